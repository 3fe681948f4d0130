"""The second stream of a semi-supervised model: beside each batch, one of cells that have a label.

An epoch draws its labelled cells: all of them, or so many of each label. They are gathered once, in the types on disk,
and the epoch's steps go through them in passes: a pass is an order of these cells, cut into lanes and steps by the same
arithmetic as the cells of the main stream. So a pass visits each drawn cell exactly once, which cells a step sees follows
from (seed, epoch, step) alone, and it is the same for every number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import ConfigError
from scviaduct.schema import MISSING, Batch
from scviaduct.storage.loader import BlockSource, Loader, gather, read_ahead
from scviaduct.storage.memory import Allocate
from scviaduct.storage.sampler import Sampler, keyed

HELD = 1 << 17
"""Labelled cells that an epoch draws at most when it is not told how many: about 200 MB at 500 genes a cell."""

_ROWS = 1 << 20  # looked at at once when cells are drawn
_DRAWN, _ORDER = 0x1ABE1, 0x0DE12


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledPlan:
    """Which labelled cells go with which step of `main`: arithmetic on the cells' labels, no I/O."""

    main: Sampler
    codes: NDArray[np.integer[Any]]
    """(rows,) the label of each cell of the source, MISSING where it has none."""
    n_samples_per_label: int | None = None
    """Cells of each label an epoch draws, all where there are fewer. Default: all labelled cells, up to HELD."""

    def drawn(self, epoch: int) -> NDArray[np.int64]:
        """(cells,) rows of the labelled training cells an epoch draws, increasing: those with the smallest hashes."""
        limit = self.n_samples_per_label or HELD
        rows, strata, hashes = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64)
        for start in range(0, self.main.n_rows, _ROWS):
            new = start + np.flatnonzero(self.codes[start : start + _ROWS] != MISSING)
            new = new[self.main.includes(new)]
            labels = self.codes[new].astype(np.int64) if self.n_samples_per_label else np.zeros(len(new), np.int64)
            rows, strata = np.concatenate([rows, new]), np.concatenate([strata, labels])
            hashes = np.concatenate([hashes, keyed(new, self.main.seed, _DRAWN, epoch)])
            kept = _smallest(strata, hashes, limit)
            rows, strata, hashes = rows[kept], strata[kept], hashes[kept]
        return np.sort(rows)

    def passes(self, n_drawn: int) -> Sampler:
        """The plan of passes over so many drawn cells; its epochs are numbered by `at`."""
        return Sampler(
            n_rows=n_drawn,
            block_rows=n_drawn,
            batch_size=self.main.batch_size,
            seed=int(keyed(np.zeros(1, np.int64), self.main.seed, _ORDER)[0]),
            n_lanes=self.main.n_lanes,
        )

    def at(self, epoch: int, step: int, steps: int) -> tuple[int, int]:
        """(number of the pass, step inside it) of a step, where a pass has `steps` steps; no pass has two numbers."""
        return epoch * self.main.steps + step // steps, step % steps


def _smallest(strata: NDArray[np.int64], hashes: NDArray[np.uint64], limit: int) -> NDArray[np.int64]:
    """Positions of the `limit` smallest hashes of each stratum, in any order."""
    order = np.lexsort((hashes, strata))
    ordered = strata[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < limit]


class LabelledLoader(Loader):
    """A Loader whose batches bring a batch of labelled cells (`Batch.labelled`).

    Each worker holds the cells the epoch has drawn; drawing other cells for the next epoch reads the blocks they lie in.

    Raises:
        ConfigError: fewer than two training cells have a label.
    """

    def __init__(
        self,
        source: BlockSource,
        plan: LabelledPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        compact: bool = False,
        allocate: Allocate | None = None,
    ) -> None:
        super().__init__(source, plan.main, rank=rank, world_size=world_size, compact=compact, allocate=allocate)
        self.plan = plan
        self._held: Batch | None = None

    def _batches(self, index: int, start_step: int) -> Iterator[list[Batch]]:
        labelled = self._labelled(index, start_step)
        for batches in super()._batches(index, start_step):
            yield [replace(batch, labelled=next(labelled)) for batch in batches]

    def _labelled(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of labelled cells from a step on, without an end."""
        held = self._hold(self.plan.drawn(epoch))
        passes = self.plan.passes(held.n_cells)
        mine, numbered, order = passes.lanes_of(self.rank, self.world_size), -1, np.zeros(0, np.int64)
        for step in count(start_step):
            number, at = self.plan.at(epoch, step, passes.steps)
            if number != numbered:
                numbered, order = number, passes.rows_of(number, 0)
            begin, end = passes.borders([at, at + 1])[:, mine.start : mine.stop]
            places = np.concatenate([order[a:b] for a, b in zip(begin, end, strict=True)])
            batch = self._gather([(held, places)])
            yield replace(
                batch,
                seeds=passes.seeds(number, batch.rows),
                lanes=np.concatenate([[0], np.cumsum(end - begin)]),
                weight=self.sampler.rows_at(step) / passes.rows_at(at),
            )

    def _hold(self, rows: NDArray[np.int64]) -> Batch:
        """These cells in memory, in the types on disk; read again only when they are others."""
        if len(rows) < 2:
            raise ConfigError(
                f"{len(rows)} training cells have a label, and batches of labelled cells need two; use "
                "--set labelled_batches=false, or more labels."
            )
        if self._held is None or not np.array_equal(self._held.rows, rows):
            self._held = None  # before the others are read: memory holds one set
            self._held = read_rows(self.source, rows)
        return self._held


def read_rows(source: BlockSource, rows: NDArray[np.int64]) -> Batch:
    """Some rows of a source, given in increasing order, as one batch in the types on disk."""
    blocks, starts = np.unique(rows // source.block_rows, return_index=True)
    inside = np.split(rows % source.block_rows, starts[1:])
    with read_ahead(source, source.read, blocks.tolist()) as read:
        parts = [gather([(block, some)], compact=True) for block, some in zip(read, inside, strict=True)]
    return gather([(part, np.arange(part.n_cells)) for part in parts], compact=True)
