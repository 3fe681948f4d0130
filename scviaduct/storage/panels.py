"""Which proteins the data sets of a view count, and which of them each batch measured.

A data set's panel is the columns of its obsm element. A view holds the counts over the union of all panels, 0 where a
panel lacks a protein. What a batch measured is decided from both, panels and counts (docs/decisions/0020).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_SHARD = 2**23
"""Counts in a file of a view at most, unless a block has more."""


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


def tell_silent(silent: NDArray[np.intp], batches: Sequence[str], names: Sequence[str]) -> None:
    """Warn of proteins that panels have and no cell of a batch."""
    for batch in np.unique(silent[:, 0]):
        proteins = [names[p] for b, p in silent if b == batch]
        log.warning(
            "batch %r: %d proteins are 0 in all its cells and count as not measured there, e.g. %s",
            batches[batch], len(proteins), ", ".join(proteins[:5]),
        )  # fmt: skip
