"""Protein counts beside the genes (CITE-seq): their names, their panels, and which batch measured which of them.

A data set's panel is the columns of its obsm element. A view holds the counts over the union of all panels, 0 where a
panel lacks a protein. What a batch measured is decided from both, panels and counts (docs/decisions/0020).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import DataError, NotCountsError, nearest
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.audit import KINDS, as_counts
from scviaduct.storage.h5ad import CountsFile, open_counts
from scviaduct.storage.places import local

log = logging.getLogger(__name__)

_VALUES = 2**22
"""Counts that are checked at once: 34 MB of float64."""
_SHARD = 2**23
"""Counts in a file of a view at most, unless a block has more."""


class ProteinCounts:
    """The protein counts of a file, `obsm[key]`; `names` are its columns.

    Raises DataError when the file has no such element, or its columns have no names or one of them twice.
    """

    def __init__(self, file: CountsFile, key: str) -> None:
        self._file, self._key, self._where = file, key, f"{file.path}: obsm[{key!r}]"
        if key not in file.obsm_names():
            raise DataError(f"{file.path}: obsm has no {key!r}; {nearest(key, file.obsm_names())}")
        columns = file.obsm_columns(key)
        if columns is None:
            raise DataError(
                f"{self._where} is an array whose columns have no names. Make it a DataFrame with the proteins as "
                f"columns, or put their names into uns['{key}_names'], and convert the file again"
            )
        self.names = columns
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice or not columns:
            what = f"names {len(twice)} proteins twice, e.g. {twice[0]!r}" if twice else "has no column"
            raise DataError(f"{self._where} {what}: every protein needs a name of its own")

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """(first cell, (cells, proteins) counts) in order, every value checked.

        Raises NotCountsError when a value is NaN, infinite, negative, fractional or at least 2**24.
        """
        step = max(1, _VALUES // len(self.names))
        table = self._file.obsm_rows(self._key, 0, min(step, self._file.n_obs))
        whole = self._file.obsm_element(self._key) if isinstance(table, pd.DataFrame) else None
        for first in range(0, self._file.n_obs, step):
            last = min(first + step, self._file.n_obs)
            values = self._file.obsm_rows(self._key, first, last) if whole is None else whole.iloc[first:last]
            dense = _dense(values)
            counts = None if dense is None else as_counts(dense)
            if counts is None:
                raise self._not_counts(dense, first)
            yield first, counts

    def _not_counts(self, values: NDArray[Any] | None, first: int) -> NotCountsError:
        if values is None:
            return NotCountsError(f"{self._where} has columns that are not numbers: keep the proteins' counts only")
        found = [(kind, np.argwhere(is_bad(values))) for kind, is_bad in KINDS]
        found = [(kind, bad) for kind, bad in found if len(bad)]
        kinds = " and ".join(f"{len(bad):,} are {kind}" for kind, bad in found)
        row, column = found[0][1][0]
        fix = "Normalised (CLR, DSB)? Get the raw counts of the antibodies from the source"
        if found[0][0].startswith("not finite"):
            fix = "Was the protein not measured there? Then write 0: a protein that is 0 in a whole batch counts as missing"
        return NotCountsError(
            f"{self._where} does not hold raw counts: of {values.size:,} values {kinds}, e.g. {values[row, column]!s} of "
            f"{self.names[column]!r} in cell {str(self._file.obs.index[first + row])!r}. {fix}"
        )


def _dense(values: Any) -> NDArray[Any] | None:
    """Numbers as an array; None when a column of a table holds anything else."""
    if isinstance(values, pd.DataFrame):
        if not all(pd.api.types.is_numeric_dtype(dtype) for dtype in values.dtypes):
            return None
        return values.to_numpy(np.float64, na_value=np.nan)
    dense = values if isinstance(values, np.ndarray) else values.toarray()
    return dense if dense.dtype.kind in "buif" else None


@dataclass(frozen=True)
class Panels:
    """The proteins of a view, and which of them each of its data sets counts; JSON-ready."""

    key: str
    """obsm element of the data sets."""
    names: tuple[str, ...]
    """The union of the panels, in order of appearance."""
    datasets: dict[str, list[str]]
    """{data set: its panel}; without the element: no protein."""
    largest: int
    """The largest count."""

    @classmethod
    def of(cls, record: dict[str, Any] | None) -> Panels | None:
        """The inverse of `asdict`; None of None."""
        return record and cls(**record | {"names": tuple(record["names"])})  # type: ignore[return-value]

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type with room for a value that no count has."""
        return np.min_scalar_type(self.largest + 1)

    @property
    def per_cell(self) -> np.dtype:
        """The counts of one cell as a field of a record."""
        return np.dtype((self.dtype, (len(self.names),)))

    def blocks_per_shard(self, block_rows: int, most: int) -> int:
        """How many blocks of cells a file of the array holds."""
        return int(np.clip(_SHARD // (block_rows * len(self.names)), 1, most))

    def counted(self, dataset_ids: Sequence[str]) -> NDArray[np.bool_]:
        """(data sets, proteins) whether each is in the data set's panel."""
        panels = [set(self.datasets[id_]) for id_ in dataset_ids]
        return np.array([[name in panel for name in self.names] for panel in panels])

    def rows(self, atlas: Atlas, dataset_id: str, n_obs: int) -> Iterator[tuple[slice, NDArray[Any]]]:
        """(cells, their counts over all panels) of a data set in order; zeros when it has no panel."""
        if not self.datasets[dataset_id]:
            step = max(1, _VALUES // len(self.names))
            for first in range(0, n_obs, step):
                n = min(step, n_obs - first)
                yield slice(first, first + n), np.zeros((n, len(self.names)), self.dtype)
            return
        with _open(atlas, dataset_id) as file:
            counts = ProteinCounts(file, self.key)
            at = [self.names.index(name) for name in counts.names]
            for first, block in counts.blocks():
                out = np.zeros((len(block), len(self.names)), self.dtype)
                out[:, at] = block
                yield slice(first, first + len(block)), out


def find_panels(atlas: Atlas, key: str, known: Panels | None, dataset_ids: Sequence[str]) -> Panels:
    """The proteins in `obsm[key]` of some data sets of an atlas, added to those that are `known` of others.

    Looks at every count. Raises DataError when no data set has the element or one has no names for its columns,
    NotCountsError when a value is no count.
    """
    names = dict.fromkeys(known.names if known else ())
    datasets, largest, seen = dict(known.datasets) if known else {}, known.largest if known else 0, dict[str, None]()
    for id_ in dataset_ids:
        datasets[id_] = []
        with _open(atlas, id_) as file:
            seen |= dict.fromkeys(file.obsm_names())
            if key not in file.obsm_names():
                continue
            counts = ProteinCounts(file, key)
            datasets[id_] = list(counts.names)
            largest = max([largest, *(int(block.max(initial=0)) for _, block in counts.blocks())])
        names |= dict.fromkeys(counts.names)
    if not names:
        there = f"what was kept of obsm is {', '.join(seen)}" if seen else "nothing was kept of obsm"
        raise DataError(
            f"No data set of {atlas.path} has obsm[{key!r}]: {there}. Convert the files with --obsm {key}, or name the "
            "element that holds the protein counts"
        )
    return Panels(key, tuple(names), datasets, largest)


def tell_silent(silent: NDArray[np.intp], batches: Sequence[str], names: Sequence[str]) -> None:
    """Warn of proteins that panels have and no cell of a batch."""
    for batch in np.unique(silent[:, 0]):
        proteins = [names[p] for b, p in silent if b == batch]
        log.warning(
            "batch %r: %d proteins are 0 in all its cells and count as not measured there, e.g. %s",
            batches[batch], len(proteins), ", ".join(proteins[:5]),
        )  # fmt: skip


def _open(atlas: Atlas, dataset_id: str) -> CountsFile:
    """A data set as the AnnData store it is."""
    return open_counts(local(atlas.counts(dataset_id).path, "An atlas"), counts="X")


class Measured:
    """Which proteins each batch measured, from looking at all of its cells.

    A protein counts as measured in a batch when it is in the panel of each data set that the batch has cells of, and
    has a count in one of them: files that were joined for scvi-tools hold zeros where nothing was measured.
    """

    def __init__(self, n_batches: int, n_proteins: int) -> None:
        self._in_panel = np.ones((n_batches, n_proteins), bool)
        self._seen = np.zeros((n_batches, n_proteins), bool)

    def add(self, counts: NDArray[Any], batches: NDArray[np.int64], panel: NDArray[np.bool_]) -> None:
        """Look at (cells, proteins) counts of one data set, whose panel this is, and at the cells' batches."""
        for batch in np.unique(batches):
            self._in_panel[batch] &= panel
            self._seen[batch] |= (counts[batches == batch] > 0).any(axis=0)

    @property
    def table(self) -> tuple[tuple[bool, ...], ...]:
        """(batches, proteins), as a Schema has it."""
        return tuple(tuple(row) for row in (self._in_panel & self._seen).tolist())

    @property
    def silent(self) -> NDArray[np.intp]:
        """(n, 2) batch and protein of those that panels have and no cell of the batch."""
        return np.argwhere(self._in_panel & ~self._seen)
