"""`de`: differential expression, accessibility or protein abundance between groups of cells, out of core.

The posterior is drawn for a random subsample of each group's cells, and only blocks that hold them are read: a view is
shuffled on disk, so the first blocks that have enough of a group are such a sample. What is counted, not drawn (raw
means, shares of non-zeros), is counted over all cells in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.distributed.bayes import Hypothesis, is_de
from scviaduct.distributed.config import Reading
from scviaduct.distributed.outputs import Decoder, OnProgress, array
from scviaduct.distributed.population import Population, open_model, open_population, seeds
from scviaduct.errors import ConfigError, DataError, nearest
from scviaduct.models.base import Model, Quantity
from scviaduct.models.counts import Cells
from scviaduct.models.noise import Noise
from scviaduct.schema import MISSING, Batch
from scviaduct.storage.manifest import refuse_existing, write_atomic
from scviaduct.storage.places import Place

_HARDLY_SEEN = 0.01  # mean count below which a feature serves to estimate pseudocounts
_REST = "Rest"  # how all cells but those of a group are called
_COUNTED = 4096  # features that cells are cut for when they are only counted


def de(
    model: str | Path,
    data: str | Place,
    *,
    groupby: str,
    group1: Sequence[str] = (),
    group2: str | None = None,
    what: str | None = None,
    mode: Literal["change", "vanilla"] = "change",
    delta: float | Literal["auto"] = 0.25,
    fdr: float = 0.05,
    pseudocounts: float | None = None,
    test: Literal["three", "two"] = "three",
    batch_correction: bool = False,
    transform_batch: Sequence[str] = (),
    n_samples: int = 5000,
    all_stats: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    on_progress: OnProgress = lambda done, n: None,
) -> pd.DataFrame:
    """Compare each of `group1` (default: all groups) with `group2` (default: all other cells that have a group).

    Columns are those of scvi-tools' differential_expression, one row a comparison and feature, best first. `what` is a
    quantity of the model (default: its first). With `batch_correction`, both groups are decoded as cells of every batch
    in turn, or of the batches in `transform_batch`, and pairs are from the same batch; otherwise of their own batch.
    `out` is a CSV file for the table. `on_progress` gets (comparisons done, all).

    Memory: 8 bytes for each of `n_samples` draws and feature, 24 bytes for each group and feature, and about 20 bytes a
    cell of a group while it is sampled.

    Raises:
        DataError, MissingColumnError: there is no such column or group, or a group has no cell.
        ConfigError: options that make no sense, or that do not go together.
        OutputExistsError: `out` exists.
    """
    check = Hypothesis(mode=mode, delta=delta, pseudocounts=pseudocounts, sides=test, seed=seed)
    _refuse(fdr, n_samples, out, batch_correction=batch_correction, batches=transform_batch)
    net, _ = open_model(model, reading)
    batches = (transform_batch or net.schema.batch.categories) if batch_correction else ()
    quantity = Quantity(name=what or next(iter(net.quantities)))
    if net.offer(quantity).drawn:
        raise ConfigError(f"{quantity.name!r} are random draws; compare {_comparable(net)}")
    decoder = Decoder.of(net, quantity, seed=seed)
    sampler = Sampled(decoder, Decoder.of(net, quantity, batches=batches).codes, n_samples)
    population = open_population(data, net.schema, reading)
    groups = Groups(*population.groups(groupby), groupby)
    pairs = groups.comparisons(group1, group2)
    estimated = mode == "change" and pseudocounts is None
    stats = Stats.of(population, groups, decoder) if all_stats or estimated else None
    tables = []
    for done, (first, second) in enumerate(pairs, 1):
        one, two = (sampler.draws(population, np.flatnonzero(cells)) for cells in groups.members(first, second))
        if stats is None:
            found = check(one, two)
        else:
            means = stats.table(groups, first, second)
            unseen = means[["raw_mean1", "raw_mean2"]].to_numpy().T < _HARDLY_SEEN
            found = check(one, two, (unseen[0], unseen[1]))
            found = pd.concat([found, means], axis=1) if all_stats else found
        tables.append(_finished(found, decoder, fdr if mode == "change" else None, first, second))
        on_progress(done, len(pairs))
    table = pd.concat(tables)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), table.to_csv(index_label="feature").encode())
    return table


def _refuse(
    fdr: float, n_samples: int, out: str | Path | None, *, batch_correction: bool, batches: Sequence[str]
) -> None:
    if not 0 < fdr < 1:
        raise ConfigError(f"fdr={fdr} must lie between 0 and 1")
    if n_samples < 2:
        raise ConfigError(f"n_samples={n_samples} must be at least 2; 5000 is usual")
    if batches and not batch_correction:
        raise ConfigError("transform_batch names batches to correct with; add batch_correction, or leave it out")
    if out is not None:
        refuse_existing(Path(out))


def _comparable(model: Model) -> str:
    return " or ".join(name for name, offer in model.quantities.items() if not offer.drawn)


def _finished(found: pd.DataFrame, decoder: Decoder, fdr: float | None, first: str, second: str | None) -> pd.DataFrame:
    """The table of a comparison, best first."""
    found.index = pd.Index(decoder.names, dtype=object)
    found = found.sort_values("bayes_factor", ascending=False, kind="stable")
    if fdr is not None:
        found[f"is_de_fdr_{fdr}"] = is_de(found["proba_de"].to_numpy(), fdr)
    other = _REST if second is None else second
    return found.assign(comparison=f"{first} vs {other}", group1=first, group2=other)


class Groups:
    """The values of an obs column, and which cells have them."""

    def __init__(self, codes: NDArray[np.integer], names: list[str], key: str) -> None:
        self.codes, self.names, self.key = codes, names, key
        self.sizes = np.bincount(codes[codes != MISSING], minlength=len(names))

    def comparisons(self, group1: Sequence[str], group2: str | None) -> list[tuple[str, str | None]]:
        """The pairs to compare, None for all other cells that have a group; raises DataError for a group without cells, or a single one."""
        there = [name for name, n in zip(self.names, self.sizes, strict=True) if n]
        for name in [*group1, *([group2] if group2 is not None else [])]:
            if name not in there:
                raise DataError(f"No cell has {name!r} in {self.key!r}; {nearest(name, there)}")
        if len(there) < 2:
            raise DataError(f"All cells have the same {self.key!r} ({', '.join(there) or 'none'}): nothing to compare")
        chosen = [name for name in (group1 or there) if name != group2]
        if not chosen:
            raise DataError(f"{group2!r} cannot be compared with itself; name another group1 or group2")
        return [(name, group2) for name in chosen]

    def numbers(self, first: str, second: str | None) -> tuple[list[int], list[int]]:
        """Codes of both groups of a comparison."""
        one = self.names.index(first)
        return [one], [k for k in range(len(self.names)) if k != one] if second is None else [self.names.index(second)]

    def members(self, first: str, second: str | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(source rows,) whether a cell is in either group of a comparison."""
        one, two = (np.isin(self.codes, numbers) for numbers in self.numbers(first, second))
        return one, two


