"""One pass over stored values: is each a count, is each index a gene, and what do they add up to?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

LIMIT = 2**24
"""Counts stay below this: from here on float32 no longer holds every whole number."""

GOOD, VALUE, INDEX, UNSORTED = range(4)
"""What was found: counts; a value that is none; an index outside; indices of a row that do not increase."""


@dataclass(frozen=True, eq=False)
class Checked:
    """Rows of counts without stored zeros; only `status` is meaningful unless it is GOOD."""

    status: int
    data: NDArray[np.uint32]
    indices: NDArray[np.int32]
    indptr: NDArray[Any]
    total: int
    largest: int
    zeros: int
    """Stored zeros, which were dropped."""


def check_block(
    values: NDArray[Any],
    indices: NDArray[Any],
    indptr: NDArray[Any],
    n_columns: int,
    lookup: NDArray[np.int32] | None = None,
) -> Checked:
    """Check CSR rows (values and indices (nnz,), indptr (rows + 1,) from 0) and drop what is zero or no gene.

    `lookup` (n_columns,) is the gene of a column, -1 for none. Several faults at once give INDEX before VALUE before
    UNSORTED.
    """
    values, indices = _plain(values), _index(indices)
    indptr = indptr.astype(np.int32 if len(values) < 2**31 else np.int64, copy=False)
    if lookup is not None:
        genes, kept, ends = np.empty(len(values), np.int32), np.empty_like(values), np.zeros_like(indptr)
        if not _move(values, indices, indptr, n_columns, lookup, kept, genes, ends):
            return _fault(INDEX)
        values, indices, indptr = kept[: ends[-1]], genes[: ends[-1]], ends
    counts = np.empty(len(values), np.uint32)
    fine, total, largest, zeros = _counts(values, counts)
    inside, rising = _rising(indices, indptr, n_columns)
    if not (fine and inside and rising):
        return _fault(INDEX if not inside else VALUE if not fine else UNSORTED)
    indices = indices.astype(np.int32, copy=False)
    if zeros:
        kept, genes, ends = np.empty_like(counts), np.empty_like(indices), np.zeros_like(indptr)
        _drop_zeros(counts, indices, indptr, kept, genes, ends)
        counts, indices, indptr = kept[: ends[-1]], genes[: ends[-1]], ends
    return Checked(GOOD, counts, indices, indptr, int(total), int(largest), int(zeros))


def _fault(status: int) -> Checked:
    nothing = np.zeros(0, np.int32)
    return Checked(status, np.zeros(0, np.uint32), nothing, nothing, 0, 0, 0)


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Four types are compiled; the others fit into one of them, or are no counts there either."""
    if values.dtype in (np.float32, np.float64, np.int32, np.int64):
        return values
    if values.dtype.kind == "f":
        return values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    return values.astype(np.int32 if values.dtype.itemsize < 4 else np.int64)


def _index(indices: NDArray[Any]) -> NDArray[Any]:
    return indices if indices.dtype in (np.int32, np.int64) else indices.astype(np.int64)


# Loops without branches, which the compiler turns into vector instructions: 1 ns a value, against 6.5 in one loop.
@numba.njit(nogil=True, cache=True)
def _counts(values, counts):  # type: ignore[no-untyped-def]  # pragma: no cover
    wrong, total, largest, zeros = 0, np.int64(0), np.int32(0), 0
    for j in range(len(values)):
        value = values[j]
        inside = (value >= 0) & (value < LIMIT)  # not so for NaN
        count = np.int32(value if inside else values.dtype.type(0))
        wrong += (values.dtype.type(count) != value) | (not inside)
        total += count
        largest = max(largest, count)
        zeros += count == 0
        counts[j] = count
    return wrong == 0, total, largest, zeros


@numba.njit(nogil=True, cache=True)
def _rising(indices, indptr, n_columns):  # type: ignore[no-untyped-def]  # pragma: no cover
    outside, falls = 0, 0
    for j in range(len(indices)):
        outside += (indices[j] < 0) | (indices[j] >= n_columns)
    for row in range(len(indptr) - 1):
        for j in range(indptr[row] + 1, indptr[row + 1]):
            falls += indices[j] <= indices[j - 1]
    return outside == 0, falls == 0


@numba.njit(nogil=True, cache=True)
def _move(values, indices, indptr, n_columns, lookup, kept, genes, ends):  # type: ignore[no-untyped-def]  # pragma: no cover
    at = 0
    for row in range(len(indptr) - 1):
        for j in range(indptr[row], indptr[row + 1]):
            if indices[j] < 0 or indices[j] >= n_columns:
                return False
            kept[at] = values[j]
            genes[at] = lookup[indices[j]]
            at += genes[at] >= 0
        ends[row + 1] = at
    return True


@numba.njit(nogil=True, cache=True)
def _drop_zeros(counts, indices, indptr, kept, genes, ends):  # type: ignore[no-untyped-def]  # pragma: no cover
    at = 0
    for row in range(len(indptr) - 1):
        for j in range(indptr[row], indptr[row + 1]):
            kept[at] = counts[j]
            genes[at] = indices[j]
            at += counts[j] != 0
        ends[row + 1] = at
