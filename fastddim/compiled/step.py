"""`ddim_step` by compiled code: checks, the numbers of a row, and the views that the code takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fastddim import reference
from fastddim.coefficients import StepCoefficients, StepTable
from fastddim.compiled.code import DRAW, Code, code_of
from fastddim.compiled.kinds import NUMBERS, Kind
from fastddim.config import Clip, DynamicThreshold, Limit, with_numbers
from fastddim.noise import STREAM_STEP, normal_for
from fastddim.step import Guidance, StepOptions, check_step

# From so many elements on several threads take a step.
_PARALLEL = 1 << 16
_MAX_KEPT = 4096
_STATE, _OUTPUT, _X0 = 0.0, 1.0, 2.0
_BOUND, _GUIDED = NUMBERS.index("bound"), len(NUMBERS) - NUMBERS.index("weight")
_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_NUMBER = (float, int)
_PLAIN = {torch.Tensor, torch.nn.Parameter}
# The types of `Guidance.fixed`: others may compare equal to what was checked.
_FIXED_TYPES = [bool, str, float, float]

_codes: dict[Any, tuple[Code, Code | None]] = {}
_plans: dict[Hashable, _Plan] = {}
_kept: dict[Any, torch.Tensor] = {}
_streams = functools.cache(lambda stream: torch.tensor(stream, dtype=torch.int64, device="cpu"))


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastddim.ddim_step` by compiled code; by the reference while torch traces, and for a state without elements.

    Rows of a tensor `step`, and values in tensors, are read on the host.

    Raises:
        TypeError, ValueError, IndexError: as `fastddim.ddim_step`; a state that is not on a CPU, or a tensor that requires
            gradients.
        CompilerMissingError: a kind of step that was never compiled here, without a C++ compiler.
    """
    if is_traced(model_output, sample):
        return reference.ddim_step(model_output, sample, table, step, options)
    guidance, limit, noise, out = options.guidance, options.limit, options.noise, options.out
    key = None
    if _is_usual(sample, table, step, options):
        key = _key(model_output, sample, guidance, limit, noise, sample.dtype, out is not None)
    plan = None if key is None else _plans.get(key)
    if plan is None:
        check_step(model_output, sample, table, step, options)
        if not sample.numel():
            return reference.ddim_step(model_output, sample, table, step, options)
        _check(model_output, sample, options)
    rows = _rows(table, step)
    if noise is None:
        if options.seeds is not None:
            noise = _draw(options, sample, step, rows)
        elif _adds_noise(rows):
            raise ValueError(
                f"noise: None, but step {step} adds noise; pass a standard normal tensor like the state, or seeds"
            )
    if plan is None and not _is_plain(sample, options):
        x_next, x0 = _over_copies(model_output, sample, rows, noise, options)
    else:
        plan = _plan_of(key, model_output, sample, options, len(rows) > 1) if plan is None else plan
        x_next, x0 = _results(sample, options)
        _run(plan, model_output, sample, x_next, x0, rows, guidance, _limit_of(options), noise)
        if options.model_input is not None:
            options.model_input.view(-1, *x_next.shape).copy_(x_next)
    if options.advance:
        assert isinstance(step, torch.Tensor)
        reference.advance(step, options, sample.shape[0])
    return x_next, x0 if options.return_x0 else None


