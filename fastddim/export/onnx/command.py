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
    PolicyFlags,
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
    policy: PolicyFlags,
    comparison: ComparisonFlags,
) -> None:
    """Write a model and its sampler as an ONNX graph.

    The graph is compared with torch, and the folder describes it.
    """
    from fastddim.export.bundle import check_destination
    from fastddim.export.onnx.pipeline_exporter import export_loaded
    from fastddim.export.policy_exporter import export_policy
    from fastddim.policies import Policy

    options = sampler.options(per_sample_steps=per_sample_steps, seeded=seeded)
    compared = comparison.arguments()
    # Before a model is fetched and read.
    check_destination(destination.out, destination.force)
    start = time.perf_counter()
    loaded = load_model(model, variant)
    given = {"force": destination.force, **compared}
    if isinstance(loaded, Policy):
        bundle = export_policy(loaded, destination.out, options, **policy.arguments(), **given)
    else:
        policy.require_default()
        bundle = export_loaded(loaded, destination.out, options, sampler_only, **given)
    report(bundle, start, bundle.kind, destination.as_json, parity=bundle.manifest["parity"])
