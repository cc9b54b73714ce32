"""The AOTInductor exporter: a model and its sampling loop, or one step of it, compiled ahead of time for libtorch."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit, require_choice
from fastddim.export.aoti.loop_module import FusedStepModule, LoopModule
from fastddim.export.bundle import Bundle, check_destination, write_bundle
from fastddim.export.denoisers import DTYPES, prepared
from fastddim.export.machine import compute_capability, cpu_features
from fastddim.export.manifest import NOTE_FILE, build_manifest, name_meanings, note
from fastddim.export.sampler_plan import ExportOptions, SamplerPlan, plan_sampler
from fastddim.export.step_module import STEP_OUTPUTS, BeforeLoop, FinishModule, hoist
from fastddim.export.validate import PARITY_STEPS, fit_parity_steps, measure_parity
from fastddim.hoisting import HoistedModel
from fastddim.schedule import Schedule
from fastddim.tracing import ExportError, quiet, told, trace

MODEL_FILE = "model.pt2"
DEVICES = ("cpu", "cuda")
# For each x86-64 instruction set the compiler's architecture, the vectors' bits, and the features as Linux names them.
_AVX2 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_ISAS = {
    "avx2": ("x86-64-v3", 256, _AVX2),
    "avx512": ("x86-64-v4", 512, (*_AVX2, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")),
}


def export_aoti(
    model: Any,
    scheduler_or_table: Schedule | DDIMConfig | StepTable | Any,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    limit: Limit = None,
    device: str = "cpu",
    cpu_isa: str | None = None,
    sample_shape: Sequence[int] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
    parity_steps: Sequence[int] = PARITY_STEPS,
    tolerance: float | None = None,
) -> Bundle:
    """Export a model with its sampling loop as a bundle with an AOTInductor package, which runs without Python.

    It needs a C++ compiler, and takes 10 s and more. On a GPU the step is the fused kernel. The code is for one kind of
    machine, which the manifest names: `target`. Two exports of one model do the same, but their bytes differ.

    Args:
        model, scheduler_or_table, out, options, limit, sample_shape, example_kwargs, force, parity_steps, tolerance: as
            `export_onnx`'s.
        device: `"cpu"`, or `"cuda"` on a machine with the kind of GPU that will run it.
        cpu_isa: the instructions that an x86-64 CPU needs to run it, `"avx2"` (the default there) or `"avx512"`. Other
            processors' packages are for those that have all that this machine's has.

    Returns:
        The bundle, opened.

    Raises:
        ValueError: options or configurations that cannot be exported, or not on this machine; ExportError: the model
            cannot.
        RuntimeError: no C++ compiler.
        FileExistsError, NotADirectoryError, PermissionError: `out`, before any work.
        ParityError: the package's results differ from the torch reference's.
    """
    target = check_destination(out, force)
    if options is not None and (options.per_sample_steps or options.seeded):
        raise ValueError("per_sample_steps, seeded: are for ONNX files; leave them out, or export with export_onnx")
    if options is not None and options.kind == "step" and options.hoisted:
        raise ValueError(
            "hoist: True with kind 'step', whose second graph is for ONNX files; leave hoist out, pass kind='loop', or export"
            " with export_onnx"
        )
    plan = plan_sampler(model, scheduler_or_table, options, sample_shape, example_kwargs, limit)
    fit_parity_steps(parity_steps, plan.sampling)
    require_choice("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: 'cuda', but torch {torch.__version__} finds no GPU here; export on a machine with one like that"
            " which will run it, or pass 'cpu'"
        )
    cpu_options, features = _choose_isa(cpu_isa)
    _require_compiler()

    def fill(folder: Path) -> dict[str, Any]:
        with prepared(plan.denoiser.model, DTYPES[plan.options.dtype], device):
            hoisted = hoist(plan, device)
            program, dims, outputs = _trace(plan, hoisted, device)
            _compile(program, folder / MODEL_FILE, cpu_options, type(model).__name__)
            manifest = _manifest(plan, hoisted, program, dims, outputs, device, features)
            manifest["parity"] = measure_parity(
                Bundle(folder, manifest), plan.denoiser, steps=parity_steps, tolerance=tolerance
            )
        (folder / NOTE_FILE).write_text(note(manifest), "utf-8")
        return manifest

    return write_bundle(target, force, fill)


def _choose_isa(wanted: str | None) -> tuple[dict[str, Any], list[str]]:
    """Inductor's options for an instruction set, and the features that a CPU needs for it."""
    import torch._inductor.config as inductor
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    have = cpu_features()
    # Older versions of torch compile for the machine that they are on.
    if platform.machine() != "x86_64" or not hasattr(inductor.cpp, "march"):
        if wanted is not None:
            raise ValueError(
                f"cpu_isa: {wanted!r} on {platform.machine()} with torch {torch.__version__}, which compiles for this"
                " machine's CPU alone; leave it out"
            )
        return {}, sorted(have)
    name = "avx2" if wanted is None else wanted
    require_choice("cpu_isa", name, tuple(_ISAS))
    march, bits, features = _ISAS[name]
    missing = sorted(set(features) - have)
    if missing:
        raise ValueError(f"cpu_isa: {name!r}, but this CPU lacks {', '.join(missing)}; export on one that has them")
    options = {"cpp.march": march, "cpp.simdlen": bits}
    with inductor.patch(options):
        flags = pick_vec_isa().build_arch_flags()
    # What Inductor adds to the architecture, as the compiler's options name it.
    return options, sorted({*features, *(flag.removeprefix("-m").replace("-", "") for flag in flags.split())})


