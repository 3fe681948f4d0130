"""h5ad files as sources of counts: opened without loading them, matrix chosen by looking, every value checked.

What is not an h5ad is recognised in storage/formats.py and refused with the way to convert it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError, NotCountsError, UnreadableFileError, nearest
from scviaduct.storage.audit import Audit, Origin, as_counts, check_counts
from scviaduct.storage.formats import open_h5ad
from scviaduct.storage.genes import normalise
from scviaduct.storage.matrix import MEMORY, Matrix, guarded

COUNTS_NAMES = ("counts", "raw_counts", "count", "umi", "umis", "umi_counts", "raw")
"""Layers with these names (in any case), and raw/X, go before other layers that hold whole numbers."""


class CountsFile:
    """One h5ad and its matrix of raw counts; a context manager that reads only what is asked for.

    `path`, `id` (the file's stem), `n_obs`, `n_vars`, and `matrix`: which matrix holds the counts.
    """

    def __init__(self, path: Path, file: h5py.File, counts: str | None = None) -> None:
        self.path, self.id, self._file = path, path.stem, file
        chosen = _named(path, file, counts) if counts else _choose(path, file)
        self._matrix = chosen
        self.matrix, self.n_obs, self.n_vars = chosen.name, chosen.n_obs, chosen.n_vars
        self._check_shape()
        _check_genes(path, self.var.index)

    def __enter__(self) -> CountsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; obs and var that were read stay."""
        self._file.close()

    @cached_property
    def obs(self) -> pd.DataFrame:
        """obs as in the file, index = the cells' names as strings."""
        return _frame(self.path, self._file, "obs")

    @cached_property
    def var(self) -> pd.DataFrame:
        """var of the counts matrix (raw/var for raw/X), index = the genes' names as strings."""
        return _frame(self.path, self._file, self.matrix[:-1] + "var" if self.matrix.startswith("raw") else "var")

    @property
    def nnz(self) -> int:
        """Stored values of the matrix: all of them when it is dense."""
        return int(self._matrix.values.size)

    def chunks(self, rows: int = 4096, memory: int = MEMORY) -> Iterator[tuple[int, csr_matrix]]:
        """(first row, canonical CSR of at most `rows` cells): uint32 counts, sorted unique genes, no stored zeros.

        Every value is checked on the way; `memory` bounds the bytes of a dense slab or of a bucket of a CSC matrix.

        Raises:
            NotCountsError: a value is not a count; UnreadableFileError, DataError: the file is damaged.
        """
        for first, block, _ in self.audited(rows, memory):
            yield first, block

    def audited(
        self, rows: int = 4096, memory: int = MEMORY, scratch: Path | None = None
    ) -> Iterator[tuple[int, csr_matrix, Audit]]:
        """`chunks` with what the audit of each block found; `scratch` is where a large CSC matrix is turned round."""
        origin = Origin(self.path, self.matrix, lambda: self.obs.index, lambda: self.var.index, self.alternatives)
        for first, block in self._matrix.blocks(rows, memory, scratch):
            yield first, *check_counts(block, origin, first)

    def audit(self) -> Audit:
        """Look at every value: one pass over the file."""
        whole = Audit(self.matrix, str(self._matrix.values.dtype), n_vars=self.n_vars)
        for _, _, part in self.audited():
            whole += part
        return whole

    def alternatives(self) -> tuple[str, ...]:
        """The file's other matrices that look like counts, by the name `counts=` takes."""
        others = [m for m in _matrices(self.path, self._file) if m.name != self.matrix]
        return tuple(_option(m.name) for m in others if _looks_like_counts(m))

    def _check_shape(self) -> None:
        if not self.n_obs or not self.n_vars:
            raise DataError(
                f"{self.path}: {self.matrix} has {self.n_obs} cells and {self.n_vars} genes: nothing to use"
            )
        found = (len(self.obs), len(self.var))
        if found != (self.n_obs, self.n_vars):
            raise DataError(
                f"{self.path}: {self.matrix} is {self.n_obs:,} x {self.n_vars:,}, but obs and var name {found[0]:,} "
                f"cells and {found[1]:,} genes: the file is damaged; write it again from its source"
            )


def open_counts(path: str | Path, *, counts: str | None = None) -> CountsFile:
    """Open an h5ad at its raw counts: `counts` ("X", "raw" or a layer), else X, raw/X or a layer, whichever holds them.

    Raises:
        UnreadableFileError: missing, empty, truncated or locked, or not an h5ad (the message says what it is).
        NotCountsError: no matrix looks like counts, or several do and none is the obvious one.
        DataError: no cells, no genes, genes named twice, or no matrix `counts`.
    """
    path = Path(path)
    file = open_h5ad(path)
    try:
        return CountsFile(path, file, counts)
    except BaseException:
        file.close()
        raise


def _matrices(path: Path, file: h5py.File) -> list[Matrix]:
    names = ["X", "raw/X", "raw.X", *(f"layers/{name}" for name in file.get("layers", ()))]
    found = [_matrix(path, file, name) for name in names if name in file]
    return [m for m in found if m is not None]


def _matrix(path: Path, file: h5py.File, name: str) -> Matrix | None:
    """None when the values are not numbers or the layout is unknown."""
    node = file[name]
    if isinstance(node, h5py.Dataset):
        numeric = node.dtype.kind in "biuf" and node.ndim == 2
        return Matrix(file, path, name, "dense", *node.shape) if numeric else None
    layout = {"csr_matrix": "csr", "csc_matrix": "csc", "csr": "csr", "csc": "csc"}.get(
        str(_attribute(node, "encoding-type", "h5sparse_format"))
    )
    shape = _attribute(node, "shape", "h5sparse_shape")
    parts = all(isinstance(node.get(part), h5py.Dataset) for part in ("data", "indices", "indptr"))
    if layout is None or shape is None or not parts or node["data"].dtype.kind not in "biuf":
        return None
    return Matrix(file, path, name, layout, int(shape[0]), int(shape[1]))


def _attribute(node: h5py.Group, *names: str) -> Any:
    value = next((node.attrs[name] for name in names if name in node.attrs), None)
    return value.decode() if isinstance(value, bytes) else value


def _named(path: Path, file: h5py.File, counts: str) -> Matrix:
    matrices = {m.name: m for m in _matrices(path, file)}
    wanted = {"X": ("X",), "raw": ("raw/X", "raw.X")}.get(counts, (f"layers/{counts}", counts))
    found = next((matrices[name] for name in wanted if name in matrices), None)
    if found is None:
        options = [_option(name) for name in matrices]
        raise DataError(f"{path}: there is no matrix {counts!r} of numbers; {nearest(counts, options)}")
    return found


def _option(name: str) -> str:
    if name in ("raw/X", "raw.X"):
        return "raw"
    layer = name.removeprefix("layers/")
    return name if layer in ("X", "raw") else layer


def _looks_like_counts(matrix: Matrix) -> bool:
    sample = matrix.sample()
    return bool(sample.any()) and as_counts(sample) is not None


def _choose(path: Path, file: h5py.File) -> Matrix:
    """X if it holds whole numbers, else the one other matrix that does."""
    matrices = _matrices(path, file)
    x = next((m for m in matrices if m.name == "X"), None)
    if x is not None and _looks_like_counts(x):
        return x
    found = [m for m in matrices if m is not x and _looks_like_counts(m)]
    obvious = [m for m in found if _option(m.name).removeprefix("layers/").lower() in COUNTS_NAMES]
    best = obvious or found
    if len(best) == 1:
        return best[0]
    if best:
        options = [_option(m.name) for m in best]
        why = _why_not(x) if x is not None else "the file has no X"
        raise NotCountsError(
            f"{path}: {why}, and {len(best)} matrices look like raw counts: {', '.join(m.name for m in best)}. "
            f"Say which one with {' or '.join(f'--counts {name}' for name in options)}"
        )
    if x is not None and as_counts(x.sample()) is not None:
        return x  # only zeros were seen; nothing better is there
    names = ", ".join(m.name for m in matrices) or "none"
    why = "".join(f" {_why_not(m)};" for m in matrices).rstrip(";")
    raise NotCountsError(
        f"{path}: no matrix holds raw counts (looked at: {names}).{why}. "
        "Normalised, log-transformed or scaled values cannot be used: get the raw counts from the data's source"
    )


def _why_not(matrix: Matrix) -> str:
    values = matrix.sample()
    with np.errstate(invalid="ignore"):
        bad = values[~((values >= 0) & (values == np.floor(values)) & np.isfinite(values))]
    if not len(bad):
        return f"{matrix.name} holds no counts"
    return f"{matrix.name} holds {bad[0]!s} ({len(bad):,} of {len(values):,} values looked at are not counts)"


def _check_genes(path: Path, names: pd.Index) -> None:
    plain = pd.Index(normalise(names))
    if plain.is_unique:
        return
    twice = plain[plain.duplicated()].unique()
    shown = "; ".join(" and ".join(map(repr, names[plain == name][:3])) for name in twice[:3])
    raise DataError(
        f"{path}: {len(twice):,} genes occur more than once in var_names (Ensembl versions aside), e.g. {shown}. "
        "Use unique ids as var_names (often another column of var has them), or sum the duplicates first"
    )


def _frame(path: Path, file: h5py.File, name: str) -> pd.DataFrame:
    def read() -> pd.DataFrame:
        node = file[name]
        if isinstance(node, h5py.Dataset):
            return _compound_frame(node, file.get("uns"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ad.OldFormatWarning)
            return ad.io.read_elem(node)

    try:
        frame = guarded(path, read)
    except UnreadableFileError:
        raise
    except Exception as error:  # anndata's errors of unknown encodings are not public
        raise UnreadableFileError(
            f"{path}: {name} cannot be read ({error}); open the file with anndata and write it again"
        ) from error
    if frame.index.dtype != object:
        frame.index = frame.index.astype(str).astype(object)
    return frame


def _compound_frame(table: h5py.Dataset, uns: h5py.Group | None) -> pd.DataFrame:
    """obs or var of files written before anndata 0.7: one structured array, categories in uns/<column>_categories."""
    rows = table[()]
    names = list(rows.dtype.names)
    index = next((n for n in ("index", "_index") if n in names), names[0])
    columns = {n: _text(rows[n]) for n in names if n != index}
    for name in columns:
        key = f"{name}_categories"
        if uns is not None and key in uns and isinstance(uns[key], h5py.Dataset):
            columns[name] = pd.Categorical.from_codes(columns[name], _text(np.atleast_1d(uns[key][()])))
    return pd.DataFrame(columns, index=_text(rows[index]))


def _text(values: np.ndarray) -> Any:
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8").astype(object)
    if values.dtype.kind == "O":
        return np.array([v.decode() if isinstance(v, bytes) else v for v in values], dtype=object)
    return values
