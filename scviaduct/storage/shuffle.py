"""A global shuffle of cells: their random keys, and the compiled loops that put cells in order.

A cell's key is a pure function of the seed, its data set and its row, and the final order is the order of the keys.
So the result does not depend on the memory given, the tasks the work was cut into, or who did them.
"""

from __future__ import annotations

import hashlib

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.storage.sampler import mix

RANGES = 1024
"""Ranges of keys that sorted cells are indexed by. At 100 million cells one holds 100,000 of them, about 100 MB."""


def shuffle_keys(seed: int, dataset_id: str, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(cells,) uint64 random keys: outputs `rows` of a splitmix64 stream (Steele et al., 2014) of the data set.

    Rows of one data set never share a key, because splitmix64 is a bijection.
    """
    start = np.frombuffer(hashlib.sha256(f"{seed}:{dataset_id}".encode()).digest()[:8], "<u8")[0]
    return mix(start + rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # mix adds the stream's next step


def key_ranges(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(cells,) the range of each key: its first 10 bits."""
    return (keys >> np.uint64(64 - RANGES.bit_length() + 1)).astype(np.int64)


@numba.njit(nogil=True, cache=True)
def sort_genes(indptr, indices, data):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sort the genes within each cell, in place."""
    for cell in range(len(indptr) - 1):
        lo, hi = indptr[cell], indptr[cell + 1]
        order = np.argsort(indices[lo:hi])
        indices[lo:hi] = indices[lo:hi][order]
        data[lo:hi] = data[lo:hi][order]


@numba.njit(nogil=True, cache=True)
def gather(cells, indptr, indices, data, out_indices, out_data):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The counts of `cells` one after another; scipy's `counts[cells]` widens to int32 first and holds the GIL."""
    at = 0
    for cell in cells:
        for j in range(indptr[cell], indptr[cell + 1]):
            out_indices[at] = indices[j]
            out_data[at] = data[j]
            at += 1
