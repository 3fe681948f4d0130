"""Which rows make up which minibatch: pure arithmetic, no I/O, one integer of state.

The rows of a source lie in blocks. An epoch's total order permutes the blocks, and the rows inside each block. The
order is cut into `n_lanes` lanes of (almost) equal length. At step s, lane v contributes the rows between two integer
borders, so every row occurs exactly once an epoch, batches differ by a row or two, and no batch is a one-cell tail.

A rank owns a run of neighbouring lanes. The global batch of a step is therefore the same set of cells for every number
of workers up to `n_lanes`, and (seed, position) is the whole state: stop anywhere, come back with another number of
workers, and nothing is lost or repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import ConfigError

_HASH_ROWS = 1 << 20  # rows hashed at once when counting a split: 8 MB of temporaries


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers (the splitmix64 finaliser: Steele, Lea and Flood 2014)."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed(rows: NDArray[np.int64], *keys: int) -> NDArray[np.uint64]:
    """One 64-bit hash per row of (keys…, row)."""
    salt = np.zeros(1, np.uint64)
    for key in keys:
        salt = mix(salt ^ np.uint64(key % 2**64))
    return mix(rows.astype(np.uint64) ^ salt)


def _van_der_corput(n: int) -> NDArray[np.float64]:
    """The first n fractions 0, 1/2, 1/4, 3/4, 1/8, …: every run of neighbours is spread evenly over [0, 1)."""
    return np.array([sum(bit / 2 ** (k + 1) for k, bit in enumerate(map(int, reversed(f"{v:b}")))) for v in range(n)])


@dataclass(frozen=True)
class Split:
    """Validation rows are those whose hash falls below `fraction`: fixed by the seed, spread over the whole source."""

    fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"The validation fraction must lie in [0, 1), not {self.fraction}.")

    def validation(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True for the rows that are held out, shape (rows,)."""
        return keyed(rows, self.seed, 0x5917) < np.uint64(int(self.fraction * 2**64))


class Segment(NamedTuple):
    """Rows [start, stop) of one block's shuffled order."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Epoch:
    """One epoch's order of the blocks, and where each begins in the total order."""

    index: int
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    """(blocks + 1,) cumulative rows in permuted order."""

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """The pieces of blocks that hold rows [start, stop) of the total order."""
        at = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[at + 1]))
            if end > start:
                offset = int(self.starts[at])
                yield Segment(int(self.order[at]), start - offset, end - offset)
            start, at = end, at + 1


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The plan of a whole training run over `n_rows` rows in blocks of `block_rows`.

    Raises:
        ConfigError: a size is not positive, or no row is left in the chosen part of the split.
    """

    n_rows: int
    block_rows: int
    batch_size: int
    seed: int = 0
    n_lanes: int = 16
    """At least the most workers the run may ever have; part of the run's identity."""
    split: Split = Split()
    part: Literal["train", "validation"] = "train"

    def __post_init__(self) -> None:
        for name in ("n_rows", "block_rows", "batch_size", "n_lanes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.n_kept == 0:
            raise ConfigError(f"The {self.part} part of {self.n_rows} rows is empty at fraction {self.split.fraction}.")

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.n_rows // self.block_rows)

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """(blocks,) rows of each block that belong to this part of the split."""
        counts = np.zeros(self.n_blocks, np.int64)
        for start in range(0, self.n_rows, _HASH_ROWS):
            rows = np.arange(start, min(self.n_rows, start + _HASH_ROWS))
            blocks = rows[self._mine(rows)] // self.block_rows
            counts += np.bincount(blocks, minlength=self.n_blocks)
        return counts

    @cached_property
    def n_kept(self) -> int:
        """Rows an epoch visits."""
        return int(self.kept.sum())

    @property
    def steps(self) -> int:
        """Steps of one epoch: as many as make batches nearest to batch_size."""
        return max(1, round(self.n_kept / self.batch_size))

    def _mine(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        held_out = self.split.validation(rows)
        return held_out if self.part == "validation" else ~held_out

    def rows_of(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Positions inside `block` of its kept rows, in this epoch's shuffled order."""
        start = block * self.block_rows
        rows = np.arange(start, min(self.n_rows, start + self.block_rows))
        inside = np.flatnonzero(self._mine(rows))
        return np.random.default_rng([self.seed, epoch, block]).permutation(inside)

    def epoch(self, index: int) -> Epoch:
        """The order of the blocks in one epoch."""
        order = np.random.default_rng([self.seed, index]).permutation(self.n_blocks)
        return Epoch(index, order, np.concatenate([[0], np.cumsum(self.kept[order])]))

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes a rank owns."""
        if world_size > self.n_lanes:
            raise ConfigError(
                f"{world_size} workers need at least as many lanes, but this run was made with {self.n_lanes}; "
                f"start a new run with --n-lanes {world_size}."
            )
        return range(rank * self.n_lanes // world_size, (rank + 1) * self.n_lanes // world_size)

    def borders(self, step: int) -> NDArray[np.int64]:
        """(n_lanes,) total-order row at which each lane's share of `step` begins.

        Each lane starts its rounding at a phase of its own, so that neither all lanes nor the neighbouring lanes of
        one rank round up at the same step.
        """
        lane_starts = np.arange(self.n_lanes + 1, dtype=np.int64) * self.n_kept // self.n_lanes
        phase = (_van_der_corput(self.n_lanes) * self.steps).astype(np.int64)
        return lane_starts[:-1] + (step * np.diff(lane_starts) + phase) // self.steps

    def rows_at(self, step: int) -> int:
        """Cells in the global batch of a step, over all ranks."""
        return int((self.borders(step + 1) - self.borders(step)).sum())

    def request(self, epoch: Epoch, step: int, rank: int = 0, world_size: int = 1) -> list[list[Segment]]:
        """What a rank reads at a step: for each of its lanes, the segments to concatenate."""
        begin, end = self.borders(step), self.borders(step + 1)
        return [list(epoch.segments(int(begin[v]), int(end[v]))) for v in self.lanes_of(rank, world_size)]

    def seeds(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """One random key per cell and epoch: a model's noise depends on it alone, not on the worker."""
        return keyed(rows, self.seed, 0xCE11, epoch)
