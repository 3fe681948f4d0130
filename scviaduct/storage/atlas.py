"""An atlas on disk: data sets of raw counts with their obs and var, opened without reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError, IncompleteError, MissingColumnError, UnreadableFileError, nearest
from scviaduct.storage.arrays import open_array, open_group
from scviaduct.storage.columns import DATASET, OBS_DATASET, Column
from scviaduct.storage.genes import normalise, select
from scviaduct.storage.manifest import ATLAS_MARKER, DATASET_MARKER, FORMAT, check_files, read_json

Join = Literal["union", "intersection"]


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
    """The counts of one data set on disk; opening it reads the row pointers only (8 bytes a cell)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def _open(self) -> None:
        self._arrays = {name: open_array(self.path / "X" / name) for name in ("data", "indices", "indptr")}
        self.indptr: NDArray[np.int64] = self._read("indptr", "row pointers", 0, None)
        shape: Any = open_group(self.path / "X").attrs["shape"]
        self.n_obs, self.n_vars = len(self.indptr) - 1, shape[1]

    def rows(self, first: int, last: int) -> csr_matrix:
        """Cells first to last as canonical CSR: counts in the stored type, int32 gene indices.

        Raises IncompleteError when a chunk is damaged or gone.
        """
        lo, hi = int(self.indptr[first]), int(self.indptr[last])
        what = f"cells {first:,}-{last - 1:,}"
        data, indices = self._read("data", what, lo, hi), self._read("indices", what, lo, hi).astype(np.int32)
        block = csr_matrix((data, indices, self.indptr[first : last + 1] - lo), shape=(last - first, self.n_vars))
        block.has_canonical_format = True
        return block

    def blocks(self, rows: int) -> Iterator[tuple[int, csr_matrix]]:
        """(first cell, CSR of at most `rows` cells) in order."""
        for first in range(0, self.n_obs, rows):
            yield first, self.rows(first, min(first + rows, self.n_obs))

    def _read(self, name: str, what: str, lo: int, hi: int | None) -> NDArray[Any]:
        array = self._arrays[name]
        try:
            values = np.asarray(array[lo:hi])
        except (RuntimeError, OSError, ValueError) as error:  # zarrs raises RuntimeError for a wrong checksum
            raise IncompleteError(
                f"{self.path}/X/{name}: {what} cannot be read ({error}); convert {self.path.name} again"
            ) from error
        # A chunk that is gone reads as the fill value, and no stored value ever equals it.
        if (values == array.fill_value).any():
            raise IncompleteError(
                f"{self.path}/X/{name}: a chunk with {what} is missing; convert {self.path.name} again"
            )
        return values


