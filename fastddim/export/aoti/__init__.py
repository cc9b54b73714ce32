"""AOTInductor: a sampler compiled ahead of time by torch, which libtorch runs without Python."""

from fastddim.export.runtime import Runtime

RUNTIME = Runtime(
    name="aoti",
    exporter="fastddim.export.aoti.exporter:export_aoti",
    command="fastddim.export.aoti.command:export_command",
    sampler="fastddim.export.aoti.sampler:AotiSampler",
    install="pip install 'fastddim[onnx]'",
    loads="libtorch loads it (`AOTIModelPackageLoader`), on machines like `target` in `manifest.json`; inputs and outputs are"
    " in this order.",
    needs="torch",
)
