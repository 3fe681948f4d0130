"""What follows a hidden layer's matrix product on CPUs: add a row by code, normalise, rectify, drop out; and the way back.

torch takes eight passes over memory for these steps, and autograd keeps what each of them made. Here the product h and
the output are kept and all else is computed again where it is needed (layer_gradients). A layer's row r belongs to cell
r // labels, and h has a row for each of them or for each cell (the product does not know the label): its rows are then
spread as they are read.

What is summed over rows is summed chunk by chunk: the bits do not depend on the threads. Moments of chunks are put together as in Chan et al. (1979).
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.models.noise import BITS, GOLDEN, mix
from scviaduct.models.vectormath import RELAXED

AS_IT_IS, BY_COLUMN, BY_ROW = range(3)
"""Norms: none, that of batch norm (a mean and a factor per unit), that of layer norm (of the row itself)."""

_SWEEP = 64  # rows whose moments are taken about one number
_LAYER_EPS = np.float32(1e-5)
_f = np.float32
_ZERO, _ONE = _f(0.0), _f(1.0)
IN_ORDER = {"contract", "nsz"}  # what is not summed along a row is vectorised without another order of its terms

Row = NDArray[np.float32]


class Source(NamedTuple):
    """Where a layer's values before the norm come from: h[its row] + added[code]."""

    h: Row  # (rows or cells, width)
    added: Row  # (categories, width)
    codes: NDArray[np.int64]  # (rows,)
    spread: int  # rows for each of h


class Norm(NamedTuple):
    """(x - mean) * factor + shift per unit, with the variance's 1 / deviation in the factor, or the row's own moments."""

    kind: int
    mean: Row
    variance: Row
    factor: Row
    weight: Row
    shift: Row
    eps: np.float32
    slope: np.float32  # of the activation below 0


