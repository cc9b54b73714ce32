"""A robot policy as one bundle: raw observations, encoder, loop and actions in one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastddim.config import require_choice, require_number
from fastddim.export.bundle import Bundle
from fastddim.export.sampler_plan import ExportOptions
from fastddim.policies.policy import Policy
from fastddim.samplers import Steps

# The runtimes whose exporters take a model, rather than an ONNX bundle.
_EXPORTERS = ("onnx", "aoti")


def export_policy(
    policy: Policy,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    runtime: str = "onnx",
    image_dtype: str = "uint8",
    committed: bool = False,
    rate: float | None = None,
    units: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Bundle:
    """Export a policy with its encoder, normalisations and loop: observations in, actions out. `PolicySampler` runs it.

    The file takes each observation by its feature's name, `[B, n_obs_steps, *shape]`, and gives `actions`
    `[B, n_action_steps, action_dim]` in the robot's units, `normalised`, the same as the network has them, and `samples`
    `[B, horizon, action_dim]`, all that was sampled. What observations alone make is computed once a run.

    Args:
        policy: from `fastddim.policies`; it is not changed.
        out: the folder to write.
        options: what is fixed in the file. Steps and method are the policy's by default, and noise is an input where they
            need it. A file of one step has a graph before it (`hoist`) where the runtime takes two.
        runtime: `"onnx"` or `"aoti"`; a TensorRT engine is built from the ONNX bundle.
        image_dtype: what pictures are taken as, `"uint8"`, or `"float32"` in [0, 1].
        committed: take `known` actions and a `mask` of them too, which the chunk keeps.
        rate: the control rate in Hz, for the manifest.
        units: of observations and `action` by name, for the manifest.
        **arguments: others of the runtime's exporter, such as `force` and `tolerance`.

    Returns:
        The bundle, opened; its manifest has `policy`.

    Raises:
        TypeError: no `Policy`; ValueError: options that do not fit; others as `export_onnx`'s.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: {type(policy).__name__}; pass fastddim.policies.load_policy(folder)")
    require_choice("runtime", runtime, _EXPORTERS)
    if rate is not None:
        require_number("rate", rate, 0.0, 1e6)
    known = (*policy.features, "action")
    for name in units or ():
        require_choice("units", name, known)
    options = ExportOptions() if options is None else options
    if options.guided or options.dynamic_size:
        raise ValueError(
            "guided, dynamic_size: True for a policy, which has one condition and one size; leave them out"
        )
    if options.num_inference_steps is None:
        options = replace(options, num_inference_steps=policy.num_inference_steps)
    if options.kind == "step" and runtime == "onnx" and options.hoist is None:
        # Or each step would encode the observations again.
        options = replace(options, hoist=True)
    sampling = policy.sampling.by(options.method, rederive=False)
    table = sampling.with_options(options.of_the_method(), sampling.limit).build(Steps(options.num_inference_steps))
    last = table.rows[-1]
    if options.kind == "step" and (last.next_from_x, last.next_from_output, last.next_from_x0) != (0, 0, 1):
        raise ValueError("kind: 'step' for a policy whose last step does not lead to x0; pass kind='loop'")
    if table.stochastic:
        options = replace(options, stochastic=True)
    from fastddim.export.runtime import get_runtime

    record = get_runtime(runtime)
    policy = policy.described(rate=rate, units=units)
    examples = policy.example_inputs(image_dtype, committed)
    bundle: Bundle = record.load(record.exporter)(
        policy, sampling, out, replace(options, method="auto"), example_kwargs=examples, **arguments
    )
    return bundle
