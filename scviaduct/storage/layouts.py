"""Where an AnnData file (h5ad or Zarr) and a 10x Genomics h5 file keep their matrices and tables (MuData: mudata.py)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import DataError, NotCountsError, UnreadableFileError, nearest
from scviaduct.storage.beside import PROTEIN_EXPRESSION, Beside
from scviaduct.storage.choice import choose, named
from scviaduct.storage.chunks import Group, guarded, is_array
from scviaduct.storage.frames import read_element, read_frame, text
from scviaduct.storage.matrix import Matrix, find_matrix

H5AD, ZARR, TENX = "h5ad", "AnnData Zarr", "10x Genomics h5"
"""The kinds of files that are read."""
GENES = "Gene Expression"
"""The feature type that becomes counts."""
ANTIBODIES = "Antibody Capture"
"""The feature type that is offered as an element of obsm."""
NAMES_IN_UNS = ("{}_names", "{}_var_names", "{}_columns", "{}_var")
"""Where files name the columns of an array of obsm, whose name stands for the braces; scvi-tools: "protein_names"."""


class Layout(Protocol):
    """What a file holds and where."""

    kind: str
    path: Path
    root: Group

    def matrix(self, counts: str | None) -> tuple[Matrix, str]:
        """The matrix of counts, and why this one."""

    def matrices(self) -> list[Matrix]:
        """All matrices of numbers."""

    def obs(self, matrix: Matrix) -> pd.DataFrame:
        """The cells of a matrix."""

    def var(self, matrix: Matrix) -> pd.DataFrame:
        """The features of a matrix."""

    def feature_type(self, counts: str | None) -> str:
        """Which features are wanted when there are several types."""

    def names(self, kind: str) -> tuple[str, ...]:
        """Names in obsm or layers."""

    def columns(self, name: str) -> tuple[str, ...] | None:
        """Names of the columns of an element of obsm, where the file has them."""

    def beside(self, name: str) -> Beside | None:
        """An element that obsm is said to have, but that stands elsewhere."""


class AnnDataLayout:
    """An h5ad file or an AnnData Zarr store."""

    def __init__(self, path: Path, root: Group) -> None:
        self.path, self.root = path, root
        self.kind = H5AD if isinstance(root, h5py.File) else ZARR

    def matrix(self, counts: str | None) -> tuple[Matrix, str]:
        """As `counts` says, else X, raw/X or the layer that holds whole numbers."""
        if counts is not None:
            return named(self.path, self.matrices(), counts), "as asked for"
        return choose(self.path, self.matrices())

    def matrices(self) -> list[Matrix]:
        """X, raw/X and the layers, as far as they are numbers."""
        names = ["X", "raw/X", "raw.X", *(f"layers/{name}" for name in self.names("layers"))]
        there = guarded(self.path, lambda: [name for name in names if name in self.root])
        found = [find_matrix(self.path, self.root, name) for name in there]
        return [m for m in found if m is not None]

    def obs(self, matrix: Matrix) -> pd.DataFrame:
        """obs as in the file."""
        return read_frame(self.path, self.root, "obs")

    def var(self, matrix: Matrix) -> pd.DataFrame:
        """var, or raw/var for raw/X."""
        name = matrix.name[:-1] + "var" if matrix.name in ("raw/X", "raw.X") else "var"
        return read_frame(self.path, self.root, name)

    def feature_type(self, counts: str | None) -> str:
        """Genes."""
        return GENES

    def names(self, kind: str) -> tuple[str, ...]:
        """Names of the elements in obsm or layers."""
        with _quiet():
            node: Any = guarded(self.path, lambda: self.root.get(kind))
            if isinstance(node, h5py.Dataset):  # before anndata 0.7 obsm was one structured array
                return tuple(node.dtype.names or ())
            return () if node is None or is_array(node) else guarded(self.path, lambda: tuple(map(str, node)))

    def columns(self, name: str) -> tuple[str, ...] | None:
        """The columns of a table; of an array the list in uns that is as long and called "<name>_names" or alike."""
        obsm: Any = guarded(self.path, lambda: self.root["obsm"])
        node = None if isinstance(obsm, h5py.Dataset) else guarded(self.path, lambda: obsm.get(name))
        if node is None:
            return None
        if "column-order" in node.attrs:
            return tuple(map(str, text(np.asarray(node.attrs["column-order"]))))
        width = node.shape[1] if is_array(node) and len(node.shape) == 2 else tuple(node.attrs.get("shape", (0, 0)))[1]
        for key in (*(pattern.format(name) for pattern in NAMES_IN_UNS), "protein_names"):
            found = self._list(f"uns/{key}")
            if len(found) == width:
                return tuple(found)
        return None

    def beside(self, name: str) -> Beside | None:
        """None."""
        return None

    def _list(self, name: str) -> list[str]:
        """The texts of a list in the file; none when there is no such list."""
        if not guarded(self.path, lambda: name in self.root and is_array(self.root[name])):
            return []
        found = np.atleast_1d(np.asarray(read_element(self.path, self.root[name])))
        return list(map(str, text(found))) if found.ndim == 1 else []


class TenxLayout:
    """A 10x Genomics h5 of CellRanger 3 and later (`matrix/features`), or of CellRanger 2 (one group a genome)."""

    kind = TENX

    def __init__(self, path: Path, root: h5py.File) -> None:
        self.path, self.root = path, root
        self._new = guarded(path, lambda: "matrix" in root and "features" in root["matrix"])

    def matrix(self, counts: str | None) -> tuple[Matrix, str]:
        """The only one; `counts` names a genome of an old file or a feature type of a new one."""
        matrices = {m.name: m for m in self.matrices()}
        names = tuple(self._types()) if self._new else tuple(matrices)
        if counts is not None and counts not in names:
            raise DataError(f"{self.path}: there is no {self._what()} {counts!r}; {nearest(counts, names)}")
        if self._new:
            wanted = self.feature_type(counts)
            if wanted not in names:
                options = " or ".join(f"--counts {name!r}" for name in names)
                raise NotCountsError(
                    f"{self.path}: holds no {GENES} but {', '.join(names)}: no genes to count. "
                    f"To use these features as they are pass {options}"
                )
            return matrices["matrix"], "as asked for" if counts else f"its {GENES} features"
        if counts is None and len(matrices) > 1:
            options = " or ".join(f"--counts {name}" for name in names)
            raise NotCountsError(f"{self.path}: holds {len(names)} genomes: say which one with {options}")
        name = counts or names[0]
        return matrices[name], "as asked for" if counts else "the only one"

    def matrices(self) -> list[Matrix]:
        """One, or one a genome."""
        return guarded(self.path, lambda: [self._matrix(name) for name in self._groups()])

    def obs(self, matrix: Matrix) -> pd.DataFrame:
        """The barcodes, without columns."""
        return pd.DataFrame(index=pd.Index(self._text(f"{matrix.name}/barcodes"), dtype=object))

    def var(self, matrix: Matrix) -> pd.DataFrame:
        """Ids as names; columns feature_name and, if the file has them, feature_types and genome."""
        fields = {"feature_name": "gene_names"}
        if self._new:
            fields = {"feature_name": "name", "feature_types": "feature_type", "genome": "genome"}
        folder = f"{matrix.name}/features/" if self._new else f"{matrix.name}/"
        index = self._text(folder + ("id" if self._new else "genes"))
        there = guarded(self.path, lambda: [c for c, name in fields.items() if folder + name in self.root])
        columns = {column: self._text(folder + fields[column]) for column in there}
        bad = next((column for column, values in columns.items() if len(values) != len(index)), None)
        if bad:
            raise UnreadableFileError(f"{self.path}: {bad} has not one entry for each feature id: the file is damaged")
        return pd.DataFrame(columns, index=pd.Index(index, dtype=object))

    def feature_type(self, counts: str | None) -> str:
        """Genes unless another type was asked for."""
        return counts if counts and self._new else GENES

    def names(self, kind: str) -> tuple[str, ...]:
        """The antibodies as an element of obsm."""
        return (PROTEIN_EXPRESSION,) if kind == "obsm" and self._antibodies else ()

    def columns(self, name: str) -> tuple[str, ...] | None:
        """Names of the antibodies."""
        return self._antibodies.names if self._antibodies else None

    def beside(self, name: str) -> Beside | None:
        """The antibodies."""
        return self._antibodies

    @cached_property
    def _antibodies(self) -> Beside | None:
        """The features of this type; under their names, or their ids where these repeat."""
        if not self._new or ANTIBODIES not in self._types():
            return None
        matrix = self.matrices()[0]
        var = self.var(matrix)
        columns = np.flatnonzero(var["feature_types"] == ANTIBODIES)
        names = var["feature_name"].iloc[columns]
        return Beside(tuple(names if names.is_unique else var.index[columns]), matrix, columns)

    def _groups(self) -> list[str]:
        if self._new:
            return ["matrix"]
        return [name for name, node in self.root.items() if isinstance(node, h5py.Group) and "barcodes" in node]

    def _matrix(self, name: str) -> Matrix:
        node = self.root[name]
        parts = [node[part] for part in ("shape", "indices", "indptr", "data")]
        whole = all(p.ndim == 1 and p.dtype.kind in "iu" for p in parts[:3])
        if not whole or parts[3].ndim != 1 or parts[3].dtype.kind not in "biuf":
            raise ValueError(f"{name}/shape, data, indices and indptr are no lists of numbers")
        n_vars, n_obs = map(int, parts[0][:])  # stored as genes x cells in CSC, which is CSR of cells x genes
        return Matrix(self.root, self.path, name, "csr", n_obs, n_vars)

    def _types(self) -> list[str]:
        if guarded(self.path, lambda: "feature_type" not in self.root["matrix/features"]):
            return [GENES]
        return list(dict.fromkeys(self._text("matrix/features/feature_type")))

    def _text(self, name: str) -> NDArray[np.object_]:
        found = guarded(self.path, lambda: text(self.root[name][:]).astype(str).astype(object))
        if found.ndim != 1:
            raise UnreadableFileError(f"{self.path}: {name} is no list: the file is damaged; get it again")
        return found

    def _what(self) -> str:
        return "feature type" if self._new else "genome"


def close(layout: Layout) -> None:
    """Close the file of a layout."""
    if isinstance(layout.root, h5py.Group):  # a file is one, and so is a part of it
        layout.root.file.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """zarr warns of files beside a store's own, such as a manifest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy")
        yield