@dataclass(frozen=True, eq=False)
class Sampled:
    """Posterior draws of a quantity for a random subsample of some cells."""

    decoder: Decoder
    codes: tuple[int | None, ...]
    """Batches to decode as; each gets the same number of draws."""
    n_samples: int

    def draws(self, population: Population, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(draws, features) one draw a cell, or as many as it takes where cells are few; those of a batch together."""
        per_batch = max(2, self.n_samples // len(self.codes))
        n, seed = per_batch * len(self.codes), self.decoder.seed
        cells = population.sampled(rows, n, seed)
        # the k-th draw of the i-th cell goes to a random place, whose batch decides as what it is decoded
        place = np.random.default_rng([seed, len(rows), n]).permutation(n)
        out = np.empty((n, len(self.decoder.names)), np.float32)
        done = 0
        for batch in population.gathered(cells, self.decoder.n_decoded):
            for number in range(-(-n // len(cells))):
                slots = number * len(cells) + np.arange(done, done + batch.n_cells)
                here = slots[slots < n]
                if len(here):
                    at = place[here]
                    out[at] = self._draw(batch, number, at // per_batch)[: len(here)]
            done += batch.n_cells
        return out

    def _draw(self, batch: Batch, number: int, which: NDArray[np.int64]) -> NDArray[np.float32]:
        """(cells, features) a draw of each cell, as of the batch that `which` names; cells without a place are decoded too."""
        net = self.decoder.model
        with net.evaluating():
            cells = Cells.of(batch, net.schema, net.device)
            noise = Noise(seeds(batch, self.decoder.seed, number), net.device)
            code = None
            if self.codes != (None,):
                filled = np.zeros(batch.n_cells, np.int64)
                filled[: len(which)] = np.array(self.codes)[which]
                code = torch.from_numpy(filled).to(net.device)
            q = net.inference(cells, None)
            return array(net.decode(self.decoder.quantity, q, cells.in_batch(code), noise))


@dataclass(frozen=True, eq=False)
class Stats:
    """Sums over the cells of each group, (groups, features), the last row for cells in none."""

    cells: NDArray[np.float64]
    raw: NDArray[np.float64]
    non_zeros: NDArray[np.float64]
    normalised: NDArray[np.float64]

    @classmethod
    def of(cls, population: Population, groups: Groups, decoder: Decoder) -> Stats:
        """One pass over all cells."""
        model = decoder.model
        proteins = model.offer(decoder.quantity).axis == "proteins"
        shape = (len(groups.names) + 1, len(decoder.names))
        made = cls(np.zeros(shape[0]), *(np.zeros(shape) for _ in range(3)))
        for batch in population.blocks(_COUNTED):
            x = csr_matrix(batch.proteins) if proteins else _counts(batch)
            codes = groups.codes[batch.rows].astype(np.int64)
            made._add(x.astype(np.float64), np.where(codes == MISSING, shape[0] - 1, codes))
        return made

    def _add(self, x: csr_matrix, codes: NDArray[np.int64]) -> None:
        n = len(codes)
        member = csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(len(self.cells), n))
        totals = np.asarray(x.sum(1)).ravel()
        scaled = x.multiply((1e4 / np.maximum(totals, 1e-300))[:, None]).tocsr()
        self.cells[:] += np.bincount(codes, minlength=len(self.cells))
        self.raw[:] += (member @ x).toarray()
        self.normalised[:] += (member @ scaled).toarray()
        x.data = (x.data != 0).astype(np.float64)
        self.non_zeros[:] += (member @ x).toarray()

    def table(self, groups: Groups, first: str, second: str | None) -> pd.DataFrame:
        """Raw means, shares of non-zeros and means per 10,000 counts, for both groups."""
        made = {}
        for number, rows in enumerate(groups.numbers(first, second), 1):
            n = self.cells[rows].sum()
            made[f"raw_mean{number}"] = self.raw[rows].sum(0) / n
            made[f"non_zeros_proportion{number}"] = self.non_zeros[rows].sum(0) / n
            made[f"raw_normalized_mean{number}"] = self.normalised[rows].sum(0) / n
        return pd.DataFrame(dict(sorted(made.items())))


def _counts(batch: Batch) -> csr_matrix:
    return csr_matrix((batch.data, batch.indices.astype(np.int32), batch.indptr), shape=(batch.n_cells, batch.n_genes))
