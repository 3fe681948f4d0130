"""Diagonal normals given as (rows, 2 * latent) means and log variances, on CPUs: draws, divergences, densities.

With v = exp(log_var) + eps, s = sqrt(v), per row:
* a draw z = mean + s * e, and KL(N(mean, v) || N(0, 1)) = (v + mean**2 - 1 - log v) / 2 summed over the latent dimensions;
* log N(z | mean, v) = -((z - mean)**2 / v + log v + log 2 pi) / 2, likewise.
The ways back compute v again: an exponential costs less than an array to keep.

Of a row of 30 latent dimensions the vector instructions take 16, so on the way forward exponentials and logarithms are
taken of some rows at once, in a buffer that stays in the nearest cache (on the way back it did not pay). Cells are cut into
chunks by their number alone.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.models.vectormath import RELAXED, exp, log

Row = NDArray[np.float32]
_f = np.float32
_ZERO, _HALF, _ONE = _f(0.0), _f(0.5), _f(1.0)
_LOG_2PI = _f(math.log(2.0 * math.pi))
_TOGETHER = 1024  # numbers in a buffer


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _span(z: Row, spread: int, chunk: int | np.int64, chunks: int) -> tuple[int, int]:
    """First and last row of a chunk, where z has a row for each so many; these lie in one chunk."""
    cells = z.shape[0]
    return cells * chunk // chunks * spread, cells * (chunk + 1) // chunks * spread


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _variances(parts: Row, first: int, last: int, own: Row) -> int:
    """own = exp(log_var) of some rows, one after another; returns how many numbers they are."""
    width = parts.shape[1] // 2
    for r in range(first, last):
        for j in range(width):
            own[(r - first) * width + j] = parts[r, width + j]
    n = (last - first) * width
    for i in range(n):
        own[i] = exp(own[i])
    return n


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _buffers(width: int) -> tuple[int, Row, Row, Row]:
    """How many rows are taken together, and three buffers for their numbers."""
    rows = max(1, _TOGETHER // max(1, width))
    x = np.empty((3, rows * width), np.float32)
    return rows, x[0], x[1], x[2]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _draw(parts: Row, noise: Row, eps: np.float32, z: Row, kl: Row, chunk: int | np.int64, chunks: int) -> None:
    first, last = _span(z, 1, chunk, chunks)
    width = z.shape[1]
    rows, own, deviation, rest = _buffers(width)
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        for i in range(_variances(parts, start, stop, own)):
            v = own[i] + eps
            deviation[i], rest[i] = np.sqrt(v), v - log(v)
        for r in range(start, stop):
            at, mean, e, out, total = (r - start) * width, parts[r], noise[r], z[r], _ZERO
            for j in range(width):
                out[j] = mean[j] + deviation[at + j] * e[j]
            for j in range(width):
                total += rest[at + j] + mean[j] * mean[j]
            kl[r] = _HALF * (total - _f(width))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _draw_back(
    parts: Row, noise: Row, eps: np.float32, by_z: Row, by_kl: Row, dparts: Row, chunk: int | np.int64, chunks: int
) -> None:
    first, last = _span(by_z, 1, chunk, chunks)
    width = noise.shape[1]
    for r in range(first, last):
        mean, log_var, e, g, k = parts[r, :width], parts[r, width:], noise[r], by_z[r], by_kl[r]
        dmean, dlog_var = dparts[r, :width], dparts[r, width:]
        for j in range(width):
            own = exp(log_var[j])
            v = own + eps
            dmean[j] = g[j] + k * mean[j]
            dlog_var[j] = _HALF * own * (g[j] * e[j] / np.sqrt(v) + k * (_ONE - _ONE / v))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _log_density(parts: Row, z: Row, eps: np.float32, out: Row, chunk: int | np.int64, chunks: int) -> None:
    width, spread = z.shape[1], out.size // max(1, z.shape[0])
    first, last = _span(z, spread, chunk, chunks)
    rows, own, inverse, logs = _buffers(width)
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        for i in range(_variances(parts, start, stop, own)):
            v = own[i] + eps
            inverse[i], logs[i] = _ONE / v, log(v)
        for r in range(start, stop):
            at, mean, point, total = (r - start) * width, parts[r], z[r // spread], _ZERO
            for j in range(width):
                d = point[j] - mean[j]
                total += d * d * inverse[at + j] + logs[at + j]
            out[r] = -_HALF * (total + _f(width) * _LOG_2PI)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _log_density_back(
    parts: Row, z: Row, eps: np.float32, by_out: Row, dparts: Row, dz: Row, chunk: int | np.int64, chunks: int
) -> None:
    width, spread = z.shape[1], by_out.size // max(1, z.shape[0])
    first, last = _span(z, spread, chunk, chunks)
    for r in range(first, last):
        mean, log_var, point, g = parts[r, :width], parts[r, width:], z[r // spread], by_out[r]
        dmean, dlog_var, dpoint = dparts[r, :width], dparts[r, width:], dz[r // spread]
        if r % spread == 0:
            for j in range(width):
                dpoint[j] = _ZERO
        for j in range(width):
            own = exp(log_var[j])
            inverse = _ONE / (own + eps)
            d = (point[j] - mean[j]) * inverse
            dmean[j] = g * d
            dpoint[j] -= g * d
            dlog_var[j] = _HALF * g * own * (d * d - inverse)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def draw(parts: Row, noise: Row, eps: np.float32, z: Row, kl: Row, chunks: int) -> None:
    """Fill z (rows, latent) and kl (rows,)."""
    for chunk in range(chunks):
        _draw(parts, noise, eps, z, kl, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def draw_parallel(parts: Row, noise: Row, eps: np.float32, z: Row, kl: Row, chunks: int) -> None:
    """As `draw`, chunks spread over threads."""
    for chunk in numba.prange(chunks):
        _draw(parts, noise, eps, z, kl, np.int64(chunk), chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def draw_back(parts: Row, noise: Row, eps: np.float32, by_z: Row, by_kl: Row, dparts: Row, chunks: int) -> None:
    """Fill dparts from the gradients by z and kl."""
    for chunk in range(chunks):
        _draw_back(parts, noise, eps, by_z, by_kl, dparts, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def draw_back_parallel(
    parts: Row, noise: Row, eps: np.float32, by_z: Row, by_kl: Row, dparts: Row, chunks: int
) -> None:
    """As `draw_back`, chunks spread over threads."""
    for chunk in numba.prange(chunks):
        _draw_back(parts, noise, eps, by_z, by_kl, dparts, np.int64(chunk), chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def log_density(parts: Row, z: Row, eps: np.float32, out: Row, chunks: int) -> None:
    """Fill out (rows,); z has a row for each so many of them."""
    for chunk in range(chunks):
        _log_density(parts, z, eps, out, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def log_density_parallel(parts: Row, z: Row, eps: np.float32, out: Row, chunks: int) -> None:
    """As `log_density`, chunks spread over threads."""
    for chunk in numba.prange(chunks):
        _log_density(parts, z, eps, out, np.int64(chunk), chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def log_density_back(parts: Row, z: Row, eps: np.float32, by_out: Row, dparts: Row, dz: Row, chunks: int) -> None:
    """Fill dparts and dz from the gradient by out."""
    for chunk in range(chunks):
        _log_density_back(parts, z, eps, by_out, dparts, dz, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def log_density_back_parallel(
    parts: Row, z: Row, eps: np.float32, by_out: Row, dparts: Row, dz: Row, chunks: int
) -> None:
    """As `log_density_back`, chunks spread over threads."""
    for chunk in numba.prange(chunks):
        _log_density_back(parts, z, eps, by_out, dparts, dz, np.int64(chunk), chunks)
