"""Counts of a store counted once more, shard by shard in parallel, and which cells a damaged file concerns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.storage.arrays import open_array
from scviaduct.storage.tasks import as_done, cores

VALUES = ("data", "indices")
"""Arrays with one entry per non-zero."""
Range = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """What one shard of `data` and of `indices` holds."""

    total: int = 0
    """Sum of the counts that can be read."""
    largest: int = 0
    top_index: int = -1
    """Largest gene index."""
    unreadable: dict[str, list[Range]] = field(default_factory=dict)
    """By array: entries lo to hi that do not decode, or that are not there."""


def count_shard(task: tuple[Path, int, int]) -> Shard:
    """Count entries lo to hi of the CSR matrix in a folder; what does not decode is narrowed down to chunks."""
    path, lo, hi = task
    found: dict[str, list[NDArray[Any]]] = {}
    unreadable: dict[str, list[Range]] = {}
    for name in VALUES:
        array = open_array(path / name)
        pieces = list(_readable(array, lo, hi))
        bad = [(start, stop) for start, stop, values in pieces if values is None]
        unreadable |= {name: bad} if bad else {}
        found[name] = [values for _, _, values in pieces if values is not None]
    return Shard(
        sum(int(values.sum(dtype=np.int64)) for values in found["data"]),
        max((int(values.max()) for values in found["data"]), default=0),
        max((int(values.max()) for values in found["indices"]), default=-1),
        unreadable,
    )


def _readable(array: Any, lo: int, hi: int) -> Iterator[tuple[int, int, NDArray[Any] | None]]:
    """(from, to, values) of whole ranges; of chunks when something in the range is wrong; None for what is."""
    values = intact(array, lo, hi)
    if values is not None:
        yield lo, hi, values
        return
    chunk = array.chunks[0]
    for start in range(lo, hi, chunk):
        stop = min(start + chunk, hi)
        yield start, stop, intact(array, start, stop)


def intact(array: Any, lo: int, hi: int) -> NDArray[Any] | None:
    """Values lo to hi, or None where they do not decode or a chunk is missing (it reads as the fill value)."""
    try:
        values = np.asarray(array[lo:hi])
    except (RuntimeError, OSError, ValueError):
        return None
    return None if (values == array.fill_value).any() else values


@dataclass(frozen=True, eq=False)
class Recount:
    """The numbers of a CSR matrix on disk."""

    indptr: NDArray[np.int64] | None
    """(cells + 1,) row pointers; None when they cannot be read or do not fit the values."""
    nnz: int
    """Entries of `data`."""
    total: int
    largest: int
    top_index: int
    unreadable: dict[str, list[Range]]

    @property
    def whole(self) -> bool:
        """Every value could be read."""
        return not self.unreadable and self.indptr is not None

    @cached_property
    def zero_count_cells(self) -> int:
        """Cells without a count."""
        return 0 if self.indptr is None else int((np.diff(self.indptr) == 0).sum())

    def cells(self, lo: int, hi: int) -> Range | None:
        """First and last cell with an entry among lo to hi; None when no row pointers say so, or no cell has any."""
        if self.indptr is None:
            return None
        first = int(np.searchsorted(self.indptr, lo, "right")) - 1
        last = int(np.searchsorted(self.indptr, min(hi, self.nnz), "left")) - 1
        return (first, last) if 0 <= first <= last else None


def recount(
    folders: Iterable[Path], executor: Executor, tick: Callable[[Path], None] = lambda _: None
) -> dict[Path, Recount | str]:
    """Count the CSR matrices (data, indices, indptr) in these folders once more, all their shards in parallel.

    Gives the reason instead where the arrays cannot be opened, or do not fit each other; `tick` is called with the
    folder of each shard that is done.
    """
    opened = {folder: _open(folder) for folder in folders}
    tasks = [task for folder, array in opened.items() if not isinstance(array, str) for task in _tasks(folder, array)]
    found: dict[Path, dict[int, Shard]] = {folder: {} for folder in opened}
    for (folder, lo, _), shard in as_done(executor, count_shard, tasks, ahead=2 * cores()):
        found[folder][lo] = shard
        tick(folder)
    return {
        folder: array if isinstance(array, str) else _combined(folder, array, found[folder])
        for folder, array in opened.items()
    }


def _open(folder: Path) -> Any:
    """The array `data`, or why the matrix cannot be counted."""
    try:
        data, indices, _ = (open_array(folder / name) for name in (*VALUES, "indptr"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        return f"the counts cannot be opened ({type(error).__name__}: {error})"
    if data.shape != indices.shape:
        return f"data has {data.shape[0]:,} entries, indices {indices.shape[0]:,}"
    return data


def _tasks(folder: Path, data: Any) -> list[tuple[Path, int, int]]:
    nnz, step = data.shape[0], (data.shards or data.chunks)[0]
    return [(folder, lo, min(lo + step, nnz)) for lo in range(0, nnz, step)]


def _combined(folder: Path, data: Any, found: dict[int, Shard]) -> Recount:
    unreadable: dict[str, list[Range]] = {}
    for lo in sorted(found):
        for name, ranges in found[lo].unreadable.items():
            unreadable.setdefault(name, []).extend(ranges)
    return Recount(
        indptr=_indptr(folder, int(data.shape[0])),
        nnz=int(data.shape[0]),
        total=sum(shard.total for shard in found.values()),
        largest=max((shard.largest for shard in found.values()), default=0),
        top_index=max((shard.top_index for shard in found.values()), default=-1),
        unreadable=unreadable,
    )


def _indptr(path: Path, nnz: int) -> NDArray[np.int64] | None:
    array = open_array(path / "indptr")
    values = intact(array, 0, array.shape[0])
    if values is None or not len(values) or values[0] or values[-1] != nnz or (np.diff(values) < 0).any():
        return None
    return values