def _require_compiler() -> None:
    import torch._inductor.config as inductor

    # The first of the two is one to download, which nothing asks for.
    compiler = inductor.cpp.cxx[-1]
    if compiler is None or shutil.which(compiler) is None:
        raise RuntimeError(
            f"CXX: {compiler!r} is not there, and AOTInductor needs a C++ compiler: apt-get install g++, or set CXX"
        )


def _trace(
    plan: SamplerPlan, hoisted: HoistedModel | None, device: str
) -> tuple[ExportedProgram, dict[str, list[str | int]], tuple[str, ...]]:
    """The graph, each input's and output's dimensions, names where they may differ, and the outputs' names."""
    module: FusedStepModule | LoopModule
    module = step = FusedStepModule(plan, hoisted)
    if plan.options.kind == "loop":
        schedule = plan.baked_schedule() if plan.options.bake_schedule else None
        before = None if hoisted is None else BeforeLoop(plan, hoisted)
        finish = None if plan.denoiser.finish is None else FinishModule(plan)
        module = LoopModule(step, schedule, before, finish)
    examples = module.example_inputs()
    # A number of steps sizes tensors on the host.
    examples = {name: value if name == "num_inference_steps" else value.to(device) for name, value in examples.items()}
    dims: dict[str, list[str | int]] = {name: ["batch", *value.shape[1:]] for name, value in examples.items()}
    dims |= dict.fromkeys(("sample", "noise", "samples", *STEP_OUTPUTS), plan.state_dims)
    if plan.options.kind == "loop":
        dims |= {
            "timesteps": ["steps"],
            "coefficients": ["steps", plan.num_columns],
            "noise": ["steps", *plan.state_dims],
            "num_inference_steps": [],
        }
    dynamic = {name: [index for index, dim in enumerate(dims[name]) if isinstance(dim, str)] for name in examples}
    program = trace(module, examples, dynamic, type(plan.denoiser.model).__name__)
    for name, value in zip(module.outputs, _outputs_of(program), strict=True):
        dims.setdefault(name, ["batch", *value.shape[1:]])
    return program, dims, module.outputs


def _outputs_of(program: ExportedProgram) -> list[torch.Tensor]:
    """Stand-ins of what a traced program returns."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    return [node.meta["val"] for node in output.args[0]]


def _compile(program: ExportedProgram, path: Path, cpu_options: Mapping[str, Any], kind: str) -> None:
    import torch._inductor.config as inductor
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    assert program.example_inputs is not None
    # Beside the package, not inside the bundle nor in Inductor's cache: weights are copied several times.
    with tempfile.TemporaryDirectory(prefix="fastddim-aoti-") as folder, quiet():
        options = {
            "aot_inductor.package": True,
            "aot_inductor.output_path": folder,
            "aot_inductor.model_name_for_generated_files": "model",
            # As many threads as the machine that runs it has.
            "cpp.dynamic_threads": True,
            "aot_inductor.enable_line_tables": False,
            # They would stay in Inductor's cache, 100 MB for each set of options.
            "aot_inductor.precompile_headers": False,
            # torch 2.11 looks up the nodes of the loop's body in the graph around it (pytorch #184623).
            "allow_buffer_reuse": torch.__version__ >= "2.13",
            **cpu_options,
        }
        try:
            # Some of the options are younger than the oldest torch that this runs with.
            known = {name: value for name, value in options.items() if name in inductor.get_config_copy()}
            files = aot_compile(program.module(check_guards=False), *program.example_inputs, options=known)
            assert isinstance(files, list)
            package_aoti(str(path), files)
        except Exception as error:
            raise ExportError(f"model: {kind} cannot be compiled: {told(error)}") from error


def _manifest(
    plan: SamplerPlan,
    hoisted: HoistedModel | None,
    program: ExportedProgram,
    dims: Mapping[str, Sequence[str | int]],
    outputs: Sequence[str],
    device: str,
    features: Sequence[str],
) -> dict[str, Any]:
    assert program.example_inputs is not None
    (examples,), _ = program.example_inputs
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in examples.items()}
    meanings = name_meanings(plan)
    inputs, results = (
        [
            {"name": name, "dtype": dtypes.get(name, "float32"), "shape": list(dims[name]), "meaning": meanings[name]}
            for name in names
        ]
        for names in (examples, outputs)
    )
    manifest = build_manifest(plan, MODEL_FILE, inputs, results, "aoti", hoisted)
    manifest["target"] = {
        "device": device,
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpu_features": list(features),
    }
    if device == "cuda":
        manifest["target"]["compute_capability"] = compute_capability()
    return manifest
