"""`ddim_step` by compiled code: checks, the numbers of a row, and the views that the code takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
_PLAIN = {torch.Tensor, torch.nn.Parameter}

_codes: dict[Any, tuple[Code, Code | None]] = {}
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
    check_step(model_output, sample, table, step, options)
    if not sample.numel():
        return reference.ddim_step(model_output, sample, table, step, options)
    _check(model_output, sample, options)
    rows = _rows(table, step)
    if options.noise is None and options.seeds is None and any(row.noise_scale != 0 for row in rows):
        raise ValueError(
            f"noise: None, but step {step} adds noise; pass a standard normal tensor like the state, or seeds"
        )
    noise = options.noise if options.seeds is None else _draw(options, sample, step, rows)
    if _is_plain(sample, options):
        bound = _Bound(model_output, sample, options, len(rows) > 1)
        bound(model_output, rows, noise)
        x_next, x0 = bound.x_next, bound.x0
    else:
        x_next, x0 = _over_copies(model_output, sample, rows, noise, options)
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
    dtype = torch.promote_types(x.dtype, output.dtype)
    options = StepOptions(limit=limit, noise=noise, out=torch.empty_like(x, dtype=dtype))
    _check(output, x, options)
    if not x.numel():
        return reference.step_with_row(output, x, row, limit, noise, options.out)
    if not _is_plain(x, options):
        return _over_copies(output, x, (row,), noise, options)
    bound = _Bound(output, x, options, False)
    bound(output, (row,), noise)
    return bound.x_next, bound.x0


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


class PreparedStep:
    """`ddim_step` with everything but `model_output` and `step` given and checked already.

    It holds references to the tensors it was made with; do not move or resize them. Each call overwrites `x_next` and
    `x0`, so use it from one thread.

    Attributes:
        x_next: `[B, ...]` the next state; `out`, where that was given.
        x0: `[B, ...]` the limited prediction of x0.
    """

    def __init__(
        self, model_output: torch.Tensor, sample: torch.Tensor, table: StepTable, options: StepOptions
    ) -> None:
        """Check. Arguments as `ddim_step`'s.

        Args:
            model_output: a tensor of the shape, dtype and strides that all calls' will have.
            options: without `advance`; the row is given to each call.

        Raises:
            TypeError, ValueError: as `ddim_step`; a stochastic table without noise or seeds.
        """
        reference.check_prepared(model_output, sample, table, options)
        _check(model_output, sample, options)
        if not sample.numel() or not _is_plain(sample, options):
            raise ValueError("sample, out: not contiguous, or overlapping; pass contiguous tensors, or use ddim_step")
        self._bound = _Bound(model_output, sample, options, False, kept=True)
        self._table, self._options, self._sample = table, options, sample
        self._spec = model_output.shape, model_output.dtype, model_output.device
        self.x_next, self.x0 = self._bound.x_next, self._bound.x0

    def fits(self, model_output: torch.Tensor) -> bool:
        """Whether `model_output` has the shape, dtype and device that this step was prepared for."""
        return (model_output.shape, model_output.dtype, model_output.device) == self._spec

    def __call__(self, model_output: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the step: `(x_next, x0)`, the same tensors each time.

        Raises:
            ValueError: a `model_output` unlike the first one.
            IndexError: a `step` outside the table.
        """
        rows = (self._table.rows[step],) if step >= 0 else ()
        if not rows:
            raise IndexError(f"step: {step} is outside the table of {len(self._table)} steps")
        if not self.fits(model_output):
            shape, dtype, device = self._spec
            raise ValueError(
                f"model_output: {model_output.dtype} {tuple(model_output.shape)} on {model_output.device}; this step was"
                f" prepared for {dtype} {tuple(shape)} on {device}"
            )
        options = self._options
        noise = options.noise if options.seeds is None else _draw(options, self._sample, step, rows)
        self._bound(model_output, rows, noise)
        return self.x_next, self.x0