class Dropout(NamedTuple):
    """The random bits of `Noise.uniform(labels * width)`; kept if they are at least `least`."""

    seeds: NDArray[np.uint64]  # (cells,)
    draw: int
    labels: int
    least: np.uint64  # 0: keep all
    kept: np.float32  # what is kept is multiplied by it


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def clear(rows: Row) -> None:
    """Zeros. A loop, as elsewhere in these kernels: an assignment to a slice takes numba up to a second to compile."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            rows[i, j] = _ZERO


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def span(source: Source, chunk: int | np.int64, chunks: int) -> tuple[int, int]:
    """First and last row of h of a chunk."""
    n = source.h.shape[0]
    return n * chunk // chunks, n * (chunk + 1) // chunks


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _moments(source: Source, mean: Row, square: Row, chunk: int | np.int64, chunks: int) -> None:
    """Mean per unit and sum of squares about it, of one chunk.

    Rows are taken in sweeps, about the mean of those before, the first sweep about its first row: no row is further than
    sqrt(rows) deviations from the mean of all, so what is taken off the squares is at most `_SWEEP` times what remains.
    """
    first, last = span(source, chunk, chunks)
    spread, sums = source.spread, np.empty((2, mean.size), np.float32)
    cells = max(1, _SWEEP // max(1, spread))
    for j in range(mean.size):
        mean[j] = source.h[first, j] + source.added[source.codes[first * spread], j] if first < last else _ZERO
        square[j] = _ZERO
    for start in range(first, last, cells):
        stop = min(start + cells, last)
        clear(sums)
        for cell in range(start, stop):
            h = source.h[cell]
            for r in range(cell * spread, (cell + 1) * spread):
                added = source.added[source.codes[r]]
                for j in range(h.size):
                    d = h[j] + added[j] - mean[j]
                    sums[0, j] += d
                    sums[1, j] += d * d
        n, before = _f((stop - start) * spread), _f((start - first) * spread)
        share, between = n / (before + n), before * n / (before + n)
        for j in range(mean.size):
            d = sums[0, j] / n
            mean[j] += d * share
            square[j] += max(_ZERO, sums[1, j] - d * sums[0, j]) + d * d * between


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _mask(dropout: Dropout, r: int, factor: Row) -> None:
    """factor = `kept` or 0 for the units of row r; width is even."""
    half = factor.size // 2
    key = mix(dropout.seeds[r // dropout.labels] + np.uint64(GOLDEN) * np.uint64(dropout.draw + 1))
    first, low = (r % dropout.labels) * half, np.uint64(2**BITS - 1)
    for j in range(half):
        h = mix(key + np.uint64(GOLDEN) * np.uint64(first + j + 1))
        factor[2 * j] = dropout.kept if (h >> np.uint64(41)) >= dropout.least else _ZERO
        factor[2 * j + 1] = dropout.kept if ((h >> np.uint64(9)) & low) >= dropout.least else _ZERO


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def mean_of_row(x: Row) -> np.float32:
    """sum(x) / size."""
    total = _ZERO
    for j in range(x.size):
        total += x[j]
    return total / _f(x.size)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def mean_of_product(x: Row, y: Row) -> np.float32:
    """sum(x * y) / size."""
    total = _ZERO
    for j in range(x.size):
        total += x[j] * y[j]
    return total / _f(x.size)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def normalise_row(h: Row, added: Row, x: Row) -> np.float32:
    """x = h + added as layer norm has it; returns the factor, one over the standard deviation."""
    for j in range(x.size):
        x[j] = h[j] + added[j]
    mean = mean_of_row(x)
    for j in range(x.size):
        x[j] -= mean
    factor = _ONE / np.sqrt(mean_of_product(x, x) + _LAYER_EPS)
    for j in range(x.size):
        x[j] *= factor
    return factor


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _shifts(source: Source, norm: Norm) -> Row:
    """(categories, width): by column, a row is h * factor + shifts[code]."""
    shifts = np.empty_like(source.added)
    for c in range(shifts.shape[0]):
        for j in range(shifts.shape[1]):
            shifts[c, j] = (source.added[c, j] - norm.mean[j]) * norm.factor[j] + norm.shift[j]
    return shifts


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _activated(y: np.float32, slope: np.float32) -> np.float32:
    return y if y > _ZERO else slope * y


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _forward(
    source: Source, norm: Norm, shifts: Row, dropout: Dropout, out: Row, chunk: int | np.int64, chunks: int
) -> None:
    first, last = span(source, chunk, chunks)
    x, kept = np.empty(out.shape[1], np.float32), np.full(out.shape[1], dropout.kept, np.float32)
    for cell in range(first, last):
        h = source.h[cell]
        for r in range(cell * source.spread, (cell + 1) * source.spread):
            o, shift = out[r], shifts[source.codes[r]]
            if dropout.least > np.uint64(0):
                _mask(dropout, r, kept)
            if norm.kind == BY_ROW:
                normalise_row(h, shift, x)
                for j in range(x.size):
                    o[j] = _activated(x[j], norm.slope) * kept[j]
            else:
                for j in range(x.size):
                    o[j] = _activated(h[j] * norm.factor[j] + shift[j], norm.slope) * kept[j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _put_together(source: Source, parts: Row, mean: Row, variance: Row, chunks: int) -> None:
    """Mean and variance of all rows from the (2, chunks, width) means and sums of squares of the chunks."""
    rows, middle, square = max(1, source.codes.size), np.zeros(mean.size), np.zeros(mean.size)
    for chunk in range(chunks):
        first, last = span(source, chunk, chunks)
        share = (last - first) * source.spread / rows
        for j in range(mean.size):
            middle[j] += share * parts[0, chunk, j]
    for chunk in range(chunks):
        first, last = span(source, chunk, chunks)
        n = float((last - first) * source.spread)
        for j in range(mean.size):
            square[j] += parts[1, chunk, j] + n * (parts[0, chunk, j] - middle[j]) ** 2
    for j in range(mean.size):
        mean[j], variance[j] = middle[j], square[j] / rows


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _factor(norm: Norm) -> None:
    for j in range(norm.factor.size):
        norm.factor[j] = norm.weight[j] / np.sqrt(norm.variance[j] + norm.eps) if norm.kind == BY_COLUMN else _ONE


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _within(codes: NDArray[np.int64], n: int) -> bool:
    """Whether all codes are in [0, n)."""
    low, high = 0, -1
    for r in range(codes.size):
        low, high = min(low, codes[r]), max(high, codes[r])
    return low == 0 and high < n


def require_codes(codes: NDArray[np.int64], n: int, what: str) -> None:
    """Refuse codes without a row among n, for the kernels do not ask.

    Raises:
        IndexError: a code is not in [0, n).
    """
    if not _within(codes, n):
        raise IndexError(f"codes up to {int(codes.max())}, but {n} {what}")


@numba.njit(nogil=True, cache=True, error_model="numpy")
def moments(source: Source, mean: Row, variance: Row, chunks: int) -> None:
    """Fill mean and variance, per unit over all rows."""
    parts = np.empty((2, chunks, mean.size), np.float32)
    for chunk in range(chunks):
        _moments(source, parts[0, chunk], parts[1, chunk], chunk, chunks)
    _put_together(source, parts, mean, variance, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def moments_parallel(source: Source, mean: Row, variance: Row, chunks: int) -> None:
    """As `moments`, chunks spread over threads."""
    parts = np.empty((2, chunks, mean.size), np.float32)
    for chunk in numba.prange(chunks):
        _moments(source, parts[0, chunk], parts[1, chunk], np.int64(chunk), chunks)
    _put_together(source, parts, mean, variance, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def forward(source: Source, norm: Norm, dropout: Dropout, out: Row, chunks: int) -> None:
    """Fill out (rows, width) and, where the norm is by column, its factor."""
    _factor(norm)
    shifts = _shifts(source, norm)
    for chunk in range(chunks):
        _forward(source, norm, shifts, dropout, out, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def forward_parallel(source: Source, norm: Norm, dropout: Dropout, out: Row, chunks: int) -> None:
    """As `forward`, chunks spread over threads."""
    _factor(norm)
    shifts = _shifts(source, norm)
    for chunk in numba.prange(chunks):
        _forward(source, norm, shifts, dropout, out, np.int64(chunk), chunks)
