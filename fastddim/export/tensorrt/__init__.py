"""TensorRT: the graphs of an ONNX bundle built into engines, for the standard TensorRT or TensorRT for RTX."""

from fastddim.export.runtime import Runtime

RUNTIME = Runtime(
    name="tensorrt",
    exporter="fastddim.export.tensorrt.exporter:export_tensorrt",
    command="fastddim.export.tensorrt.command:export_command",
    options="fastddim.export.tensorrt.options:TensorRTOptions",
    sampler="fastddim.export.tensorrt.sampler:TensorRTSampler",
    others=("fastddim.export.tensorrt.options:Profile",),
    install="pip install 'fastddim[onnx,tensorrt]', or 'fastddim[onnx,rtx]' for TensorRT for RTX",
    loads="TensorRT loads it, of the flavour and version and on the GPUs that `engine` in `manifest.json` names; `build.log`"
    " is what it said.",
    needs="torch and that TensorRT",
    server=("tensorrt", "model.plan"),
)
