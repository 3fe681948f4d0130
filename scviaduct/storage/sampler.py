"""Which rows make up which minibatch: pure arithmetic, no I/O, one integer of state.

The rows of a source lie in blocks. An epoch's total order permutes the blocks, and the rows inside each block. The
order is cut into `n_lanes` lanes of (almost) equal length. At step s, lane v contributes the rows between two integer
borders, so every row occurs exactly once an epoch, batches differ by a row or two, and no batch is a one-cell tail.

A rank owns a run of neighbouring lanes. The global batch of a step is therefore the same set of cells for every number
of workers up to `n_lanes`, and (seed, position) is the whole state: stop anywhere, come back with another number of
workers, and nothing is lost or repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
        return self._hash(rows) < np.uint64(int(self.fraction * 2**64))

    def _hash(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        return keyed(rows, self.seed, 0x5917)  # a bijection for each seed: no two rows share a hash


@dataclass(frozen=True, eq=False, kw_only=True)
class StratifiedSplit(Split):
    """Of each category's n cells, the round(fraction · n) with the smallest hashes (halves up) are validation rows.

    Fixed by seed and codes, independent of blocks and workers. A category with few cells may have none. Holds the codes
    of all rows, a byte or two each.
    """

    codes: NDArray[np.integer[Any]]
    """(rows,) the category of each row; -1, no value, is a category as well."""

    def validation(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True for the rows that are held out, shape (rows,)."""
        wanted, limits = self._limits
        codes = self.codes[rows]
        return (self._hash(rows) <= limits[codes]) & (wanted[codes] > 0)

    @cached_property
    def _limits(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Per category (that of -1 is the last): rows to hold out, and the largest hash of these.

        Two passes: the first counts rows by the leading bits of their hashes, which tells in which bucket the limit
        lies; the second sorts the hashes of these buckets alone.
        """
        n_codes = int(self.codes.max()) + 2
        bits = max(0, 20 - (n_codes - 1).bit_length())  # about a million counters
        counts = np.zeros((n_codes, 1 << bits), np.int64)
        for codes, hashes in self._hashes():
            flat = codes * (1 << bits) + _leading(hashes, bits)
            counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)
        wanted = np.floor(self.fraction * counts.sum(1) + 0.5).astype(np.int64)
        cumulated = counts.cumsum(1)
        bucket = (cumulated < wanted[:, None]).sum(1).clip(max=counts.shape[1] - 1)
        before = cumulated[np.arange(n_codes), bucket] - counts[np.arange(n_codes), bucket]
        return wanted, self._largest(bucket, wanted - before, bits)

    def _largest(self, bucket: NDArray[np.int64], rank: NDArray[np.int64], bits: int) -> NDArray[np.uint64]:
        """Per category the rank-th smallest hash (from 1) of its bucket; 0 where the rank is not positive."""
        found = [(codes[inside], hashes[inside]) for codes, hashes, inside in self._inside(bucket, bits)]
        codes, hashes = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((hashes, codes))
        starts = np.searchsorted(codes[order], np.arange(len(bucket)))
        limits = np.zeros(len(bucket), np.uint64)
        some = rank > 0
        limits[some] = hashes[order][starts[some] + rank[some] - 1]
        return limits

    def _inside(self, bucket: NDArray[np.int64], bits: int) -> Iterator[tuple[Any, Any, NDArray[np.bool_]]]:
        for codes, hashes in self._hashes():
            yield codes, hashes, _leading(hashes, bits) == bucket[codes]

    def _hashes(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """(codes, hashes) of runs of rows; -1 becomes the last code."""
        missing = int(self.codes.max()) + 1
        for start in range(0, len(self.codes), _HASH_ROWS):
            codes = self.codes[start : start + _HASH_ROWS].astype(np.int64)
            yield np.where(codes < 0, missing, codes), self._hash(np.arange(start, start + len(codes)))


def _leading(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """The first bits of each hash as a number."""
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), np.int64)


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
        starts = self._starts
        at = bisect_right(starts, start) - 1
        while start < stop:
            end = min(stop, starts[at + 1])
            if end > start:
                yield Segment(int(self.order[at]), start - starts[at], end - starts[at])
            start, at = end, at + 1

    @cached_property
    def _starts(self) -> list[int]:
        return self.starts.tolist()  # bisect on a list takes a tenth of searchsorted's time for one number


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
            blocks = rows[self.includes(rows)] // self.block_rows
            counts += np.bincount(blocks, minlength=self.n_blocks)
        return counts

    @cached_property
    def n_kept(self) -> int:
        """Rows an epoch visits."""
        return int(self.kept.sum())

    @property
    def steps(self) -> int:
        """Steps of one epoch: as many as loaders take whose last batch is what is left, here in equal batches."""
        return -(-self.n_kept // self.batch_size)

    def includes(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True for the rows that belong to this part of the split, shape (rows,)."""
        if not self.split.fraction:
            return np.full(len(rows), self.part == "train")
        held_out = self.split.validation(rows)
        return held_out if self.part == "validation" else ~held_out

    def rows_of(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Positions inside `block` of its kept rows, in this epoch's shuffled order."""
        start = block * self.block_rows
        rows = np.arange(start, min(self.n_rows, start + self.block_rows))
        inside = np.flatnonzero(self.includes(rows))
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

    @cached_property
    def _lanes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(n_lanes,) each: first row in the total order, rows, and the phase of the rounding."""
        borders = np.arange(self.n_lanes + 1, dtype=np.int64) * self.n_kept // self.n_lanes
        return borders[:-1], np.diff(borders), (_van_der_corput(self.n_lanes) * self.steps).astype(np.int64)

    def borders(self, steps: ArrayLike) -> NDArray[np.int64]:
        """(…, n_lanes) total-order row at which each lane's share of a step begins.

        Each lane starts its rounding at a phase of its own, so that neither all lanes nor the neighbouring lanes of
        one rank round up at the same step.
        """
        starts, lengths, phases = self._lanes
        return starts + (np.asarray(steps, np.int64)[..., None] * lengths + phases) // self.steps

    def rows_at(self, step: int) -> int:
        """Cells in the global batch of a step, over all ranks."""
        _, lengths, phases = self._lanes
        n = self.steps
        return sum(
            ((step + 1) * length + phase) // n - (step * length + phase) // n
            for length, phase in zip(lengths.tolist(), phases.tolist(), strict=True)
        )

    def shares(self, steps: range, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """(steps, lanes of the rank) cells that each lane gives to each of some neighbouring steps."""
        mine = self.lanes_of(rank, world_size)
        return np.diff(self.borders(np.arange(steps.start, steps.stop + 1)), axis=0)[:, mine.start : mine.stop]

    def request(self, epoch: Epoch, steps: range, rank: int = 0, world_size: int = 1) -> list[list[Segment]]:
        """What a rank reads for some neighbouring steps: for each of its lanes, the segments to concatenate."""
        begin, end = self.borders([steps.start, steps.stop]).tolist()
        return [list(epoch.segments(begin[v], end[v])) for v in self.lanes_of(rank, world_size)]

    def seeds(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """One random key per cell and epoch: a model's noise depends on it alone, not on the worker."""
        return keyed(rows, self.seed, 0xCE11, epoch)
