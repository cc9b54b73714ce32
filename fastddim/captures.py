"""Captures of a model by key, made anew when the model changes, with what to do where one cannot be made."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

from fastddim.capture_checks import ModelState, captures_itself, is_compiled
from fastddim.cuda_graph import CaptureError, GraphCache, Sized

# How many kinds of runs are remembered, and how often one is captured that fails for want of memory, or by another thread.
_MAX_SEEN = 256
_TRIES = 3
# After so many captures for one changed thing it is named.
_OFTEN = 3

_log = logging.getLogger("fastddim")

T = TypeVar("T", bound=Sized)
R = TypeVar("R")


def changes_itself(name: str) -> CaptureError:
    """Of a model whose member `name` is another one after each call."""
    return CaptureError(
        f"the model changes its {name!r} whenever it is called, which a replay would not", permanent=True
    )


class Captures(Generic[T]):
    """Captures of work that calls a model. Thread-safe.

    The first work of its kind is not captured, so that what comes once goes without. A capture that fails for want of memory,
    or by what another thread does, is tried again later.

    Args:
        model: what makes the captures stale when it changes (`ModelState`), or a tuple of such.
        max_graphs: how many captures are kept, at least 1.
        called: what the work calls, where that is another object, as a model that was compiled.

    Attributes:
        graphs: those that are kept.
    """

    def __init__(self, model: Any, max_graphs: int = 8, called: Any = None) -> None:
        self.model = model
        self._called = called
        self.graphs: GraphCache[T] = GraphCache(max_graphs)
        self._state: ModelState | None = None
        # Tensors that the model leaves on itself whenever it is called.
        self._left: set[str] = set()
        self._changes: Counter[str] = Counter()
        # Kinds of work that were seen, with the number of captures that may still fail.
        self._tries: dict[Hashable, int] = {}
        self._runs = threading.local()

    def watch(self, models: Iterable[Any]) -> None:
        """Be captures of these models too, where `model` is a tuple."""
        new = [model for model in models if all(model is not each for each in self.model)]
        if new:
            self.model, self._state = (*self.model, *new), None

    @property
    def in_use(self) -> bool:
        """Whether this thread is within a use of a capture, whose buffers another one must not take."""
        return bool(getattr(self._runs, "inside", False))

    def see(self, key: Hashable) -> bool:
        """Whether a kind of work is the first of its kind."""
        if key in self._tries:
            return False
        if len(self._tries) >= _MAX_SEEN:
            self._tries.clear()
        self._tries[key] = _TRIES
        return True

    def use(
        self,
        key: Hashable,
        device: torch.device,
        build: Callable[[bool], T],
        use: Callable[[T], R],
        warn: Callable[[str], None],
        *,
        at_once: bool = False,
    ) -> R | None:
        """What `use` makes of the capture of a key; None where there is none yet, or cannot be one.

        Args:
            key: what the capture is of beside the model.
            device: where the work runs.
            build: makes the capture; its argument is `Graph`'s `probe`.
            use: puts the work on the current stream. A `CaptureError` that it raises is one of the capture.
            warn: gets the reason why there is no capture.
            at_once: capture the first of its kind too.
        """
        if (self.see(key) and not at_once) or not self._tries.get(key, 0):
            return None
        try:
            # Buffers made in inference mode could not be written to outside it.
            with self.graphs.turn(device), self._as_inside(), torch.inference_mode(False), torch.no_grad():
                changed = None if self._state is None else self._state.difference()
                if self._state is None or changed is not None:
                    self._start_over(changed)
                return use(self.graphs.get(key, lambda: self._build(key, build)))
        except CaptureError as error:
            left = self._tries.get(key, _TRIES)
            warned = left < _TRIES
            left = self._tries[key] = 0 if error.permanent else left - 1
            reason = str(error) + (" (to be tried again)" if left else "")
            out_of_memory = isinstance(error.__cause__, torch.cuda.OutOfMemoryError)
        # The error, which holds what was built so far, is gone.
        if out_of_memory:
            self.graphs.clear()
            torch.cuda.empty_cache()
        if not warned or not left:
            warn(reason)
        return None

    def _build(self, key: Hashable, build: Callable[[bool], T]) -> T:
        called = self.model if self._called is None else self._called
        if captures_itself(called):
            raise CaptureError("the model is compiled to capture CUDA graphs of its own", permanent=True)
        probe = not is_compiled(called)
        capture = build(probe)
        changes = self._find_changes()
        if changes:
            # What changes in a model's first calls alone has settled after them.
            del capture
            self._start_over()
            capture = build(probe)
            changes = self._find_changes()
        # A tensor that each call replaces may be one that it leaves behind: the probe refuses a model that reads it again.
        frozen = [name for name, is_tensor in changes if not (is_tensor and probe)]
        if frozen:
            raise changes_itself(frozen[0])
        if changes:
            self._left.update(name for name, _ in changes)
            self._state = ModelState(self.model, self._left)
        self._tries[key] = _TRIES
        return capture

    def _find_changes(self) -> list[tuple[str, bool]]:
        assert self._state is not None
        return list(self._state.differences())

    def _start_over(self, changed: str | None = None) -> None:
        """Drop all captures, as they are of another model than it is now."""
        self.graphs.clear()
        self._state = ModelState(self.model, self._left)
        if changed is not None:
            self._changes[changed] += 1
            if self._changes[changed] == _OFTEN:
                _log.warning("the model is captured again and again, as its %r changes between runs", changed)

    @contextlib.contextmanager
    def _as_inside(self) -> Iterator[None]:
        self._runs.inside = True
        try:
            yield
        finally:
            self._runs.inside = False
