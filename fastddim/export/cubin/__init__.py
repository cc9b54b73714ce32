"""The fused step alone, compiled for NVIDIA GPUs: a program with its own model launches it through the CUDA driver."""

from fastddim.export.runtime import Runtime

RUNTIME = Runtime(
    name="cubin",
    exporter="fastddim.export.cubin.exporter:export_cubin",
    command="fastddim.export.cubin.command:export_command",
    options="fastddim.export.cubin.options:KernelOptions",
    others=(
        "fastddim.export.cubin.bundle:KernelBundle",
        "fastddim.export.cubin.bundle:open_kernels",
    ),
    install="pip install 'fastddim[onnx]' triton",
)
