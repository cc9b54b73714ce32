"""What each arithmetic instruction computes: one small function over arrays of all threads' operands.

`ARITHMETIC` is the list of those the machine knows, by opcode with every modifier. Only what IEEE 754 fixes is in it: a
sum or product without `.rn` may be contracted by the assembler, and `approx`, `full` and `ftz` are the hardware's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
I16, I32, I64 = np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "b16": U16, "u16": U16, "s16": I16, "f16": F16, "bf16": U16,
    "b32": U32, "u32": U32, "s32": I32, "f32": F32, "b64": U64, "u64": U64, "s64": I64, "f64": F64,
}  # fmt: skip
# Arithmetic that is not correctly rounded and all the same allowed, with the reason; computed as if it were.
ALLOWED_INEXACT: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A function of arrays, and the numpy types of its result and its operands."""

    function: Callable[..., Any]
    result: Any
    operands: tuple[Any, ...]


ARITHMETIC: dict[str, Arithmetic] = {}


def _same(stem: str, types: str, function: Callable[..., Any], arity: int) -> None:
    """`stem.type` for each type, which is the type of the result and of all operands."""
    for name in types.split():
        ARITHMETIC[f"{stem}.{name}"] = Arithmetic(function, TYPES[name], (TYPES[name],) * arity)


def _define(opcode: str, function: Callable[..., Any], result: str, *operands: str) -> None:
    ARITHMETIC[opcode] = Arithmetic(function, TYPES[result], tuple(TYPES[name] for name in operands))


# Integers: numpy's wrap around, as PTX's.
_same("add", "s16 s32 s64", np.add, 2)
_same("sub", "s16 s32 s64", np.subtract, 2)
_same("mul.lo", "s16 s32 s64", np.multiply, 2)
_same("mad.lo", "s32 s64", lambda a, b, c: a * b + c, 3)
_same("neg", "s32 s64", np.negative, 1)
_same("min", "s16 s32 s64 u32 u64", np.minimum, 2)
_same("max", "s16 s32 s64 u32 u64", np.maximum, 2)
for _name, _function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    _same(_name, "pred b16 b32 b64", _function, 2)
_same("not", "pred b16 b32 b64", np.invert, 1)
_define("mul.hi.u32", lambda a, b: (U64(1) * a * b >> U64(32)).astype(U32), "u32", "u32", "u32")
_define("mul.wide.u32", lambda a, b: U64(1) * a * b, "u64", "u32", "u32")
_define("mul.wide.s32", lambda a, b: I64(1) * a * b, "s64", "s32", "s32")
_define("mad.wide.u32", lambda a, b, c: U64(1) * a * b + c, "u64", "u32", "u32", "u64")
_define("mad.wide.s32", lambda a, b, c: I64(1) * a * b + c, "s64", "s32", "s32", "s64")


def divide_integers(a: Any, b: Any) -> Any:
    """The quotient rounded towards zero; of a division by zero, which PTX leaves open, all ones."""
    quotient = np.abs(I64(1) * a) // np.maximum(np.abs(I64(1) * b), 1)
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -quotient, quotient)).astype(I32)


def shift_left(a: Any, count: Any) -> Any:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Any, count: Any) -> Any:
    """Of a signed number, its sign fills the bits, however many."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))


def extract_bits(a: Any, start: Any, length: Any) -> Any:
    """`length` bits from bit `start` on, sign-extended where the type is signed."""
    wide = I64(1) * a
    inside = (wide >> start.astype(I64)) & ((I64(1) << length.astype(I64)) - 1)
    if a.dtype.kind == "i":
        sign = (I64(1) << length.astype(I64)) >> 1
        inside = (inside ^ sign) - sign
    return inside.astype(a.dtype)


def count_ones(a: Any) -> Any:
    return np.bitwise_count(a).astype(U32)


def pick_bytes(a: Any, b: Any, selector: Any) -> Any:
    """The bytes of b and a, a's the lower four, that each 4 bits of the selector name; with the fourth bit, their sign."""
    both = U64(1) * b << U64(32) | a
    result = np.zeros(np.shape(both), U64)
    for k in range(4):
        chosen = selector.astype(U64) >> U64(4 * k)
        byte = both >> (chosen & U64(7)) * U64(8) & U64(0xFF)
        byte = np.where(chosen & U64(8), (byte >> U64(7)) * U64(0xFF), byte)
        result |= byte << U64(8 * k)
    return result.astype(U32)