@dataclass(frozen=True, eq=False)
class Atlas:
    """Data sets on disk. Only metadata are held; counts, obs and var are read when they are asked for."""

    path: Path
    datasets: tuple[DatasetInfo, ...]
    vocabulary: dict[str, tuple[str, ...]]
    """Values that occur in each obs column that is not numeric in all data sets, as text."""
    _files: dict[str, dict[str, dict[str, Any]]] = field(repr=False)
    """Size and sha256 of the files of each data set."""
    _open: dict[str, Counts] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Atlas:
        """Open an atlas; reads its JSON files, no arrays.

        Raises:
            UnreadableFileError: there is nothing at `path`, or it is a file.
            IncompleteError: the atlas was not written to the end, or a data set of it is gone.
        """
        path = Path(path)
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
        except KeyError as error:
            raise IncompleteError(
                f"{path}: a manifest lacks {error}: it is damaged; convert the files again"
            ) from error
        return cls(path, infos, vocabulary, files)

    @property
    def n_obs(self) -> int:
        """Cells of all data sets."""
        return sum(d.n_obs for d in self.datasets)

    def obs(self, dataset_id: str, columns: list[str] | None = None) -> pd.DataFrame:
        """obs of one data set as in its source, or some `columns` of it; MissingColumnError for one that is not."""
        group = open_group(self._checked(dataset_id) / "obs")
        if columns is None:
            return ad.io.read_elem(group)
        attributes: Any = group.attrs
        available = list(attributes["column-order"])
        for column in columns:
            if column not in available:
                raise MissingColumnError(
                    f"{self.path}: obs of data set {dataset_id!r} has no column {column!r}; {nearest(column, available)}"
                )
        index = pd.Index(ad.io.read_elem(group[attributes["_index"]]))
        return pd.DataFrame({c: ad.io.read_elem(group[c]) for c in columns}, index=index)

    def var(self, dataset_id: str) -> pd.DataFrame:
        """var of one data set as in its source."""
        return ad.io.read_elem(open_group(self._checked(dataset_id) / "var"))

    def counts(self, dataset_id: str) -> Counts:
        """The counts of one data set, for reading any rows."""
        if dataset_id not in self._open:
            self._open[dataset_id] = Counts(self._checked(dataset_id))
        return self._open[dataset_id]

    def chunks(self, dataset_id: str, rows: int = 8192) -> Iterator[tuple[int, csr_matrix]]:
        """(first cell, canonical CSR of at most `rows` cells) of one data set, in order."""
        yield from self.counts(dataset_id).blocks(rows)

    def genes(self, join: Join = "union") -> tuple[str, ...]:
        """Genes of any ("union") or of all ("intersection") data sets, Ensembl versions aside, in order of appearance."""
        names = [dict.fromkeys(normalise(self.var(d.id).index)) for d in self.datasets]
        found = dict.fromkeys(gene for genes in names for gene in genes)
        return tuple(g for g in found if join == "union" or all(g in genes for genes in names))

    def lazy(self, join: Join = "union", rows: int = 8192) -> ad.AnnData:
        """All data sets as one AnnData whose X is a dask array of CSR blocks of at most `rows` cells, float32.

        obs holds the columns of all data sets (text ones as categories of the vocabulary) and "dataset"; a column of
        that name in a source becomes "obs.dataset". Names of cells get the prefix "<data set>:" when they collide.
        """
        genes = self.genes(join)
        positions = {gene: i for i, gene in enumerate(genes)}
        blocks = []
        for info in self.datasets:
            names = normalise(self.var(info.id).index)
            columns = np.array([positions.get(name, -1) for name in names], np.int32)
            blocks.append(_lazy_counts(self.counts(info.id), columns, len(genes), rows))
        return ad.AnnData(X=da.concatenate(blocks), obs=self._all_obs(), var=self._all_var(genes))

    def digest(self) -> str:
        """sha256 over the manifests of the data sets: equal digests mean the same data in the same order."""
        digest = hashlib.sha256()
        for info in self.datasets:
            digest.update((self.path / "datasets" / info.id / DATASET_MARKER).read_bytes())
        return digest.hexdigest()

    def _checked(self, dataset_id: str) -> Path:
        if dataset_id not in self._files:
            known = [d.id for d in self.datasets]
            raise DataError(f"{self.path} has no data set {dataset_id!r}; {nearest(dataset_id, known)}")
        path = self.path / "datasets" / dataset_id
        if dataset_id not in self._open:
            check_files(path, self._files[dataset_id])
        return path

    def _all_obs(self) -> pd.DataFrame:
        frames = [self.obs(d.id).rename(columns={DATASET: OBS_DATASET}) for d in self.datasets]
        text = {OBS_DATASET if name == DATASET else name: values for name, values in self.vocabulary.items()}
        parts = []
        for frame in frames:
            codes = {c: Column(c, text[c]).encode(frame[c], len(frame)) for c in frame.columns if c in text}
            parts.append(frame.assign(**{c: pd.Categorical.from_codes(codes[c], text[c]) for c in codes}))
        obs = pd.concat(parts)
        for name, values in text.items():
            # A data set without the column turns the concatenated categories into objects.
            obs[name] = pd.Categorical(obs[name], categories=list(values))
        ids = [d.id for d in self.datasets]
        obs[DATASET] = pd.Categorical.from_codes(np.repeat(range(len(ids)), [d.n_obs for d in self.datasets]), ids)
        obs.index = obs.index.astype(str)
        if not obs.index.is_unique:
            obs.index = make_index_unique(pd.Index(obs[DATASET].astype(str) + ":" + obs.index))
        return obs

    def _all_var(self, genes: tuple[str, ...]) -> pd.DataFrame:
        frames = [self.var(d.id) for d in self.datasets]
        for frame in frames:
            frame.index = pd.Index(normalise(frame.index))
        var = pd.concat([f.astype({c: object for c in f.columns if f[c].dtype == "category"}) for f in frames])
        return var[~var.index.duplicated()].reindex(pd.Index(genes))


def _refuse_other(path: Path) -> None:
    """Say what is at a path that is not an atlas."""
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist; scviaduct convert FILES --out {path} makes an atlas")
    if not path.is_dir():
        raise UnreadableFileError(f"{path} is a file, not an atlas; scviaduct convert {path} --out ATLAS makes one")
    if not (path / ATLAS_MARKER).exists():
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