def step_with_row(
    output: torch.Tensor,
    x: torch.Tensor,
    row: StepCoefficients,
    limit: Limit,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.step_with_row` on tensors of one shape `[B, ...]` and any dtypes, whose results have that of both."""
    dtype = x.dtype if x.dtype is output.dtype else torch.promote_types(x.dtype, output.dtype)
    key = _key(output, x, None, limit, noise, dtype, False)
    plan = None if key is None else _plans.get(key)
    x_next = torch.empty_like(x, dtype=dtype)
    if plan is None:
        options = StepOptions(limit=limit, noise=noise, out=x_next)
        _check(output, x, options)
        if not x.numel():
            return reference.step_with_row(output, x, row, limit, noise, x_next)
        if not _is_plain(x, options):
            return _over_copies(output, x, (row,), noise, options)
        plan = _plan_of(key, output, x, options, False)
    x0 = torch.empty_like(x_next)
    _run(plan, output, x, x_next, x0, (row,), None, limit, noise)
    return x_next, x0


def draw_normal(seeds: torch.Tensor, steps: int | torch.Tensor, shape: tuple[int, ...], stream: int) -> torch.Tensor:
    """`noise.normal_for` for seeds `[B]` on a CPU, the same bits: `[B, *shape]` float32."""
    batch, n = seeds.shape[0], math.prod(shape)
    if not batch * n or is_traced(seeds):
        return normal_for(seeds, steps, shape, stream)
    counters = steps.reshape(-1).long() if isinstance(steps, torch.Tensor) else torch.tensor([steps], device="cpu")
    drawn = torch.empty(batch, (n + 3) // 4, 4, dtype=torch.float32, device="cpu")
    code_of(DRAW)([seeds.contiguous(), counters.expand(batch).contiguous(), _streams(stream), drawn])
    return drawn.view(batch, -1)[:, :n].reshape(batch, *shape)


def can_prepare(sample: torch.Tensor, options: StepOptions) -> bool:
    """Whether a `PreparedStep` takes these tensors."""
    return not is_traced(sample) and bool(sample.numel()) and _is_plain(sample, options)


class PreparedStep(reference.PreparedStep):
    """`reference.PreparedStep` by compiled code: each call overwrites the same `(x_next, x0)`, so use it from one thread.

    Do not move or resize the tensors that it was made with.
    """

    def __init__(
        self, model_output: torch.Tensor, sample: torch.Tensor, table: StepTable, options: StepOptions
    ) -> None:
        """Check. Arguments and errors as `reference.PreparedStep`'s; those for which `can_prepare`."""
        super().__init__(model_output, sample, table, options)
        _check(model_output, sample, options)
        self._plan = _plan_of(None, model_output, sample, options, False)
        self._results = _results(sample, options)
        # Kept, as memory of this size is not reused by itself.
        self._scratch = _scratch(self._plan, sample)

    def __call__(self, model_output: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the step: `(x_next, x0)`. `model_output` is one that `fits`, and `step` in the table."""
        options, sample, rows = self._options, self._sample, self._rows[step : step + 1]
        noise = options.noise if options.seeds is None else _draw(options, sample, step, rows)
        x_next, x0 = self._results
        _run(self._plan, model_output, sample, x_next, x0, rows, options.guidance, self._limit, noise, self._scratch)
        if options.model_input is not None:
            options.model_input.view(-1, *x_next.shape).copy_(x_next)
        return x_next, x0


class _Plan(NamedTuple):
    """What takes a step over tensors of some shapes and dtypes.

    Attributes:
        code: takes `sizes`, model output, state, numbers, noise if there is any, x0, and the next state unless that is
            written over the state: all contiguous, and of any shape, as `sizes` alone has the sizes.
        unlimited: the step without a limit, for a threshold whose bound is found of its x0.
        sizes: `[B * n]`, or `[B, n]` where each sample has numbers of its own; never read.
        by_sample, in_place: whether they have, and whether the next state is written over the state.
        compute: dtype of the arithmetic.
    """

    code: Code
    unlimited: Code | None
    sizes: torch.Tensor
    by_sample: bool
    in_place: bool
    compute: torch.dtype


def _plan_of(
    key: Hashable,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    options: StepOptions,
    several_rows: bool,
) -> _Plan:
    """The plan of a checked step over plain tensors, kept if it has a key."""
    guidance, limit, out, previous = options.guidance, options.limit, options.out, options.previous_x0
    limit_kind = "none" if limit is None else "clip" if isinstance(limit, Clip) else "threshold"
    finds_bound = _finds_bound(_limit_of(options))
    by_sample = several_rows or finds_bound or (guidance is not None and _is_by_sample(guidance))
    in_place = out is not None and out.data_ptr() == sample.data_ptr()
    parallel = sample.numel() >= _PARALLEL and torch.get_num_threads() > 1
    guided = None if guidance is None else (guidance.method, guidance.cond_first, guidance.rescaled)
    dtype = sample.dtype if out is None else out.dtype
    noise = options.noise
    noise_dtype = noise.dtype if noise is not None else None if options.seeds is None else torch.float32
    dtypes = (model_output.dtype, sample.dtype, noise_dtype, dtype, dtype if previous is None else previous.dtype)
    compute = reference.compute_dtype(model_output, sample, noise)
    kept = (guided, limit_kind, previous is None, in_place, by_sample, parallel, dtypes)
    codes = _codes.get(kept)
    if codes is None:
        names = [_NAMES[torch.float32 if each is None else each] for each in dtypes]
        kind = Kind(
            *guided or ("", False, False),
            limit=limit_kind,
            noise=noise_dtype is not None,
            looks_back=previous is not None,
            in_place=in_place,
            by_sample=by_sample,
            parallel=parallel,
            dtypes=(names[0], names[1], names[2], names[3], names[4]),
            compute=_NAMES[compute],
        )
        wide = (names[0], names[1], "float32", kind.compute, kind.compute)
        without = kind._replace(limit="none", noise=False, looks_back=False, in_place=False, dtypes=wide)
        codes = _codes[kept] = code_of(kind), code_of(without) if finds_bound else None
    batch = sample.shape[0]
    shape = (batch, sample.numel() // batch) if by_sample else (sample.numel(),)
    with torch.inference_mode(False):
        sizes = torch.empty(1, dtype=torch.float32, device="cpu").expand(shape)
    plan = _Plan(*codes, sizes, by_sample, in_place, compute)
    if key is not None:
        if len(_plans) >= _MAX_KEPT:
            _plans.clear()
        _plans[key] = plan
    return plan


def _run(
    plan: _Plan,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    x_next: torch.Tensor,
    x0: torch.Tensor,
    rows: Sequence[StepCoefficients],
    guidance: Guidance | None,
    limit: Limit,
    noise: torch.Tensor | None,
    scratch: Sequence[torch.Tensor] = (),
) -> None:
    """Fill `x_next` and `x0`, the latter with the x0 of the step before in it where the table looks back."""
    output = _contiguous(model_output)
    if _meets(output, x_next) or _meets(output, x0):
        output = output.clone()
    numbers = _numbers(rows, guidance, limit, plan.compute, sample.shape[0] if plan.by_sample else None)
    given = [plan.sizes, output, sample, numbers]
    if plan.unlimited is not None:
        assert isinstance(limit, DynamicThreshold)
        spare = scratch or _scratch(plan, sample)
        plan.unlimited([*given, *spare])
        found = reference.abs_quantile(spare[0], limit.ratio)
        given[3] = numbers.clone()
        given[3][:, _BOUND] = found.clamp_(1.0, limit.max_value)
    if noise is not None:
        given.append(_contiguous(noise))
    given.append(x0)
    if not plan.in_place:
        given.append(x_next)
    plan.code(given)


def _results(sample: torch.Tensor, options: StepOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step over plain tensors writes: what is given for it, or new tensors."""
    out, previous = options.out, options.previous_x0
    return (
        torch.empty_like(sample) if out is None else out,
        previous if previous is not None else torch.empty_like(sample if out is None else out),
    )


def _scratch(plan: _Plan, sample: torch.Tensor) -> Sequence[torch.Tensor]:
    """x0 and the next state of the step without a limit, where a threshold needs it."""
    if plan.unlimited is None:
        return ()
    return torch.empty((2, *plan.sizes.shape), dtype=plan.compute, device="cpu").unbind()


def _is_usual(sample: torch.Tensor, table: Any, step: Any, options: StepOptions) -> bool:
    """Whether a row of a table is asked for with no other options than those in a `_key`, nor any that reads the row."""
    out = options.out
    return (
        type(table) is StepTable
        and type(step) is int
        and 0 <= step < len(table.rows)
        and (out is None or (out is sample and options.noise is None))
        and options.seeds is None
        and options.first_row is None
        and options.limit_values is None
        and options.model_input is None
        and options.advance is False
        and options.timesteps is None
        and options.next_timestep is None
        and options.previous_x0 is None
        and options.ratios is None
        and not table.looks_back
    )


def _key(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    guidance: Guidance | None,
    limit: Limit,
    noise: torch.Tensor | None,
    dtype: torch.dtype,
    in_place: bool,
) -> Hashable:
    """All that a step's checks and its plan depend on; None for a step that is no matter of a few shapes and dtypes."""
    if not (sample.is_cpu and model_output.is_cpu and sample.is_contiguous()) or sample.is_neg():
        return None
    if limit is not None and type(limit) is not Clip:
        return None
    has_gradients = torch.is_grad_enabled()
    if has_gradients and (sample.requires_grad or model_output.requires_grad):
        return None
    drawn = guided = None
    if noise is not None:
        if type(noise) not in _PLAIN or not noise.is_cpu or (has_gradients and noise.requires_grad):
            return None
        drawn = noise.shape, noise.dtype
    if guidance is not None:
        if (
            type(guidance) is not Guidance
            or type(guidance.scale) not in _NUMBER
            or type(guidance.rescale) not in _NUMBER
        ):
            return None
        fixed = guidance.fixed
        # Whether there is an epsilon is the table's matter.
        if [*map(type, fixed)] != _FIXED_TYPES or guidance.method == "cfg++":
            return None
        guided = fixed, guidance.rescale != 0
    described = sample.shape, sample.dtype, model_output.shape, model_output.dtype, dtype
    return described, limit is None, drawn, guided, in_place, torch.get_num_threads()


def _over_copies(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    rows: Sequence[StepCoefficients],
    noise: torch.Tensor | None,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of tensors that are not plain: over copies that are, written back."""
    out, previous, model_input = options.out, options.previous_x0, options.model_input
    dtype = sample.dtype if out is None else out.dtype
    # The model's input gets the state before it is rounded to another dtype.
    compute = reference.compute_dtype(model_output, sample, noise)
    wide = compute if model_input is not None and model_input.dtype != dtype else dtype
    state = _contiguous(sample)
    kept = None if previous is None else previous.clone(memory_format=torch.contiguous_format)
    plain = replace(options, out=torch.empty_like(state, dtype=wide), previous_x0=kept)
    results = _results(state, plain)
    plan = _plan_of(None, model_output, state, plain, len(rows) > 1)
    _run(plan, model_output, state, *results, rows, options.guidance, _limit_of(options), noise)
    if model_input is not None:
        model_input.view(-1, *sample.shape).copy_(results[0])
    x_next = torch.empty_like(sample, dtype=dtype) if out is None else out
    x0 = torch.empty_like(sample, dtype=dtype) if previous is None else previous
    return x_next.copy_(results[0]), x0.copy_(results[1])


def _limit_of(options: StepOptions) -> Limit:
    values = options.limit_values
    return options.limit if values is None else with_numbers(options.limit, *values.tolist())


def _finds_bound(limit: Limit) -> bool:
    return isinstance(limit, DynamicThreshold) and limit.max_value > 1


def _adds_noise(rows: Sequence[StepCoefficients]) -> bool:
    return any(row.noise_scale != 0 for row in rows)


def _is_plain(sample: torch.Tensor, options: StepOptions) -> bool:
    """Whether the code can take these tensors as they are."""
    out, previous, model_input = options.out, options.previous_x0, options.model_input
    dtype = sample.dtype if out is None else out.dtype
    if model_input is not None and model_input.dtype != dtype and dtype not in (torch.float32, torch.float64):
        return False
    if not sample.is_contiguous() or sample.is_neg():
        return False
    # Read, and apart from what is written.
    read = [sample] if options.noise is None else [sample, _contiguous(options.noise)]
    written = [tensor for tensor in (out, previous) if tensor is not None]
    if not written:
        return True
    if not all(tensor.is_contiguous() and not tensor.is_neg() for tensor in written):
        return False
    if out is not None and out.data_ptr() == sample.data_ptr() and out.dtype == sample.dtype:
        del read[0]
    apart = not any(_meets(a, b) for a in written for b in read)
    return apart and (len(written) < 2 or not _meets(written[0], written[1]))


def _meets(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + b.nbytes and other < start + a.nbytes


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_neg().contiguous() if tensor.is_neg() else tensor.contiguous()


def is_traced(*tensors: torch.Tensor) -> bool:
    """Whether torch follows the operations on tensors, for which code has none: a trace, a transform, a stand-in."""
    functorch: Any = torch._C._functorch
    return (
        torch.compiler.is_compiling()
        or functorch.maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _check(model_output: torch.Tensor, sample: torch.Tensor, options: StepOptions) -> None:
    """What the reference takes and compiled code does not."""
    if not sample.is_cpu:
        raise ValueError(f"backend: 'compiled' with a state on {sample.device}; it is for CPUs, pass 'auto'")
    noise = options.noise
    if torch.is_grad_enabled() and (
        model_output.requires_grad or sample.requires_grad or (noise is not None and noise.requires_grad)
    ):
        raise ValueError(
            "backend: 'compiled' has no gradients, and a tensor requires them; pass 'reference', or call under"
            " torch.no_grad()"
        )
    for tensor in (model_output, sample, noise, options.out, options.previous_x0):
        if tensor is not None and tensor.dtype not in _NAMES:
            raise ValueError(f"backend: 'compiled' with {tensor.dtype}; pass {', '.join(_NAMES.values())}")


def _is_by_sample(guidance: Guidance) -> bool:
    """Whether guidance needs sums over samples, or has a value for each."""
    return guidance.rescaled or guidance.method == "apg" or isinstance(guidance.scale, torch.Tensor)


def _rows(table: StepTable | torch.Tensor, step: int | torch.Tensor) -> Sequence[StepCoefficients]:
    """The step's row, or one for each sample."""
    if isinstance(table, StepTable):
        if isinstance(step, torch.Tensor):
            return [table.rows[index] for index in step.reshape(-1).tolist()]
        return (table.rows[step],)
    found = table[step.reshape(-1)] if isinstance(step, torch.Tensor) else table[step : step + 1]
    return [StepCoefficients(*row) for row in found.tolist()]


def _draw(
    options: StepOptions, sample: torch.Tensor, step: int | torch.Tensor, rows: Sequence[StepCoefficients]
) -> torch.Tensor:
    """The noise of the seeds; zeros where no row has a use for it."""
    assert options.seeds is not None
    if not _adds_noise(rows):
        return torch.zeros(sample.shape, dtype=torch.float32, device="cpu")
    counted = step if options.first_row is None else step - options.first_row
    return draw_normal(options.seeds, counted, tuple(sample.shape[1:]), STREAM_STEP)


def _numbers(
    rows: Sequence[StepCoefficients],
    guidance: Guidance | None,
    limit: Limit,
    compute: torch.dtype,
    batch: int | None,
) -> torch.Tensor:
    """`[len(NUMBERS)]`, or with a batch `[batch, len(NUMBERS)]`; do not write to them."""
    bound = 0.0 if limit is None else limit.range if isinstance(limit, Clip) else limit.max_value
    if guidance is None:
        key: Any = (rows[0], bound, compute, batch)
    elif isinstance(guidance.scale, torch.Tensor) or isinstance(guidance.rescale, torch.Tensor):
        key = None
    else:
        key = (rows[0], bound, compute, batch, guidance.scale, guidance.rescale, guidance.fixed)
    key = None if len(rows) > 1 else key
    kept = None if key is None else _kept.get(key)
    if kept is not None:
        return kept
    size = batch or 1
    values = np.empty((size, len(NUMBERS)))
    values[:, :-_GUIDED] = [(*_row_numbers(row), bound) for row in rows]
    values[:, -_GUIDED:] = np.stack(
        np.broadcast_arrays(*_guidance_numbers(guidance, compute), np.empty(size))[:-1], axis=1
    )
    with torch.inference_mode(False):
        made = torch.from_numpy(values).to(compute)
        made = made if batch else made[0]
    if key is not None:
        if len(_kept) >= _MAX_KEPT:
            _kept.clear()
        _kept[key] = made
    return made


@functools.lru_cache(_MAX_KEPT)
def _row_numbers(row: StepCoefficients) -> tuple[float, ...]:
    """The sums of `reference.step_with_row`: which term leads each, the other one's ratio, and the factor of both."""
    x0_x, x0_output, from_x, from_output, from_x0, noise_scale, from_previous = map(float, row)
    first, _, ratio, scale = _lead((_STATE, x0_x), (_OUTPUT, x0_output))
    rest = 0.0
    if from_x == 0:
        terms = (_OUTPUT, from_output), (_X0, from_x0)
    elif from_output == 0:
        terms = (_STATE, from_x), (_X0, from_x0)
    else:
        terms, rest = ((_STATE, from_x), (_OUTPUT, from_output)), from_x0
    return first, ratio, scale, *_lead(*terms), rest, from_previous, noise_scale


def _lead(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float, float, float]:
    """`reference._combine` of two terms and their factors."""
    (first, scale), (second, other) = (b, a) if abs(a[1]) < abs(b[1]) else (a, b)
    return first, second, other / scale if other != 0 else 0.0, scale


def _guidance_numbers(guidance: Guidance | None, compute: torch.dtype) -> list[Any]:
    """The last `_GUIDED` of `NUMBERS`, each one number or one for each sample."""
    if guidance is None:
        return [0.0] * _GUIDED
    scale, rescale = (
        np.asarray(each.tolist() if isinstance(each, torch.Tensor) else each, str(compute).removeprefix("torch."))
        for each in (guidance.scale, guidance.rescale)
    )
    from_cond = np.abs(scale) >= 0.5
    less_one = np.subtract(scale, 1, dtype=scale.dtype)
    weight = less_one if guidance.method == "apg" else np.where(from_cond, less_one, scale)
    return [weight, from_cond, rescale, 1 - guidance.apg_eta, guidance.apg_norm_threshold or math.inf]
