"""A runtime from outside the package: a pickled model, and numpy for the steps around it."""

import time
from typing import Annotated

import numpy as np
import torch
import typer

from fastddim.cli_options import with_options
from fastddim.export import BundleSampler, ExportOptions, Runtime
from fastddim.export.bundle import check_destination, write_bundle
from fastddim.export.command_options import Destination, Model, load_model, report
from fastddim.export.denoisers import describe
from fastddim.export.manifest import NOTE_FILE, build_manifest, name_meanings, note
from fastddim.export.models import denoiser_of
from fastddim.export.sampler_plan import plan_sampler

RUNTIME = Runtime(
    name="toy",
    exporter="toy_runtime:export_toy",
    command="toy_runtime:export_command",
    sampler="toy_runtime:ToySampler",
    install="pip install toys",
    loads="Python's pickle loads it.",
    needs="a toy",
)


def export_toy(model, scheduler_or_table, out, options=None, *, sample_shape=None, word="", force=False):
    target = check_destination(out, force)
    plan = plan_sampler(model, scheduler_or_table, options, sample_shape)
    state = ["batch", *plan.denoiser.sample_shape]
    shapes = {
        "sample": state, "timesteps": ["steps"], "coefficients": ["steps", 6],
        **{name: ["batch", *condition.example.shape[1:]] for name, condition in plan.denoiser.conditions.items()},
    }  # fmt: skip
    meanings = name_meanings(plan)

    def described(name, shape):
        dtype = "float32" if name in ("sample", "samples", "coefficients") else "int64"
        dtype = plan.table.timestep_dtype if name == "timesteps" else dtype
        return {"name": name, "dtype": dtype, "shape": shape, "meaning": meanings[name]}

    def fill(folder):
        torch.save(model, folder / "model.pickle")
        inputs = [described(name, shape) for name, shape in shapes.items()]
        manifest = build_manifest(plan, "model.pickle", inputs, [described("samples", state)])
        manifest |= {"runtime": "toy", "parity": [], "word": word}
        (folder / NOTE_FILE).write_text(note(manifest), "utf-8")
        return manifest

    return write_bundle(target, force, fill)


@with_options
def export_command(
    *,
    model: Model = None,
    destination: Destination,
    word: Annotated[str, typer.Option(help="Kept in the manifest.")] = "",
) -> None:
    """Pickle a model."""
    start = time.perf_counter()
    pipeline = load_model(model)
    bundle = export_toy(
        denoiser_of(pipeline), pipeline.scheduler, destination.out, ExportOptions(), word=word, force=destination.force
    )
    report(bundle, start, "toy", destination.as_json, parity=[])


class ToySampler(BundleSampler):
    runtime = "toy"

    def __init__(self, bundle, *, check_finite=False):
        super().__init__(bundle, check_finite)
        model = torch.load(self.bundle.model_path, weights_only=False)
        self._denoiser = describe(model, tuple(self.bundle.manifest["sample"]["shape"]), None)

    def device(self):
        return "a toy"

    def _sample_loop(self, inputs):
        x = inputs["sample"]
        conditions = {name: torch.from_numpy(inputs[name]) for name in self._conditions}
        limit = (self.bundle.manifest["sample"]["range"] or [-np.inf, np.inf])[1]
        for t, c in zip(inputs["timesteps"], inputs["coefficients"], strict=True):
            with torch.no_grad():
                timesteps = torch.full((len(x),), t.item())
                output = self._denoiser.call(torch.from_numpy(x), timesteps, conditions).numpy()
            x0 = np.clip(c[0] * x + c[1] * output, -limit, limit)
            x = (c[2] * x + c[3] * output + c[4] * x0).astype(np.float32)
        return {"samples": x}

    def _run_steps(self, call):
        raise NotImplementedError
