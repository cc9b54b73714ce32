"""Whole interpreter runs that import fastddim, or torch and diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastddim.bench.cases import LEFT_OUT, Call, Candidate, Case, Scope, installed

_TIMEOUT_S = 600


def import_suite(scope: Scope) -> list[Case]:
    """The bare import, and the first use of the drop-in scheduler."""
    ours, baseline = "import fastddim", "import torch, diffusers"
    used_ours = "import fastddim; fastddim.DDIMScheduler"
    used_baseline = "import torch, diffusers; diffusers.DDIMScheduler"
    rows = [
        ("import", ours, ("fastddim",), baseline, ("torch", "diffusers")),
        ("first use", used_ours, ("fastddim.scheduler",), used_baseline, ("diffusers.schedulers.scheduling_ddim",)),
    ]
    return [
        Case(
            suite="import",
            name=name,
            candidates=(
                Candidate(our_code, partial(_import_call, our_code, our_modules)),
                Candidate(code, partial(_import_call, code, modules), "import", installed("diffusers")),
            ),
            inputs=lambda: None,
            reference=lambda _: (np.ones(1),),
            target=1 / 1.5,
            needs=LEFT_OUT if scope.quick and name == "first use" else None,
        )
        for name, our_code, our_modules, code, modules in rows
    ]


def _import_call(code: str, modules: Sequence[str], _: Any) -> Call:
    program = f"{code}\nimport sys\nprint(all(name in sys.modules for name in {list(modules)!r}))"
    # The children import the fastddim that this process runs, installed or not.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))

    def run() -> Sequence[Any]:
        child = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        if child.returncode:
            raise RuntimeError(f"{code!r} failed: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
        return (np.array([float(child.stdout.strip() == "True")]),)

    return run
