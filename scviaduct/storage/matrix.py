"""Rows of an HDF5 matrix as CSR, in bounded memory, whatever it is stored as: CSR, CSC or dense.

Reads go forward and whole HDF5 chunks at a time, so that each chunk is decompressed once.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix

from scviaduct.errors import DataError, UnreadableFileError
from scviaduct.storage.audit import check_indptr

MEMORY = 256 * 2**20
"""Bytes a slab of a dense matrix, or a bucket of a CSC matrix, may take."""
SLAB = 2**20
"""Values read at once where the reader may choose."""
WORKERS = os.cpu_count() or 1
"""Threads that inflate gzip."""
_POOL = ThreadPoolExecutor(WORKERS, thread_name_prefix="inflate")

T = TypeVar("T")


@dataclass(frozen=True)
class Matrix:
    """A matrix of an h5ad: its place, layout and shape; no values are held."""

    file: h5py.File
    path: Path
    name: str
    """"X", "raw/X" or "layers/<name>"."""
    layout: str
    """"csr", "csc" or "dense"."""
    n_obs: int
    n_vars: int

    @property
    def values(self) -> h5py.Dataset:
        """The dataset that holds the values."""
        node = self.file[self.name]
        return node if self.layout == "dense" else node["data"]

    def indptr(self) -> NDArray[np.int64]:
        """Row (CSR) or column (CSC) pointers, checked."""
        node = self.file[self.name]
        indptr = np.asarray(guarded(self.path, lambda: node["indptr"][:]), np.int64)
        wanted = (self.n_obs if self.layout == "csr" else self.n_vars) + 1
        if len(indptr) != wanted or node["indices"].shape != node["data"].shape:
            raise DataError(
                f"{self.path}: {self.name} has {len(indptr):,} row or column pointers where {wanted:,} are needed, "
                f"{node['indices'].shape[0]:,} indices and {node['data'].shape[0]:,} values: the file is damaged"
            )
        check_indptr(indptr, node["data"].shape[0], self.path, self.name)
        return indptr

    def blocks(self, rows: int, memory: int = MEMORY, scratch: Path | None = None) -> Iterator[tuple[int, csr_matrix]]:
        """(first row, raw CSR of at most `rows` rows) in order, values and indices as they are stored.

        A CSC matrix goes through row buckets in temporary files in `scratch` (about 16 bytes a value; default: the
        system's temporary directory), unless it is smaller than `memory` bytes; a dense one is read in slabs of at most `memory` bytes where its chunks allow.
        """
        if self.layout == "csc":
            return _csc_blocks(self, rows, memory, scratch)
        return _csr_blocks(self, rows) if self.layout == "csr" else _dense_blocks(self, rows, memory)

    def sample(self, size: int = 20_000) -> NDArray[Any]:
        """Some stored values of the beginning, the middle and the end."""
        values = self.values
        step = max(1, size // (3 * max(1, values.shape[1]))) if values.ndim == 2 else max(1, size // 3)
        starts = sorted({0, values.shape[0] // 2, max(0, values.shape[0] - step)})
        parts = guarded(self.path, lambda: [np.ravel(values[s : s + step]) for s in starts])
        return np.concatenate(parts)


def guarded(path: Path, read: Callable[[], T]) -> T:
    """The result of `read`; UnreadableFileError when HDF5 or a decompressor cannot give the data."""
    try:
        return read()
    except (OSError, RuntimeError, zlib.error) as error:
        if isinstance(error, UnreadableFileError):
            raise
        raise UnreadableFileError(
            f"{path}: a part of the file cannot be read ({error}): it is damaged; get it again from its source"
        ) from error


def _csr_blocks(matrix: Matrix, rows: int) -> Iterator[tuple[int, csr_matrix]]:
    indptr, node = matrix.indptr(), matrix.file[matrix.name]
    data, indices = Forward(node["data"], matrix.path), Forward(node["indices"], matrix.path)
    for first in range(0, matrix.n_obs, rows):
        last = min(first + rows, matrix.n_obs)
        lo, hi = int(indptr[first]), int(indptr[last])
        parts = data.read(lo, hi), indices.read(lo, hi), indptr[first : last + 1] - lo
        yield first, csr_matrix(parts, shape=(last - first, matrix.n_vars))


def _dense_blocks(matrix: Matrix, rows: int, memory: int) -> Iterator[tuple[int, csr_matrix]]:
    values = matrix.values
    aligned = values.chunks[0] if values.chunks else 1
    per_row = max(1, matrix.n_vars * values.dtype.itemsize)
    fits = max(1, memory // per_row)
    slab = max(aligned, fits // aligned * aligned) if aligned * per_row <= 4 * memory else fits
    slab = min(slab, -(-max(rows, aligned) // aligned) * aligned)
    for start in range(0, matrix.n_obs, slab):
        dense = guarded(matrix.path, lambda start=start: values[start : start + slab])  # type: ignore[misc]
        for first in range(0, len(dense), rows):
            yield start + first, csr_matrix(_native(dense[first : first + rows]))


def _csc_blocks(matrix: Matrix, rows: int, memory: int, scratch: Path | None) -> Iterator[tuple[int, csr_matrix]]:
    node = matrix.file[matrix.name]
    nnz, itemsize = node["data"].shape[0], node["data"].dtype.itemsize
    if nnz * (itemsize + 8) * 2 <= memory:
        data, indices = guarded(matrix.path, lambda: (node["data"][:], node["indices"][:]))
        _check_rows(matrix, indices)
        whole = csc_matrix((_native(data), indices, matrix.indptr()), shape=(matrix.n_obs, matrix.n_vars)).tocsr()
        for first in range(0, matrix.n_obs, rows):
            yield first, whole[first : first + rows]
        return
    # Twice the records: sorting a bucket needs a copy of it. Buckets hold a whole number of blocks.
    buckets = min(2**15, -(-nnz * (itemsize + 8) * 4 // memory))
    span = -(-max(1, -(-matrix.n_obs // buckets)) // rows) * rows
    with tempfile.TemporaryDirectory(prefix="scviaduct-csc-", dir=scratch) as directory:
        files = _fill_buckets(matrix, Path(directory), span)
        for first in range(0, matrix.n_obs, span):
            yield from _bucket_blocks(matrix, files.get(first // span), first, min(span, matrix.n_obs - first), rows)


def _fill_buckets(matrix: Matrix, directory: Path, span: int) -> dict[int, Path]:
    """One pass over the columns: (row, column, value) records to one file per `span` rows."""
    node, indptr = matrix.file[matrix.name], matrix.indptr()
    data, indices = Forward(node["data"], matrix.path), Forward(node["indices"], matrix.path)
    record, columns = _record(data.dtype), np.arange(matrix.n_vars, dtype=np.int32)
    files: dict[int, Path] = {}
    for lo in range(0, int(indptr[-1]), SLAB):
        hi = min(lo + SLAB, int(indptr[-1]))
        entries = np.empty(hi - lo, record)
        rows = indices.read(lo, hi)
        _check_rows(matrix, rows)
        entries["row"], entries["value"] = rows, data.read(lo, hi)
        entries["column"] = np.repeat(columns, np.diff(np.clip(indptr, lo, hi)).astype(np.intp))
        bucket = (entries["row"] // span).astype(np.uint16)  # numpy sorts 16 bits by radix
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket))
        for number, part in enumerate(np.split(entries[order], ends[:-1])):
            if len(part):
                path = files.setdefault(number, directory / str(number))
                with path.open("ab") as file:
                    part.tofile(file)
    return files


def _bucket_blocks(
    matrix: Matrix, path: Path | None, start: int, n_rows: int, rows: int
) -> Iterator[tuple[int, csr_matrix]]:
    record = _record(Forward(matrix.values, matrix.path).dtype)
    entries = np.fromfile(path, record) if path else np.empty(0, record)
    columns = np.concatenate([[0], np.cumsum(np.bincount(entries["column"], minlength=matrix.n_vars))])
    parts = np.ascontiguousarray(entries["value"]), entries["row"] - start, columns  # still in the order of columns
    whole = csc_matrix(parts, shape=(n_rows, matrix.n_vars)).tocsr()
    for first in range(0, n_rows, rows):
        yield start + first, whole[first : first + rows]


def _record(value: np.dtype) -> np.dtype:
    return np.dtype([("row", np.int64), ("column", np.int32), ("value", value)])


def _check_rows(matrix: Matrix, rows: NDArray[Any]) -> None:
    bad = (rows < 0) | (rows >= matrix.n_obs)
    if bad.any():
        raise DataError(
            f"{matrix.path}: {matrix.name} has cell indices outside 0-{matrix.n_obs - 1:,}, "
            f"e.g. {rows[bad.argmax()]:,}: the file is damaged; get it again from its source"
        )


def _native(values: NDArray[Any]) -> NDArray[Any]:
    """Types that scipy.sparse cannot hold as ones that hold the same values."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


class Forward:
    """A 1-D HDF5 dataset read from front to back: what is left of a chunk is kept for the next read."""

    def __init__(self, dataset: h5py.Dataset, path: Path) -> None:
        self._dataset, self._path = dataset, path
        self._chunk = dataset.chunks[0] if dataset.chunks else 1
        self._inflate = _inflater(dataset)
        self._tail = np.empty(0, dataset.dtype)
        self._start = self._end = 0
        self.dtype = _native(self._tail).dtype

    def read(self, lo: int, hi: int) -> NDArray[Any]:
        """Values lo to hi; lo must not lie before the previous read's."""
        if hi > self._end:
            end = min(-(-hi // self._chunk) * self._chunk, len(self._dataset))
            fresh = guarded(self._path, lambda: self._load(self._end, end))
            keep = self._tail[lo - self._start :] if lo < self._end else self._tail[:0]
            start = max(lo, self._start) if len(keep) else self._end
            self._tail, self._start, self._end = np.concatenate([keep, fresh]), start, end
        return _native(self._tail[lo - self._start : hi - self._start])

    def _load(self, lo: int, hi: int) -> NDArray[Any]:
        """Whole chunks; gzip is inflated in threads, because HDF5 itself only ever uses one."""
        if self._inflate is None:
            return self._dataset[lo:hi]
        inflate, starts = self._inflate, range(lo, hi, self._chunk)
        out = np.empty(len(starts) * self._chunk, self._dataset.dtype)
        share = max(1, -(-len(starts) // WORKERS))

        def fill(part: range) -> None:
            for start in part:
                inflate(start, out[start - lo : start - lo + self._chunk])

        list(_POOL.map(fill, [starts[i : i + share] for i in range(0, len(starts), share)]))
        return out[: hi - lo]


def _inflater(dataset: h5py.Dataset) -> Callable[[int, NDArray[Any]], None] | None:
    """A function that decodes the chunk at an offset into an array, for gzip with or without shuffle; else None."""
    if dataset.chunks is None:
        return None
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if filters not in ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]):
        return None
    shuffled, itemsize = len(filters) == 2, dataset.dtype.itemsize

    def inflate(start: int, out: NDArray[Any]) -> None:
        mask, raw = dataset.id.read_direct_chunk((start,))
        if mask:  # a filter was left out for this chunk
            values = dataset[start : start + len(out)]
            out[: len(values)] = values
            return
        plain = np.frombuffer(zlib.decompress(raw, bufsize=out.nbytes), np.uint8)
        if shuffled and itemsize > 1:
            plain = np.ascontiguousarray(plain.reshape(itemsize, -1).T).reshape(-1)
        out[:] = plain.view(out.dtype)

    return inflate
