"""What a bundle says of itself: its manifest, and the note for whoever integrates it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import fastddim
from fastddim.config import Clip, Limit
from fastddim.export.bundle import FORMAT, limit_record, read_limit
from fastddim.export.runtime import get_runtime, public_name
from fastddim.export.sampler_plan import SamplerPlan
from fastddim.export.step_module import kept_names
from fastddim.hoisting import HoistedModel
from fastddim.noise import STREAM_INITIAL, STREAM_STEP

NOTE_FILE = "README.md"

_MEANINGS = {
    "sample": "the starting state; standard normal for a whole run",
    "timestep": "what the model is called with at each sample's step",
    "timesteps": "what the model is called with at each step, in the order of the steps",
    "num_inference_steps": "how many steps to take, at least 1 and at most as many as the training's",
    "seed": "the 64 bits of the sample's seed",
    "previous_x0": "pred_original_sample of the step before; a run's first step does not read it",
    "noise": "standard normal, fresh for each step",
    "guidance_scale": "classifier-free guidance: uncond + guidance_scale * (cond - uncond)",
    "guidance_rescale": "in [0, 1]: how far to pull the guided output's deviation back to the conditional one's",
    "step_values": "what the model computes of each step's timestep alone",
    "both_values": "what the model computes of each step's timestep and a sample's conditions",
    "samples": "the finished samples",
    "next_sample": "the state after the step",
    "pred_original_sample": "the limited prediction of x0",
}
_GUIDANCE_SCALES = {
    "cfg++": "CFG++'s lambda in [0, 1]: x0 is that of uncond + guidance_scale * (cond - uncond), epsilon that of uncond",
    "apg": "adaptive projected guidance: cond + (guidance_scale - 1) * what the projection leaves of cond - uncond",
}
_COLUMNS = "x0 = limit(c0 * sample + c1 * output); next_sample = c2 * sample + c3 * output + c4 * x0 + c5 * noise"
_LOOKING_BACK = " + c6 * previous_x0, where c6 is not 0"


def name_meanings(plan: SamplerPlan, hoisted: HoistedModel | None = None) -> dict[str, str]:
    """What each of the sampler's inputs and outputs is, by name; with what is `hoisted`, where a second graph computes it."""
    row_of = "step" if plan.options.kind == "loop" else "sample"
    columns = _COLUMNS + (_LOOKING_BACK if plan.table.looks_back else "")
    meanings = {**_MEANINGS, "coefficients": f"c0 to c{plan.num_columns - 1} of each {row_of}: {columns}"}
    if plan.options.guidance_method in _GUIDANCE_SCALES:
        meanings["guidance_scale"] = _GUIDANCE_SCALES[plan.options.guidance_method]
    if plan.table.start_scale != 1:
        meanings["sample"] = (
            f"the starting state; standard normal noise times {plan.table.start_scale!r} for a whole run"
        )
    for name, condition in plan.denoiser.conditions.items():
        meanings[name] = condition.meaning or "conditions the model"
        meanings[f"uncond_{name}"] = f"{name} of the unconditional half"
    kept = () if hoisted is None else kept_names(hoisted)
    meanings |= dict.fromkeys(kept, "what the model computes of a sample's conditions alone")
    finish = plan.denoiser.finish
    return meanings if finish is None else {**meanings, **finish.outputs}


