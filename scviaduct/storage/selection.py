"""Some cells and genes of an atlas: which they are, how much memory they take, and their counts block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import ConfigError, DataError, MissingColumnError, UnreadableFileError, nearest
from scviaduct.storage.atlas import Atlas, Counts, DatasetInfo
from scviaduct.storage.columns import DATASET, OBS_DATASET, as_text
from scviaduct.storage.genes import Join, normalise, select
from scviaduct.storage.joined import joined_obs, joined_var
from scviaduct.storage.where import Where, shown

BLOCK = 2**21
"""Values of a block; larger ones are slower, because fresh memory costs more than the work on it."""


@dataclass(frozen=True, eq=False)
class Cells:
    """The chosen cells of one data set."""

    id: str
    n_obs: int
    """Cells of the data set."""
    rows: NDArray[np.int64] | None
    """The chosen ones, increasing; None for all."""
    nnz: int
    """Their non-zeros over all genes."""
    columns: NDArray[np.int32]
    """(genes of the data set,) position of each among the chosen genes, -1 where it is not chosen."""

    @property
    def n_cells(self) -> int:
        """How many are chosen."""
        return self.n_obs if self.rows is None else len(self.rows)


Block = tuple[Cells, int, int]
"""(data set, first cell, last cell)."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Cells and genes of an atlas. One data set is as in its source; several are on the common axis, as in `lazy`."""

    atlas: Atlas
    cells: tuple[Cells, ...]
    genes: tuple[str, ...]
    """Names on the common axis; for one data set and all its genes, its var_names."""

    @classmethod
    def of(
        cls,
        atlas: Atlas,
        *,
        datasets: str | Sequence[str] | None = None,
        where: str | None = None,
        genes: str | Path | Sequence[str] | None = None,
        join: Join = "union",
    ) -> Selection:
        """The cells of some data sets (default: all) for which the query `where` over obs is true, over some genes.

        `genes` are names, or a text file with one per line; without them `join` says which genes of several data sets
        are meant: those of any or of all. A gene counts as zero where a data set does not have it, unless `join` is
        "intersection": then a chosen gene that a data set lacks is refused.

        Raises:
            DataError: no such data set or gene, or no cell is chosen. MissingColumnError: no data set has a column
                that `where` names. ConfigError: `where` is no comparison of columns.
        """
        if join not in ("union", "intersection"):
            raise ConfigError(f"join must be 'union' or 'intersection', not {join!r}")
        infos = _datasets(atlas, datasets)
        names, columns = _genes(atlas, infos, genes, join)
        rows = _rows(atlas, infos, Where.parse(where)) if where is not None else [None] * len(infos)
        cells = [_cells(atlas, info, r, c) for info, r, c in zip(infos, rows, columns, strict=True)]
        return cls(atlas, tuple(cells), names)

    @property
    def n_obs(self) -> int:
        """Chosen cells."""
        return sum(part.n_cells for part in self.cells)

    @cached_property
    def nnz(self) -> int:
        """About how many non-zeros they have over the chosen genes: exact for all genes, else from a sample of cells."""
        return sum(part.nnz if (part.columns >= 0).all() else self._sampled(part) for part in self.cells)

    def _sampled(self, part: Cells) -> int:
        counts, step = self.atlas.counts(part.id), max(1, part.n_obs // 16)
        kept = total = 0
        for first in range(0, part.n_obs, step):
            block = counts.rows(first, min(first + 32, part.n_obs))
            kept += int((part.columns[block.indices] >= 0).sum())
            total += block.nnz
        return min(part.nnz, int(part.nnz * kept / max(1, total) * 1.1) + 1)

    @property
    def bytes(self) -> int:
        """About how much memory they take as an AnnData: float32 counts, their gene indices, obs."""
        index = 4 if self.nnz < 2**31 else 8
        columns: set[str] = set()
        for part in self.cells:
            columns |= set(self.atlas.obs_columns(part.id))
        return self.nnz * (4 + index) + self.n_obs * (index + 80 + 12 * len(columns))  # 80: a name as a str, its hash

    def obs(self) -> pd.DataFrame:
        """obs of the chosen cells: of one data set as in its source, of several joined."""
        only = [part.id for part in self.cells]
        obs = self.atlas.obs(only[0]) if len(only) == 1 else joined_obs(self.atlas, only)
        if all(part.rows is None for part in self.cells):
            return obs
        starts = np.cumsum([0, *(part.n_obs for part in self.cells)])
        rows = [
            s + (np.arange(p.n_obs) if p.rows is None else p.rows) for s, p in zip(starts, self.cells, strict=False)
        ]
        obs = obs.iloc[np.concatenate(rows)]
        text = [c for c in obs.columns if isinstance(obs[c].dtype, pd.CategoricalDtype)]
        return obs.assign(**{c: obs[c].cat.remove_unused_categories() for c in text})

    def var(self) -> pd.DataFrame:
        """var of the chosen genes: of one data set as in its source, of several joined."""
        if len(self.cells) > 1:
            return joined_var(self.atlas, [part.id for part in self.cells], self.genes)
        (part,) = self.cells
        return self.atlas.var(part.id).iloc[_source_order(part)]

    def obsm(self) -> dict[str, Any]:
        """obsm of the chosen cells, when they are of one data set."""
        if len(self.cells) > 1:
            return {}
        (part,) = self.cells
        stored = self.atlas.obsm(part.id)
        return stored if part.rows is None else {name: _taken(values, part.rows) for name, values in stored.items()}

    def blocks(self) -> Iterator[Block]:
        """(data set, first cell, last cell) pieces that hold about `BLOCK` values each, for `counts`."""
        for part in self.cells:
            info = next(d for d in self.atlas.datasets if d.id == part.id)
            step = int(np.clip(BLOCK * info.n_obs // max(1, info.nnz), 16, 8192))
            for first in range(0, part.n_obs, step):
                yield part, first, min(first + step, part.n_obs)

    def layers(self) -> tuple[str, ...]:
        """Names of the layers that come along, when the cells are of one data set."""
        return tuple(self.atlas.layers(self.cells[0].id)) if len(self.cells) == 1 else ()

    def counts(self, block: Block) -> csr_matrix:
        """(chosen cells of the block, chosen genes) float32; blocks without a chosen cell are not read."""
        part, rows = block[0], self._rows(block)
        counts = _read(self.atlas.counts(part.id), rows)
        if self._all_genes(part):
            return counts.astype(np.float32)
        return select(counts, part.columns, len(self.genes)).astype(np.float32)

    def layer(self, name: str, block: Block) -> csr_matrix:
        """(chosen cells of the block, chosen genes) of a layer, in the type it is stored in."""
        part, rows = block[0], self._rows(block)
        values = _read(self._layers[name], rows)
        return values if self._all_genes(part) else values[:, _source_order(part)]

    @cached_property
    def _layers(self) -> dict[str, Counts]:
        return self.atlas.layers(self.cells[0].id)

    def _rows(self, block: Block) -> NDArray[np.int64]:
        part, first, last = block
        if part.rows is None:
            return np.arange(first, last)
        return part.rows[np.searchsorted(part.rows, first) : np.searchsorted(part.rows, last)]

    def _all_genes(self, part: Cells) -> bool:
        return len(part.columns) == len(self.genes) and bool((part.columns == np.arange(len(self.genes))).all())


def _read(stored: Counts, rows: NDArray[np.int64]) -> csr_matrix:
    """Some rows, increasing; what lies between the first and the last is decoded."""
    if not len(rows):
        return csr_matrix((0, stored.n_vars), dtype=np.uint8)
    first, last = int(rows[0]), int(rows[-1]) + 1
    block = stored.rows(first, last)
    return block if len(rows) == last - first else block[rows - first]


def _source_order(part: Cells) -> NDArray[np.int64]:
    """Positions in the data set of the genes it has of the chosen ones, in the order of these."""
    at = np.flatnonzero(part.columns >= 0)
    return at[np.argsort(part.columns[at])]


def _datasets(atlas: Atlas, wanted: str | Sequence[str] | None) -> list[DatasetInfo]:
    """In the order of the atlas."""
    if wanted is None:
        return list(atlas.datasets)
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    known = [d.id for d in atlas.datasets]
    for name in sorted(names - set(known)):
        raise DataError(f"{atlas.path} has no data set {name!r}; {nearest(name, known)}")
    if not names:
        raise DataError(f"no data set is chosen; {atlas.path} has {shown(known, 5)}")
    return [d for d in atlas.datasets if d.id in names]


def _genes(
    atlas: Atlas, infos: list[DatasetInfo], genes: str | Path | Sequence[str] | None, join: Join
) -> tuple[tuple[str, ...], list[NDArray[np.int32]]]:
    """The chosen genes, and for each data set where its genes are among them."""
    if genes is None and len(infos) == 1:
        names = tuple(map(str, atlas.var(infos[0].id).index))
        return names, [np.arange(len(names), dtype=np.int32)]
    if genes is None:
        found = {d.id: [name for name in atlas.axis.names[d.id] if name is not None] for d in infos}
        union = dict.fromkeys(name for names in found.values() for name in names)
        shared = set.intersection(*map(set, found.values()))
        chosen = tuple(name for name in union if join == "union" or name in shared)
        if not chosen:
            raise DataError(f"The data sets {shown([d.id for d in infos], 5)} have no gene in common; use join='union'")
    else:
        chosen = tuple(_named(genes))
    columns = [atlas.axis.columns(d.id, chosen) for d in infos]
    _refuse_absent(atlas, infos, chosen, columns, join)
    return chosen, columns


def _named(genes: str | Path | Sequence[str]) -> list[str]:
    """Names without Ensembl versions; a file has one per line."""
    if isinstance(genes, str | Path):
        if not Path(genes).is_file():
            raise UnreadableFileError(f"{genes} is no file: give the path of a text file with one gene per line")
        genes = [line.strip() for line in Path(genes).read_text(encoding="utf-8").splitlines() if line.strip()]
    names = normalise(genes)
    twice = [name for name, n in pd.Series(names, dtype=object).value_counts().items() if n > 1]
    if twice or not names:
        raise DataError(f"{len(twice):,} genes are named twice: {shown(twice, 5)}" if twice else "no gene is named")
    return names


def _refuse_absent(
    atlas: Atlas, infos: list[DatasetInfo], genes: Sequence[str], columns: list[NDArray[np.int32]], join: Join
) -> None:
    there = [np.isin(np.arange(len(genes)), c) for c in columns]
    absent = np.flatnonzero(~np.logical_or.reduce(there))
    if len(absent):
        name = genes[int(absent[0])]
        raise DataError(
            f"{len(absent):,} of {len(genes):,} genes are in none of the data sets of {atlas.path}, e.g. {name!r}; "
            f"{nearest(name, atlas.genes())}"
        )
    for info, found in zip(infos, there, strict=True):
        if join == "intersection" and len(infos) > 1 and not found.all():
            lacking = [genes[i] for i in np.flatnonzero(~found).tolist()]
            raise DataError(
                f"data set {info.id!r} lacks {len(lacking):,} of the genes ({shown(lacking)}); leave them out, or use "
                "join='union': they then count as zero there"
            )


def _rows(atlas: Atlas, infos: list[DatasetInfo], where: Where) -> list[NDArray[np.int64] | None]:
    """The cells of each data set for which the query is true; a data set without a column has it missing."""
    known = {d.id: atlas.obs_columns(d.id) for d in infos}
    names = {DATASET} | {_joined_name(c) for columns in known.values() for c in columns}
    for column in where.columns.values():
        if column not in names:
            raise MissingColumnError(
                f"where={where.text!r}: no data set has an obs column {column!r}; {nearest(column, sorted(names))}"
            )
    frames = [_frame(atlas, info, known[info.id], where.columns.values()) for info in infos]
    rows: list[NDArray[np.int64] | None] = [where.rows(frame) for frame in frames]
    if not any(len(r) for r in rows if r is not None):
        columns = {c: atlas.vocabulary.get(c, ()) for c in where.columns.values()}
        values = "".join(f"; {c} has {shown(v, 8)}" for c, v in columns.items() if v)
        raise DataError(f"where={where.text!r} is true of no cell{values}")
    return rows


def _joined_name(column: str) -> str:
    return OBS_DATASET if column == DATASET else column


def _frame(atlas: Atlas, info: DatasetInfo, known: list[str], columns: Iterable[str]) -> pd.DataFrame:
    """Columns of one data set as `lazy` has them: text where the atlas has text."""
    sources = {c: DATASET if c == OBS_DATASET and DATASET in known else c for c in columns if c != DATASET}
    obs = atlas.obs(info.id, [source for source in dict.fromkeys(sources.values()) if source in known])
    frame = pd.DataFrame(index=range(info.n_obs))
    for column in columns:
        source = sources.get(column)
        if source is None:
            frame[column] = pd.Categorical([info.id] * info.n_obs)
        elif source not in known:
            frame[column] = np.nan
        elif source in atlas.vocabulary and not pd.api.types.is_bool_dtype(obs[source]):
            frame[column] = as_text(obs[source])
        else:
            frame[column] = obs[source].array
    return frame


def _cells(atlas: Atlas, info: DatasetInfo, rows: NDArray[np.int64] | None, columns: NDArray[np.int32]) -> Cells:
    if rows is None or len(rows) == info.n_obs:
        return Cells(info.id, info.n_obs, None, info.nnz, columns)
    indptr = atlas.counts(info.id).indptr
    return Cells(info.id, info.n_obs, rows, int((indptr[rows + 1] - indptr[rows]).sum()), columns)


def _taken(values: Any, rows: NDArray[np.int64]) -> Any:
    return values.iloc[rows] if isinstance(values, pd.DataFrame) else values[rows]