_define("div.s32", divide_integers, "s32", "s32", "s32")
for _name in ("b16", "b32", "b64"):
    _define(f"shl.{_name}", shift_left, _name, _name, "u32")
for _name in ("u16", "u32", "u64", "s16", "s32", "s64"):
    _define(f"shr.{_name}", shift_right, _name, _name, "u32")
for _name in ("u32", "s32"):
    _define(f"bfe.{_name}", extract_bits, _name, _name, "u32", "u32")
_define("popc.b32", count_ones, "u32", "u32")
_define("prmt.b32", pick_bytes, "b32", "b32", "b32", "b32")


def add_once(a: Any, b: Any) -> Any:
    """a + b of float64, an inexact sum with an odd last bit: rounding it to float32 is then the only rounding."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(I64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(F64)


def fuse(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once.

    float64 holds the product. Its rounded sum is rounded as the exact one is, unless it lies half way between two float32
    (those below the normal numbers have other half ways).
    """
    product, addend = np.asarray(np.multiply(a, b, dtype=F64)), np.asarray(c, dtype=F64)
    total = np.asarray(product + addend)
    doubtful = (total.view(I64) & 0x1FFFFFFF == 0x10000000) | (np.abs(total) < 2.0**-125)
    result = total.astype(F32)
    if doubtful.any():
        product, addend = np.broadcast_to(product, total.shape), np.broadcast_to(addend, total.shape)
        result[doubtful] = add_once(product[doubtful], addend[doubtful]).astype(F32)
    return result


