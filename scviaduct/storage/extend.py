"""An existing view as one more part of a larger one: its cells are sorted by their keys already.

When data sets were appended to an atlas, a view of it grows by merging: the old cells are read front to back in the
order they stand in, their keys computed again, and the new ones come in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import IncompleteError
from scviaduct.schema import MISSING
from scviaduct.storage.columns import Column
from scviaduct.storage.panels import Panels
from scviaduct.storage.shards import Arrays, Slice
from scviaduct.storage.shuffle import RANGES, key_ranges, shuffle_keys
from scviaduct.storage.spill import Totals, facts_dtype, record_dtype
from scviaduct.storage.view import PROTEINS, View, array_name

_STEP = 2**18
"""Cells whose keys are computed at once: 2 MB of each array."""


def is_prefix(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Whether the data sets {id: sha256} of `new` are those of `old`, in their order, and more."""
    return len(old) < len(new) and list(old.items()) == list(new.items())[: len(old)]


def holds_all(view: View, columns: Sequence[Column]) -> bool:
    """Whether the obs columns of a view's cells follow from what it stores.

    They do not when a column was left out because it seemed to name cells, or numbers of the old data sets became
    text because a new one has text there.
    """
    known, left_out = view.manifest["columns"], view.manifest["identifiers"]

    def follows(column: Column) -> bool:
        if column.name not in known:
            return column.name not in left_out
        old = known[column.name].get("categories")
        return old is None if column.categories is None else old is not None and set(old) <= set(column.categories)

    return all(map(follows, columns))


class Grown:
    """A view's cells as the view that grows out of it stores them."""

    def __init__(self, view: View, columns: Sequence[Column], seed: int, panels: Panels | None) -> None:
        self._view, self._seed, self._arrays = view, seed, Arrays(view.path)
        self._ids = view.categories["dataset"]
        self._dtype = record_dtype(facts_dtype(columns, panels))
        self._translate = [_translation(view, column) for column in columns]
        manifest = view.manifest
        largest = np.iinfo(self._arrays.layouts(["data"])[0].dtype).max  # of its type, which is all that matters
        self.totals = Totals(view.n_rows, manifest["nnz"], manifest["sum"], int(largest), zero=0)
        self.borders = self._borders()

    def records(self, first: int, last: int) -> NDArray[Any]:
        """What goes with the cells whose keys lie in the ranges `first` to `last`, in their order.

        Raises IncompleteError when a chunk of the view is damaged or gone.
        """
        lo, hi = self.borders[[first, last], 0].tolist()
        records = np.empty(hi - lo, self._dtype)
        records["dataset"], records["row"] = self._values("source/dataset", lo, hi), self._values("source/row", lo, hi)
        records["key"] = self._keys(records["dataset"], records["row"])
        records["nnz"] = np.diff(self._values("indptr", lo, hi + 1))
        for i, translate in enumerate(self._translate):
            records[f"obs{i}"] = translate(lambda name: self._values(name, lo, hi), hi - lo)
        if self._view.panels:
            n = len(self._view.panels.names)
            records["proteins"][:, n:] = 0  # the names that new panels bring come after the known ones
            records["proteins"][:, :n] = self._values(PROTEINS, lo * n, hi * n).reshape(-1, n)
        return records

    def counts(self, first: int, last: int, indices: NDArray[Any], data: NDArray[Any]) -> None:
        """Fill (nnz,) gene indices and counts of those cells."""
        start, stop = self.borders[[first, last], 1].tolist()
        indices[:], data[:] = self._read(Slice("indices", start, stop), Slice("data", start, stop))

    def _borders(self) -> NDArray[np.int64]:
        per_range = np.zeros(RANGES, np.int64)
        for lo in range(0, self._view.n_rows, _STEP):
            hi = min(lo + _STEP, self._view.n_rows)
            keys = self._keys(self._values("source/dataset", lo, hi), self._values("source/row", lo, hi))
            per_range += np.bincount(key_ranges(keys), minlength=RANGES)
        cells = np.concatenate([[0], np.cumsum(per_range)])
        nnz = self._read(*(Slice("indptr", at, at + 1) for at in cells.tolist()))
        return np.stack([cells, np.concatenate(nnz)], axis=1)

    def _keys(self, datasets: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        keys = np.empty(len(rows), np.uint64)
        for number in np.unique(datasets).tolist():
            of_it = datasets == number
            keys[of_it] = shuffle_keys(self._seed, self._ids[number], rows[of_it])
        return keys

    def _values(self, name: str, first: int, last: int) -> NDArray[Any]:
        return self._read(Slice(name, first, last))[0]

    def _read(self, *wanted: Slice) -> list[NDArray[Any]]:
        try:
            return self._arrays.read(*wanted)
        except (RuntimeError, OSError, ValueError) as error:  # numcodecs raises RuntimeError for what does not decode
            raise IncompleteError(
                f"View {self._view.name!r} of {self._view.atlas_path} cannot be read ({error}). {self._view.remedy}"
            ) from error


Read = Callable[[str], NDArray[Any]]


def _translation(view: View, column: Column) -> Callable[[Read, int], NDArray[Any]]:
    """How a column's values follow from what the view stores, given a reader of its arrays and a number of cells."""
    old = view.manifest["columns"].get(column.name)
    if old is None:
        return lambda _, n: column.encode(None, n)
    if column.categories is None:
        return lambda read, _: read(array_name(column.name))
    position = {category: i for i, category in enumerate(column.categories)}
    lookup = np.array([*(position[category] for category in old["categories"]), MISSING], column.dtype)
    return lambda read, _: lookup[read(array_name(column.name))]  # a missing value is -1: the last
