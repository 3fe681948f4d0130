"""prepare: choose the training genes, shuffle all cells, and write them as a view that a loader reads at full speed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import dask.utils
import numpy as np

from scviaduct.errors import ConfigError, DataError, IncompleteError, OutputExistsError, ScviaductError, nearest
from scviaduct.storage.arrays import Codec
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.columns import DATASET, OBS_DATASET, Tally
from scviaduct.storage.extend import Grown, is_prefix
from scviaduct.storage.genes import normalise
from scviaduct.storage.hvg import Flavor
from scviaduct.storage.locks import locked
from scviaduct.storage.manifest import (
    VIEW_MARKER,
    disk_is_full,
    read_json,
    replace_folder,
    tree_digest,
    write_json_atomic,
)
from scviaduct.storage.merge import Form, Sorted, total, write
from scviaduct.storage.places import local
from scviaduct.storage.plan import TASK_VALUES, Plan, manifests, planned, tasks
from scviaduct.storage.qc import Filters
from scviaduct.storage.spill import ARRAYS, Spilled, Task, spill
from scviaduct.storage.tasks import as_done, cores
from scviaduct.storage.view import FORMAT, View

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_TASK_BYTES, _BASE_BYTES = 12 * TASK_VALUES, 2**28
"""Memory of a task (indices and counts of 16 bits, twice, and what is decoded), and of the program without any."""


def prepare(
    atlas: str | Path | Atlas,
    *,
    genes: int | str | Path | Sequence[str] = 2000,
    flavor: Flavor = "seurat_v3",
    batch_key: str | None = None,
    name: str = "default",
    seed: int = 0,
    block_rows: int = 1024,
    memory: str = "2GB",
    join: Literal["intersection", "union"] = "intersection",
    filters: Filters = Filters(),  # noqa: B008 - frozen
    proteins: str | None = None,
    codec: Codec = "lz4",
    workers: int | None = None,
    executor: Executor | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> View:
    """Write the training view `name` of an atlas: the chosen genes of all its cells, in one random order.

    `genes` is a number of highly variable genes (of a `flavor` that scanpy has, found per value of the obs column
    `batch_key`, by default per data set), "all", names, or the path of a text file with one name per line. `join` says
    which genes are in question: those of every data set, or of any (a gene counts as zero where it was not measured).
    Cells that fail the `filters`, and cells without a count over the chosen genes, are left out and counted. `proteins`
    names the obsm element with the protein counts of CITE-seq, which the view then has over all panels. `codec`
    compresses the arrays: "lz4", "zstd" (smaller, for slow disks) or "none".

    `memory` bounds this process; `workers` (default: the cores) are its threads, or how many tasks `executor` has at a
    time. Neither changes a byte of the result. `on_progress` is called with (phase, cells done, cells).

    A finished view of the same recipe is returned as it is. When data sets were appended to the atlas since, it grows:
    its genes stay, and the new cells are merged in. A run that was killed is taken up where it was.

    Raises:
        OutputExistsError: `name` holds a view of another recipe, or data sets were changed (unless `overwrite`).
        DataError: genes, batches, proteins or filters do not fit the atlas.
        NotCountsError: a protein has values that are no counts.
        ConfigError: an option has a value that makes no sense.
        IncompleteError: something of the atlas is damaged, or the disk is full; what is done is kept.
    """
    store = Atlas.open(atlas) if isinstance(atlas, str | Path) else atlas
    recipe = {
        "genes": _gene_request(genes),
        "flavor": _one_of(flavor, get_args(Flavor), "flavor"),
        "batch_key": batch_key,
        "join": _one_of(join, ("intersection", "union"), "join"),
        "filters": asdict(filters),
        "proteins": proteins,
        "seed": int(seed),
        "block_rows": _positive(block_rows, "block_rows"),
        "codec": _one_of(codec, get_args(Codec), "codec"),
    }
    job = _Job(store, recipe, _parse_memory(memory), _workers(workers), executor, on_progress or _silent)
    final = _checked_path(store, name)
    with _locked(final):
        _recover(final)
        datasets = manifests(store)
        standing = None if overwrite else _standing(final, recipe, datasets)
        if standing is None or standing.manifest["datasets"] != datasets:
            with _kept_for_the_next_run(final):
                job.run(final, datasets, standing)
        shutil.rmtree(_partial(final), ignore_errors=True)
    return View.open(store.path, name)


def _silent(phase: str, done: int, cells: int) -> None:
    pass


def _one_of(value: str, options: tuple[str, ...], option: str) -> str:
    if value not in options:
        raise ConfigError(f"{option} is one of {', '.join(options)}, not {value!r}: {nearest(value, options)}")
    return value


def _workers(workers: int | None) -> int:
    return cores() if workers is None else _positive(workers, "workers")


def _gene_request(genes: int | str | Path | Sequence[str]) -> int | str | list[str]:
    """What the recipe remembers of `genes`: a number, "all" or the names."""
    if isinstance(genes, int | np.integer):
        return _positive(int(genes), "genes")
    if genes == "all":
        return "all"
    if isinstance(genes, str | Path):
        if not Path(genes).is_file():
            raise ConfigError(f"genes must be a number, 'all', names, or the path of a text file; {genes} is no file.")
        lines = Path(genes).read_text().splitlines()
        genes = [line.strip() for line in lines if line.strip()]
    names = normalise(genes)
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        raise DataError(f"{len(twice)} genes are named twice: {', '.join(twice[:5])}" if twice else "No gene is named.")
    return names


def _positive(value: int, option: str) -> int:
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, not {value}")
    return int(value)


def _parse_memory(memory: str) -> int:
    try:
        return _positive(int(dask.utils.parse_bytes(memory)), "memory")
    except ValueError as error:
        raise ConfigError(f"memory must be a size such as '2GB', not {memory!r}") from error


def _checked_path(atlas: Atlas, name: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"A view's name consists of letters, digits, '_', '-' and '.': not {name!r}")
    return local(atlas.path, "The atlas") / "views" / name


@contextlib.contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Only one process makes a view at a time; others wait, then find it made. Nothing is left of the lock."""
    lock = final.with_name(f".{final.name}.lock")
    try:
        with locked(lock, busy=f"{final} is being made by another process", patience=math.inf):
            yield
    finally:
        with contextlib.suppress(OSError):  # other views are in it
            final.parent.rmdir()


