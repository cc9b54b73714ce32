"""What tests/test_cubin.py exports and launches, for itself and for processes without Triton's interpreter.

python cubin_runs.py export FOLDER   the variants' kernel bundles
python cubin_runs.py launch FOLDER   the same steps by Triton's launcher over the stub driver: FOLDER/VARIANT-BATCH.json
"""

import json
import math
import os
import re
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
}  # fmt: skip
CASES = [(name, batch) for name, options in VARIANTS.items() for batch in options["batches"]]


def eta_of(name):
    return 0.0 if VARIANTS[name].get("noise", "none") == "none" else 1.0


def bundle_parameters(folder):
    """What STUB_CUDA_PARAMETERS has to be, read from the PTX."""
    found = {}
    for path in folder.glob("*.ptx"):
        head = re.search(r"\.visible \.entry (\w+)\((.*?)\)", path.read_text(), re.DOTALL)
        found[head[1]] = ",".join(str(int(bits) // 8) for bits in re.findall(r"\.param \.[a-z](\d+)", head[2]))
    return ";".join(f"{entry}:{sizes}" for entry, sizes in found.items())


def make_request(name, batch, device="cpu"):
    """The step of a variant, checked and about to be launched, and its tensors as kernel.json names them."""
    from fastddim.kernels import launch
    from fastddim.kernels.plan import ARGUMENT_OF, STEP_POINTERS

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
    drawn, advance = options["noise"] == "drawn", options.get("advance", False)
    request = launch.assemble(
        model_output=torch.randn(stacked).to(device, model),
        sample=torch.randn(shape).to(device, state),
        table=table,
        step=index.to(device) if own_index else ROW,
        options=StepOptions(
            guidance=Guidance(scale, phi if options.get("guidance_rescale") else 0.0) if options["guided"] else None,
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
    )
    slots = zip(STEP_POINTERS, request.tensors, strict=True)
    tensors = {ARGUMENT_OF.get(slot, slot): tensor for slot, tensor in slots if tensor is not None}
    if request.counters is not None:
        tensors["counters"] = request.counters
    return request, tensors


def export(name, folder):
    from fastddim.export import KernelOptions, export_cubin

    export_cubin(folder / name, KernelOptions(**VARIANTS[name]))


def launch_all(folder):
    import stub_cuda

    stub_cuda.install()
    from fastddim.kernels import launch

    launch._DEVICE_TYPES = ("cuda", "cpu")
    torch.set_grad_enabled(False)
    for name, batch in CASES:
        os.environ["STUB_CUDA_PARAMETERS"] = bundle_parameters(folder / name)
        request, tensors = make_request(name, batch)
        seen = len(Path(os.environ["STUB_CUDA_RECORD"]).read_text().splitlines())
        request.run()
        lines = Path(os.environ["STUB_CUDA_RECORD"]).read_text().splitlines()[seen:]
        addresses = {slot: tensor.data_ptr() for slot, tensor in tensors.items()}
        launches = [json.loads(line) for line in lines if '"launch"' in line]
        (folder / f"{name}-{batch}.json").write_text(json.dumps({"addresses": addresses, "launches": launches}))


if __name__ == "__main__":
    command, root = sys.argv[1], Path(sys.argv[2])
    if command == "launch":
        launch_all(root)
    else:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(export, VARIANTS, [root] * len(VARIANTS)))