def build_manifest(
    plan: SamplerPlan,
    model: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    runtime: str = "onnx",
    hoisted: HoistedModel | None = None,
) -> dict[str, Any]:
    """The manifest of a sampler, without `files` and `parity`.

    Args:
        plan: what was exported.
        model: the file's name.
        inputs, outputs: `name`, `dtype`, `shape` and `meaning` of each.
        runtime: what runs the file.
        hoisted: the parts of the model, where it is in two.
    """
    denoiser, options, table, limit = plan.denoiser, plan.options, plan.table, plan.limit
    sampling = (
        dict.fromkeys(("schedule_type", "schedule", "method")) if plan.sampling is None else plan.sampling.record()
    )
    return {
        "format": FORMAT.name,
        "format_version": FORMAT.version,
        "kind": options.kind,
        "runtime": runtime,
        "model": model,
        "inputs": inputs,
        "outputs": outputs,
        **sampling,
        "sampling": {
            "guided": options.guided,
            "guidance_rescale": options.guidance_rescale,
            "guidance_method": options.guidance_method,
            "apg_eta": options.apg_eta,
            "apg_norm_threshold": options.apg_norm_threshold,
            "stochastic": options.stochastic,
            "baked_schedule": options.bake_schedule,
            "per_sample_steps": options.per_sample_steps,
            "seeded": options.seeded,
            "dtype": options.dtype,
            "hoisted": None if hoisted is None else _hoisted_record(hoisted, 2 if options.guided else 1),
            "limit": limit_record(limit),
            "null_values": {
                name: condition.null for name, condition in denoiser.conditions.items() if condition.null is not None
            },
        },
        "table": {
            "timesteps": list(table.timesteps),
            "coefficients": table.columns.tolist(),
            "start_scale": table.start_scale,
            "noising": table.noising,
        },
        "sample": {
            "shape": list(denoiser.sample_shape),
            "layout": "NCHW" if len(denoiser.sample_shape) == 3 else "N...",
            "range": [-limit.range, limit.range] if isinstance(limit, Clip) else None,
        },
        "noise": {
            "generator": "Philox4x32-10, then Box-Muller; see fastddim/noise.py",
            "key": "the 64 bits of the sample's seed",
            "counter": "(element // 4, 0, step, stream)",
            "stream_initial": STREAM_INITIAL,
            "stream_step": STREAM_STEP,
        },
        "versions": {"fastddim": fastddim.__version__, **_versions()},
        **denoiser.facts,
    }


def _hoisted_record(hoisted: HoistedModel, copies: int) -> dict[str, int]:
    return {
        "operations": hoisted.operations,
        "bytes_per_step": hoisted.per_step,
        "bytes_per_sample": copies * hoisted.per_row,
        "bytes_per_step_and_sample": copies * hoisted.per_pair,
    }


def _versions() -> dict[str, str]:
    import torch

    versions = {}
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    # Names its build too, as in 2.11.0+cu130.
    versions["torch"] = torch.__version__
    return versions


def limit_text(limit: Limit) -> str:
    """A limit on x0 in words."""
    return "none" if limit is None else str(limit)


def note(manifest: Mapping[str, Any]) -> str:
    """What an integrator reads first."""
    kind = "all steps of a run in one call" if manifest["kind"] == "loop" else "one step of a run in each call"
    errors = [entry["largest_error"] for entry in manifest["parity"]]
    compared = (
        f"Largest difference from the torch reference at export: {max(errors):.1e}."
        if errors
        else "Not compared with the torch reference at export."
    )
    components = "".join(_section(name, component) for name, component in manifest.get("components", {}).items())
    hoisted = manifest["sampling"]["hoisted"]
    told = (
        f" {hoisted['operations']} of the model's operations run once, before the steps; their results take"
        f" {hoisted['bytes_per_step']} bytes for each step, {hoisted['bytes_per_sample']} for each sample, and"
        f" {hoisted['bytes_per_step_and_sample']} for each step of each sample."
        if hoisted
        else ""
    )
    before = _section("Before the steps", manifest["before"]) if "before" in manifest else ""
    runtime = get_runtime(manifest["runtime"])
    runner = (components and runtime.pipeline) or runtime.sampler
    command, name = "`fastddim run FOLDER --seed 0 --out samples.png`, or ", public_name(runner or "")
    if components:
        command = ""
    elif "policy" in manifest:
        command = "`fastddim run FOLDER --observations FILE.npz --out actions.npz`, or "
        name = "fastddim.export.PolicySampler"
    python = f"\nWith Python: {command}`{name}(FOLDER)`, which needs {runtime.needs}.\n" if runner else ""
    return f"""# An exported diffusion sampler

`{manifest["model"]}` holds the model and its sampler: {kind}. {runtime.loads}{told}
`manifest.json` says the same as this page for programs, with a default table of timesteps and coefficients; its schema is
in fastddim.

{_tables(manifest)}

Limit of x0: {limit_text(read_limit(manifest))}. {compared}
{python}{before}{components}"""


def _section(title: str, described: Mapping[str, Any]) -> str:
    """What a graph beside the sampler's is."""
    return f"\n## {title}\n\n`{described['model']}`: {described['meaning']}.\n\n{_tables(described)}\n"


def _tables(described: Mapping[str, Any]) -> str:
    """The inputs and outputs of a graph."""
    tables = []
    for group in ("inputs", "outputs"):
        rows = [
            f"| `{item['name']}` | {item['dtype']} | {item['shape']} | {item['meaning']} |" for item in described[group]
        ]
        tables.append("\n".join([f"| {group.removesuffix('s')} | dtype | shape | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(tables)
