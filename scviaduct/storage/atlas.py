"""An atlas on disk: data sets of raw counts with their obs and var, opened without reading them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError, IncompleteError, MissingColumnError, UnreadableFileError, nearest
from scviaduct.storage.arrays import open_group
from scviaduct.storage.fetched import fetch_group
from scviaduct.storage.genes import GeneAxis, Join, gene_axis, select
from scviaduct.storage.joined import joined_obs, joined_var
from scviaduct.storage.manifest import ATLAS_MARKER, DATASET_MARKER, FORMAT, check_files, read_json
from scviaduct.storage.memory import Allocate
from scviaduct.storage.places import Place, exists, place
from scviaduct.storage.shards import Arrays, Slice


@dataclass(frozen=True)
class DatasetInfo:
    """What the manifest of a data set says of it."""

    id: str
    """Stem of the source file."""
    n_obs: int
    """Cells, those without counts included."""
    n_vars: int
    """Genes."""
    nnz: int
    """Counts that are not zero."""
    sum: int
    """Sum of all counts."""
    source: str
    """Name of the source file."""
    sha256: str
    """sha256 of the source file."""
    matrix: str
    """Which matrix of the source held the counts."""
    zero_count_cells: int
    """Cells without any count."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> DatasetInfo:
        """The record of a manifest."""
        names = {f.name: "source_sha256" if f.name == "sha256" else f.name for f in fields(cls)}
        return cls(**{name: manifest[key] for name, key in names.items()})


