"""Negative log-likelihoods of counts and their gradients, cell by cell, for CPUs.

A cell is handled in three steps: all genes as if the count were 0 (vectorised), the non-zeros (log-gamma becomes a
short product because counts are small integers), and the way back through softmax or softplus. With
mu = size * scale(logits), theta = exp(px_r), eps = 1e-8 (scvi-tools' formulas) and T = theta + mu + eps:

* NB: -log p(0) = theta log(T / (theta + eps)); a count x adds -log prod_{k<x} (theta + k)(mu + eps) / (T (k + 1)).
* ZINB, pi the logit of an extra zero, t = -pi + log p_NB(0): softplus(-pi) - softplus(t) at 0, otherwise
  softplus(-pi) - t + (the NB term of x). `sure` = sigmoid(t) is the chance that a zero is the NB's own.
* Poisson: mu - x log mu + log x!.   Normal: mean mu, standard deviation exp(px_r).

`a` is mu * dL/dmu: its sum over genes is the gradient of log size, a - softmax * sum(a) that of the logits.
Everything is float32 but the non-zeros, whose products need float64's range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.models.vectormath import RELAXED, exp, log, lost

NB, ZINB, POISSON, NORMAL = range(4)
"""Likelihoods the kernel knows."""

Row = NDArray[np.float32]
_f = np.float32
_EPS, _ZERO, _ONE, _HALF = _f(1e-8), _f(0.0), _f(1.0), _f(0.5)
_EMPTY = _f(-80.0)  # log sizes below this are the -inf of a cell without counts
_HALF_LOG_2PI = _f(0.5 * math.log(2 * math.pi))
_SMALL_COUNT = 16  # up to here log-gamma is a product that cannot leave float64's range
_LARGE_THETA = 1e10
_INVERSE_FACTORIAL = np.array([1.0 / math.factorial(k) for k in range(_SMALL_COUNT + 1)])
_LOG_FACTORIAL = np.array([math.lgamma(k + 1.0) for k in range(256)])


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=True)
def _largest(row: Row) -> np.float32:
    top = row[0]
    for g in range(row.size):
        top = max(top, row[g])
    return top


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _softmax_rate(logits: Row, library: np.float32, mu: Row) -> np.float32:
    """mu = exp(library) * softmax(logits); returns log mu - logits, the same for all genes."""
    top = _largest(logits)
    total = _ZERO
    for g in range(mu.size):
        mu[g] = exp(logits[g] - top)
        total += mu[g]
    factor = exp(library) / total if library > _EMPTY else _ZERO
    for g in range(mu.size):
        mu[g] *= factor
    return library - top - log(total)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _softplus_rate(logits: Row, library: np.float32, mu: Row) -> np.float32:
    """mu = exp(library) * log(1 + exp(logits)); returns log mu - logits where logits are far below 0."""
    size = exp(library) if library > _EMPTY else _ZERO
    for g in range(mu.size):
        e = exp(-abs(logits[g]))
        u = _ONE + e
        mu[g] = size * (max(logits[g], _ZERO) + log(u) + lost(e, u) / u)
    return library


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _nb_zeros(mu: Row, theta: Row, a: Row, q: Row, tl: Row) -> np.float32:
    """All counts 0: returns the loss; writes it per gene to tl, a, and q = dL/dpx_r."""
    loss = _ZERO
    for g in range(mu.size):
        inverse = _ONE / (theta[g] + _EPS)
        r = mu[g] * inverse
        u = _ONE + r
        w = _ONE / u
        share = theta[g] * inverse
        tl[g] = theta[g] * (log(u) + lost(r, u) * w)
        a[g] = mu[g] * share * w
        q[g] = tl[g] - share * a[g]
        loss += tl[g]
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _extra_zeros(zi: Row, tl: Row, dzi: Row, sure: Row) -> np.float32:
    """All counts 0, mixed with extra zeros: returns the loss, writes `sure` and the part of dL/dpi known so far."""
    loss = _ZERO
    for g in range(zi.size):
        t = -zi[g] - tl[g]
        e_pi, e_t = exp(-abs(zi[g])), exp(-abs(t))
        dzi[g] = -(_ONE if zi[g] < _ZERO else e_pi) / (_ONE + e_pi)
        sure[g] = (_ONE if t > _ZERO else e_t) / (_ONE + e_t)
        loss += max(-zi[g], _ZERO) - max(t, _ZERO) + log((_ONE + e_pi) / (_ONE + e_t))
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _rising(x: float, theta: float) -> tuple[float, float]:
    """log Gamma(x+theta)/Gamma(theta) and its derivative by theta: Stirling's difference, shifted up to 12."""
    low, shift, slope = theta, 0.0, 0.0
    while low < 12.0:
        shift -= math.log1p(x / low)
        slope -= 1.0 / (low + x) - 1.0 / low
        low += 1.0
    i, j = 1.0 / low, 1.0 / (low + x)
    ratio = math.log1p(x / low)
    value = (low - 0.5) * ratio + x * (math.log(low + x) - 1.0)
    value += (j - i) / 12.0 - (j * j * j - i * i * i) / 360.0
    digamma = ratio - 0.5 * (j - i) - (j * j - i * i) / 12.0 + (j**4 - i**4) / 120.0
    return value + shift, digamma + slope


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _large_count(x: float, theta: float, m: float, total: float) -> tuple[float, float]:
    """-log prod_{k<x} (theta + k) m / (total (k + 1)) and sum_{k<x} 1 / (theta + k) without the product."""
    value, digamma = _rising(x, theta)
    return math.lgamma(x + 1.0) - value - x * math.log(m / total), digamma


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _nb_counts(genes: NDArray[np.int32], counts: Row, mu: Row, theta: Row, a: Row, q: Row) -> float:
    """Add to a and q what the non-zeros change; returns the change of the loss."""
    loss, product = 0.0, 1.0
    for j in range(genes.size):
        g, x = genes[j], float(counts[j])
        th, m = float(theta[g]), float(mu[g]) + 1e-8
        total = th + m
        if x <= _SMALL_COUNT and th < _LARGE_THETA:
            rising, slope, odds = 1.0, 0.0, 1.0
            for k in range(int(x)):
                slope = slope * (th + k) + rising
                rising *= th + k
                odds *= m / total
            value, digamma = rising * odds * _INVERSE_FACTORIAL[int(x)], slope / rising
            # One logarithm for many genes: factors are collected while they stay far inside float64's range.
            if 1e-60 < value < 1e60:
                product *= value
                if not 1e-200 < product < 1e200:
                    loss -= math.log(product)
                    product = 1.0
            else:
                loss -= math.log(value)
        else:
            extra, digamma = _large_count(x, th, m, total)
            loss += extra
        a[g] += _f(x * float(mu[g]) * (1.0 / total - 1.0 / m))
        q[g] += _f(th * (x / total - digamma))
    return loss - math.log(product)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _not_extra(genes: NDArray[np.int32], zi: Row, tl: Row, sure: Row) -> np.float32:
    """An observed count is never an extra zero: softplus(-t) joins the loss and `sure` becomes 1."""
    loss = _ZERO
    for j in range(genes.size):
        t = -zi[genes[j]] - tl[genes[j]]
        loss += max(-t, _ZERO) + log(_ONE + exp(-abs(t)))
    for j in range(genes.size):
        sure[genes[j]] = _ONE
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _nb_gradients(a: Row, q: Row, weight: np.float32, dr: Row) -> None:
    for g in range(a.size):
        a[g] *= weight
        dr[g] += weight * q[g]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _zinb_gradients(a: Row, q: Row, sure: Row, weight: np.float32, dr: Row, dzi: Row) -> None:
    for g in range(a.size):
        s = weight * sure[g]
        a[g] *= s
        dr[g] += s * q[g]
        dzi[g] = weight * dzi[g] + s


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _poisson_zeros(mu: Row, weight: np.float32, a: Row) -> np.float32:
    loss = _ZERO
    for g in range(mu.size):
        a[g] = weight * mu[g]
        loss += mu[g]
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _poisson_counts(genes: NDArray[np.int32], counts: Row, mu: Row, log_mu: Row, weight: np.float32, a: Row) -> float:
    """`log_mu` stands in for log(mu) where mu has left float32's range."""
    loss = 0.0
    for j in range(genes.size):
        g, x = genes[j], float(counts[j])
        loss += _LOG_FACTORIAL[int(x)] if x < 256.0 else math.lgamma(x + 1.0)
        loss -= x * (math.log(mu[g]) if mu[g] > 1e-30 else float(log_mu[g]))
        a[g] -= weight * counts[j]
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _normal(x: Row, mu: Row, px_r: Row, weight: np.float32, a: Row, dr: Row) -> np.float32:
    loss = _ZERO
    for g in range(mu.size):
        inverse = exp(-px_r[g])
        d = (x[g] - mu[g]) * inverse
        a[g] = -weight * d * inverse * mu[g]
        dr[g] += weight * (_ONE - d * d)
        loss += _HALF * d * d + px_r[g] + _HALF_LOG_2PI
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _softmax_back(mu: Row, library: np.float32, a: Row) -> np.float32:
    """a becomes the gradient of the logits; returns that of the library."""
    total = _ZERO
    for g in range(a.size):
        total += a[g]
    factor = total * exp(-library) if library > _EMPTY else _ZERO
    for g in range(a.size):
        a[g] -= factor * mu[g]
    return total


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _softplus_back(logits: Row, a: Row) -> np.float32:
    """As `_softmax_back`; d log softplus(l) / dl = sigmoid(l) / softplus(l), which is 1 where l is far below 0."""
    total = _ZERO
    for g in range(a.size):
        total += a[g]
        e = exp(-abs(logits[g]))
        u = _ONE + e
        sigmoid = (_ONE if logits[g] > _ZERO else e) / u
        scale = max(logits[g], _ZERO) + log(u) + lost(e, u) / u
        a[g] *= sigmoid / scale if logits[g] > _EMPTY else _ONE
    return total


