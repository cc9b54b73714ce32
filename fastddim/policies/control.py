"""Between a policy and a robot: observations' history, chunks executed action by action, ensembles over time. No torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from fastddim.config import require_int, require_number
from fastddim.policies.chunk import Chunk

Array = npt.NDArray[Any]
# Called with observations `[1, n_obs_steps, ...]` and keyword arguments.
Sample = Callable[..., Chunk]


class ActionQueue:
    """One action for each control step, from a policy that samples chunks of them.

    `act` takes the newest observation and gives the action to execute now. The first observation is repeated until there
    are as many as the policy looks back at. A chunk is executed whole, then the next one is sampled; with `lead`, it is
    sampled in a thread while the last `lead` actions are executed, and begins where these end.

    Args:
        sample: a `PolicySampler`, or a function called as one, such as `policy.sample`.
        n_obs_steps, n_action_steps, horizon, first_action: the policy's; a bundle's `manifest["policy"]` has them too.
        lead: how many control steps before a chunk ends the next one is begun; 0 waits for it at the end.
        commit: with `lead`, hand the actions that are executed meanwhile to the sampler as known ones, so that the next chunk
            goes on from them; for a file that was exported with `committed`.
        strength: below 1, each chunk starts from the last one, shifted, noised this far, in as many fewer steps.
        seed: of the first chunk; the others count up.
        options: more keyword arguments of each call, such as `num_inference_steps`.

    Raises:
        ValueError: numbers out of range; the message names them.
    """

    def __init__(
        self,
        sample: Sample,
        *,
        n_obs_steps: int,
        n_action_steps: int,
        horizon: int,
        first_action: int,
        lead: int = 0,
        commit: bool = False,
        strength: float = 1.0,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require_int("n_obs_steps", n_obs_steps, 1)
        require_int("first_action", first_action, 0, horizon - 1)
        require_int("n_action_steps", n_action_steps, 1, horizon - first_action)
        require_int("lead", lead, 0, n_action_steps - 1)
        require_number("strength", strength, 0.0, 1.0)
        if commit and not lead:
            raise ValueError("commit: True with lead 0, where nothing is executed meanwhile; pass lead too")
        self._sample, self._horizon, self._first = sample, horizon, first_action
        self._lead, self._commit, self._strength, self._seed = lead, commit, strength, seed
        self._options = dict(options or {})
        self._history: deque[dict[str, Array]] = deque(maxlen=n_obs_steps)
        self._worker = ThreadPoolExecutor(1, "fastddim-policy") if lead else None
        self.reset()

    def reset(self) -> None:
        """Forget observations and actions: at the begin of an episode."""
        pending: Future[Chunk] | None = getattr(self, "_pending", None)
        if pending is not None and not pending.cancel():
            pending.exception()
        self._history.clear()
        self._actions: deque[Array] = deque()
        self._executed: deque[Array] = deque(maxlen=self._first)
        self._pending: Future[Chunk] | None = None
        self._last: Array | None = None
        # Control steps between the last chunk's observation and the next one's.
        self._since = 0
        self._chunks = 0

    def close(self) -> None:
        """End the thread of a queue with `lead`."""
        self.reset()
        if self._worker is not None:
            self._worker.shutdown()

    def __enter__(self) -> ActionQueue:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def act(self, observation: Mapping[str, Any]) -> Array:
        """The action `[action_dim]` to execute now.

        Args:
            observation: the newest, by the features' names, `[*shape]` each.

        Raises:
            Exception: what the sampler raises; the queue is then as it was before the call that would have sampled.
        """
        self._see(observation)
        if not self._actions:
            if self._pending is not None:
                pending, self._pending = self._pending, None
                chunk, skipped = pending.result(), self._lead
            else:
                chunk, skipped = self._sample(**self._call()), 0
            self._take(chunk, skipped)
        if self._worker is not None and self._pending is None and len(self._actions) == self._lead:
            self._pending = self._worker.submit(self._sample, **self._call())
        action = self._actions.popleft()
        self._executed.append(action)
        self._since += 1
        return action

    def _see(self, observation: Mapping[str, Any]) -> None:
        seen = {name: np.array(value) for name, value in observation.items()}
        self._history.append(seen)
        while len(self._history) < (self._history.maxlen or 1):
            self._history.append(seen)

    def _take(self, chunk: Chunk, skipped: int) -> None:
        actions = np.asarray(chunk.actions)[0]
        self._actions.extend(np.array(action) for action in actions[skipped:])
        self._last = np.array(chunk.samples)

    def _call(self) -> dict[str, Any]:
        """The arguments of the next chunk's sampling, all of them its own."""
        stacked = {name: np.stack([moment[name] for moment in self._history])[None] for name in self._history[-1]}
        given: dict[str, Any] = {"observations": stacked, "seeds": self._seed + self._chunks, **self._options}
        if self._strength < 1 and self._last is not None:
            index = np.minimum(np.arange(self._horizon) + self._since, self._horizon - 1)
            given |= {"previous": self._last[:, index], "strength": self._strength}
        if self._commit and self._actions:
            given |= self._known()
        self._chunks += 1
        self._since = 0
        return given

    def _known(self) -> dict[str, Array]:
        """The actions of the horizon that are decided: what was executed last, and what is executed meanwhile."""
        decided = [*self._executed, *self._actions]
        begin = self._first - len(self._executed)
        known = np.zeros((1, self._horizon, len(decided[0])), np.float32)
        mask = np.zeros(known.shape, bool)
        known[0, begin : begin + len(decided)] = decided
        mask[0, begin : begin + len(decided)] = True
        return {"known": known, "mask": mask}


class TemporalEnsemble:
    """The mean of all chunks' actions for a control step, older chunks weighing `exp(-coefficient * age)` less or more.

    ACT's ensemble (arXiv:2304.13705, algorithm 2): weight `exp(-coefficient * i)`, i = 0 for the oldest chunk, so that a
    positive coefficient trusts older ones more.

    Args:
        coefficient: the paper's m, 0.01 there.
    """

    def __init__(self, coefficient: float = 0.01) -> None:
        require_number("coefficient", coefficient, -1e3, 1e3)
        self._coefficient = coefficient
        self._chunks: deque[tuple[int, Array]] = deque()
        self._now = 0
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget all chunks: at the begin of an episode."""
        with self._lock:
            self._chunks.clear()
            self._now = 0

    def act(self, actions: Any) -> Array:
        """The action `[action_dim]` to execute now.

        Args:
            actions: of a chunk that was sampled for the newest observation, `[n_action_steps, action_dim]`, the first for now.
        """
        chunk = np.asarray(actions, np.float64)
        if chunk.ndim != 2 or not len(chunk):
            raise ValueError(f"actions: shape {chunk.shape}; pass [n_action_steps, action_dim] of one sample")
        with self._lock:
            self._chunks.append((self._now, chunk))
            # Of chunks of any length, those that say something of now.
            self._chunks = deque((begin, own) for begin, own in self._chunks if self._now - begin < len(own))
            said = np.stack([own[self._now - begin] for begin, own in self._chunks])
            weights = np.exp(-self._coefficient * np.arange(len(said)))
            self._now += 1
        mean: Array = (weights[:, None] * said).sum(0) / weights.sum()
        return mean
