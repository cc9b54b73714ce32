"""What the commands of `fastddim export` share: their options, loading a model, and what they print."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.cli_options import (
    Eta,
    GuidanceMethod,
    Json,
    Method,
    choice,
    integer,
    integers,
    naming_options,
    number,
    parse_guidance_method,
    parse_integers,
    parse_method,
    quiet_diffusers,
)
from fastddim.config import require_number

if TYPE_CHECKING:
    from fastddim.export.bundle import Folder
    from fastddim.export.sampler_plan import ExportOptions

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A diffusers folder or hub id, or a LeRobot policy's folder. Default: digits."
    ),
]
SamplerOnly = Annotated[bool, typer.Option("--sampler-only", help="Leave out encoders and decoder.")]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a bundle is written, and how its command tells."""

    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write.")]
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False
    as_json: Json = False


@dataclass(frozen=True, slots=True)
class SamplerFlags:
    """What is fixed in a file with a model and its sampler: fields of `ExportOptions`."""

    kind: Annotated[str, choice(help="loop: all steps; step: one.")] = "loop"
    guided: Annotated[bool, typer.Option("--guidance", help="Guidance, its scale an input.")] = False
    guidance_rescale: Annotated[
        bool, typer.Option("--guidance-rescale", help="The guidance's rescale is an input too.")
    ] = False
    guidance_method: GuidanceMethod = "cfg"
    stochastic: Annotated[bool, typer.Option("--noise", help="Noise is an input; eta may be above 0.")] = False
    bake_schedule: Annotated[bool, typer.Option("--bake-schedule", help="Take a number of steps, not a table.")] = False
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Take any height and width.")] = False
    dtype: Annotated[str, choice(help="float32 by default, float16, bfloat16.", show_default=False)] = "float32"
    num_inference_steps: Annotated[int | None, integer("--steps", help="Steps of the default table. Default: 50.")] = (
        None
    )
    method: Method = "auto"
    eta: Eta = None

    def options(self, **others: Any) -> ExportOptions:
        """The `ExportOptions` of these flags and other fields."""
        from fastddim.export.sampler_plan import ExportOptions

        named = {**parse_method(self.method), **parse_guidance_method(self.guidance_method)}
        given = {**dataclasses.asdict(self), **named}
        return ExportOptions(**given, **others)


@dataclass(frozen=True, slots=True)
class PolicyFlags:
    """What is fixed in the file of a robot policy, of which MODEL is the folder."""

    committed: Annotated[bool, typer.Option("--committed", help="Policies: take known actions and a mask.")] = False
    image_dtype: Annotated[str, choice(help="Policies: uint8 pictures, or float32.")] = "uint8"
    rate: Annotated[float | None, number(help="Policies: control rate in Hz, to note.")] = None

    def arguments(self) -> dict[str, Any]:
        """Those of `export_policy`."""
        return dataclasses.asdict(self)

    def require_default(self) -> None:
        """Refuse them for a model that is no policy."""
        for name, value in self.arguments().items():
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}: {value!r}, but MODEL is no robot policy; leave it out")


@dataclass(frozen=True, slots=True)
class ComparisonFlags:
    """How a file is compared with torch."""

    tolerance: Annotated[float | None, number(help="Largest difference from torch.")] = None
    parity_steps: Annotated[str, integers(help="Compare after these.")] = "1,10,50"

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            require_number("--tolerance", self.tolerance, 0.0, math.inf)

    def steps(self) -> Sequence[int]:
        """The numbers of steps after which results are compared."""
        return parse_integers(self.parity_steps, "--parity-steps")

    def arguments(self) -> dict[str, Any]:
        """The exporters' arguments."""
        return {"parity_steps": self.steps(), "tolerance": self.tolerance}


def load_model(model: str | None, variant: str | None = None) -> Any:
    """A diffusers pipeline that can be exported, without diffusers' own output."""
    from fastddim.export.models import load_exportable

    quiet_diffusers()
    with naming_options({"model": "MODEL", "variant": "--variant"}):
        return load_exportable(model, variant)


def report(bundle: Folder, start: float, what: str, as_json: bool, **facts: Any) -> None:
    """Print what was written or compared.

    Args:
        bundle: the result.
        start: `time.perf_counter()` when the work began.
        what: the bundle in a word.
        as_json: print one JSON object.
        **facts: what JSON has beside path and seconds; `parity` has a line for each comparison with torch.
    """
    seconds = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps({"path": str(bundle.path), "seconds": seconds, **facts}))
        return
    for entry in facts.get("parity", ()):
        compared_after = f"{entry['steps']} steps" if "steps" in entry else entry["component"]
        typer.echo(
            f"batch {entry['batch']} of {entry['size']}, {compared_after}: largest difference from torch"
            f" {entry['largest_error']:.1e} (tolerance {entry['tolerance']:.1e})"
        )
    size = sum(file["bytes"] for file in bundle.manifest["files"].values())
    typer.echo(f"{str(bundle.path)!r}: {what}, {size / 1e6:.1f} MB, {seconds:.1f} s")
