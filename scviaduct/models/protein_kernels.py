"""totalVI's losses of proteins and their gradients on CPUs, in float64: see proteins for the formulas.

With s the background's standard deviation, b = alpha + s * noise its logarithm, mu1 = e * exp(b) and mu2 = mu1 * f the
two rates, phi the inverse dispersion and d = log NB2 - m - log NB1, the second component has the weight w2 = sigmoid(d):

* -log p: d/d log mu = -(w1 g1 + w2 g2) with g = y mu / (mu + eps) - (phi + y) mu / (phi + mu + eps), for b and log e alike;
  d/d log f = -w2 g2; d/dm = w2 - sigmoid(-m); d/d log phi = -phi (psi(y + phi) - psi(phi) + w1 h1 + w2 h2) with
  h = log(phi + eps) - log(phi + mu + eps) + phi / (phi + eps) - (phi + y) / (phi + mu + eps).
* KL of the background: d/d alpha = (alpha - mean) / var, which is minus that by the prior's mean; d/ds = s / var - 1 / s.

What is known per batch and protein is copied to each cell first; then some hundred (cell, protein)s are computed at a
time, flat, as a panel is often shorter than a few vectors. Gradients by what cells share are added up in the cells'
order: the bits do not depend on the threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.models.vectormath import RELAXED, exp64, log64

CELLS_PER_CHUNK = 32
_AT_ONCE = 512  # (cell, protein)s whose intermediate numbers are in the cache
_EPS = 1e-8
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_PULL = 1e-3  # of -log P(foreground) in the loss

Row = NDArray[np.float32]
Work = NDArray[np.float64]


class Said(NamedTuple):
    """What is known of each cell and protein: (cells * proteins,)."""

    exp_std: bool  # the background's standard deviation is exp(log_beta), not softplus
    log_alpha: Row
    log_beta: Row
    excess: Row
    mixing: Row
    counts: Row
    noise: Row


class Shared(NamedTuple):
    """What cells share: (batches, proteins), or one row for all; and the batch of each cell."""

    measured: NDArray[np.bool_]
    codes: NDArray[np.int64]
    log_efficiency: Row
    prior_mean: Row
    prior_log_std: Row
    log_phi: Row


class Results(NamedTuple):
    """Losses, (cells,), and the gradients of their sum times `weight`."""

    weight: float
    likelihood: Row
    kl: Row
    said: Row  # (4, cells * proteins) by log_alpha, log_beta, excess, mixing
    shared: Row  # (4, cells * proteins) by the cell's log_efficiency, prior_mean, prior_log_std, log_phi


# Rows of what is computed on the way.
_SEEN, _EFFICIENCY, _MEAN, _LOG_STD, _PHI, _LOG_PHI, _GAMMA, _PSI, _DRAWN, _SLOPE, _KL, _NLL = range(12)
_ALPHA, _BETA, _PRIOR, _RATE, _EXCESS, _MIXING, _BY_PHI, _PULLED = range(12, 20)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _gammas(x: float) -> tuple[float, float]:
    """Log-gamma and digamma of x > 0: Stirling's series, from x + 8 on where x is below 8."""
    low = min(x, 8.0)
    rising, slope = low, 1.0
    for k in range(1, 8):
        slope = slope * (low + k) + rising
        rising *= low + k
    shifted = x < 8.0
    z = x + 8.0 if shifted else x
    log_z, i = log64(z), 1.0 / z
    j = i * i
    series = ((((-691 / 360360 * j + 1 / 1188) * j - 1 / 1680) * j + 1 / 1260) * j - 1 / 360) * j + 1 / 12
    value = (z - 0.5) * log_z - z + _HALF_LOG_2PI + i * series
    series = (((((691 / 32760 * j - 1 / 132) * j + 1 / 240) * j - 1 / 252) * j + 1 / 120) * j - 1 / 12) * j
    psi = log_z - 0.5 * i + series
    return (value - log64(rising) if shifted else value), (psi - slope / rising if shifted else psi)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _softplus(x: float) -> tuple[float, float]:
    """log(1 + e**x) and its slope."""
    e = exp64(-abs(x))
    u = 1.0 + e
    return max(x, 0.0) + log64(u), (1.0 if x > 0.0 else e) / u


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _background(said: Said, at: slice, w: Work) -> None:
    """The log background drawn and its slope by beta; KL and the efficiencies' prior with their gradients."""
    seen, efficiency, mean, log_std = w[_SEEN], w[_EFFICIENCY], w[_MEAN], w[_LOG_STD]
    alpha, beta, noise = said.log_alpha[at], said.log_beta[at], said.noise[at]
    drawn, slope, kl, by_alpha, by_beta, by_prior = w[_DRAWN], w[_SLOPE], w[_KL], w[_ALPHA], w[_BETA], w[_PRIOR]
    for k in range(alpha.size):
        a, b, e = np.float64(alpha[k]), np.float64(beta[k]), efficiency[k]
        if said.exp_std:
            std = exp64(b)
            by_std = std
        else:
            std, by_std = _softplus(b)
        std += _EPS
        apart, inverse = a - mean[k], exp64(-2.0 * log_std[k])
        distance = (std * std + apart * apart) * inverse
        drawn[k] = a + std * np.float64(noise[k])
        slope[k] = by_std * np.float64(noise[k])
        own = log_std[k] - log64(std) + 0.5 * (distance - 1.0)
        kl[k] = (own if seen[k] > 0.0 else 0.0) + e + 0.5 * e * e + _HALF_LOG_2PI
        by_alpha[k] = apart * inverse
        by_beta[k] = (std * inverse - 1.0 / std) * by_std
        by_prior[k] = 1.0 - distance


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _coefficients(counts: Row, phi: Work, gamma: Work, psi: Work) -> None:
    """From those of phi to the log of the binomial coefficient and its slope by phi."""
    for k in range(counts.size):
        y = np.float64(counts[k])
        value, slope = _gammas(y + phi[k])
        factorial, _ = _gammas(y + 1.0)
        gamma[k] = value - gamma[k] - factorial
        psi[k] = slope - psi[k]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _component(y: float, mu: float, phi: float, log_phi: float) -> tuple[float, float, float]:
    """log NB without the coefficient, and its slopes by log mu and by phi."""
    low, total = mu + _EPS, phi + mu + _EPS
    log_total, pull = log64(total), (phi + y) / total
    value = phi * (log_phi - log_total) + y * (log64(low) - log_total)
    return value, mu * (y / low - pull), log_phi - log_total + phi / (phi + _EPS) - pull


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _mixture(said: Said, at: slice, w: Work) -> None:
    """-log p, the pull towards foreground, and their gradients; that by phi without the coefficient's part."""
    counts, excess, mixing = said.counts[at], said.excess[at], said.mixing[at]
    seen, efficiency, drawn, phi, log_phi = w[_SEEN], w[_EFFICIENCY], w[_DRAWN], w[_PHI], w[_LOG_PHI]
    gamma, nll, pulled = w[_GAMMA], w[_NLL], w[_PULLED]
    by_rate, by_excess, by_mixing, by_phi = w[_RATE], w[_EXCESS], w[_MIXING], w[_BY_PHI]
    for k in range(counts.size):
        y, m, r = np.float64(counts[k]), np.float64(mixing[k]), np.float64(excess[k])
        above, mu = max(r, 0.0) + 1.0 + _EPS, exp64(efficiency[k] + drawn[k])
        v1, g1, h1 = _component(y, mu, phi[k], log_phi[k])
        v2, g2, h2 = _component(y, mu * above, phi[k], log_phi[k])
        better, w2 = _softplus(v2 - m - v1)
        unlikely, share = _softplus(-m)
        w1, there = 1.0 - w2, seen[k] > 0.0
        nll[k] = unlikely - gamma[k] - v1 - better if there else 0.0
        pulled[k] = _PULL * unlikely
        by_rate[k] = -(w1 * g1 + w2 * g2) if there else 0.0
        by_excess[k] = -w2 * g2 / above if min(r, seen[k]) > 0.0 else 0.0
        by_mixing[k] = (w2 - share if there else 0.0) - _PULL * share
        by_phi[k] = w1 * h1 + w2 * h2


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _gradients(w: Work, start: int, n: int, out: Results) -> None:
    """All gradients of n (cell, protein)s, weighted."""
    weight, at = out.weight, slice(start, start + n)
    seen, slope, rate, prior = w[_SEEN], w[_SLOPE], w[_RATE], w[_PRIOR]
    alpha, beta, mean = out.said[0, at], out.said[1, at], out.shared[1, at]
    for k in range(n):
        own = w[_ALPHA, k] if seen[k] > 0.0 else 0.0
        alpha[k] = weight * (own + rate[k])
        mean[k] = -weight * own
        beta[k] = weight * ((w[_BETA, k] if seen[k] > 0.0 else 0.0) + rate[k] * slope[k])
    excess, mixing = out.said[2, at], out.said[3, at]
    for k in range(n):
        excess[k], mixing[k] = weight * w[_EXCESS, k], weight * w[_MIXING, k]
    efficiency, log_std, log_phi = out.shared[0, at], out.shared[2, at], out.shared[3, at]
    for k in range(n):
        efficiency[k] = weight * (rate[k] + 1.0 + w[_EFFICIENCY, k])
        log_std[k] = weight * (prior[k] if seen[k] > 0.0 else 0.0)
        log_phi[k] = -weight * w[_PHI, k] * (w[_PSI, k] + w[_BY_PHI, k] if seen[k] > 0.0 else 0.0)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _of_phi(log_phi: Row, codes: NDArray[np.int64]) -> Work:
    """(4, rows, proteins) phi, its logarithm, log-gamma and digamma, of the rows that cells have."""
    out = np.empty((4, *log_phi.shape))
    done = np.zeros(len(log_phi), np.bool_)
    for code in codes:
        row = code if len(log_phi) > 1 else 0
        if done[row]:
            continue
        done[row] = True
        for p in range(log_phi.shape[1]):
            phi = exp64(np.float64(log_phi[row, p]))
            out[0, row, p], out[1, row, p] = phi, log64(phi + _EPS)
            out[2, row, p], out[3, row, p] = _gammas(phi)
    return out


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _to_cell(shared: Shared, of_phi: Work, code: int | np.int64, w: Work, first: int) -> None:
    """What is known per batch to the columns of one cell."""
    row, of = (code if len(shared.measured) > 1 else 0), (code if of_phi.shape[1] > 1 else 0)
    for p in range(shared.measured.shape[1]):
        k = first + p
        w[_SEEN, k] = 1.0 if shared.measured[row, p] else 0.0
        w[_EFFICIENCY, k] = shared.log_efficiency[row, p]
        w[_MEAN, k], w[_LOG_STD, k] = shared.prior_mean[row, p], shared.prior_log_std[row, p]
        w[_PHI, k], w[_LOG_PHI, k] = of_phi[0, of, p], of_phi[1, of, p]
        w[_GAMMA, k], w[_PSI, k] = of_phi[2, of, p], of_phi[3, of, p]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _chunk(said: Said, shared: Shared, of_phi: Work, out: Results, chunk: int | np.int64, chunks: int) -> None:
    n, width = out.kl.size, shared.measured.shape[1]
    together = max(1, _AT_ONCE // width)
    work = np.empty((20, together * width))
    last = n * (chunk + 1) // chunks
    for start in range(n * chunk // chunks, last, together):
        cells = min(together, last - start)
        at = slice(start * width, (start + cells) * width)
        for i in range(cells):
            _to_cell(shared, of_phi, shared.codes[start + i], work, i * width)
        _background(said, at, work)
        _coefficients(said.counts[at], work[_PHI], work[_GAMMA], work[_PSI])
        _mixture(said, at, work)
        _gradients(work, start * width, cells * width, out)
        for i in range(cells):
            own = slice(i * width, (i + 1) * width)
            out.likelihood[start + i] = work[_NLL, own].sum()
            out.kl[start + i] = work[_KL, own].sum() + work[_PULLED, own].sum()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def losses(said: Said, shared: Shared, out: Results, chunks: int) -> None:
    """Fill `out`."""
    of_phi = _of_phi(shared.log_phi, shared.codes)
    for chunk in range(chunks):
        _chunk(said, shared, of_phi, out, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def losses_parallel(said: Said, shared: Shared, out: Results, chunks: int) -> None:
    """As `losses`, chunks spread over threads."""
    of_phi = _of_phi(shared.log_phi, shared.codes)
    for chunk in numba.prange(chunks):
        _chunk(said, shared, of_phi, out, np.int64(chunk), chunks)