class Counts:
    """The counts of one data set on disk; opening it reads the row pointers only (8 bytes a cell).

    `allocate` makes the arrays that are read.
    """

    def __init__(self, path: Place, matrix: str = "X", *, allocate: Allocate = np.empty) -> None:
        self.path, self.matrix = path, matrix
        self._arrays = Arrays(path / matrix, allocate)
        attributes = read_json(path / matrix / "zarr.json")["attributes"]
        length = read_json(path / matrix / "indptr" / "zarr.json")["shape"][0]
        (self.indptr,) = self._read("row pointers", Slice("indptr", 0, length))
        self.n_obs, self.n_vars = length - 1, attributes["shape"][1]

    def __reduce__(self) -> tuple[type[Counts], tuple[Place, str]]:
        return Counts, (self.path, self.matrix)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type of the counts."""
        return self._arrays.layouts(["data"])[0].dtype

    def rows(self, first: int, last: int) -> csr_matrix:
        """Cells first to last as canonical CSR: counts in the stored type, int32 gene indices.

        Raises IncompleteError when a chunk is damaged or gone.
        """
        indptr, indices, data = self.raw(first, last)
        block = csr_matrix((data, indices.astype(np.int32), indptr), shape=(last - first, self.n_vars))
        block.has_canonical_format = True
        return block

    def raw(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        """(row pointers from 0, gene indices, counts) of cells first to last, in the stored types."""
        lo, hi = int(self.indptr[first]), int(self.indptr[last])
        what = f"cells {first:,}-{last - 1:,}"
        indices, data = self._read(what, Slice("indices", lo, hi), Slice("data", lo, hi))
        return self.indptr[first : last + 1] - lo, indices, data

    def blocks(self, rows: int) -> Iterator[tuple[int, csr_matrix]]:
        """(first cell, CSR of at most `rows` cells) in order."""
        for first in range(0, self.n_obs, rows):
            yield first, self.rows(first, min(first + rows, self.n_obs))

    def _read(self, what: str, *slices: Slice) -> list[NDArray[Any]]:
        try:
            return self._arrays.read(*slices)
        except (RuntimeError, OSError, ValueError) as error:  # numcodecs raises RuntimeError for what does not decode
            why = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else error
            raise IncompleteError(
                f"{self.path}/{self.matrix}: {what} cannot be read ({why}); convert {self.path.name} again"
            ) from error


@dataclass(frozen=True, eq=False)
class Atlas:
    """Data sets on disk. Only metadata are held; counts, obs and var are read when they are asked for."""

    path: Place
    datasets: tuple[DatasetInfo, ...]
    vocabulary: dict[str, tuple[str, ...]]
    """Values that occur in each obs column that is not numeric in all data sets, as text."""
    identifiers: tuple[str, ...]
    """Columns that name cells (more than 100 values, and than half the cells): not in the vocabulary."""
    _files: dict[str, dict[str, dict[str, Any]]] = field(repr=False)
    """Size and sha256 of the files of each data set."""
    _open: dict[str, Counts] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Place) -> Atlas:
        """Open an atlas; reads its JSON files, no arrays.

        Raises:
            UnreadableFileError: there is nothing at `path`, or it is a file.
            IncompleteError: the atlas was not written to the end, or a data set of it is gone.
        """
        path = place(path)
        _refuse_other(path)
        record = read_json(path / ATLAS_MARKER)
        if record.get("format") != FORMAT:
            raise IncompleteError(
                f"{path} has the atlas format {record.get('format')!r} (written by scviaduct {record.get('version')}); "
                f"this version reads format {FORMAT}: convert the files again, or use that version"
            )
        manifests = {name: read_json(path / "datasets" / name / DATASET_MARKER) for name in record["datasets"]}
        try:
            infos = tuple(DatasetInfo.of(manifest) for manifest in manifests.values())
            files = {name: manifest["files"] for name, manifest in manifests.items()}
            vocabulary = {column: tuple(values) for column, values in record["vocabulary"].items()}
            identifiers = tuple(record["identifiers"])
        except KeyError as error:
            raise IncompleteError(
                f"{path}: a manifest lacks {error}: it is damaged; convert the files again"
            ) from error
        return cls(path, infos, vocabulary, identifiers, files)

    @property
    def n_obs(self) -> int:
        """Cells of all data sets."""
        return sum(d.n_obs for d in self.datasets)

    def obs(self, dataset_id: str, columns: list[str] | None = None) -> pd.DataFrame:
        """obs of one data set as in its source, or some `columns` of it; MissingColumnError for one that is not."""
        group = self._group(dataset_id, "obs")
        if columns is None:
            return ad.io.read_elem(group)
        attributes: Any = group.attrs
        available = self.obs_columns(dataset_id)
        for column in columns:
            if column not in available:
                raise MissingColumnError(
                    f"{self.path}: obs of data set {dataset_id!r} has no column {column!r}; {nearest(column, available)}"
                )
        index = pd.Index(ad.io.read_elem(group[attributes["_index"]]))
        return pd.DataFrame({c: ad.io.read_elem(group[c]) for c in columns}, index=index)

    def obs_columns(self, dataset_id: str) -> list[str]:
        """Names of the obs columns of one data set."""
        attributes: Any = self._group(dataset_id, "obs").attrs
        return list(attributes["column-order"])

    def obsm(self, dataset_id: str) -> dict[str, Any]:
        """What was kept of obsm of one data set, whole."""
        stored = any(name.startswith("obsm/") for name in self._files[dataset_id])
        return dict(ad.io.read_elem(self._group(dataset_id, "obsm"))) if stored else {}

    def layers(self, dataset_id: str) -> dict[str, Counts]:
        """The layers that were kept of one data set, for reading any rows."""
        names = {name.split("/")[1] for name in self._files[dataset_id] if re.match("layers/[^/]+/", name)}
        return {name: Counts(self._checked(dataset_id), f"layers/{name}") for name in sorted(names)}

    def var(self, dataset_id: str) -> pd.DataFrame:
        """var of one data set as in its source."""
        return ad.io.read_elem(self._group(dataset_id, "var"))

    def counts(self, dataset_id: str) -> Counts:
        """The counts of one data set, for reading any rows."""
        if dataset_id not in self._open:
            self._open[dataset_id] = Counts(self._checked(dataset_id))
        return self._open[dataset_id]

    def chunks(self, dataset_id: str, rows: int = 8192) -> Iterator[tuple[int, csr_matrix]]:
        """(first cell, canonical CSR of at most `rows` cells) of one data set, in order."""
        yield from self.counts(dataset_id).blocks(rows)

    @cached_property
    def axis(self) -> GeneAxis:
        """The names by which the genes of the data sets are compared; DataError when they have no kind in common."""
        return gene_axis({d.id: self.var(d.id) for d in self.datasets})

    def genes(self, join: Join = "union") -> tuple[str, ...]:
        """Genes of any ("union") or of all ("intersection") data sets on the `axis`, in order of appearance."""
        return self.axis.genes(join)

    def lazy(self, join: Join = "union", rows: int = 8192) -> ad.AnnData:
        """All data sets as one AnnData whose X is a dask array of CSR blocks of at most `rows` cells, float32.

        obs holds the columns of all data sets (text ones as categories of the vocabulary) and "dataset"; a column of
        that name in a source becomes "obs.dataset". Names of cells get the prefix "<data set>:" when they collide.
        """
        genes = self.genes(join)
        blocks = []
        for info in self.datasets:
            columns = self.axis.columns(info.id, genes)
            blocks.append(_lazy_counts(self.counts(info.id), columns, len(genes), rows))
        ids = [d.id for d in self.datasets]
        return ad.AnnData(X=da.concatenate(blocks), obs=joined_obs(self, ids), var=joined_var(self, ids, genes))

    def to_adata(
        self,
        *,
        datasets: str | Sequence[str] | None = None,
        where: str | None = None,
        genes: str | Path | Sequence[str] | None = None,
        join: Join = "union",
        memory: str | None = None,
    ) -> ad.AnnData:
        """Chosen cells and genes in memory: X as CSR float32, one data set as in its source, several as in `lazy`.

        `where` is a query over obs such as "cell_type == 'B cell' and donor != 'd1'" (pandas syntax); `genes` are names
        or a text file with one per line, in whose order they come; the rest as in `scviaduct.export`.

        Raises:
            NotEnoughMemoryError: they take more than `memory` (such as "40GB"; default: what is free).
            DataError, MissingColumnError, ConfigError: there is no such data set, gene or column, no such cell, or
                `where` is no comparison.
        """
        from scviaduct.storage.export import to_adata

        return to_adata(self, datasets=datasets, where=where, genes=genes, join=join, memory=memory)

    def digest(self) -> str:
        """sha256 over the manifests of the data sets: equal digests mean the same data in the same order."""
        digest = hashlib.sha256()
        for info in self.datasets:
            digest.update((self.path / "datasets" / info.id / DATASET_MARKER).read_bytes())
        return digest.hexdigest()

    def _group(self, dataset_id: str, name: str) -> zarr.Group:
        path = self._checked(dataset_id)
        if isinstance(path, Path):
            return open_group(path / name)
        return fetch_group(path, name, self._files[dataset_id])

    def _checked(self, dataset_id: str) -> Place:
        if dataset_id not in self._files:
            known = [d.id for d in self.datasets]
            raise DataError(f"{self.path} has no data set {dataset_id!r}; {nearest(dataset_id, known)}")
        path = self.path / "datasets" / dataset_id
        if dataset_id not in self._open:
            check_files(path, self._files[dataset_id])
        return path


def _refuse_other(path: Place) -> None:
    """Say what is at a path that is not an atlas."""
    if exists(path / ATLAS_MARKER):
        return
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist; scviaduct convert FILES --out {path} makes an atlas")
    if not path.is_dir():
        raise UnreadableFileError(f"{path} is a file, not an atlas; scviaduct convert {path} --out ATLAS makes one")
    raise IncompleteError(
        f"{path} is not a complete atlas: it has no {ATLAS_MARKER}, which is written last; run scviaduct convert again"
    )


def _lazy_counts(counts: Counts, columns: NDArray[np.int32], n_genes: int, rows: int) -> da.Array:
    shared = dask.delayed((counts, columns, n_genes), traverse=False)
    read = dask.delayed(_read_block, pure=False)
    meta = csr_matrix((0, 0), dtype=np.float32)
    blocks = []
    for first in range(0, counts.n_obs, rows):
        last = min(first + rows, counts.n_obs)
        blocks.append(da.from_delayed(read(shared, first, last), (last - first, n_genes), meta=meta))
    return da.concatenate(blocks)


def _read_block(shared: tuple[Counts, NDArray[np.int32], int], first: int, last: int) -> csr_matrix:
    counts, columns, n_genes = shared
    return select(counts.rows(first, last), columns, n_genes).astype(np.float32)
