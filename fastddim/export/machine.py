"""What compiled files depend on in a machine: the processor's features and the GPU's compute capability."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def cpu_features() -> frozenset[str]:
    """The features that Linux says this machine's processor has, without underscores; nothing elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.replace("_", "").split())
    return frozenset()


def compute_capability(device: torch.device | None = None) -> str:
    """A GPU's compute capability, such as 9.0; the current GPU's by default."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))
