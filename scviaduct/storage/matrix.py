"""Rows of a stored matrix as CSR, in bounded memory, whatever it is stored as: CSR, CSC or dense, HDF5 or Zarr.

Reads go forward and whole chunks at a time, so that each chunk is decompressed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix

from scviaduct.errors import DataError, UnreadableFileError
from scviaduct.storage.audit import check_indptr
from scviaduct.storage.chunks import Array, Forward, Group, chunk_shape, guarded, is_array, native, unwritten

MEMORY = 256 * 2**20
"""Bytes a slab of a dense matrix, or a bucket of a CSC matrix, may take."""
SLAB = 2**20
"""Values read at once where the reader may choose."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a file: its place, layout and shape; no values are held."""

    file: Group
    path: Path
    name: str
    """"X", "raw/X" or "layers/<name>"; in a 10x file the name of its group."""
    layout: str
    """"csr", "csc" or "dense"."""
    n_obs: int
    n_vars: int

    @property
    def node(self) -> Any:
        """The dataset of a dense matrix, or the group of a sparse one."""
        return guarded(self.path, lambda: self.file[self.name])

    @property
    def values(self) -> Array:
        """The dataset that holds the values."""
        return self.node if self.layout == "dense" else guarded(self.path, lambda: self.node["data"])

    def indptr(self) -> NDArray[np.int64]:
        """Row (CSR) or column (CSC) pointers, checked."""
        node = self.node
        found, stored = node["indptr"].shape, node["data"].shape
        wanted = (self.n_obs if self.layout == "csr" else self.n_vars) + 1
        if found != (wanted,) or node["indices"].shape != stored:
            raise DataError(
                f"{self.path}: {self.name} has {found[0]:,} row or column pointers where {wanted:,} are needed, "
                f"{node['indices'].shape[0]:,} indices and {stored[0]:,} values: the file is damaged"
            )
        indptr = guarded(self.path, lambda: np.asarray(node["indptr"][:], np.int64))
        check_indptr(indptr, stored[0], self.path, self.name)
        return indptr

    def check_written(self) -> int:
        """UnreadableFileError when chunks of a sparse matrix are not stored; their number for a dense one.

        They read as zeros. Those of a dense matrix may be zeros indeed: Zarr does not store chunks of nothing else.
        """
        if self.layout == "dense":
            return guarded(self.path, lambda: unwritten(self.values))
        node, nnz = self.node, self.values.shape[0]
        for part in ("data", "indices", "indptr") if nnz else ():
            missing = guarded(self.path, lambda part=part: unwritten(node[part]))  # type: ignore[misc]
            # A chunk of indices is all zeros, and left out with reason, where cells have the first gene only.
            if missing and not (part == "indices" and nnz <= self.n_obs):
                raise UnreadableFileError(
                    f"{self.path}: {missing:,} chunks of {self.name}/{part} are not there and would read as zeros: "
                    "the file was not written or copied to its end; get it again from its source"
                )
        return 0

    def blocks(
        self, rows: int, memory: int = MEMORY, scratch: Path | None = None, start: int = 0
    ) -> Iterator[tuple[int, csr_matrix]]:
        """(first row, raw CSR of at most `rows` rows) in order from row `start`, values and indices as they are stored.

        A CSC matrix goes through row buckets in temporary files in `scratch` (about 16 bytes a value; default: the
        system's temporary directory), unless it is smaller than `memory` bytes; a dense one is read in slabs of at
        most `memory` bytes where its chunks allow.
        """
        if self.layout == "csc":
            return _csc_blocks(self, rows, memory, scratch, start)
        return _csr_blocks(self, rows, start) if self.layout == "csr" else _dense_blocks(self, rows, memory, start)

    def sample(self, size: int = 20_000) -> NDArray[Any]:
        """Some stored values of the beginning, the middle and the end."""
        values = self.values
        step = max(1, size // (3 * max(1, values.shape[1]))) if values.ndim == 2 else max(1, size // 3)
        starts = sorted({0, values.shape[0] // 2, max(0, values.shape[0] - step)})
        parts = guarded(self.path, lambda: [np.ravel(values[s : s + step]) for s in starts])
        return native(np.concatenate(parts))

    def stored_values(self) -> int:
        """Values that are not zero: for a sparse matrix those it stores, for a dense one from the share in `sample`."""
        size = int(np.prod(self.values.shape, dtype=np.int64))
        if self.layout != "dense" or not size:
            return size
        sample = self.sample()
        return int(np.count_nonzero(sample) / len(sample) * size)


def find_matrix(path: Path, file: Group, name: str) -> Matrix | None:
    """The matrix `name` of an AnnData file; None when its values are not numbers or its layout is unknown."""
    return guarded(path, lambda: _find(path, file, name))


def _find(path: Path, file: Group, name: str) -> Matrix | None:
    node: Any = file[name]
    if is_array(node):
        numeric = node.dtype.kind in "biuf" and node.ndim == 2
        return Matrix(file, path, name, "dense", *map(int, node.shape)) if numeric else None
    layout = {"csr_matrix": "csr", "csc_matrix": "csc", "csr": "csr", "csc": "csc"}.get(
        str(_attribute(node, "encoding-type", "h5sparse_format"))
    )
    shape = _attribute(node, "shape", "h5sparse_shape")
    parts = [node.get(part) for part in ("data", "indices", "indptr")]
    flat = all(is_array(p) and p.ndim == 1 and p.dtype.kind in "biuf" for p in parts)
    if layout is None or shape is None or not flat or any(p.dtype.kind not in "iu" for p in parts[1:]):
        return None
    return Matrix(file, path, name, layout, int(shape[0]), int(shape[1]))


def _attribute(node: Group, *names: str) -> Any:
    value = next((node.attrs[name] for name in names if name in node.attrs), None)
    return value.decode() if isinstance(value, bytes) else value


def _csr_blocks(matrix: Matrix, rows: int, start: int) -> Iterator[tuple[int, csr_matrix]]:
    indptr, node = matrix.indptr(), matrix.node
    data, indices = Forward(node["data"], matrix.path), Forward(node["indices"], matrix.path)
    for first in range(start, matrix.n_obs, rows):
        last = min(first + rows, matrix.n_obs)
        lo, hi = int(indptr[first]), int(indptr[last])
        parts = data.read(lo, hi), indices.read(lo, hi), indptr[first : last + 1] - lo
        yield first, csr_matrix(parts, shape=(last - first, matrix.n_vars))


def _dense_blocks(matrix: Matrix, rows: int, memory: int, start: int) -> Iterator[tuple[int, csr_matrix]]:
    values = matrix.values
    aligned = (chunk_shape(values) or (1,))[0]
    per_row = max(1, matrix.n_vars * values.dtype.itemsize)
    fits = max(1, memory // per_row)
    slab = max(aligned, fits // aligned * aligned) if aligned * per_row <= 4 * memory else fits
    slab = min(slab, -(-max(rows, aligned) // aligned) * aligned)
    for begin in range(start // aligned * aligned, matrix.n_obs, slab):
        lo, hi = max(begin, start), min(begin + slab, matrix.n_obs)
        if lo >= hi:
            continue
        dense = guarded(matrix.path, lambda lo=lo, hi=hi: np.asarray(values[lo:hi]))  # type: ignore[misc]
        for first in range(0, len(dense), rows):
            yield lo + first, csr_matrix(native(dense[first : first + rows]))


def _csc_blocks(
    matrix: Matrix, rows: int, memory: int, scratch: Path | None, start: int
) -> Iterator[tuple[int, csr_matrix]]:
    node = matrix.node
    nnz, itemsize = node["data"].shape[0], node["data"].dtype.itemsize
    if nnz * (itemsize + 8) * 2 <= memory:
        indptr = matrix.indptr()
        data, indices = guarded(matrix.path, lambda: (node["data"][:], node["indices"][:]))
        _check_rows(matrix, indices)
        whole = csc_matrix((native(data), indices, indptr), shape=(matrix.n_obs, matrix.n_vars)).tocsr()
        for first in range(start, matrix.n_obs, rows):
            yield first, whole[first : first + rows]
        return
    # Twice the records: sorting a bucket needs a copy of it. Buckets hold a whole number of blocks.
    buckets = min(2**15, -(-nnz * (itemsize + 8) * 4 // memory))
    span = -(-max(1, -(-matrix.n_obs // buckets)) // rows) * rows
    with tempfile.TemporaryDirectory(prefix="scviaduct-csc-", dir=scratch) as directory:
        files = _fill_buckets(matrix, Path(directory), span)
        for first in range(start // span * span, matrix.n_obs, span):
            whole = _bucket(matrix, files.get(first // span), first, min(span, matrix.n_obs - first))
            for row in range(max(start, first), first + whole.shape[0], rows):
                yield row, whole[row - first : row - first + rows]


def _fill_buckets(matrix: Matrix, directory: Path, span: int) -> dict[int, Path]:
    """One pass over the columns: (row, column, value) records to one file per `span` rows."""
    node, indptr = matrix.node, matrix.indptr()
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


def _bucket(matrix: Matrix, path: Path | None, start: int, n_rows: int) -> csr_matrix:
    record = _record(Forward(matrix.values, matrix.path).dtype)
    entries = np.fromfile(path, record) if path else np.empty(0, record)
    columns = np.concatenate([[0], np.cumsum(np.bincount(entries["column"], minlength=matrix.n_vars))])
    parts = np.ascontiguousarray(entries["value"]), entries["row"] - start, columns  # still in the order of columns
    return csc_matrix(parts, shape=(n_rows, matrix.n_vars)).tocsr()


def _record(value: np.dtype) -> np.dtype:
    return np.dtype([("row", np.int64), ("column", np.int32), ("value", value)])


def _check_rows(matrix: Matrix, rows: NDArray[Any]) -> None:
    bad = (rows < 0) | (rows >= matrix.n_obs)
    if bad.any():
        raise DataError(
            f"{matrix.path}: {matrix.name} has cell indices outside 0-{matrix.n_obs - 1:,}, "
            f"e.g. {rows[bad.argmax()]:,}: the file is damaged; get it again from its source"
        )
