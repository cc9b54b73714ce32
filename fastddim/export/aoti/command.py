"""`fastddim export aoti`."""

from __future__ import annotations

import time
from typing import Annotated

from fastddim.cli_options import Variant, choice, with_options
from fastddim.export.command_options import (
    ComparisonFlags,
    Destination,
    Model,
    PolicyFlags,
    SamplerFlags,
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
    device: Annotated[str, choice(help="cpu or cuda.")] = "cpu",
    cpu_isa: Annotated[str | None, choice(help="The CPU needs avx2 or avx512. Default: avx2.")] = None,
    policy: PolicyFlags,
    comparison: ComparisonFlags,
) -> None:
    """Compile a model and its sampler for libtorch.

    AOTInductor compiles them for machines like this one, of a pipeline with an autoencoder the sampler alone.
    """
    from fastddim.export.aoti.exporter import export_aoti
    from fastddim.export.bundle import check_destination
    from fastddim.export.models import denoiser_of
    from fastddim.export.policy_exporter import export_policy
    from fastddim.policies import Policy

    options = sampler.options()
    compared = comparison.arguments()
    # Before a model is fetched and read.
    check_destination(destination.out, destination.force)
    start = time.perf_counter()
    loaded = load_model(model, variant)
    given = {"device": device, "cpu_isa": cpu_isa, "force": destination.force, **compared}
    if isinstance(loaded, Policy):
        bundle = export_policy(loaded, destination.out, options, runtime="aoti", **policy.arguments(), **given)
    else:
        policy.require_default()
        bundle = export_aoti(denoiser_of(loaded), loaded.scheduler, destination.out, options, **given)
    report(bundle, start, bundle.kind, destination.as_json, parity=bundle.manifest["parity"])
