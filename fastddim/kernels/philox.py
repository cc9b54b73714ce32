"""`fastddim/noise.py` on the device, bit for bit: Philox4x32-10 and the polynomial Box-Muller, for Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from fastddim import noise

_SIN = tuple(tl.constexpr(value) for value in noise.SIN)
_COS = tuple(tl.constexpr(value) for value in noise.COS)
_LOG = tuple(tl.constexpr(value) for value in noise.LOG)
SIN0, SIN1, SIN2, SIN3 = _SIN
COS0, COS1, COS2, COS3 = _COS
LOG0, LOG1, LOG2, LOG3, LOG4, LOG5, LOG6 = _LOG
SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
LN2_HIGH = tl.constexpr(noise.LN2_HIGH)
LN2_LOW = tl.constexpr(noise.LN2_LOW)
STREAM_STEP = tl.constexpr(noise.STREAM_STEP)


@triton.jit
def product(a, b):
    """`a * b` rounded by itself, whatever the compiler may fuse with an addition; -0.0 becomes 0.0.

    Inductor drops `enable_fp_fusion=False`. libdevice's `mul_rn` would flush denormals.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def _log(u):
    bits = u.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    exponent = bits >> 23
    mantissa = (bits - (exponent << 23) + SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    t = mantissa - 1.0
    square = t * t
    poly = product(t, LOG6) + LOG5
    poly = product(poly, t) + LOG4
    poly = product(poly, t) + LOG3
    poly = product(poly, t) + LOG2
    poly = product(poly, t) + LOG1
    poly = product(poly, t) + LOG0
    # A half and the few bits of LN2_HIGH make exact products, where one rounding is as good as two.
    tail = tl.fma(square, -0.5, product(square * t, poly))
    e = exponent.to(tl.float32)
    return tl.fma(e, LN2_HIGH, t + (tail + product(e, LN2_LOW)))


@triton.jit
def box_muller(word0, word1):
    """Two independent float32 normals from two uint32 words of any shape."""
    u = tl.fma(word0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    radius = tl.sqrt_rn(_log(u) * -2.0)
    bits = word1.to(tl.int32, bitcast=True)
    f = ((bits & 0x3FFFFFFF) - 0x20000000).to(tl.float32) * 9.313225746154785e-10
    square = f * f
    sine = product(square, SIN3) + SIN2
    sine = product(sine, square) + SIN1
    sine = f * (product(sine, square) + SIN0)
    cosine = product(square, COS3) + COS2
    cosine = product(cosine, square) + COS1
    cosine = product(cosine, square) + COS0
    odd = (bits & 0x40000000) != 0
    # The quarter turns differ from (cosine, sine) by a swap and signs; a sign is its bit, flipped.
    sign = bits & -2147483648
    x = tl.where(odd, sine, cosine).to(tl.int32, bitcast=True) ^ sign ^ tl.where(odd, -2147483648, 0)
    y = tl.where(odd, cosine, sine).to(tl.int32, bitcast=True) ^ sign
    return radius * x.to(tl.float32, bitcast=True), radius * y.to(tl.float32, bitcast=True)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 of counters (uint32) and an int64 seed; a round's product is one of 64 bits, not its two halves."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_block(seed, step, start, BLOCK: tl.constexpr, STREAM: tl.constexpr):
    """`[BLOCK]` float32: a stream's noise at a step, for elements `start ... start + BLOCK - 1` of one sample.

    seed: int64 scalar, read as 64 bits; step: integer scalar; start: a multiple of BLOCK, BLOCK of 4.
    """
    first = start // 4
    # start is a multiple of BLOCK, so no carry reaches the high word within a block.
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = low * 0
    high = (first >> 32).to(tl.uint32) + zero
    r0, r1, r2, r3 = philox(seed, low, high, step.to(tl.uint32) + zero, zero + STREAM)
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