class _Bound:
    """A step's tensors as the code takes them: contiguous, and what it writes apart from what it reads.

    Attributes:
        x_next, x0: what a call writes, as the caller gets it.
    """

    def __init__(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        options: StepOptions,
        several_rows: bool,
        kept: bool = False,
    ) -> None:
        guidance, limit, out, previous = options.guidance, options.limit, options.out, options.previous_x0
        if options.limit_values is not None:
            limit = with_numbers(limit, *options.limit_values.tolist())
        self._guidance, self._limit, self._model_input = guidance, limit, options.model_input
        noise = options.noise
        noise_dtype = noise.dtype if noise is not None else None if options.seeds is None else torch.float32
        compute = self._compute = reference.compute_dtype(model_output, sample, noise)
        limit_kind = "none" if limit is None else "clip" if isinstance(limit, Clip) else "threshold"
        self._finds_bound = isinstance(limit, DynamicThreshold) and limit.max_value > 1
        by_sample = several_rows or self._finds_bound or (guidance is not None and _is_by_sample(guidance))
        self._batch, numel = sample.shape[0], sample.numel()
        self._shape = shape = (self._batch, numel // self._batch) if by_sample else (numel,)
        self._output_shape = shape if guidance is None else (2, *shape)

        dtype = sample.dtype if out is None else out.dtype
        self.x_next = torch.empty_like(sample, dtype=dtype) if out is None else out
        self.x0 = torch.empty_like(sample, dtype=dtype) if previous is None else previous
        # What is made for one call shares no memory with its arguments.
        self._may_meet = kept or out is not None or previous is not None
        self._state, x0 = sample.view(shape), self.x0.view(shape)
        in_place = out is not None and out.data_ptr() == sample.data_ptr()
        self._results = [x0] if in_place else [self.x_next.view(shape), x0]
        if previous is not None:
            self._results.reverse()

        parallel = numel >= _PARALLEL and torch.get_num_threads() > 1
        guided = None if guidance is None else (guidance.method, guidance.cond_first, guidance.rescaled)
        dtypes = (model_output.dtype, sample.dtype, noise_dtype, dtype, self.x0.dtype)
        key = (guided, limit_kind, previous is None, in_place, by_sample, parallel, dtypes)
        codes = _codes.get(key)
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
            codes = _codes[key] = code_of(kind), code_of(without) if self._finds_bound else None
        self._code, self._unlimited = codes
        if self._finds_bound:
            self._scratch = torch.empty((2, *shape), dtype=compute, device="cpu").unbind()

    def __call__(
        self, model_output: torch.Tensor, rows: Sequence[StepCoefficients], noise: torch.Tensor | None
    ) -> None:
        """Fill `x_next` and `x0`."""
        output = _contiguous(model_output)
        if self._may_meet and (_meets(output, self.x_next) or _meets(output, self.x0)):
            output = output.clone()
        batch = self._batch if len(self._shape) > 1 else None
        numbers = _numbers(rows, self._guidance, self._limit, self._compute, batch)
        given = [output.view(self._output_shape), self._state, numbers]
        if self._finds_bound:
            assert self._unlimited is not None
            assert isinstance(self._limit, DynamicThreshold)
            self._unlimited([*given, *self._scratch])
            found = reference.abs_quantile(self._scratch[1], self._limit.ratio)
            given[2] = numbers.clone()
            given[2][:, _BOUND] = found.clamp_(1.0, self._limit.max_value)
        if noise is not None:
            given.append(_contiguous(noise).view(self._shape))
        self._code(given + self._results)
        if self._model_input is not None:
            self._model_input.view(-1, *self.x_next.shape).copy_(self.x_next)


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
    state = sample.contiguous()
    results = torch.empty_like(state, dtype=wide)
    kept = None if previous is None else previous.clone(memory_format=torch.contiguous_format)
    plain = replace(options, noise=noise, seeds=None, first_row=None, out=results, model_input=None, previous_x0=kept)
    bound = _Bound(model_output, state, plain, len(rows) > 1)
    bound(model_output, rows, noise)
    if model_input is not None:
        model_input.view(-1, *sample.shape).copy_(bound.x_next)
    x_next = torch.empty_like(sample, dtype=dtype) if out is None else out
    x0 = torch.empty_like(sample, dtype=dtype) if previous is None else previous
    return x_next.copy_(bound.x_next), x0.copy_(bound.x0)


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
        or not all(map(_PLAIN.__contains__, map(type, tensors)))
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
    if all(row.noise_scale == 0 for row in rows):
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
