"""Rows of a table added to cells by their codes, and the gradients of the cells added up by row, on CPUs."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.models.counts import use_threads

Rows = NDArray[np.float32]
Codes = NDArray[np.int64]

_PARALLEL_FROM = 1 << 19  # numbers
_COLUMNS = 256  # of a part that one thread adds up: every sum is in the cells' order


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _row(table: Rows, code: int | np.int64) -> Rows:
    return table[code if len(table) > 1 else 0]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add(h: Rows, table: Rows, codes: Codes) -> None:
    for i in range(codes.size):
        own, row = h[i], _row(table, codes[i])
        for j in range(own.size):
            own[j] += row[j]


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def _add_parallel(h: Rows, table: Rows, codes: Codes) -> None:
    for i in numba.prange(codes.size):
        own, row = h[i], _row(table, codes[i])
        for j in range(own.size):
            own[j] += row[j]


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _sum_columns(h: Rows, codes: Codes, table: Rows, first: int | np.int64) -> None:
    last = min(first + _COLUMNS, h.shape[1])
    for i in range(codes.size):
        own, row = h[i, first:last], _row(table, codes[i])[first:last]
        for j in range(own.size):
            row[j] += own[j]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sum(h: Rows, codes: Codes, table: Rows) -> None:
    for first in range(0, h.shape[1], _COLUMNS):
        _sum_columns(h, codes, table, first)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def _sum_parallel(h: Rows, codes: Codes, table: Rows) -> None:
    for part in numba.prange((h.shape[1] + _COLUMNS - 1) // _COLUMNS):
        _sum_columns(h, codes, table, np.int64(part) * _COLUMNS)


def _alone(h: Rows) -> bool:
    return h.size < _PARALLEL_FROM or use_threads(len(h)) == 1


def add(h: Rows, table: Rows, codes: Codes) -> None:
    """In place: (cells, width) h plus the row of each cell's code; one row is everybody's. Codes are not checked."""
    (_add if _alone(h) else _add_parallel)(h, table, codes)


def add_up(h: Rows, codes: Codes, table: Rows) -> None:
    """Add (cells, width) h to the rows of a table, as `add` takes them. The bits do not depend on the threads."""
    (_sum if _alone(h) else _sum_parallel)(h, codes, table)