def _add_exactly(a: Any, b: Any) -> tuple[Any, Any]:
    """a + b of float64 as its rounded value and the rest."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _halves(a: Any) -> tuple[Any, Any]:
    """A float64 as two numbers of 26 bits."""
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def fuse_wide(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float64, rounded once (Boldo and Melquiond, "Emulation of a FMA", 2008)."""
    a, b, c = (np.asarray(operand, dtype=F64) for operand in (a, b, c))
    with np.errstate(over="ignore", invalid="ignore"):
        product = a * b
        (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
        rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
        high, low = _add_exactly(c, rest)
        total, error = _add_exactly(product, high)
        exact = total + add_once(low, error)
        return np.where(np.isfinite(exact), exact, product + c)


def pairwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float32 on 64-bit registers that hold two."""

    def on_pairs(*operands: Any) -> Any:
        pairs = [np.ascontiguousarray(operand).reshape(-1, 1).view(F32) for operand in operands]
        return function(*pairs).view(U64).reshape(-1)

    return on_pairs


_FLOAT_OPERATIONS = (("add", np.add, 2), ("sub", np.subtract, 2), ("mul", np.multiply, 2))
for _name, _function, _arity in _FLOAT_OPERATIONS:
    _same(f"{_name}.rn", "f32 f64", _function, _arity)
    _define(f"{_name}.rn.f32x2", pairwise(_function), "b64", *["b64"] * _arity)
_same("fma.rn", "f32", fuse, 3)
_same("fma.rn", "f64", fuse_wide, 3)
_define("fma.rn.f32x2", pairwise(fuse), "b64", "b64", "b64", "b64")


def from_half(bits: Any) -> Any:
    return bits.view(F16).astype(F32)


# numpy's division and square root are the processor's, which are rounded correctly.
_same("div.rn", "f32 f64", np.divide, 2)
_same("sqrt.rn", "f32 f64", np.sqrt, 1)
# The first operand's sign on the second one's magnitude.
_same("copysign", "f32 f64", lambda sign, magnitude: np.copysign(magnitude, sign), 2)
_same("abs", "f32 f64", np.abs, 1)
_same("neg", "f32 f64", np.negative, 1)
for _opcode in ALLOWED_INEXACT:
    _define(_opcode, np.divide, "f32", "f32", "f32")


def minimum(a: Any, b: Any) -> Any:
    """NaN where an operand is; -0 is less than +0."""
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), np.minimum(a, b))


def maximum(a: Any, b: Any) -> Any:
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), np.maximum(a, b))


def minimum_of_magnitudes(a: Any, b: Any) -> Any:
    """`.xorsign.abs`: the smaller magnitude with the product of the signs; NaN where an operand is."""
    least = np.minimum(np.abs(a), np.abs(b))
    return np.where(np.signbit(a) != np.signbit(b), -least, least)


_same("min.NaN", "f32", minimum, 2)
_same("max.NaN", "f32", maximum, 2)
_same("min.NaN.xorsign.abs", "f32", minimum_of_magnitudes, 2)

_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _unordered(compare: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _ordered(compare: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


for _name, _function in _COMPARISONS.items():
    for _type in ("b16", "b32", "b64") if _name in ("eq", "ne") else ("s16", "s32", "s64", "u16", "u32", "u64"):
        _define(f"setp.{_name}.{_type}", _function, "pred", _type, _type)
    for _type in ("f32", "f64"):
        _define(f"setp.{_name}.{_type}", _ordered(_function) if _name == "ne" else _function, "pred", _type, _type)
        _define(f"setp.{_name}u.{_type}", _unordered(_function), "pred", _type, _type)
for _type in ("b16", "b32", "b64", "f32", "f64"):
    _define(f"selp.{_type}", lambda a, b, chosen: np.where(chosen, a, b), _type, _type, _type, "pred")
# A copy: registers do not share their arrays.
_same("mov", "pred b16 u16 b32 u32 f32 b64 u64 f64", np.copy, 1)


def to_bfloat16(x: Any) -> Any:
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def from_bfloat16(bits: Any) -> Any:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_half(x: Any) -> Any:
    return x.astype(F16).view(U16)


def _pack(narrow: Callable[..., Any]) -> Callable[..., Any]:
    return lambda high, low: narrow(high).astype(U32) << U32(16) | narrow(low)


def truncate(x: Any) -> Any:
    """Towards zero, to the nearest int32 where there is none, and 0 for NaN."""
    return np.clip(np.where(np.isnan(x), 0, x).astype(F64), -(2.0**31), 2.0**31 - 1).astype(I32)


def _converted(name: str) -> Callable[..., Any]:
    return lambda x: x.astype(TYPES[name])


_define("cvt.f32.bf16", from_bfloat16, "f32", "bf16")
_define("cvt.rn.bf16.f32", to_bfloat16, "bf16", "f32")
_define("cvt.rn.f16.f32", to_half, "b16", "f32")
_define("cvt.rn.bf16x2.f32", _pack(to_bfloat16), "b32", "f32", "f32")
_define("cvt.rn.f16x2.f32", _pack(to_half), "b32", "f32", "f32")
for _name in ("f32", "f64"):
    _define(f"cvt.rzi.s32.{_name}", truncate, "s32", _name)
# Widening is exact; the others are rounded by the processor, to the nearest even.
for _opcode in (
    "f32.f16", "f64.f32", "rn.f32.f64", "rn.f32.s32", "rn.f32.u32", "rn.f32.s64", "rn.f32.u64", "rn.f64.s32", "rn.f64.u32",
    "s64.s32", "u64.u32", "u32.u64", "u16.u32", "u32.u16", "s32.s16", "u16.u64", "u64.u16",
):  # fmt: skip
    _to, _from = _opcode.split(".")[-2:]
    _define(f"cvt.{_opcode}", _converted(_to), _to, _from)


# Of a half-precision operand and float32, rounded once to float32.
for _type, _widen in (("f16", from_half), ("bf16", from_bfloat16)):
    _define(f"add.rn.f32.{_type}", lambda a, b, widen=_widen: widen(a) + b, "f32", "b16", "f32")
    _define(f"sub.rn.f32.{_type}", lambda a, b, widen=_widen: widen(a) - b, "f32", "b16", "f32")
    _define(
        f"fma.rn.f32.{_type}", lambda a, b, c, widen=_widen: fuse(widen(a), widen(b), c), "f32", "b16", "b16", "f32"
    )


def explain_unknown(opcode: str) -> str:
    """Why an opcode is refused."""
    parts = opcode.split(".")
    inexact = [part for part in parts if part in ("approx", "full", "ftz")]
    if inexact:
        return f"unknown instruction: .{inexact[0]} is not correctly rounded"
    if parts[0] in ("add", "sub", "mul", "fma", "mad") and parts[-1] in ("f16", "bf16", "f32", "f64", "f32x2"):
        return (
            "unknown instruction: without .rn the assembler may contract it"
            if "rn" not in parts
            else "unknown instruction"
        )
    return "unknown instruction"
