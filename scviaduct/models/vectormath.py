"""exp, log, sine and cosine for numba loops, written so that LLVM turns them into vector instructions.

numba calls libm once a number (about 5 ns); the single-precision polynomials (Cephes' expf, logf, sinf and cosf) cost
0.2-0.4 ns a number with AVX-512 and are right to 1.3e-7 relative, the double-precision ones (Taylor's, and FreeBSD's log)
are right to 4e-16.
"""

from __future__ import annotations

import math

import numba
import numpy as np

RELAXED = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered (needed to vectorise them); infinities and NaN keep their meaning."""

_f = np.float32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
_HALF, _ONE, _SQRT_HALF = _f(0.5), _f(1.0), _f(0.70710678)
_MOST, _LEAST = _f(88.0), _f(-87.0)
_E0, _E1, _E2 = _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3)
_E3, _E4, _E5 = _f(4.1665795894e-2), _f(1.6666665459e-1), _f(5.0000001201e-1)
_TWO_PI = _f(6.283185307179586)
_S0, _S1, _S2 = _f(-1.9515295891e-4), _f(8.3321608736e-3), _f(-1.6666654611e-1)
_C0, _C1, _C2 = _f(2.443315711809948e-5), _f(-1.388731625493765e-3), _f(4.166664568298827e-2)
_L0, _L1, _L2 = _f(7.0376836292e-2), _f(-1.1514610310e-1), _f(1.1676998740e-1)
_L3, _L4, _L5 = _f(-1.2420140846e-1), _f(1.4249322787e-1), _f(-1.6668057665e-1)
_L6, _L7, _L8 = _f(2.0000714765e-1), _f(-2.4999993993e-1), _f(3.3333331174e-1)

_ROUND = 1.5 * 2.0**52  # added to a double, it leaves the nearest whole number in the last bits
_LOG2E_64, _LN2_HIGH_64, _LN2_LOW_64 = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_1, _2, _3, _4, _5, _6, _7, _8, _9, _10, _11, _12 = (1.0 / math.factorial(k) for k in range(1, 13))
_SQRT_HALF_BITS, _ONE_BITS, _MANTISSA = 0x3FE6A09E667F3BCD, 0x3FF0000000000000, 0x000FFFFFFFFFFFFF
_WHOLE_BITS, _WHOLE = 0x4330000000000000, 2.0**52  # of a double whose last bits are a whole number
_G1, _G2, _G3 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01
_G4, _G5, _G6 = 2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01
_G7 = 1.479819860511658591e-01


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def exp(x: np.float32) -> np.float32:
    """e**x; x is clamped to [-87, 88], where float32 ends."""
    x = min(max(x, _LEAST), _MOST)
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return (p * r * r + r + _ONE) * power.view(np.float32)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def log(x: np.float32) -> np.float32:
    """Natural logarithm of a normal positive float32."""
    bits = np.float32(x).view(np.int32)
    exponent = np.int32((bits >> np.int32(23)) - np.int32(126))
    m = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    low = m < _SQRT_HALF
    e = _f(np.int32(exponent - np.int32(1)) if low else exponent)
    m = (m + m if low else m) - _ONE
    z = m * m
    y = ((((((((_L0 * m + _L1) * m + _L2) * m + _L3) * m + _L4) * m + _L5) * m + _L6) * m + _L7) * m + _L8) * m * z
    return m + (y + e * _LN2_LOW - _HALF * z) + e * _LN2_HIGH


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def exp64(x: float) -> float:
    """e**x; x is clamped to [-708, 709], where float64 ends."""
    x = min(max(x, -708.0), 709.0)
    whole = np.float64(x * _LOG2E_64 + _ROUND)
    n = whole - _ROUND
    r = x - n * _LN2_HIGH_64 - n * _LN2_LOW_64
    p = (((((_12 * r + _11) * r + _10) * r + _9) * r + _8) * r + _7) * r + _6
    p = (((((p * r + _5) * r + _4) * r + _3) * r + _2) * r + _1) * r + 1.0
    power = np.int64((whole.view(np.int64) + np.int64(1023)) << np.int64(52))
    return p * power.view(np.float64)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def log64(x: float) -> float:
    """Natural logarithm of a normal positive float64."""
    bits = np.float64(x).view(np.int64) + np.int64(_ONE_BITS - _SQRT_HALF_BITS)
    e = np.int64((bits >> np.int64(52)) | np.int64(_WHOLE_BITS)).view(np.float64) - (_WHOLE + 1023.0)
    f = np.int64((bits & np.int64(_MANTISSA)) + np.int64(_SQRT_HALF_BITS)).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even, odd = w * (_G2 + w * (_G4 + w * _G6)), z * (_G1 + w * (_G3 + w * (_G5 + w * _G7)))
    half = 0.5 * f * f
    return e * _LN2_HIGH_64 - ((half - (s * (half + even + odd) + e * _LN2_LOW_64)) - f)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def cos_and_sin_of_turns(u: np.float32) -> tuple[np.float32, np.float32]:
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1], from the nearest quarter turn on."""
    quarter = np.int32(u * _f(4.0) + _HALF)
    x = (u - _f(quarter) * _f(0.25)) * _TWO_PI
    z = x * x
    s = ((_S0 * z + _S1) * z + _S2) * z * x + x
    c = ((_C0 * z + _C1) * z + _C2) * z * z - _HALF * z + _ONE
    odd, q = (quarter & np.int32(1)) == np.int32(1), quarter & np.int32(3)
    cos = s if odd else c
    sin = c if odd else s
    return (-cos if q == np.int32(1) or q == np.int32(2) else cos), (-sin if q >= np.int32(2) else sin)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def lost(r: np.float32, u: np.float32) -> np.float32:
    """What rounding took from u = 1 + r, so log1p(r) is log(u) + lost / u. Strict: must not be simplified to 0."""
    return r - (u - _ONE)
