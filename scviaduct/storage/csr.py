"""A CSR matrix that is written block by block, can be continued after a kill, and is read back at the end."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.storage import arrays
from scviaduct.storage.arrays import Growing, make_group, open_array

_MODULUS = 2**64


@dataclass
class Sums:
    """What must be found again when a matrix is read back; the weights tell lost, changed and swapped values."""

    rows: int = 0
    nnz: int = 0
    values: int = 0
    """Σ value · (column + position + 1) modulo 2**64; a value is taken by its bits."""
    pointers: int = 0
    """Σ row pointer · (row + 1) modulo 2**64."""

    def add(self, data: NDArray[Any], indices: NDArray[Any]) -> None:
        """Values and their columns, in order."""
        part = _weigh(data.view(f"u{data.dtype.itemsize}"), indices, np.uint64(self.nnz))
        self.values = (self.values + int(part)) % _MODULUS
        self.nnz += len(data)

    def add_pointers(self, indptr: NDArray[np.int64]) -> None:
        """Row pointers without the first one, which is 0."""
        weights = np.arange(self.rows + 1, self.rows + 1 + len(indptr), dtype=np.uint64)
        self.pointers = (self.pointers + int(np.dot(indptr.astype(np.uint64), weights))) % _MODULUS
        self.rows += len(indptr)


@numba.njit(nogil=True, cache=True)
def _weigh(data: NDArray[Any], indices: NDArray[Any], position: np.uint64) -> np.uint64:
    total = np.uint64(0)
    for i in range(len(data)):
        total += np.uint64(data[i]) * (np.uint64(indices[i]) + position + np.uint64(i) + np.uint64(1))
    return total


class CsrWriter:
    """Writes {data, indices, indptr} below `path`, a valid AnnData element of `shape`.

    `dtype` is the type of the values; an unsigned one is widened when a larger value comes. `index` is that of the
    indices, by default the smallest (SciPy warns of unsigned ones where it compares matrices). The fill values are ones
    that are never stored, so that a chunk that is gone can be told from data: no zeros are stored, no index reaches
    the largest value of its type, no pointer is negative.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: np.dtype,
        saved: tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]] | None = None,
        index: np.dtype | None = None,
    ) -> None:
        index = index or np.min_scalar_type(shape[1])
        self.path = path
        attributes = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)}
        make_group(path, attributes)
        fills: dict[str, tuple[np.dtype, int]] = {
            "data": (dtype, 0),
            "indices": (index, int(np.iinfo(index).max)),
            "indptr": (np.dtype(np.int64), -1),
        }
        if saved is None:
            self.sums = Sums()
            self._arrays = {name: Growing(path / name, kind, fill=fill) for name, (kind, fill) in fills.items()}
            self._arrays["indptr"].append(np.zeros(1, np.int64))
        else:
            state, tails = saved
            self.sums = Sums(**state["sums"])
            self._arrays = {
                name: Growing.resume(path / name, tails[name], state["whole"][name], fill=fill)
                for name, (_, fill) in fills.items()
            }
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="encode")

    @property
    def rows(self) -> int:
        """Rows that were appended."""
        return self.sums.rows

    def append(self, block: csr_matrix) -> None:
        """Add rows: values in any type that fits, sorted columns, no zeros. Values and indices go in two threads."""
        first = self.sums.nnz
        data = self._beside.submit(self._arrays["data"].append, block.data)
        try:
            self._arrays["indices"].append(block.indices)
            self.sums.add(block.data, block.indices)
            pointers = block.indptr[1:] + np.int64(first)
            self._arrays["indptr"].append(pointers)
            self.sums.add_pointers(pointers)
        finally:
            data.result()

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What `saved` takes to go on from here: JSON-ready numbers, and arrays of less than a shard each."""
        states = {name: array.state for name, array in self._arrays.items()}
        whole = {name: state[1] for name, state in states.items()}
        return {"sums": vars(self.sums), "whole": whole}, {name: state[0] for name, state in states.items()}

    def files(self) -> list[Path]:
        """The files `state` relies on."""
        return [file for array in self._arrays.values() for file in array.files()]

    def drop_old(self) -> None:
        """Remove arrays of narrower types: call it when a newer `state` is safe on disk."""
        for array in self._arrays.values():
            array.drop_old()

    def close(self) -> None:
        """Write what is left."""
        data = self._beside.submit(self._arrays["data"].close)
        try:
            for name in ("indices", "indptr"):
                self._arrays[name].close()
        finally:
            data.result()
        self._beside.shutdown()


def read_sums(path: Path) -> Sums:
    """The sums of a CSR matrix on disk, a shard at a time."""
    data, indices, indptr = (open_array(path / name) for name in ("data", "indices", "indptr"))
    sums = Sums()
    for start in range(0, data.shape[0], arrays.SHARD):
        part = slice(start, start + arrays.SHARD)
        sums.add(np.asarray(data[part]), np.asarray(indices[part]))
    for start in range(1, indptr.shape[0], arrays.SHARD):
        sums.add_pointers(np.asarray(indptr[start : start + arrays.SHARD]))
    return sums