class Kind(NamedTuple):
    """Which loss."""

    likelihood: int
    softplus: bool
    """Scale = softplus(logits); otherwise softmax."""
    weight: np.float32
    """Gradients are those of weight * sum(loss)."""


class Nonzeros(NamedTuple):
    """CSR of the counts."""

    indptr: NDArray[np.int64]
    genes: NDArray[np.int32]
    counts: Row


class Inputs(NamedTuple):
    """What the decoder says of each cell; arrays that a likelihood does not use have shape (1, 1)."""

    logits: Row  # (cells, genes)
    library: Row  # (cells,) log size
    px_r: Row  # (1 or cells, genes)
    theta: Row  # exp(px_r)
    zi: Row  # (cells, genes)


class Outputs(NamedTuple):
    """Loss per cell and the gradients by each input."""

    loss: Row  # (cells,)
    logits: Row
    library: Row
    px_r: Row  # (chunks or cells, genes), zeroed by the caller: a chunk of cells adds to a row of its own
    zi: Row


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _counts_cell(kind: Kind, i: int, rows: tuple, cell: tuple, inputs: Inputs, out: Outputs, work: Row) -> float:
    """Loss and gradients by log mu, px_r and zi of cell i under NB or ZINB."""
    genes, counts = cell
    mu, a, tl, q = work[0], out.logits[i], work[1], work[2]
    theta, dr = inputs.theta[rows[0]], out.px_r[rows[1]]
    loss = float(_nb_zeros(mu, theta, a, q, tl))
    if kind.likelihood == ZINB:
        zi, sure = inputs.zi[i], work[3]
        loss = float(_extra_zeros(zi, tl, out.zi[i], sure)) + float(_not_extra(genes, zi, tl, sure))
        loss += _nb_counts(genes, counts, mu, theta, a, q)
        _zinb_gradients(a, q, sure, kind.weight, dr, out.zi[i])
        return loss
    loss += _nb_counts(genes, counts, mu, theta, a, q)
    _nb_gradients(a, q, kind.weight, dr)
    return loss


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _other_cell(kind: Kind, i: int, rows: tuple, cell: tuple, inputs: Inputs, out: Outputs, work: Row) -> float:
    """As `_counts_cell` under Poisson (work[1] is log mu) or Normal (work[1] becomes the dense counts)."""
    genes, counts = cell
    mu, a, x = work[0], out.logits[i], work[1]
    if kind.likelihood == POISSON:
        return float(_poisson_zeros(mu, kind.weight, a)) + _poisson_counts(genes, counts, mu, x, kind.weight, a)
    for g in range(x.size):
        x[g] = _ZERO
    for j in range(genes.size):
        x[genes[j]] = counts[j]
    return float(_normal(x, mu, inputs.px_r[rows[0]], kind.weight, a, out.px_r[rows[1]]))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def chunk_of_cells(kind: Kind, x: Nonzeros, inputs: Inputs, out: Outputs, chunk: int | np.int64, chunks: int) -> None:
    """Fill `out` for one of `chunks` equal parts of the cells."""
    n, width = inputs.logits.shape
    shared = inputs.theta.shape[0] == 1
    work = np.empty((4, width), np.float32)
    for i in range(n * chunk // chunks, n * (chunk + 1) // chunks):
        mu, logits, library, a = work[0], inputs.logits[i], inputs.library[i], out.logits[i]
        shift = _softplus_rate(logits, library, mu) if kind.softplus else _softmax_rate(logits, library, mu)
        rows = (0, chunk) if shared else (i, i)
        cell = (x.genes[x.indptr[i] : x.indptr[i + 1]], x.counts[x.indptr[i] : x.indptr[i + 1]])
        if kind.likelihood == NB or kind.likelihood == ZINB:
            out.loss[i] = _counts_cell(kind, i, rows, cell, inputs, out, work)
        else:
            for g in range(width):
                work[1, g] = logits[g] + shift
            out.loss[i] = _other_cell(kind, i, rows, cell, inputs, out, work)
        out.library[i] = _softplus_back(logits, a) if kind.softplus else _softmax_back(mu, library, a)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def all_cells(kind: Kind, x: Nonzeros, inputs: Inputs, out: Outputs, chunks: int) -> None:
    """Fill `out`, each thread with its chunk."""
    for chunk in numba.prange(chunks):
        chunk_of_cells(kind, x, inputs, out, np.int64(chunk), chunks)
