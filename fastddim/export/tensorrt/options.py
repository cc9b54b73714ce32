"""What is fixed in a TensorRT engine, checked before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastddim.config import require_choice, require_int

FLAVOURS = ("auto", "standard", "rtx")
HARDWARE_COMPATIBILITIES = ("ampere_plus", "same_compute_capability")
LARGEST_OPTIMIZATION_LEVEL = 5

Range = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes that an engine takes, each `(min, opt, max)`; it is fastest at opt.

    Attributes:
        batch: samples in a call.
        steps: the steps of a loop; 1, the bundle's default table and its training timesteps by default.
        height, width: the sizes for a bundle of any size, which has no default for them.

    Raises:
        ValueError: a range that is not `1 <= min <= opt <= max`.
    """

    batch: Range = (1, 1, 8)
    steps: Range | None = None
    height: Range | None = None
    width: Range | None = None

    def __post_init__(self) -> None:
        for name, given in self._given():
            if len(given) != 3 or any(isinstance(size, bool) or not isinstance(size, int) for size in given):
                raise ValueError(f"profiles: {name} {given!r}; pass three integers (min, opt, max)")
            low, best, high = given
            if not 1 <= low <= best <= high:
                raise ValueError(f"profiles: {name} {given!r}; pass 1 <= min <= opt <= max")

    def _given(self) -> Iterator[tuple[str, Range]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    @classmethod
    def parse(cls, text: str) -> Profile:
        """The profile in a text such as `batch=1:4:8,steps=1:50:100`.

        Raises:
            ValueError: another form, an unknown dimension, or a range that is not one.
        """
        known = [field.name for field in fields(cls)]
        ranges: dict[str, Any] = {}
        for part in text.split(","):
            name, is_given, sizes = part.strip().partition("=")
            if name not in known or name in ranges:
                raise ValueError(f"profiles: {name!r} in {text!r}; pass each of {', '.join(known)} at most once")
            numbers = sizes.split(":")
            if not is_given or not all(number.isdecimal() for number in numbers):
                raise ValueError(f"profiles: {part.strip()!r} in {text!r}; pass {name}=MIN:OPT:MAX")
            ranges[name] = tuple(map(int, numbers))
        return cls(**ranges)

    def ranges(self, manifest: Mapping[str, Any]) -> dict[str, Range]:
        """The range of each dimension that a bundle's inputs leave open.

        Args:
            manifest: the bundle's manifest.

        Raises:
            ValueError: a dimension that the bundle does not have, or that needs a range.
        """
        steps = len(manifest["table"]["timesteps"])
        most = max(steps, (manifest["schedule"] or {}).get("num_train_timesteps", steps))
        default = {"steps": (1, steps, most)}
        wanted = open_dimensions(manifest)
        given = dict(self._given())
        for name in given:
            if name not in wanted:
                raise ValueError(
                    f"profiles: {name} is no dimension of this bundle, which has {', '.join(sorted(wanted))}"
                )
        ranges = {**default, **given}
        for name in sorted(wanted):
            if name not in ranges:
                raise ValueError(f"profiles: {name} is missing, and this bundle takes any; pass its (min, opt, max)")
        return {name: ranges[name] for name in sorted(wanted)}


def open_dimensions(manifest: Mapping[str, Any]) -> set[str]:
    """The names of what a bundle's inputs leave open; a baked schedule's number of steps is among them."""
    dims = {dim for item in manifest["inputs"] for dim in item["shape"] if isinstance(dim, str)}
    return dims | ({"steps"} if manifest["sampling"]["baked_schedule"] else set())


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions:
    """How an engine is built. The weights' dtype is the graph's: networks are strongly typed.

    Attributes:
        flavour: `"standard"` (the package tensorrt), `"rtx"` (tensorrt-rtx), or `"auto"`, the first that is installed.
        profiles: an engine is tuned for each; a call takes the first one that has its sizes.
        compute_capabilities: rtx: the GPUs to build for, such as `("8.9", "12.0")`, none needed here; by default all.
            The standard flavour builds for the GPU that is here.
        workspace: the largest scratch memory of a layer in bytes.
        builder_optimization_level: 0 to 5; higher takes longer to build.
        tf32: float32 products may be rounded to TF32, faster and three digits exact; TensorRT's own default.
        version_compatible: later versions of TensorRT load the engine too.
        hardware_compatibility: standard: `"ampere_plus"` or `"same_compute_capability"`; by default this GPU's model.
        refit: the weights may be replaced later.
        strip_plan: leave the weights out; whoever loads the engine takes them from the ONNX bundle.
        weight_streaming: weights may stay on the host in part.
        timing_cache: standard: a file of measured kernels, read where it exists and written.
        fused_step: standard, TensorRT 10.8 or later, kind `"step"`: the step is our kernel, compiled by Triton, instead
            of the graph's operations. It is in the engine: loading that needs no Triton.

    Raises:
        ValueError: an option out of range, or options that exclude each other.
    """

    flavour: str = "auto"
    profiles: tuple[Profile, ...] = (Profile(),)
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    builder_optimization_level: int | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    refit: bool = False
    strip_plan: bool = False
    weight_streaming: bool = False
    timing_cache: str | Path | None = None
    fused_step: bool = False

    def __post_init__(self) -> None:
        require_choice("flavour", self.flavour, FLAVOURS)
        if not self.profiles:
            raise ValueError("profiles: (); pass one or more")
        if self.workspace is not None:
            require_int("workspace", self.workspace, 1)
        if self.builder_optimization_level is not None:
            require_int("builder_optimization_level", self.builder_optimization_level, 0, LARGEST_OPTIMIZATION_LEVEL)
        if self.hardware_compatibility is not None:
            require_choice("hardware_compatibility", self.hardware_compatibility, HARDWARE_COMPATIBILITIES)
        for capability in self.compute_capabilities:
            major, point, minor = str(capability).partition(".")
            if not (point and major.isdecimal() and minor.isdecimal()):
                raise ValueError(f"compute_capabilities: {capability!r}; pass such as '8.9'")

    def identity(self) -> dict[str, Any]:
        """What decides the engine, for the manifest."""
        kept = asdict(self)
        for name in ("flavour", "profiles", "compute_capabilities", "timing_cache"):
            del kept[name]
        return kept
