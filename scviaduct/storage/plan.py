"""What a view will hold, decided once and remembered beside the work, so that a run that was killed decides nothing anew.

A plan is the genes, the obs columns and which cells are left out. It is the last file of its folder to be written: a
folder with a plan has all that the tasks read besides the atlas.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import DataError
from scviaduct.storage.atlas import Atlas, DatasetInfo
from scviaduct.storage.columns import Column, view_columns
from scviaduct.storage.extend import holds_all
from scviaduct.storage.hvg import batches, gene_columns, highly_variable_genes
from scviaduct.storage.manifest import DATASET_MARKER, file_digest, read_json, sync_tree, write_json_atomic
from scviaduct.storage.panels import Panels
from scviaduct.storage.proteins import find_panels
from scviaduct.storage.qc import Filters, Kept, kept_cells
from scviaduct.storage.scan import Rows
from scviaduct.storage.spill import Task, write_facts
from scviaduct.storage.view import View

PLAN = "plan.json"
TASK_CELLS, TASK_VALUES = 16_384, 2**24
"""Cells of a task at most, and non-zeros it is expected to hold: about 100 MB while they are sorted."""


@dataclass(frozen=True)
class Plan:
    """What was decided before the work began; JSON-ready."""

    recipe: dict[str, Any]
    datasets: dict[str, str]
    """{data set: sha256 of its manifest} of the atlas, in order."""
    grows_from: str | None
    """Digest of the view whose cells and genes are taken over."""
    first: int
    """Position in the atlas of the first data set whose cells are read from the atlas."""
    genes: tuple[str, ...]
    genes_chosen_from: tuple[str, ...] | None
    """The data sets that the genes were chosen from; None when they were named."""
    columns: tuple[tuple[str, tuple[str, ...] | None], ...]
    """(name, categories) of the obs columns that are stored."""
    identifiers: tuple[str, ...]
    filtered: dict[str, dict[str, int]]
    """{data set: {filter: cells that fail it}}."""
    panels: Panels | None = None
    """The proteins, when the view has any."""

    @property
    def stored(self) -> tuple[Column, ...]:
        """The obs columns of the view."""
        return tuple(Column(*column) for column in self.columns)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a JSON file; IncompleteError when it is damaged."""
        record = read_json(path)
        columns = tuple((name, None if c is None else tuple(c)) for name, c in record["columns"])
        chosen = record["genes_chosen_from"]
        texts = {"genes": tuple(record["genes"]), "identifiers": tuple(record["identifiers"])}
        panels = Panels.of(record["panels"])
        return cls(
            **record | texts | {"columns": columns, "genes_chosen_from": chosen and tuple(chosen), "panels": panels}
        )


def manifests(atlas: Atlas) -> dict[str, str]:
    """{data set: sha256 of its manifest}, in the atlas's order: equal ones mean equal data."""
    return {d.id: file_digest(atlas.path / "datasets" / d.id / DATASET_MARKER) for d in atlas.datasets}


def planned(
    atlas: Atlas,
    folder: Path,
    recipe: dict[str, Any],
    datasets: dict[str, str],
    base: View | None,
    executor: Executor | None,
) -> Plan:
    """The plan that an earlier run left in `folder` when it is the same work, else a new one: `folder` is then emptied.

    `base` is the view that grows. Raises DataError when genes, batches or filters do not fit the atlas.
    """
    if (folder / PLAN).is_file():
        left = Plan.read(folder / PLAN)
        same = left.recipe == recipe and list(left.datasets.items()) == list(datasets.items())
        if same and left.grows_from == (base.digest if base else None):
            return left
    shutil.rmtree(folder, ignore_errors=True)
    plan, kept = _decide(atlas, recipe, datasets, base, executor)
    folder.mkdir()
    for number, info in enumerate(atlas.datasets[plan.first :], plan.first):
        keep = None if kept is None else kept.masks[info.id]
        write_facts(_facts(folder, number), atlas, info.id, plan.stored, keep, plan.panels)
    sync_tree(folder)
    write_json_atomic(folder / PLAN, asdict(plan))
    return plan


def _facts(folder: Path, number: int) -> Path:
    return folder / f"cells-{number}.npy"