def _partial(final: Path) -> Path:
    """Where the work on a view lies until it is whole."""
    return final.with_name(f".{final.name}.partial")


def _standing(final: Path, recipe: dict[str, Any], datasets: dict[str, str]) -> View | None:
    """The view that is there, of these data sets or of the first of them; None when there is none."""
    if not (final / VIEW_MARKER).is_file():
        return None
    manifest = read_json(final / VIEW_MARKER)
    made, of = manifest["recipe"], manifest.get("datasets", {})
    different = [key for key in recipe if recipe[key] != made.get(key)]
    if not different and (list(of.items()) == list(datasets.items()) or is_prefix(of, datasets)):
        return View.open(final.parents[1], final.name)
    what = f"it was made by another recipe, different: {', '.join(different)}"
    if not different:
        changed = next((id_ for id_ in of if datasets.get(id_) != of[id_]), None)
        what = (
            f"data set {changed!r} was changed or removed since it was made" if changed else "their order has changed"
        )
        what = f"the atlas has changed: {what}"
    raise OutputExistsError(
        f"View {final.name!r} of {final.parents[1]} exists, but {what}. "
        "Choose another --name, or replace it with --overwrite."
    )


@contextlib.contextmanager
def _kept_for_the_next_run(final: Path) -> Iterator[None]:
    """What was done stays when the run is stopped or the disk is full, and goes when the options were wrong."""
    try:
        yield
    except ScviaductError as error:
        if not isinstance(error, IncompleteError):
            shutil.rmtree(_partial(final), ignore_errors=True)
        raise
    except (OSError, RuntimeError) as error:  # zarrs raises RuntimeError
        if not disk_is_full(error):
            raise
        raise IncompleteError(
            f"The disk of {final.parents[1]} is full: view {final.name!r} could not be written. Free some space and "
            "run the same scviaduct prepare again: it goes on from what is done."
        ) from error


