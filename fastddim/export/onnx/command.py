"""`fastddim export onnx`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fastddim.cli_options import Variant, with_options
from fastddim.export.command_options import (
    ComparisonFlags,
    Destination,
    Model,
    SamplerFlags,
    SamplerOnly,
    load_model,
    report,
)


@with_options
def export_command(
    *,
    model: Model = None,
    variant: Variant = None,
    destination: Destination,
    sampler: SamplerFlags,
    per_sample_steps: Annotated[
        bool, typer.Option("--per-sample-steps", help="Baked schedule: a number for each sample.")
    ] = False,
    seeded: Annotated[bool, typer.Option("--seeded", help="Take seeds, not states and noise.")] = False,
    sampler_only: SamplerOnly = False,
    comparison: ComparisonFlags,
) -> None:
    """Write a model and its sampler as an ONNX graph.

    The graph is compared with torch, and the folder describes it.
    """
    from fastddim.export.bundle import check_destination
    from fastddim.export.onnx.pipeline_exporter import export_loaded

    options = sampler.options(per_sample_steps=per_sample_steps, seeded=seeded)
    compared = comparison.arguments()
    # Before a model is fetched and read.
    check_destination(destination.out, destination.force)
    start = time.perf_counter()
    bundle = export_loaded(
        load_model(model, variant), destination.out, options, sampler_only, force=destination.force, **compared
    )
    report(bundle, start, bundle.kind, destination.as_json, parity=bundle.manifest["parity"])
