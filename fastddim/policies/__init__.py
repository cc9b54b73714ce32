"""Robot policies: from a checkpoint to actions. `docs/policies.md` is the user's page; the names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "chunk": ("Chunk",),
    "control": ("ActionQueue", "TemporalEnsemble"),
    "diffusion_policy": ("from_diffusion_policy",),
    "lerobot": ("from_lerobot", "load_policy"),
    "normalisation": ("Normalisation",),
    "policy": ("Feature", "Policy", "shifted"),
    "real_time_chunking": ("RealTimeChunking", "chunk_weights"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from fastddim.policies.chunk import Chunk as Chunk
    from fastddim.policies.control import ActionQueue as ActionQueue
    from fastddim.policies.control import TemporalEnsemble as TemporalEnsemble
    from fastddim.policies.diffusion_policy import from_diffusion_policy as from_diffusion_policy
    from fastddim.policies.lerobot import from_lerobot as from_lerobot
    from fastddim.policies.lerobot import load_policy as load_policy
    from fastddim.policies.normalisation import Normalisation as Normalisation
    from fastddim.policies.policy import Feature as Feature
    from fastddim.policies.policy import Policy as Policy
    from fastddim.policies.policy import shifted as shifted
    from fastddim.policies.real_time_chunking import RealTimeChunking as RealTimeChunking
    from fastddim.policies.real_time_chunking import chunk_weights as chunk_weights


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastddim.policies' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastddim.policies.{_MODULE_OF[name]}"), name)
