"""What a step file's second graph computed for all steps of a run, and its rows for a step of any of the samples. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class RunValues:
    """What was computed before the steps of a run of B samples, in numpy.

    A step takes any of the samples, each at a step of its own: `of_steps` and `of_samples` are its inputs. Nothing here
    changes, so several threads may take rows at a time.

    Args:
        values: the graph's outputs, by name.
        described: their descriptions in the manifest. A dimension `"steps"`, the first one, has a row for each step, and
            `"batch"` one for each sample.

    Attributes:
        nbytes: the memory that the values take.
    """

    def __init__(self, values: Mapping[str, Array], described: Sequence[Mapping[str, Any]]) -> None:
        self._values = values
        shapes = {item["name"]: item["shape"] for item in described}
        self._of_steps = {name: shape for name, shape in shapes.items() if shape[:1] == ["steps"]}
        self._of_samples = {name: shape for name, shape in shapes.items() if name not in self._of_steps}
        self.nbytes = sum(value.nbytes for value in values.values())

    def of_steps(self, steps: Sequence[int], samples: Sequence[int] | None = None) -> dict[str, Array]:
        """The inputs of a step that change from step to step.

        Args:
            steps: each sample's step, from 0.
            samples: the samples' numbers in the run, as many; None for all, in their order.

        Returns:
            By name, `[..., len(steps), ...]`: contiguous copies.

        Raises:
            IndexError: a step or a sample that the run does not have.
        """
        chosen = np.arange(len(steps)) if samples is None else np.asarray(samples)
        rows = {}
        for name, shape in self._of_steps.items():
            value = self._values[name]
            if "batch" not in shape:
                rows[name] = value[np.asarray(steps)]
                continue
            axis = shape.index("batch")
            # The batch's dimension first: with it the step's is one index.
            picked = np.moveaxis(value, axis, 1)[np.asarray(steps), chosen]
            rows[name] = np.ascontiguousarray(np.moveaxis(picked, 0, axis - 1))
        return rows

    def of_samples(self, samples: Sequence[int] | None = None) -> dict[str, Array]:
        """The inputs of a step that stay the same in all steps, by name.

        Args:
            samples: the samples' numbers in the run; None for all, without a copy.

        Raises:
            IndexError: a sample that the run does not have.
        """
        kept = {}
        for name, shape in self._of_samples.items():
            value = self._values[name]
            whole = samples is None or "batch" not in shape
            kept[name] = value if whole else value.take(np.asarray(samples), shape.index("batch"))
        return kept
