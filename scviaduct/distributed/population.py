"""The cells that a trained model is asked about: those of a view, or of a file whose genes are aligned by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import Reading, TrackingConfig
from scviaduct.distributed.registered import open_bundle
from scviaduct.distributed.workers import device
from scviaduct.errors import ConfigError, DataError, MissingColumnError, nearest
from scviaduct.models.base import Model
from scviaduct.schema import Batch, Schema
from scviaduct.storage.cells import view_obs
from scviaduct.storage.loader import BlockSource, MemorySource, cut, gather, stream
from scviaduct.storage.manifest import ATLAS_MARKER
from scviaduct.storage.places import Place, exists, local, place
from scviaduct.storage.query import Query, read_query
from scviaduct.storage.sampler import keyed
from scviaduct.storage.view import View, occurring

_VALUES = 2**24  # values that are decoded at once: 64 MB each array
_BLOCKS = 64
_SAMPLE, _NOISE = 0xDE5A, 0x0DD5  # what the hashes of a cell are for


class Population(ABC):
    """Cells in blocks. Results have `n_obs` rows; row i of the source is row `places[i]` of them."""

    source: BlockSource
    schema: Schema
    n_obs: int
    places: NDArray[np.int64] | None = None
    """None when every row has its cell; else the other rows have no count over the model's genes, and no result."""
    identity: dict[str, str]
    """Where the cells are from, for the record."""

    @abstractmethod
    def obs(self) -> pd.DataFrame:
        """One row a result, indexed by the cells' names."""

    @abstractmethod
    def groups(self, key: str) -> tuple[NDArray[np.integer], list[str]]:
        """(source rows,) code of each cell in an obs column, -1 where it has no value; and the categories.

        Raises MissingColumnError, DataError.
        """

    @abstractmethod
    def sampled(self, rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
        """`n` of these source rows at random, fixed by the seed; all of them when they are fewer."""

    def blocks(self, n_features: int) -> Iterator[Batch]:
        """All cells in order, so few at a time that decoding `n_features` of them stays small."""
        step = max(1, _VALUES // n_features)
        with stream(self.source) as blocks:
            for block in blocks:
                for start in range(0, block.n_cells, step):
                    yield cut(block, start, min(start + step, block.n_cells), block.lanes)

    def gathered(self, rows: NDArray[np.int64], n_features: int) -> Iterator[Batch]:
        """Some cells by their source rows, in increasing order and as few at a time; only their blocks are read."""
        step, rows, size = max(1, _VALUES // n_features), np.sort(rows), self.source.block_rows
        # at most so many blocks are held that a rare cell type, one cell a block, is not decoded cell by cell
        borders = [0, *_borders(rows // size, min(step, size), _BLOCKS), len(rows)]
        for first, last in pairwise(borders):
            part = rows[first:last]
            held = [(self.source.read(int(b)), part[part // size == b] - b * size) for b in np.unique(part // size)]
            if held:
                yield gather(held)


def _borders(blocks: NDArray[np.int64], most: int, most_blocks: int) -> Iterator[int]:
    """Where to cut increasing block numbers, so that a part has at most `most` of them and `most_blocks` distinct."""
    start, distinct = 0, 1
    for at in range(1, len(blocks)):
        distinct += int(blocks[at] != blocks[at - 1])
        if at - start == most or distinct > most_blocks:
            yield at
            start, distinct = at, 1


class _OfView(Population):
    def __init__(self, view: View, schema: Schema) -> None:
        self.view, self.schema = view, schema
        self.source, self.n_obs = view.source(schema), view.n_rows
        self.identity = {"atlas": str(view.atlas_path), "view": view.name, "digest": view.digest}

    def obs(self) -> pd.DataFrame:
        return view_obs(self.view, self.schema.keys)

    def groups(self, key: str) -> tuple[NDArray[np.integer], list[str]]:
        record = self.view.column(key)
        codes = self.source.strata(key)
        return codes, list(record.get("categories") or occurring(record))

    def sampled(self, rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
        """The view is shuffled on disk, so the rows of its first blocks, in a random order of these, are a sample."""
        of_rows = rows // self.source.block_rows
        blocks, counts = np.unique(of_rows, return_counts=True)
        order = np.argsort(keyed(blocks, seed, _SAMPLE))
        enough = int(np.searchsorted(np.cumsum(counts[order]), n)) + 1
        taken, last = (np.isin(of_rows, blocks[order[part]]) for part in (slice(enough - 1), slice(enough - 1, enough)))
        rest = rows[last]
        rest = rest[np.argsort(keyed(rest, seed, _SAMPLE))[: n - int(taken.sum())]]
        return np.sort(np.concatenate([rows[taken], rest]))


class _OfFile(Population):
    def __init__(self, query: Query, path: Path) -> None:
        self.query, self.schema = query, query.schema
        self.source, self.n_obs = MemorySource(query.batch), query.n_obs
        self.places = None if len(query.kept) == query.n_obs else query.kept
        self._path = path
        self.identity = {"file": str(path), "digest": query.sha256}

    def obs(self) -> pd.DataFrame:
        return self.query.obs.copy()

    def groups(self, key: str) -> tuple[NDArray[np.integer], list[str]]:
        if key not in self.query.obs.columns:
            raise MissingColumnError(f"{self._path}: obs has no column {key!r}: {nearest(key, self.query.obs.columns)}")
        values = pd.Categorical(self.query.obs[key].iloc[self.query.kept])
        return values.codes, [str(c) for c in values.categories]

    def sampled(self, rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
        return np.sort(rows[np.argsort(keyed(rows, seed, _SAMPLE))[:n]])


def open_model(model: str | Path, reading: Reading) -> tuple[Model, Bundle]:
    """A trained model by its run, its bundle or its registered name (models:/name@alias), on this process's device.

    Raises UnreadableFileError, IncompleteError, ConfigError as `open_bundle` does.
    """
    bundle = open_bundle(model, TrackingConfig(tracking_uri=reading.tracking_uri))
    return bundle.model().to(device()), bundle


def open_population(data: str | Place, schema: Schema, reading: Reading) -> Population:
    """The cells of an atlas's view or of a file (h5ad, AnnData Zarr, 10x Genomics h5) as the model's codes.

    Raises:
        DataError: a batch or category is unknown to the model, genes do not fit, a column is missing.
        ConfigError: an option is meant for the other kind of data.
    """
    path = place(data)
    if exists(path / ATLAS_MARKER) or exists(path / "datasets"):
        _refuse_options(
            reading, ("batch_key", "counts", "proteins", "sum_duplicates", "min_genes"), "a file, not an atlas"
        )
        return _of_view(View.open(path, reading.view or "default"), schema)
    _refuse_options(reading, ("view",), "an atlas, not a file")
    return _of_file(local(data, "A file of cells"), schema, reading)


def _refuse_options(reading: Reading, names: tuple[str, ...], owner: str) -> None:
    for name in names:
        if getattr(reading, name) != getattr(Reading(), name):
            raise ConfigError(f"{name} is an option for {owner}; leave it out.")


def _of_view(view: View, schema: Schema) -> Population:
    for covariate in schema.covariates:
        known = set(covariate.categories)
        new = [c for c in occurring(view.column(covariate.key)) if c not in known]
        if new:
            raise DataError(
                f"View {view.name!r} of {view.atlas_path}: {len(new)} categories of {covariate.key!r} are unknown to the "
                f"model, e.g. {new[0]!r}. Map the files of these cells first (scviaduct map), or train on this view."
            )
    return _OfView(view, schema)


def _of_file(path: Path, schema: Schema, reading: Reading) -> Population:
    query = read_query(
        path,
        schema,
        batch_key=reading.batch_key,
        reuse_batches=True,
        counts=reading.counts,
        sum_duplicates=reading.sum_duplicates,
        floor=reading.min_genes,
        proteins=reading.proteins,
    )
    for old, new in query.schema.added(schema):
        raise DataError(
            f"{path}: {len(new)} categories of {old.key!r} are unknown to the model, e.g. {new[0]!r}; it knows "
            f"{', '.join(map(repr, old.categories[:3]))}{', …' if len(old) > 3 else ''}. Map the file first: "
            f"scviaduct map MODEL {path.name} --out mapped"
        )
    return _OfFile(query, path)


def seeds(batch: Batch, seed: int, *draw: int) -> NDArray[np.uint64]:
    """The cells' random keys for a draw: functions of (seed, cell, draw), whatever the blocks."""
    return keyed(batch.rows, seed, _NOISE, *draw)
