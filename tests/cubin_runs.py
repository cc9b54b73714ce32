"""What tests/test_cubin.py exports and launches, for itself and for processes without Triton's interpreter.

python cubin_runs.py export FOLDER   the variants' kernel bundles
python cubin_runs.py launch FOLDER   the same steps by Triton's launcher over the stub driver, executed on the machine in
                                     tests/ptx: FOLDER/VARIANT-BATCH.pt, and FOLDER/error, what a wrong launch raises
"""

import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fastddim import DDIMConfig, Schedule, StepTable
from fastddim.config import Clip, DynamicThreshold
from fastddim.noise import seed_tensor
from fastddim.step import Guidance, StepOptions

STEPS, ROW = 5, 2
THRESHOLD = DynamicThreshold(0.97, 1.5)
# One of every tier, every argument, every dtype, and sizes that no block divides.
VARIANTS = {
    "latents": {"shape": (4, 16, 16), "batches": (1, 6), "model_dtype": "bfloat16", "guided": True, "limit": Clip(),
                "model_input": True},
    "action": {"shape": (7,), "batches": (1,), "state_dtype": "float16", "model_dtype": "float16", "noise": "given",
               "limit": DynamicThreshold(0.9, 0.5)},
    "captured": {"shape": (3, 9, 7), "batches": (3,), "guided": True, "guidance_rescale": True, "per_sample": True,
                 "limit": THRESHOLD, "noise": "drawn", "x0": True, "model_input": True, "advance": True},
    "drawn": {"shape": (3, 40, 40), "batches": (2,), "noise": "drawn", "advance": True, "model_input": True},
    "large": {"shape": (3, 80, 80), "batches": (2,), "state_dtype": "bfloat16", "guided": True, "guidance_rescale": True,
              "limit": THRESHOLD, "x0": True},
    "cfg++": {"shape": (7,), "batches": (1,), "guided": True, "guidance_method": "cfg++", "limit": Clip()},
    "projected": {"shape": (3, 80, 80), "batches": (2,), "guided": True, "guidance_method": "apg", "apg_eta": 0.25,
                  "apg_norm_threshold": 50.0},
}  # fmt: skip
CASES = [(name, batch) for name, options in VARIANTS.items() for batch in options["batches"]]


def eta_of(name):
    return 0.0 if VARIANTS[name].get("noise", "none") == "none" else 1.0


def make_step(name, batch, device="cpu"):
    """The arguments of a variant's step."""
    options = {"guided": False, "per_sample": False, "noise": "none", "limit": None, **VARIANTS[name]}
    torch.manual_seed(len(name) + batch)
    state = getattr(torch, options.get("state_dtype", "float32"))
    model = getattr(torch, options.get("model_dtype", "float32"))
    shape, stacked = (batch, *options["shape"]), (2 * batch if options["guided"] else batch, *options["shape"])
    schedule = Schedule(DDIMConfig())
    table = StepTable.build(schedule, schedule.pairs(STEPS), eta=eta_of(name))
    own_index = options["per_sample"] or options.get("advance", False)
    index = torch.arange(batch) % STEPS if options["per_sample"] else torch.tensor(ROW)
    scale = torch.linspace(1.5, 7.5, batch).to(device) if options["per_sample"] else 3.0
    phi = torch.linspace(0.1, 0.9, batch).to(device) if options["per_sample"] else 0.7
    method = {name: options[name] for name in ("apg_eta", "apg_norm_threshold") if name in options}
    method["method"] = options.get("guidance_method", "cfg")
    phi = phi if options.get("guidance_rescale") else 0.0
    drawn, advance = options["noise"] == "drawn", options.get("advance", False)
    return {
        "model_output": torch.randn(stacked).to(device, model),
        "sample": torch.randn(shape).to(device, state),
        "table": table,
        "step": index.to(device) if own_index else ROW,
        "options": StepOptions(
            guidance=Guidance(scale, phi, **method) if options["guided"] else None,
            limit=options["limit"],
            noise=torch.randn(shape).to(device, state) if options["noise"] == "given" else None,
            seeds=seed_tensor(range(5, 5 + batch), device) if drawn else None,
            first_row=torch.arange(batch, device=device) // 2 if drawn and options["per_sample"] else None,
            out=torch.full(shape, math.nan, device=device, dtype=state),
            return_x0=options.get("x0", False),
            model_input=torch.full(stacked, math.nan, device=device, dtype=model)
            if options.get("model_input")
            else None,
            advance=advance,
            timesteps=torch.tensor(table.timesteps, device=device) if advance else None,
            next_timestep=torch.full(stacked[:1], -7, device=device) if advance else None,
        ),
    }


def make_request(name, batch, device="cpu"):
    """The step of a variant, checked and about to be launched, and its tensors as kernel.json names them."""
    from fastddim.kernels import launch
    from fastddim.kernels.plan import ARGUMENT_OF, STEP_POINTERS

    request = launch.assemble(**make_step(name, batch, device))
    slots = zip(STEP_POINTERS, request.tensors, strict=True)
    tensors = {ARGUMENT_OF.get(slot, slot): tensor for slot, tensor in slots if tensor is not None}
    return request, tensors


def can_prepare(name):
    return not (VARIANTS[name].get("per_sample") or VARIANTS[name].get("advance"))


def vary(step):
    """The model outputs and rows that a prepared step is called with."""
    return [(step["model_output"], ROW), (-step["model_output"], 0)]


def export(name, folder):
    from fastddim.export import KernelOptions, export_cubin

    export_cubin(folder / name, KernelOptions(**VARIANTS[name]))


def prepare(name, batch):
    from fastddim.kernels import PreparedStep

    step = make_step(name, batch)
    prepared = PreparedStep(step["model_output"], step["sample"], step["table"], step["options"])
    # Several launches take the slow way.
    assert (prepared._fast is None) == (name in ("large", "projected"))
    return step, prepared


def launch_all(folder):
    import stub_cuda
    from triton.runtime import driver

    from ptx.launcher import Machine
    from ptx.memory import Memory
    from ptx.stub import StubDevice

    cache, machine = folder / "cache", Machine(90, seed=0)
    stub_cuda.install(cache).let_answer(StubDevice(machine, cache).answer)
    torch.set_grad_enabled(False)
    with machine.installed(driver.active):
        for name, batch in CASES:
            request, tensors = make_request(name, batch)
            found = {"before": {slot: tensor.clone() for slot, tensor in tensors.items()}, "after": tensors}
            request.run()
            if can_prepare(name):
                step, prepared = prepare(name, batch)
                found["prepared"] = []
                for output, row in vary(step):
                    x_next, x0 = prepared(output, row)
                    results = {"out": x_next, "x0": x0, "model_input": step["options"].model_input}
                    found["prepared"].append({slot: None if t is None else t.clone() for slot, t in results.items()})
            torch.save(found, folder / f"{name}-{batch}.pt")
        step, prepared = prepare("action", 1)
        # The machine forgets the tensors that the step is bound to.
        machine.memory = Memory()
        try:
            prepared(step["model_output"], ROW)
        except RuntimeError as error:
            (folder / "error").write_text(str(error))


if __name__ == "__main__":
    command, root = sys.argv[1], Path(sys.argv[2])
    if command == "launch":
        launch_all(root)
    else:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(export, VARIANTS, [root] * len(VARIANTS)))
