"""Files as sources of counts: opened without loading them, matrix chosen by looking, every value checked.

h5ad files, AnnData Zarr stores, 10x Genomics h5 files and MuData are read; what is none of them is recognised in
storage/formats.py and refused with the way to convert it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError, nearest
from scviaduct.storage.audit import Audit, Origin, check_counts
from scviaduct.storage.choice import looks_like_counts, option
from scviaduct.storage.chunks import guarded, is_array
from scviaduct.storage.features import choose_features
from scviaduct.storage.formats import open_layout
from scviaduct.storage.frames import read_element
from scviaduct.storage.layouts import TENX, Layout, close
from scviaduct.storage.manifest import file_digest
from scviaduct.storage.matrix import MEMORY, Matrix, find_matrix


class CountsFile:
    """One file and its matrix of raw counts; a context manager that reads only what is asked for.

    `path`, `id` (the file's stem), `kind`, `n_obs`, `n_vars` (genes), `matrix` (which one holds the counts) and `why`
    (why this one), `other_features` (features that are no genes, by type), `summed_features` (features that are
    counted for an earlier one of the same name), `var` (one row a gene; of raw/var for raw/X), and
    `unwritten_chunks` (chunks of a dense matrix that are not stored and read as zeros).
    """

    def __init__(self, path: Path, layout: Layout, counts: str | None = None, *, sum_duplicates: bool = False) -> None:
        self.path, self.id, self.kind, self._layout = path, path.stem, layout.kind, layout
        self._matrix, self.why = layout.matrix(counts)
        self.matrix, self.n_obs = self._matrix.name, self._matrix.n_obs
        var = layout.var(self._matrix)
        self._check_shape(len(var))
        self.unwritten_chunks = self._matrix.check_written()
        features = choose_features(path, var, layout.feature_type(counts), sum_duplicates=sum_duplicates)
        self.var, self._lookup = features.var, features.lookup
        self.n_vars = len(self.var)
        self.other_features, self.summed_features = features.other, features.summed

    def __enter__(self) -> CountsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; obs and var that were read stay."""
        close(self._layout)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """obs as in the file, index = the cells' names as strings."""
        return self._layout.obs(self._matrix)

    @property
    def layout(self) -> str:
        """How the counts are stored: "csr", "csc" or "dense"."""
        return self._matrix.layout

    @property
    def nnz(self) -> int:
        """Stored values of the matrix: all of them when it is dense."""
        return int(np.prod(self._matrix.values.shape, dtype=np.int64))

    @cached_property
    def stored_values(self) -> int:
        """Values that are not zero, for estimates: of a dense matrix from a sample."""
        return self._matrix.stored_values()

    @property
    def n_bytes(self) -> int:
        """Size of the file, or of all files of a Zarr store."""
        return sum(p.stat().st_size for p in self._files())

    def digest(self) -> str:
        """sha256 of the file; of a Zarr store, of the names and digests of its files in order."""
        if self.path.is_file():
            return file_digest(self.path)
        lines = (f"{p.relative_to(self.path).as_posix()} {file_digest(p)}\n" for p in self._files())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def chunks(self, rows: int = 4096, memory: int = MEMORY) -> Iterator[tuple[int, csr_matrix]]:
        """(first row, canonical CSR of at most `rows` cells): uint32 counts, sorted unique genes, no stored zeros.

        Every value is checked on the way; `memory` bounds the bytes of a dense slab or of a bucket of a CSC matrix.

        Raises:
            NotCountsError: a value is not a count; UnreadableFileError, DataError: the file is damaged.
        """
        for first, block, _ in self.audited(rows, memory):
            yield first, block

    def audited(
        self, rows: int = 4096, memory: int = MEMORY, scratch: Path | None = None, start: int = 0
    ) -> Iterator[tuple[int, csr_matrix, Audit]]:
        """`chunks` from row `start` on, with what the audit of each block found.

        `scratch` is where a large CSC matrix is turned round; that is done again for any `start`.
        """
        origin = Origin(self.path, self.matrix, lambda: self.obs.index, lambda: self.var.index, self.alternatives)
        for first, block in self._matrix.blocks(rows, memory, scratch, start):
            yield first, *check_counts(block, origin, first, self._lookup, self.n_vars)

    def audit(self) -> Audit:
        """Look at every value: one pass over the file."""
        whole = Audit(self.matrix, str(self._matrix.values.dtype), n_vars=self.n_vars)
        for _, _, part in self.audited():
            whole += part
        return whole

    def alternatives(self) -> tuple[str, ...]:
        """The file's other matrices that look like counts, by the name `counts=` takes."""
        others = [m for m in self._layout.matrices() if m.name != self.matrix]
        return tuple(option(m.name) for m in others if looks_like_counts(m))

    def layer_names(self) -> tuple[str, ...]:
        """Layers of numbers over the same genes, without the one that holds the counts; "X" when a layer holds them.

        Empty when the counts are in raw/X, whose genes are others.
        """
        if self.kind == TENX or self.matrix.startswith("raw"):
            return ()
        others = [m for m in self._layout.matrices() if m.name != self.matrix and not m.name.startswith("raw")]
        shape = (self._matrix.n_obs, self._matrix.n_vars)
        return tuple(m.name.removeprefix("layers/") for m in others if (m.n_obs, m.n_vars) == shape)

    def layer_blocks(
        self, name: str, rows: int = 4096, memory: int = MEMORY, scratch: Path | None = None, start: int = 0
    ) -> Iterator[tuple[int, csr_matrix]]:
        """(first row, CSR) of a layer from row `start` on, in its stored type, over the same genes as the counts.

        Values are not checked; stored zeros are dropped, those of features with the same name added up.

        Raises:
            DataError: there is no such layer, or gene indices lie outside the matrix; UnreadableFileError: damaged.
        """
        if name not in self.layer_names():
            raise DataError(f"{self.path}: there is no layer {name!r}; {nearest(name, self.layer_names())}")
        at = "X" if name == "X" and self.matrix != "X" else f"layers/{name}"
        layer = find_matrix(self.path, self._layout.root, at)
        assert layer is not None
        layer.check_written()
        for first, block in layer.blocks(rows, memory, scratch, start):
            yield first, _over_genes(self.path, at, block, self._lookup, self.n_vars)

    def obsm_names(self) -> tuple[str, ...]:
        """Names of the arrays, sparse matrices and tables in obsm."""
        return self._layout.names("obsm")

    def obsm_element(self, name: str) -> Any:
        """An element of obsm, whole: an array, a CSR matrix, or a DataFrame.

        Raises:
            DataError: there is none of this name, or it has not one row a cell; UnreadableFileError: it is damaged.
        """
        if name not in self.obsm_names():
            raise DataError(f"{self.path}: obsm has no {name!r}; {nearest(name, self.obsm_names())}")
        if beside := self._layout.beside(name):
            return beside.rows(0, self.n_obs)
        group: Any = guarded(self.path, lambda: self._layout.root["obsm"])
        if isinstance(group, h5py.Dataset):  # before anndata 0.7
            found = guarded(self.path, lambda: group[name])
        else:
            found = read_element(self.path, guarded(self.path, lambda: group[name]))
        if getattr(found, "format", "csr") != "csr":
            found = found.tocsr()
        return self._one_a_cell(name, found)

    def obsm_columns(self, name: str) -> tuple[str, ...] | None:
        """Names of the columns of an element of obsm: a table's own, those of an array as uns has them; None without."""
        return self._layout.columns(name)

    def obsm_rows(self, name: str, first: int, last: int) -> NDArray[Any] | csr_matrix | pd.DataFrame:
        """Rows first to last of an element of obsm; a dense array or a CSR matrix is read in part, others whole.

        Raises as `obsm_element`.
        """
        if beside := self._layout.beside(name):
            return beside.rows(first, last)
        group: Any = guarded(self.path, lambda: self._layout.root["obsm"])
        node = None if isinstance(group, h5py.Dataset) else guarded(self.path, lambda: group.get(name))
        if is_array(node):
            return guarded(self.path, lambda: np.asarray(self._one_a_cell(name, node)[first:last]))
        stored = None if node is None else find_matrix(self.path, self._layout.root, f"obsm/{name}")
        if stored is not None and stored.layout == "csr":
            stored.check_written()
            self._one_a_cell(name, stored)
            return next(block for _, block in stored.blocks(last - first, start=first))
        found = self.obsm_element(name)
        return found.iloc[first:last] if isinstance(found, pd.DataFrame) else found[first:last]

    def _one_a_cell(self, name: str, found: Any) -> Any:
        n = found.n_obs if isinstance(found, Matrix) else found.shape[0]
        if n != self.n_obs:
            raise DataError(f"{self.path}: obsm[{name!r}] has {n:,} rows for {self.n_obs:,} cells: damaged")
        return found

    def _files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    def _check_shape(self, n_vars: int) -> None:
        wanted = (self._matrix.n_obs, self._matrix.n_vars)
        if not all(wanted):
            raise DataError(f"{self.path}: {self.matrix} has {wanted[0]} cells and {wanted[1]} genes: nothing to use")
        found = (len(self.obs), n_vars)
        if found != wanted:
            raise DataError(
                f"{self.path}: {self.matrix} is {wanted[0]:,} x {wanted[1]:,}, but obs and var name {found[0]:,} "
                f"cells and {found[1]:,} genes: the file is damaged; write it again from its source"
            )


def open_counts(path: str | Path, *, counts: str | None = None, sum_duplicates: bool = False) -> CountsFile:
    """Open an h5ad, an AnnData Zarr store, a 10x Genomics h5 or a MuData at its raw counts.

    `counts` ("X", "raw" or a layer; in a 10x file a genome or a feature type) says which matrix holds them, else X,
    raw/X or a layer, whichever does. With `sum_duplicates` genes that are named twice are added up: the first keeps
    its place.

    Raises:
        UnreadableFileError: missing, empty, truncated or locked, or of another format (the message says which).
        NotCountsError: no matrix looks like counts, or several do and none is the obvious one.
        DataError: no cells, no genes, genes named twice, or no matrix `counts`.
    """
    path = Path(path)
    layout = open_layout(path)
    try:
        return CountsFile(path, layout, counts, sum_duplicates=sum_duplicates)
    except BaseException:
        close(layout)
        raise


def _over_genes(path: Path, name: str, block: csr_matrix, lookup: NDArray[np.int32] | None, n_vars: int) -> csr_matrix:
    """A layer's block with features moved to their genes."""
    if block.nnz and not (block.indices.min() >= 0 and block.indices.max() < block.shape[1]):
        raise DataError(f"{path}: {name} has gene indices outside 0-{block.shape[1] - 1:,}: the file is damaged")
    if lookup is not None:
        gene = lookup[block.indices]
        kept = np.concatenate([[0], np.cumsum(gene >= 0)])[block.indptr]
        block = csr_matrix((block.data[gene >= 0], gene[gene >= 0], kept), shape=(block.shape[0], n_vars))
    block.sum_duplicates()
    block.eliminate_zeros()
    return block
