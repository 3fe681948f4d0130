"""A global shuffle of cells in bounded memory: cells go to buckets on disk by a random key, each bucket is sorted.

A cell's key is a pure function of the seed, its data set and its row, and the final order is the order of the keys.
So the result does not depend on the memory given, the number of buckets or the chunks the cells were read in.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from scviaduct.storage.sampler import mix


def shuffle_keys(seed: int, dataset_id: str, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(cells,) uint64 random keys: outputs `rows` of a splitmix64 stream (Steele et al., 2014) of the data set.

    Rows of one data set never share a key, because splitmix64 is a bijection.
    """
    start = np.frombuffer(hashlib.sha256(f"{seed}:{dataset_id}".encode()).digest()[:8], "<u8")[0]
    return mix(start + rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # mix adds the stream's next step


class Buckets:
    """Cells spilled to files by key range, then read back range by range in the order of their keys.

    `records` is a structured array with the fields "key", "nnz" (non-zeros of the cell) and whatever else belongs to
    a cell; `counts` has its counts as CSR.
    """

    def __init__(self, directory: Path, n_buckets: int, buffer_bytes: int) -> None:
        self.directory, self.n_buckets, self.buffer_bytes = directory, n_buckets, buffer_bytes
        self.n_cells = self.nnz = self.sum = self.largest = 0
        self._buffer: list[tuple[NDArray[Any], csr_matrix]] = []
        self._buffered = 0
        directory.mkdir(parents=True)

    def add(self, records: NDArray[Any], counts: csr_matrix) -> None:
        """Take cells; they are written once `buffer_bytes` have come together."""
        self.n_cells += len(records)
        self.nnz += counts.nnz
        self.sum += int(counts.data.sum(dtype=np.int64))
        self.largest = max(self.largest, int(counts.data.max(initial=0)))
        self._buffer.append((records, counts))
        self._buffered += records.nbytes + counts.data.nbytes + counts.indices.nbytes
        if self._buffered >= self.buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory to the buckets' files."""
        if not self._buffer:
            return
        records = np.concatenate([r for r, _ in self._buffer])
        counts = vstack([c for _, c in self._buffer], format="csr")
        self._buffer, self._buffered = [], 0
        bucket = self._bucket(records["key"])
        order = np.argsort(bucket, kind="stable")
        records, counts = records[order], counts[order]
        borders = np.searchsorted(bucket[order], np.arange(self.n_buckets + 1))
        for k, (start, stop) in enumerate(itertools.pairwise(borders)):
            if start < stop:
                self._append(k, records[start:stop], counts, slice(*counts.indptr[[start, stop]]))

    def _bucket(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        # the upper 32 bits times n, over 2^32: order-preserving, and no overflow for n < 2^32
        return ((keys >> np.uint64(32)) * np.uint64(self.n_buckets) >> np.uint64(32)).astype(np.int64)

    def _append(self, bucket: int, records: NDArray[Any], counts: csr_matrix, entries: slice) -> None:
        data = counts.data[entries]
        indices = counts.indices[entries].astype(np.min_scalar_type(counts.shape[1]))
        with self._path(bucket).open("ab") as file:
            for array in (records, data.astype(np.min_scalar_type(int(data.max(initial=0)))), indices):
                np.save(file, array, allow_pickle=False)

    def read(self, n_genes: int) -> Iterator[tuple[NDArray[Any], csr_matrix]]:
        """(records, counts) of each bucket in turn, cells in the order of their keys; a bucket's file is then deleted.

        Cells with equal keys (of different data sets) stay in the order they were added in.
        """
        self.flush()
        for path in sorted(self.directory.glob("*.npy")):
            records, counts = _load(path, n_genes)
            path.unlink()
            order = np.argsort(records["key"], kind="stable")
            yield records[order], counts[order]

    def _path(self, bucket: int) -> Path:
        return self.directory / f"{bucket:05d}.npy"


def _load(path: Path, n_genes: int) -> tuple[NDArray[Any], csr_matrix]:
    pieces = []
    with path.open("rb") as file:
        while file.peek(1):
            pieces.append([np.load(file, allow_pickle=False) for _ in range(3)])
    records, data, indices = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    indptr = np.concatenate([[0], np.cumsum(records["nnz"], dtype=np.int64)])
    return records, csr_matrix((data, indices.astype(np.int32), indptr), shape=(len(records), n_genes))
