"""Diagonal normals given as (rows, 2 * latent) means and log variances, on CPUs: draws, divergences, densities.

With v = exp(log_var) + eps, s = sqrt(v), per row:
* a draw z = mean + s * e, and KL(N(mean, v) || N(0, 1)) = (v + mean**2 - 1 - log v) / 2 summed over the latent dimensions;
* log N(z | mean, v) = -((z - mean)**2 / v + log v + log 2 pi) / 2, likewise.
The ways back compute v again: an exponential costs less than an array to keep.
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


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def draw(parts: Row, noise: Row, eps: np.float32, z: Row, kl: Row) -> None:
    """Fill z (rows, latent) and kl (rows,)."""
    width = z.shape[1]
    for r in range(z.shape[0]):
        mean, log_var, e, out, total = parts[r, :width], parts[r, width:], noise[r], z[r], _ZERO
        for j in range(width):
            v = exp(log_var[j]) + eps
            out[j] = mean[j] + np.sqrt(v) * e[j]
            total += v + mean[j] * mean[j] - _ONE - log(v)
        kl[r] = _HALF * total


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def draw_back(parts: Row, noise: Row, eps: np.float32, by_z: Row, by_kl: Row, dparts: Row) -> None:
    """Fill dparts from the gradients by z and kl."""
    width = noise.shape[1]
    for r in range(noise.shape[0]):
        mean, log_var, e, g, k = parts[r, :width], parts[r, width:], noise[r], by_z[r], by_kl[r]
        dmean, dlog_var = dparts[r, :width], dparts[r, width:]
        for j in range(width):
            own = exp(log_var[j])
            v = own + eps
            dmean[j] = g[j] + k * mean[j]
            dlog_var[j] = _HALF * own * (g[j] * e[j] / np.sqrt(v) + k * (_ONE - _ONE / v))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def log_density(parts: Row, z: Row, eps: np.float32, out: Row) -> None:
    """Fill out (rows,); z has a row for each so many of them."""
    width, spread = z.shape[1], out.size // max(1, z.shape[0])
    for r in range(out.size):
        mean, log_var, point, total = parts[r, :width], parts[r, width:], z[r // spread], _ZERO
        for j in range(width):
            v = exp(log_var[j]) + eps
            d = point[j] - mean[j]
            total += d * d / v + log(v) + _LOG_2PI
        out[r] = -_HALF * total


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def log_density_back(parts: Row, z: Row, eps: np.float32, by_out: Row, dparts: Row, dz: Row) -> None:
    """Fill dparts and dz from the gradient by out."""
    width, spread = z.shape[1], by_out.size // max(1, z.shape[0])
    for r in range(by_out.size):
        mean, log_var, point, g = parts[r, :width], parts[r, width:], z[r // spread], by_out[r]
        dmean, dlog_var, dpoint = dparts[r, :width], dparts[r, width:], dz[r // spread]
        if r % spread == 0:
            dpoint[:] = _ZERO
        for j in range(width):
            own = exp(log_var[j])
            inverse = _ONE / (own + eps)
            d = (point[j] - mean[j]) * inverse
            dmean[j] = g * d
            dpoint[j] -= g * d
            dlog_var[j] = _HALF * g * own * (d * d - inverse)
