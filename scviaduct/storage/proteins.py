"""Protein counts beside the genes (CITE-seq), as the data sets of an atlas hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import DataError, NotCountsError, nearest
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.audit import KINDS, as_counts
from scviaduct.storage.h5ad import CountsFile, open_counts
from scviaduct.storage.panels import Panels
from scviaduct.storage.places import local

_VALUES = 2**22
"""Counts that are checked at once: 34 MB of float64."""


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


def panel_rows(panels: Panels, atlas: Atlas, dataset_id: str, n_obs: int) -> Iterator[tuple[slice, NDArray[Any]]]:
    """(cells, their counts over all panels) of a data set in order; zeros when it has no panel."""
    if not panels.datasets[dataset_id]:
        step = max(1, _VALUES // len(panels.names))
        for first in range(0, n_obs, step):
            n = min(step, n_obs - first)
            yield slice(first, first + n), np.zeros((n, len(panels.names)), panels.dtype)
        return
    with _open(atlas, dataset_id) as file:
        counts = ProteinCounts(file, panels.key)
        at = [panels.names.index(name) for name in counts.names]
        for first, block in counts.blocks():
            out = np.zeros((len(block), len(panels.names)), panels.dtype)
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


def _open(atlas: Atlas, dataset_id: str) -> CountsFile:
    """A data set as the AnnData store it is."""
    return open_counts(local(atlas.counts(dataset_id).path, "An atlas"), counts="X")
