"""ONNX: the graph of a sampler or of a whole pipeline, and ONNX Runtime, which runs it here."""

from fastddim.export.runtime import Runtime

RUNTIME = Runtime(
    name="onnx",
    exporter="fastddim.export.onnx.exporter:export_onnx",
    command="fastddim.export.onnx.command:export_command",
    sampler="fastddim.export.onnx.sampler:OrtSampler",
    pipeline="fastddim.export.onnx.pipeline:OrtPipeline",
    others=(
        "fastddim.export.onnx.pipeline_exporter:export_pipeline",
        "fastddim.export.onnx.pipeline_exporter:verify_pipeline",
    ),
    install="pip install 'fastddim[onnx]'",
    loads="Any ONNX runtime loads it.",
    needs="no torch",
    server=("onnxruntime", "model.onnx"),
)