def _decide(
    atlas: Atlas, recipe: dict[str, Any], datasets: dict[str, str], base: View | None, executor: Executor | None
) -> tuple[Plan, Kept | None]:
    batches(atlas, recipe["batch_key"])  # a column that is misspelt is refused also when nothing has to be ranked
    ids = [d.id for d in atlas.datasets]
    columns, identifiers = view_columns(atlas.vocabulary, (atlas.obs(id_) for id_ in ids), ids)
    first = len(base.manifest["datasets"]) if base and holds_all(base, columns) else 0
    filters = Filters(**recipe["filters"])
    kept = _kept(atlas, filters, first, executor)
    filtered = dict(base.manifest["filtered_cells"]) if base and first else {}
    filtered |= {id_: kept.removed[id_] for id_ in ids[first:]} if kept else {}
    if base is None:
        genes, chosen_from = _choose(atlas, recipe, kept, executor)
    else:
        genes, chosen_from = base.genes, base.manifest["genes_chosen_from"]
    stored = tuple((column.name, column.categories) for column in columns)
    grows_from = base.digest if base else None
    panels = _panels(atlas, recipe["proteins"], base if first else None, ids[first:])
    plan = Plan(recipe, datasets, grows_from, first, genes, chosen_from, stored, tuple(identifiers), filtered, panels)
    _refuse_absent(atlas, plan)
    return plan, kept


def _panels(atlas: Atlas, key: str | None, base: View | None, ids: Sequence[str]) -> Panels | None:
    """The proteins of the data sets `ids`, and of those of the view whose cells are taken over."""
    return None if key is None else find_panels(atlas, key, base.panels if base else None, ids)


def _kept(atlas: Atlas, filters: Filters, first: int, executor: Executor | None) -> Kept | None:
    """Which cells of the data sets from `first` on pass the filters."""
    if first:
        try:
            return kept_cells(replace(atlas, datasets=atlas.datasets[first:]), filters, executor=executor)
        except DataError:  # none of the new cells passes: that is an error only if none of the old does
            pass
    return kept_cells(atlas, filters, executor=executor)


def _choose(
    atlas: Atlas, recipe: dict[str, Any], kept: Kept | None, executor: Executor | None
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The genes, and the data sets they were chosen from."""
    request, join = recipe["genes"], recipe["join"]
    if isinstance(request, list):
        return tuple(request), None
    available, everywhere = atlas.genes(join), tuple(d.id for d in atlas.datasets)
    if not available:
        names = "; ".join(f"{d.id}: {', '.join(map(str, atlas.var(d.id).index[:2]))}" for d in atlas.datasets[:4])
        raise DataError(f"The data sets of {atlas.path} have no gene in common ({names}).")
    if request == "all" or request >= len(available):
        return tuple(available), everywhere
    ranked = highly_variable_genes(
        atlas,
        n_top_genes=request,
        genes=available,
        batch_key=recipe["batch_key"],
        flavor=recipe["flavor"],
        keep=kept.masks if kept else None,
        executor=executor,
    )
    return tuple(ranked.index[ranked["highly_variable"]]), everywhere


def _refuse_absent(atlas: Atlas, plan: Plan) -> None:
    n_genes = len(plan.genes)
    positions = gene_columns(atlas, plan.genes)
    if plan.recipe["join"] == "union":
        return
    for id_, columns in positions.items():
        absent = np.setdiff1d(np.arange(n_genes), columns)
        if len(absent):
            shown = ", ".join(plan.genes[i] for i in absent[:5])
            fix = "Leave them out, or use --join union: they then count as zero there."
            if plan.grows_from:
                fix = "The view cannot grow: choose its genes anew with --overwrite, or prepare another --name."
            raise DataError(f"Data set {id_!r} lacks {len(absent)} of the {n_genes} chosen genes (e.g. {shown}). {fix}")


def tasks(atlas: Atlas, plan: Plan, folder: Path) -> Iterator[Task]:
    """The tasks of a plan, in the order of the cells; their cut depends on nothing but the atlas and the genes."""
    positions = gene_columns(atlas, plan.genes)
    n_genes, seed, folder = len(plan.genes), plan.recipe["seed"], folder.absolute()
    for number, info in enumerate(atlas.datasets[plan.first :], plan.first):
        columns: NDArray[np.int32] | None = positions[info.id]
        columns = None if np.array_equal(positions[info.id], np.arange(n_genes)) else columns
        cells, path = _cells_per_task(info, n_genes), atlas.counts(info.id).path.absolute()
        for first in range(0, info.n_obs, cells):
            rows = Rows(path, plan.datasets[info.id], first, min(first + cells, info.n_obs))
            out = folder / f"spilled-{number}-{first}-{rows.last}"
            yield Task(rows, number, info.id, columns, n_genes, seed, _facts(folder, number), out)


def _cells_per_task(info: DatasetInfo, n_genes: int) -> int:
    # chosen genes have more counts than the others: twice as many are expected in them
    share = min(1.0, 2 * n_genes / info.n_vars)
    per_cell = max(1.0, info.nnz / info.n_obs * share)
    return int(np.clip(TASK_VALUES / per_cell, 1, TASK_CELLS))