class _Job:
    """One run: plan, spill, merge, publish."""

    def __init__(
        self,
        atlas: Atlas,
        recipe: dict[str, Any],
        memory: int,
        workers: int,
        executor: Executor | None,
        on_progress: Progress,
    ) -> None:
        self._atlas, self._recipe, self._memory, self._executor = atlas, recipe, memory, executor
        self._workers, self._tell = workers, on_progress

    def run(self, final: Path, datasets: dict[str, str], base: View | None) -> None:
        """Make the view `final`, or make it of `base`, which is the one that is there."""
        folder = _partial(final)
        self._tell("choose genes", 0, self._atlas.n_obs)
        plan = planned(self._atlas, folder, self._recipe, datasets, base, self._executor)
        self._tell("choose genes", self._atlas.n_obs, self._atlas.n_obs)
        if not (folder / "view" / VIEW_MARKER).is_file():
            todo = list(tasks(self._atlas, plan, folder))
            self._spill(todo)
            self._write(folder / "view", plan, todo, base)
        replace_folder(folder / "view", final)

    def _spill(self, todo: list[Task]) -> None:
        open_ = [task for task in todo if not task.out.is_file()]
        cells = sum(task.n_cells for task in todo)
        done = cells - sum(task.n_cells for task in open_)
        self._tell("shuffle", done, cells)
        with contextlib.ExitStack() as stack:
            pool = self._executor or stack.enter_context(self._threads())
            for task, _ in as_done(pool, spill, open_, ahead=2 * self._workers):
                done += task.n_cells
                self._tell("shuffle", done, cells)
        ARRAYS.clear()

    def _threads(self) -> ThreadPoolExecutor:
        fit = (self._memory - _BASE_BYTES) // _TASK_BYTES
        return ThreadPoolExecutor(int(np.clip(fit, 1, self._workers)), thread_name_prefix="prepare")

    def _write(self, path: Path, plan: Plan, todo: list[Task], base: View | None) -> None:
        shutil.rmtree(path, ignore_errors=True)
        if any(column.name == OBS_DATASET for column in plan.stored):
            log.warning("the obs column %r is called %r in views: %r is the data set id", DATASET, OBS_DATASET, DATASET)
        spilled = [Spilled(task.out) for task in todo]
        grown = [Grown(base, plan.stored, plan.recipe["seed"], plan.panels)] if base and plan.first else []
        parts: list[Sorted] = [*grown, *spilled]
        cells = total(parts)
        if not cells.cells:
            raise DataError(f"No cell of {self._atlas.path} has a count over the {len(plan.genes)} chosen genes.")
        zero = dict(base.manifest["zero_count_cells"]) if base and plan.first else {}
        for task, part in zip(todo, spilled, strict=True):
            zero[task.dataset_id] = zero.get(task.dataset_id, 0) + part.totals.zero
        form = Form(plan.stored, len(plan.genes), plan.recipe["block_rows"], plan.recipe["codec"], plan.panels)
        with self._threads() as pool:
            tallies = write(
                path,
                parts,
                form,
                memory=self._memory,
                pool=pool,
                on_cells=lambda done: self._tell("write", done, cells.cells),
            )
            manifest = _manifest(plan, tallies, zero) | {"n_rows": cells.cells, "nnz": cells.nnz, "sum": cells.sum}
            files = tree_digest(path, pool=pool)
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        write_json_atomic(path / VIEW_MARKER, manifest | {"digest": digest, "files": files})


def _manifest(plan: Plan, tallies: list[Tally], zero: dict[str, int]) -> dict[str, Any]:
    """What view.json says of the cells and where they are from."""
    return {
        "format": FORMAT,
        "recipe": plan.recipe,
        "datasets": plan.datasets,
        "genes_chosen_from": plan.genes_chosen_from,
        "zero_count_cells": zero,
        "filtered_cells": plan.filtered,
        "columns": {tally.column.name: tally.to_dict() for tally in tallies},
        "identifiers": list(plan.identifiers),
        "genes": list(plan.genes),
    } | ({"proteins": asdict(plan.panels)} if plan.panels else {})


def _recover(final: Path) -> None:
    """Put back the old view where a run was killed between taking it away and putting the new one in its place."""
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
