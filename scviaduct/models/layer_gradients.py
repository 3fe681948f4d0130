"""The way back through what follows a hidden layer's matrix product (layer_kernels), on CPUs.

A unit whose output is 0 passes no gradient, be it rectified or dropped. With a norm by column the gradient by h is
factor * (g - pull[0] - (x - mean) * pull[1]), where g is that by the value before the activation and the pulls are its
sums over all rows; where several rows are made of one of h, the first pass puts their g together and the second needs the
output no more.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from scviaduct.models.layer_kernels import (
    BY_ROW,
    IN_ORDER,
    Norm,
    Row,
    Source,
    clear,
    mean_of_product,
    mean_of_row,
    normalise_row,
    span,
)

_f = np.float32
_ZERO = _f(0.0)


class Back(NamedTuple):
    """What the way back reads and writes."""

    grad: Row  # (rows, width) by the output
    out: Row  # (rows, width) the output
    sums: Row  # (2, width) over the rows: the gradient by the norm's shift, and that times (x - mean)
    pull: Row  # (2, width) what the mean's and the variance's dependence on all rows takes, 0 where there is none
    parts: Row  # (chunks, categories, width) gradients by added, chunk by chunk
    dh: Row  # like h
    dadded: Row  # (categories, width) or (0, width): not wanted


def put_together_by_sums(source: Source, norm: Norm) -> bool:
    """Whether `backward` needs `sums` before it whatever the moments: it takes the gradients by the output together."""
    return source.spread > 1 and norm.kind != BY_ROW


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _through(grad: np.float32, out: np.float32, kept: np.float32, slope: np.float32) -> np.float32:
    """The gradient by the value before the activation."""
    return grad * (kept if out > _ZERO else (slope * kept if out < _ZERO else _ZERO))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _centred(source: Source, norm: Norm) -> Row:
    """(categories, width) added - mean."""
    out: Row = np.empty(source.added.shape, np.float32)
    for code in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[code, j] = source.added[code, j] - norm.mean[j]
    return out


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _sums(
    source: Source,
    norm: Norm,
    centred: Row,
    kept: np.float32,
    back: Back,
    sums: Row,
    chunk: int | np.int64,
    chunks: int,
) -> None:
    """Over a chunk: the gradient by the norm's shift, and that times (x - mean).

    Where rows share one of h: that gradient's sum by cell and by code, too, in dh and parts.
    """
    first, last = span(source, chunk, chunks)
    clear(sums)
    if source.spread > 1:
        clear(back.parts[chunk])
        clear(back.dh[first:last])
    for cell in range(first, last):
        h, d = source.h[cell], back.dh[cell]
        for r in range(cell * source.spread, (cell + 1) * source.spread):
            grad, o, code = back.grad[r], back.out[r], source.codes[r]
            x = centred[code]
            if source.spread > 1:
                t = back.parts[chunk, code]
                for j in range(h.size):
                    g = _through(grad[j], o[j], kept, norm.slope)
                    t[j] += g
                    d[j] += g
                    sums[1, j] += g * (h[j] + x[j])
            else:
                for j in range(h.size):
                    g = _through(grad[j], o[j], kept, norm.slope)
                    sums[0, j] += g
                    sums[1, j] += g * (h[j] + x[j])
    if source.spread > 1:
        for code in range(centred.shape[0]):
            for j in range(sums.shape[1]):
                sums[0, j] += back.parts[chunk, code, j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _pulls(norm: Norm, centred: Row, pull: Row) -> tuple[Row, Row]:
    """What h's gradient loses to the moments, as row[code] + h * slope, by (categories, width) rows and a slope."""
    rows: Row = np.empty(centred.shape, np.float32)
    slope = np.empty(norm.factor.size, np.float32)
    for j in range(slope.size):
        slope[j] = norm.factor[j] * pull[1, j]
    for code in range(rows.shape[0]):
        for j in range(slope.size):
            rows[code, j] = norm.factor[j] * (pull[0, j] + centred[code, j] * pull[1, j])
    return rows, slope


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _backward(
    source: Source, norm: Norm, pulls: tuple[Row, Row], kept: np.float32, back: Back, chunk: int | np.int64, chunks: int
) -> None:
    """By column, with one row for each of h."""
    first, last = span(source, chunk, chunks)
    slope = pulls[1]
    clear(back.parts[chunk])
    for r in range(first, last):
        code = source.codes[r]
        h, grad, o, d = source.h[r], back.grad[r], back.out[r], back.dh[r]
        t, row = back.parts[chunk, code], pulls[0][code]
        for j in range(h.size):
            g = norm.factor[j] * _through(grad[j], o[j], kept, norm.slope) - (row[j] + h[j] * slope[j])
            d[j] = g
            t[j] += g


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _scale(rows: Row, factor: Row) -> None:
    for i in range(rows.shape[0]):
        for j in range(factor.size):
            rows[i, j] *= factor[j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _backward_joint(
    source: Source, norm: Norm, pulls: tuple[Row, Row], back: Back, chunk: int | np.int64, chunks: int
) -> None:
    """By column, with several rows for each of h: `_sums` has put together what comes by the output."""
    first, last = span(source, chunk, chunks)
    slope = pulls[1]
    _scale(back.parts[chunk], norm.factor)
    _scale(back.dh[first:last], norm.factor)
    for cell in range(first, last):
        h, d = source.h[cell], back.dh[cell]
        for r in range(cell * source.spread, (cell + 1) * source.spread):
            code = source.codes[r]
            t, row = back.parts[chunk, code], pulls[0][code]
            for j in range(h.size):
                g = row[j] + h[j] * slope[j]
                d[j] -= g
                t[j] -= g


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _backward_by_row(
    source: Source, norm: Norm, kept: np.float32, back: Back, chunk: int | np.int64, chunks: int
) -> None:
    first, last = span(source, chunk, chunks)
    x, g = np.empty(source.h.shape[1], np.float32), np.empty(source.h.shape[1], np.float32)
    clear(back.parts[chunk])
    clear(back.dh[first:last])
    for cell in range(first, last):
        h, d = source.h[cell], back.dh[cell]
        for r in range(cell * source.spread, (cell + 1) * source.spread):
            grad, o, t = back.grad[r], back.out[r], back.parts[chunk, source.codes[r]]
            factor = normalise_row(h, source.added[source.codes[r]], x)
            for j in range(x.size):
                g[j] = _through(grad[j], o[j], kept, norm.slope)
            mean, along = mean_of_row(g), mean_of_product(g, x)
            for j in range(x.size):
                y = factor * (g[j] - mean - x[j] * along)
                d[j] += y
                t[j] += y


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
    """The sum over the first axis, in its order, unless it is not wanted."""
    if out.shape[0] > 0:
        clear(out)
        for chunk in range(parts.shape[0]):
            for i in range(out.shape[0]):
                for j in range(out.shape[1]):
                    out[i, j] += parts[chunk, i, j]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def sums(source: Source, norm: Norm, kept: np.float32, back: Back, rows: int, chunks: int) -> None:
    """Fill back.sums, and back.pull with these rows' part (see `_pull`)."""
    parts, centred = np.empty((chunks, 2, norm.mean.size), np.float32), _centred(source, norm)
    for chunk in range(chunks):
        _sums(source, norm, centred, kept, back, parts[chunk], chunk, chunks)
    _total(parts, back.sums)
    _pull(norm, back, rows)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def sums_parallel(source: Source, norm: Norm, kept: np.float32, back: Back, rows: int, chunks: int) -> None:
    """As `sums`, chunks spread over threads."""
    parts, centred = np.empty((chunks, 2, norm.mean.size), np.float32), _centred(source, norm)
    for chunk in numba.prange(chunks):
        _sums(source, norm, centred, kept, back, parts[chunk], np.int64(chunk), chunks)
    _total(parts, back.sums)
    _pull(norm, back, rows)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _back(
    source: Source, norm: Norm, pulls: tuple[Row, Row], kept: np.float32, back: Back, chunk: int | np.int64, chunks: int
) -> None:
    if norm.kind == BY_ROW:
        _backward_by_row(source, norm, kept, back, chunk, chunks)
    elif source.spread > 1:
        _backward_joint(source, norm, pulls, back, chunk, chunks)
    else:
        _backward(source, norm, pulls, kept, back, chunk, chunks)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def backward(source: Source, norm: Norm, kept: np.float32, back: Back, chunks: int) -> None:
    """Fill back.dh and back.dadded."""
    pulls = _pulls(norm, _centred(source, norm), back.pull)
    for chunk in range(chunks):
        _back(source, norm, pulls, kept, back, chunk, chunks)
    _total(back.parts, back.dadded)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def backward_parallel(source: Source, norm: Norm, kept: np.float32, back: Back, chunks: int) -> None:
    """As `backward`, chunks spread over threads."""
    pulls = _pulls(norm, _centred(source, norm), back.pull)
    for chunk in numba.prange(chunks):
        _back(source, norm, pulls, kept, back, np.int64(chunk), chunks)
    _total(back.parts, back.dadded)
