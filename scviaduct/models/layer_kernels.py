"""What follows a hidden layer's matrix product on CPUs: add a row by code, normalise, rectify, drop out; and the way back.

torch takes eight passes over memory for these steps, and autograd keeps what each of them made. Here the product h and
the output are kept and all else is computed again where it is needed; a unit whose output is 0 passes no gradient, be it
rectified or dropped. A layer's row r belongs to cell r // labels, and h has a row for each of them or for each cell (the
product does not know the label): its rows are then spread as they are read.

Rows are cut into chunks by their number alone, and what is summed over rows is summed chunk by chunk: the bits do not
depend on the threads. Moments of chunks are put together as in Chan et al. (1979).
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

_CHUNKS, ROWS_PER_CHUNK = 16, 256
_SWEEP = 64  # rows whose moments are taken at once: 32 kB at 128 units, so that they stay in the nearest cache
_LAYER_EPS = np.float32(1e-5)
_f = np.float32
_ZERO, _ONE = _f(0.0), _f(1.0)

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


class Back(NamedTuple):
    """What the way back reads and writes."""

    grad: Row  # (rows, width) by the output
    out: Row  # (rows, width) the output
    sums: Row  # (2, width) over the rows: the gradient by the norm's shift, and that times (x - mean)
    pull: Row  # (2, width) what the mean's and the variance's dependence on all rows takes, 0 where there is none
    dh: Row  # like h
    dadded: Row  # (categories, width) or (0, width): not wanted


def chunks_of(rows: int) -> int:
    """Into how many chunks to cut rows, whatever the threads."""
    return max(1, min(_CHUNKS, rows // ROWS_PER_CHUNK))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _values(source: Source, r: int, x: Row) -> None:
    """x = the values of row r before the norm."""
    h, added = source.h[r // source.spread], source.added[source.codes[r]]
    for j in range(x.size):
        x[j] = h[j] + added[j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _span(source: Source, chunk: int | np.int64, chunks: int) -> tuple[int, int]:
    """First and last row of a chunk; rows of one row of h lie in one chunk."""
    n, spread = source.h.shape[0], source.spread
    return n * chunk // chunks * spread, n * (chunk + 1) // chunks * spread


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _moments(source: Source, mean: Row, square: Row, chunk: int | np.int64, chunks: int) -> None:
    """Mean per unit and sum of squares about it, of one chunk."""
    first, last = _span(source, chunk, chunks)
    width = source.h.shape[1]
    x, part = np.empty((_SWEEP, width), np.float32), np.empty((2, width), np.float32)
    mean[:], square[:] = _ZERO, _ZERO
    for start in range(first, last, _SWEEP):
        n = min(_SWEEP, last - start)
        part[:] = _ZERO
        for i in range(n):
            row = x[i]
            _values(source, start + i, row)
            for j in range(width):
                part[0, j] += row[j]
        weight = _ONE / _f(n)
        for j in range(width):
            part[0, j] *= weight
        for i in range(n):
            for j in range(width):
                d = x[i, j] - part[0, j]
                part[1, j] += d * d
        before = _f(start - first)
        share, between = _f(n) / (before + _f(n)), before * _f(n) / (before + _f(n))
        for j in range(width):
            d = part[0, j] - mean[j]
            mean[j] += d * share
            square[j] += part[1, j] + d * d * between


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
def _row_moments(x: Row) -> tuple[np.float32, np.float32]:
    """Mean of a row and one over its standard deviation, as layer norm has them."""
    total, square = _ZERO, _ZERO
    for j in range(x.size):
        total += x[j]
    mean = total / _f(x.size)
    for j in range(x.size):
        d = x[j] - mean
        square += d * d
    return mean, _ONE / np.sqrt(square / _f(x.size) + _LAYER_EPS)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _normalise(norm: Norm, x: Row) -> np.float32:
    """x becomes the value before the activation's shift; returns the row's factor where it has one of its own."""
    factor = _ONE
    if norm.kind == BY_COLUMN:
        for j in range(x.size):
            x[j] = (x[j] - norm.mean[j]) * norm.factor[j]
    elif norm.kind == BY_ROW:
        mean, factor = _row_moments(x)
        for j in range(x.size):
            x[j] = (x[j] - mean) * factor
    return factor


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _forward(source: Source, norm: Norm, dropout: Dropout, out: Row, chunk: int | np.int64, chunks: int) -> None:
    first, last = _span(source, chunk, chunks)
    x, factor = np.empty(out.shape[1], np.float32), np.full(out.shape[1], dropout.kept, np.float32)
    for r in range(first, last):
        _values(source, r, x)
        _normalise(norm, x)
        if dropout.least > np.uint64(0):
            _mask(dropout, r, factor)
        o = out[r]
        for j in range(x.size):
            y = x[j] + norm.shift[j]
            o[j] = (y if y > _ZERO else norm.slope * y) * factor[j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _through(norm: Norm, kept: np.float32, grad: Row, out: Row, g: Row) -> None:
    """g = gradient by the value before the activation."""
    low = norm.slope * kept
    for j in range(g.size):
        g[j] = grad[j] * (kept if out[j] > _ZERO else (low if out[j] < _ZERO else _ZERO))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _sums(
    source: Source, norm: Norm, kept: np.float32, grad: Row, out: Row, sums: Row, chunk: int | np.int64, chunks: int
) -> None:
    """Over a chunk: the gradient by the norm's shift, and that times (x - mean)."""
    first, last = _span(source, chunk, chunks)
    width = out.shape[1]
    x, g = np.empty(width, np.float32), np.empty(width, np.float32)
    sums[:] = _ZERO
    for r in range(first, last):
        _values(source, r, x)
        _through(norm, kept, grad[r], out[r], g)
        for j in range(width):
            sums[0, j] += g[j]
            sums[1, j] += g[j] * (x[j] - norm.mean[j])


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _before_norm(norm: Norm, x: Row, factor: np.float32, back: Back, g: Row) -> None:
    """g becomes the gradient by x, the values before the norm (by row: x are the normalised ones)."""
    if norm.kind == BY_COLUMN:
        for j in range(g.size):
            g[j] = norm.factor[j] * (g[j] - back.pull[0, j] - (x[j] - norm.mean[j]) * back.pull[1, j])
    elif norm.kind == BY_ROW:
        total, along = _ZERO, _ZERO
        for j in range(g.size):
            total += g[j]
            along += g[j] * x[j]
        total, along = total / _f(g.size), along / _f(g.size)
        for j in range(g.size):
            g[j] = factor * (g[j] - total - x[j] * along)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _backward(
    source: Source, norm: Norm, kept: np.float32, back: Back, dadded: Row, chunk: int | np.int64, chunks: int
) -> None:
    first, last = _span(source, chunk, chunks)
    width = back.out.shape[1]
    x, g = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(first, last):
        _values(source, r, x)
        factor = _normalise(norm, x) if norm.kind == BY_ROW else _ONE
        _through(norm, kept, back.grad[r], back.out[r], g)
        _before_norm(norm, x, factor, back, g)
        d, begin = back.dh[r // source.spread], r % source.spread == 0
        for j in range(width):
            d[j] = g[j] if begin else d[j] + g[j]
        if dadded.shape[0] > 0:
            t = dadded[source.codes[r]]
            for j in range(width):
                t[j] += g[j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _put_together(source: Source, parts: Row, mean: Row, variance: Row, chunks: int) -> None:
    """Mean and variance of all rows from the (2, chunks, width) means and sums of squares of the chunks."""
    rows = max(1, source.codes.size)
    for j in range(mean.size):
        middle, square = 0.0, 0.0
        for chunk in range(chunks):
            first, last = _span(source, chunk, chunks)
            middle += (last - first) / rows * parts[0, chunk, j]
        for chunk in range(chunks):
            first, last = _span(source, chunk, chunks)
            square += parts[1, chunk, j] + (last - first) * (parts[0, chunk, j] - middle) ** 2
        mean[j], variance[j] = middle, square / rows


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _factor(norm: Norm) -> None:
    for j in range(norm.factor.size):
        norm.factor[j] = norm.weight[j] / np.sqrt(norm.variance[j] + norm.eps)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _pull(norm: Norm, back: Back, rows: int) -> None:
    """These rows' part where the moments are those of `rows` rows; 0 where they are of none."""
    if rows == 0:
        return
    for j in range(norm.mean.size):
        back.pull[0, j] = back.sums[0, j] / rows
        back.pull[1, j] = back.sums[1, j] / (rows * (norm.variance[j] + norm.eps))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _total(parts: Row, out: Row) -> None:
    """The sum over the first axis, in its order."""
    out[:] = parts[0]
    for chunk in range(1, parts.shape[0]):
        out += parts[chunk]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _parts(back: Back, chunks: int) -> Row:
    return np.zeros((chunks, *back.dadded.shape), np.float32)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def within(codes: NDArray[np.int64], n: int) -> bool:
    """Whether all codes are in [0, n)."""
    low, high = 0, -1
    for r in range(codes.size):
        low, high = min(low, codes[r]), max(high, codes[r])
    return low == 0 and high < n


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
    for chunk in range(chunks):
        _forward(source, norm, dropout, out, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def forward_parallel(source: Source, norm: Norm, dropout: Dropout, out: Row, chunks: int) -> None:
    """As `forward`, chunks spread over threads."""
    _factor(norm)
    for chunk in numba.prange(chunks):
        _forward(source, norm, dropout, out, np.int64(chunk), chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def sums(source: Source, norm: Norm, kept: np.float32, back: Back, rows: int, chunks: int) -> None:
    """Fill back.sums, and back.pull with these rows' part (see `_pull`)."""
    parts = np.empty((chunks, 2, norm.mean.size), np.float32)
    for chunk in range(chunks):
        _sums(source, norm, kept, back.grad, back.out, parts[chunk], chunk, chunks)
    _total(parts, back.sums)
    _pull(norm, back, rows)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def sums_parallel(source: Source, norm: Norm, kept: np.float32, back: Back, rows: int, chunks: int) -> None:
    """As `sums`, chunks spread over threads."""
    parts = np.empty((chunks, 2, norm.mean.size), np.float32)
    for chunk in numba.prange(chunks):
        _sums(source, norm, kept, back.grad, back.out, parts[chunk], np.int64(chunk), chunks)
    _total(parts, back.sums)
    _pull(norm, back, rows)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def backward(source: Source, norm: Norm, kept: np.float32, back: Back, chunks: int) -> None:
    """Fill back.dh and back.dadded."""
    parts = _parts(back, chunks)
    for chunk in range(chunks):
        _backward(source, norm, kept, back, parts[chunk], chunk, chunks)
    _total(parts, back.dadded)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def backward_parallel(source: Source, norm: Norm, kept: np.float32, back: Back, chunks: int) -> None:
    """As `backward`, chunks spread over threads."""
    parts = _parts(back, chunks)
    for chunk in numba.prange(chunks):
        _backward(source, norm, kept, back, parts[chunk], np.int64(chunk), chunks)
    _total(parts, back.dadded)
