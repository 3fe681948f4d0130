"""Quality of cells and genes out of core, as `scanpy.pp.calculate_qc_metrics` defines it, and filters on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import ConfigError, DataError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.genes import match, symbol_candidates
from scviaduct.storage.scan import Rows, fold, ranges

log = logging.getLogger(__name__)

MITOCHONDRIAL = "MT-"
"""Prefix of mitochondrial genes' symbols: MT-ND1 in human, mt-Nd1 in mouse, Mt-nd1 in rat."""
PRIMARY = "is_primary_data"
"""obs column of CELLxGENE: False for a cell that another collection holds as well."""


@dataclass(frozen=True)
class Filters:
    """Which cells to keep; the default keeps all. Limits are inclusive, as in `scanpy.pp.filter_cells`."""

    min_counts: int = 0
    """Fewest counts of a cell, over all genes of its data set."""
    min_genes: int = 0
    """Fewest genes with a count."""
    max_mito: float | None = None
    """Highest share of mitochondrial counts in per cent (scanpy's pct_counts_mt): 20 means 20 %."""
    is_primary_data: bool = False
    """Keep only cells whose obs column `is_primary_data` is true."""

    def __post_init__(self) -> None:
        for name in ("min_counts", "min_genes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.max_mito is not None and not 0 <= self.max_mito <= 100:
            raise ConfigError(f"max_mito is a percentage, from 0 to 100, not {self.max_mito}")

    @property
    def on_counts(self) -> bool:
        """Whether the counts must be read."""
        return bool(self.min_counts or self.min_genes or self.max_mito is not None)


@dataclass(frozen=True, eq=False)
class Kept:
    """Which cells pass the filters."""

    masks: dict[str, NDArray[np.bool_]]
    """{data set: (cells,) True where a cell is kept}."""
    removed: dict[str, dict[str, int]]
    """{data set: {filter: cells that fail it}}; a cell that fails several counts for each. JSON-ready."""


def kept_cells(atlas: Atlas, filters: Filters, *, executor: Executor | None = None) -> Kept | None:
    """Which cells pass `filters`; None when no filter is set. One pass over the counts, where a filter needs them.

    Raises:
        MissingColumnError: a data set has no obs column `is_primary_data`, where that is asked for.
        DataError: that column has a value that is not true or false, or no cell passes.
        ConfigError: mitochondrial genes are asked for, and a data set has no symbols to find them by.
    """
    if filters == Filters():
        return None
    failed = {info.id: {} for info in atlas.datasets}  # type: dict[str, dict[str, NDArray[np.bool_]]]
    if filters.is_primary_data:
        for dataset_id, fails in failed.items():
            fails["is_primary_data"] = ~_primary(atlas, dataset_id)
    if filters.on_counts:
        for dataset_id, found in _measure(atlas, filters, executor).items():
            failed[dataset_id] |= found
    masks = {name: ~np.logical_or.reduce(list(fails.values())) for name, fails in failed.items()}
    removed = {name: {key: int(fail.sum()) for key, fail in fails.items()} for name, fails in failed.items()}
    if not any(mask.any() for mask in masks.values()):
        raise DataError(f"No cell of {atlas.path} passes the filters; cells that fail each: {removed}")
    return Kept(masks, removed)


def _primary(atlas: Atlas, dataset_id: str) -> NDArray[np.bool_]:
    """(cells,) the obs column `is_primary_data` as bool."""
    column = atlas.obs(dataset_id, [PRIMARY])[PRIMARY]
    text = column.astype(object).astype(str).str.lower()
    wrong = ~text.isin(("true", "false"))
    if wrong.any():
        raise DataError(
            f"obs column {PRIMARY!r} of data set {dataset_id!r}: {int(wrong.sum())} cells are neither True nor False "
            f"(e.g. {column[wrong].iloc[0]!r} of cell {column.index[wrong][0]})."
        )
    return (text == "true").to_numpy()


def _measure(atlas: Atlas, filters: Filters, executor: Executor | None) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """{data set: {filter on counts: (cells,) True where a cell fails it}}."""
    wanted = {} if filters.max_mito is None else {"mt": MITOCHONDRIAL}
    flags = _flags(atlas, wanted)
    if wanted and not any(found.any() for found in flags.values()):
        raise ConfigError(f"No gene of {atlas.path} has a name that starts with {MITOCHONDRIAL!r}: leave out max_mito.")
    work = {
        info.id: [partial(_failing, rows, flags[info.id], filters) for rows in ranges(atlas, info.id)]
        for info in atlas.datasets
    }
    found = fold(work, _join, executor=executor)
    return {
        dataset_id: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for dataset_id, parts in found.items()
    }


def _join(parts: list[Any] | None, *more: Any) -> list[Any]:
    return [*(parts or []), *more]


def _failing(rows: Rows, flags: NDArray[np.uint64], filters: Filters) -> dict[str, NDArray[np.bool_]]:
    """{filter: (cells,) True where a cell fails it}."""
    sums = _empty(rows, 3)
    for cells, indptr, indices, data in rows.blocks():
        _sum_cells(indptr, indices, data, flags, sums[cells, :3])
    n_genes, total, mito = sums.T
    fails = {}
    if filters.min_counts:
        fails["min_counts"] = total < filters.min_counts
    if filters.min_genes:
        fails["min_genes"] = n_genes < filters.min_genes
    if filters.max_mito is not None:
        fails["max_mito"] = mito * 100 > filters.max_mito * total
    return fails


def _empty(rows: Rows, width: int) -> NDArray[np.int64]:
    return np.zeros((rows.last - rows.first, width), np.int64)


def _flags(atlas: Atlas, qc_vars: Mapping[str, str | Sequence[str]]) -> dict[str, NDArray[np.uint64]]:
    """{data set: (genes,) bit k set where a gene belongs to the k-th of `qc_vars`}."""
    flags = {}
    for info in atlas.datasets:
        var = atlas.var(info.id)
        bits = np.zeros(len(var), np.uint64)
        for k, (name, wanted) in enumerate(qc_vars.items()):
            if isinstance(wanted, str):
                found = _prefixed(var, wanted, name, info.id)
            else:
                found = match(wanted, var, where=f"data set {info.id!r}").columns(len(var)) >= 0
            bits |= found.astype(np.uint64) << np.uint64(k)
        flags[info.id] = bits
    return flags


def _prefixed(var: pd.DataFrame, prefix: str, name: str, dataset_id: str) -> NDArray[np.bool_]:
    """(genes,) whether a symbol begins with `prefix`, upper and lower case alike, in the column with the most such."""
    options = symbol_candidates(var)
    if not options:
        raise ConfigError(
            f"Genes of {name!r} are found by symbols that start with {prefix!r}, and data set {dataset_id!r} has none: "
            f"its var has {', '.join(map(str, var.index[:2]))}, … and the columns {list(var.columns)}. "
            "Add a column of symbols to var (such as feature_name) and convert again, or name the genes."
        )
    found = [np.array([symbol.upper().startswith(prefix.upper()) for symbol in names], bool) for names in options]
    best = max(found, key=np.count_nonzero)
    if not best.any():
        log.warning("data set %r has no gene that starts with %r", dataset_id, prefix)
    return best


@dataclass(frozen=True, eq=False)
class QC:
    """Quality metrics with scanpy's names."""

    obs: dict[str, pd.DataFrame]
    """{data set: frame by cell}: n_genes_by_counts, total_counts, pct_counts_in_top_50_genes, pct_counts_mt, … ."""
    var: pd.DataFrame
    """By gene of `Atlas.genes("union")`, over all cells: n_cells_by_counts, mean_counts, pct_dropout_by_counts, … ."""


def qc_metrics(
    atlas: Atlas,
    *,
    qc_vars: Mapping[str, str | Sequence[str]] | None = None,
    percent_top: Sequence[int] = (50, 100, 200, 500),
    executor: Executor | None = None,
) -> QC:
    """`scanpy.pp.calculate_qc_metrics` of every data set, in one pass over the counts.

    `qc_vars` are groups of genes whose share of a cell's counts is wanted: the names of the genes, or a prefix of their
    symbols; by default {"mt": "MT-"}, the mitochondrial ones. A cell's metrics are over all genes of its data set; a
    gene's are over the cells of all data sets, and a gene that a data set lacks counts as zero there.

    Raises:
        ConfigError: a prefix is asked for of a data set without symbols, or percent_top of more genes than it has.
    """
    groups = {"mt": MITOCHONDRIAL} if qc_vars is None else qc_vars
    tops = sorted(set(percent_top))
    for info in atlas.datasets:
        if tops and not 0 < tops[0] <= tops[-1] <= info.n_vars:
            raise ConfigError(f"percent_top must be between 1 and the {info.n_vars} genes of {info.id!r}, not {tops}")
    flags = _flags(atlas, groups)
    work = {
        info.id: [partial(_describe, rows, flags[info.id], len(groups), tops) for rows in ranges(atlas, info.id)]
        for info in atlas.datasets
    }
    sums = fold(work, _add, executor=executor)
    obs = {dataset_id: _obs_metrics(atlas, dataset_id, cells, groups, tops) for dataset_id, (cells, _) in sums.items()}
    return QC(obs, _var_metrics(atlas, {dataset_id: genes for dataset_id, (_, genes) in sums.items()}))


_Sums = tuple[list[NDArray[np.int64]], NDArray[np.int64]]


def _add(sums: _Sums | None, *pieces: tuple[NDArray[np.int64], NDArray[np.int64]]) -> _Sums:
    cells, genes = sums or ([], np.zeros((), np.int64))
    return [*cells, *(piece[0] for piece in pieces)], sum((piece[1] for piece in pieces), genes)


def _describe(
    rows: Rows, flags: NDArray[np.uint64], n_groups: int, tops: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(cells, [genes, counts, counts of each group, counts of the top genes]), (genes, [cells, counts])."""
    by_cell, by_gene = _empty(rows, 2 + n_groups + len(tops)), np.zeros((rows.n_vars, 2), np.int64)
    for cells, indptr, indices, data in rows.blocks():
        _sum_cells(indptr, indices, data, flags, by_cell[cells, : 2 + n_groups])
        _sum_genes(indices, data, by_gene)
        _sum_tops(indptr, data, np.array(tops, np.int64), by_cell[cells, 2 + n_groups :])
    return by_cell, by_gene


def _obs_metrics(
    atlas: Atlas, dataset_id: str, parts: list[NDArray[np.int64]], groups: Mapping[str, Any], tops: Sequence[int]
) -> pd.DataFrame:
    n_genes, total, *rest = np.concatenate(parts).T
    columns: dict[str, NDArray[Any]] = {"n_genes_by_counts": n_genes, "log1p_n_genes_by_counts": np.log1p(n_genes)}
    columns |= {"total_counts": total, "log1p_total_counts": np.log1p(total)}
    with np.errstate(invalid="ignore"):  # 0 / 0 in cells without counts: NaN, as in scanpy
        for top, counts in zip(tops, rest[len(groups) :], strict=True):
            columns[f"pct_counts_in_top_{top}_genes"] = counts / total * 100
        for name, counts in zip(groups, rest, strict=False):
            columns |= {f"total_counts_{name}": counts, f"log1p_total_counts_{name}": np.log1p(counts)}
            columns[f"pct_counts_{name}"] = counts / total * 100
    return pd.DataFrame(columns, index=atlas.obs(dataset_id, []).index)


def _var_metrics(atlas: Atlas, sums: Mapping[str, NDArray[np.int64]]) -> pd.DataFrame:
    genes = atlas.genes("union")
    n_cells, total = np.zeros((2, len(genes)), np.int64)
    for dataset_id, by_gene in sums.items():
        columns = atlas.axis.columns(dataset_id, genes)
        named = columns >= 0
        n_cells[columns[named]] += by_gene[named, 0]
        total[columns[named]] += by_gene[named, 1]
    mean = total / atlas.n_obs
    metrics = {"n_cells_by_counts": n_cells, "mean_counts": mean, "log1p_mean_counts": np.log1p(mean)}
    metrics["pct_dropout_by_counts"] = (1 - n_cells / atlas.n_obs) * 100
    return pd.DataFrame(metrics | {"total_counts": total, "log1p_total_counts": np.log1p(total)}, index=pd.Index(genes))


@numba.njit(nogil=True, cache=True)
def _sum_cells(indptr, indices, data, flags, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    for cell in range(len(indptr) - 1):
        sums[cell, 0] = indptr[cell + 1] - indptr[cell]
        for j in range(indptr[cell], indptr[cell + 1]):
            count = np.int64(data[j])
            sums[cell, 1] += count
            group, bits = 2, flags[indices[j]]
            while bits:
                if bits & np.uint64(1):
                    sums[cell, group] += count
                bits >>= np.uint64(1)
                group += 1


@numba.njit(nogil=True, cache=True)
def _sum_genes(indices, data, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    for j in range(len(indices)):
        sums[indices[j], 0] += 1
        sums[indices[j], 1] += np.int64(data[j])


@numba.njit(nogil=True, cache=True)
def _sum_tops(indptr, data, tops, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sum of the n largest counts of each cell, for each n of `tops`; small counts are tallied, not sorted."""
    small = np.zeros(256, np.int64)
    for cell in range(len(indptr) - 1 if len(tops) else 0):
        small[:] = 0
        values = data[indptr[cell] : indptr[cell + 1]]
        for count in values:
            if count < 256:
                small[count] += 1
        taken, total, k = 0, np.int64(0), 0
        for count in np.sort(values[values >= 256])[::-1]:
            taken += 1
            total += np.int64(count)
            if k < len(tops) and taken == tops[k]:
                sums[cell, k] = total
                k += 1
        for count in range(255, 0, -1):
            while k < len(tops) and taken + small[count] >= tops[k]:
                sums[cell, k] = total + (tops[k] - taken) * count
                k += 1
            taken += small[count]
            total += small[count] * count
        sums[cell, k:] = total
