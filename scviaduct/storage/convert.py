"""Files become one verified atlas: data sets in parallel, every value checked, read back, resumable at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dask.utils import parse_bytes

from scviaduct import __version__
from scviaduct.errors import ConfigError, DataError, IncompleteError, OutputExistsError
from scviaduct.storage.arrays import open_group
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.dataset import DatasetPlan, write_dataset
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.manifest import (
    ATLAS_MARKER,
    DATASET_MARKER,
    FORMAT,
    disk_is_full,
    file_digest,
    read_json,
    write_json_atomic,
)
from scviaduct.storage.places import local
from scviaduct.storage.probe import Look, check_room, look
from scviaduct.storage.request import Request, abandon, alone, begin, check_ids, finish, go_on, is_done, unfinished
from scviaduct.storage.tasks import cores, processes
from scviaduct.storage.vocabulary import vocabulary

LEAST_MEMORY = 512 * 2**20
"""The interpreter with its libraries and one shard of each array need about this much."""
WORTH = 30_000_000
"""Counts below which processes are not worth the two seconds it takes to start them: two seconds' work of one."""
_POLL = 0.5

Progress = Callable[[str, int, int], None]


def convert(
    files: Sequence[str | Path],
    *,
    out: str | Path,
    counts: str | None = None,
    memory: str = "2GB",
    workers: int | None = None,
    executor: Executor | None = None,
    append: bool = False,
    obsm: Sequence[str] = (),
    layers: Sequence[str] = (),
    sum_duplicates: bool = False,
    on_progress: Progress | None = None,
) -> Atlas:
    """Make an atlas of files (h5ad, AnnData Zarr, 10x Genomics h5, MuData), one data set each, named by the files' stems.

    Every count is checked, and what was written is read back. All files are looked at before the first is
    converted. A conversion that is killed, or finds the disk full, goes on where it was when the same call is made
    again; the atlas is the same, byte for byte, and the same for any `memory`, `workers` and `executor`.

    `counts` says which matrix holds the raw counts ("X", "raw" or a layer; default: found by looking). `memory` is a
    bound for all processes together that does not depend on the size of the files (obs and var aside); with an
    `executor` it is the bound of one task. `workers` is the number of processes (default: one a core, fewer where
    memory or files are few), `executor` runs the data sets elsewhere, e.g. on a cluster with a shared file system.
    `append` adds data sets to a finished atlas; those it has stay untouched, and files it has are skipped. `obsm` and
    `layers` are names of elements to keep besides, where a file has them. `sum_duplicates` adds up genes that are
    named twice. `on_progress` is called with (data set, cells done, cells of all files).

    Raises:
        OutputExistsError: `out` is taken, or by an unfinished conversion of other files or options.
        UnreadableFileError, NotCountsError, DataError: a file cannot be used; the message names it and the fix.
        IncompleteError: the disk is full or too small, or what was read back is not what was written.
        ConfigError: `memory` or `workers` makes no sense.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, str | Path) else files)]
    target, budget = local(out, "The atlas").absolute(), memory_bytes(memory)
    with alone(target):
        before = [d.id for d in Atlas.open(target).datasets] if append else []
        check_ids(paths, tuple(before))
        options = {"counts": counts, "obsm": tuple(obsm), "layers": tuple(layers), "sum_duplicates": sum_duplicates}
        plans = [DatasetPlan(p.absolute(), str(p), p.stem, **options) for p in paths]  # type: ignore[arg-type]
        asked = Request(tuple(plans), append)
        resuming = unfinished(target, asked)
        known = _already_there(target, asked, before)
        if resuming:
            go_on(target, asked)
        new = asked.without(known)
        told = _Told(on_progress, known)
        if new.plans:
            found = look(new.plans, target, before)
            todo = [plan for plan in new.plans if not is_done(target, plan.id)]
            n = _workers(workers, budget, [found[p.id] for p in todo], executor)
            check_room(target, {p.id: found[p.id] for p in todo}, n)
            if not resuming:
                begin(target, asked)
            told.expect(found)
            with _kept_or_removed(target, new):
                _run(_tasks(target, todo, found, budget // n if executor is None else budget), n, executor, told)
            write_record(target, [*before, *(p.id for p in new.plans)])
        finish(target)
    return Atlas.open(target)


def memory_bytes(memory: str) -> int:
    """Bytes of an amount such as "2GB"; ConfigError when it is none, or less than conversion needs."""
    try:
        budget = int(parse_bytes(memory))
    except ValueError:
        raise ConfigError(f"memory={memory!r} is not an amount of memory; write it like 2GB or 800MB") from None
    if budget < LEAST_MEMORY:
        raise ConfigError(f"memory={memory!r} is too little: {LEAST_MEMORY // 2**20}MiB is the least conversion needs")
    return budget


def _already_there(out: Path, request: Request, before: Sequence[str]) -> list[str]:
    """Data sets of a finished atlas that were made of the same files; OutputExistsError for others of the same name."""
    if not request.append:  # a record means that the last attempt was killed after writing it
        return [plan.id for plan in request.plans] if (out / ATLAS_MARKER).is_file() else []
    known = []
    for plan in (plan for plan in request.plans if plan.id in before):
        wanted = read_json(out / "datasets" / plan.id / DATASET_MARKER)["source_sha256"]
        with open_counts(plan.path, counts=plan.counts, sum_duplicates=plan.sum_duplicates) as file:
            if file.digest() != wanted:
                raise OutputExistsError(
                    f"{out} has a data set {plan.id!r} of another file than {plan.given} (the sha256 differ): "
                    "rename the file to add it beside the other"
                )
        known.append(plan.id)
    return known


def _workers(workers: int | None, budget: int, todo: Sequence[Look], executor: Executor | None) -> int:
    """Processes that share the memory; 1 where starting them costs more than it saves."""
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    room = budget // LEAST_MEMORY
    if workers is not None and executor is None and workers > room:
        raise ConfigError(
            f"{workers} workers need {workers * LEAST_MEMORY // 2**20:,}MiB of memory: give more --memory, or "
            f"{room} workers"
        )
    if workers is None and executor is None and sum(look.values for look in todo) < WORTH:
        return 1
    return max(1, min(workers or cores(), len(todo), room if executor is None else len(todo)))


@dataclass(frozen=True)
class _Task:
    """A data set to be made, in this process or another."""

    plan: DatasetPlan
    folder: Path
    memory: int

    @property
    def progress(self) -> Path:
        """The file that tells how many cells are done."""
        return self.folder / f".{self.plan.id}.progress"


def _tasks(out: Path, todo: Sequence[DatasetPlan], found: dict[str, Look], memory: int) -> list[_Task]:
    """The largest first, so that the last to end is a small one."""
    ordered = sorted(todo, key=lambda plan: -found[plan.id].values)
    return [_Task(plan, out / "datasets", memory) for plan in ordered]


class _Told:
    """Adds up the cells of data sets that are made at the same time."""

    def __init__(self, on_progress: Progress | None, known: Sequence[str]) -> None:
        self._call, self._known = on_progress, known
        self._all, self._done = 0, dict[str, int]()

    def expect(self, found: dict[str, Look]) -> None:
        """What there is to do, and what is done."""
        self._cells = {name: look.n_obs for name, look in found.items()}
        self._all = sum(self._cells.values())
        self._done = {name: n for name, n in self._cells.items() if not found[name].bytes}
        for what in [*(f"{name} is in the atlas already" for name in self._known), ""]:
            self._tell(what)

    def at(self, dataset_id: str, cells: int | None = None) -> None:
        """So many cells of a data set are done; all of them by default."""
        cells = self._cells[dataset_id] if cells is None else cells
        if self._done.get(dataset_id) != cells:
            self._done[dataset_id] = cells
            self._tell(dataset_id)

    def _tell(self, what: str) -> None:
        if self._call:
            self._call(what, sum(self._done.values()), self._all)


def _run(tasks: Sequence[_Task], workers: int, executor: Executor | None, told: _Told) -> None:
    if executor is None and workers == 1:
        for task in tasks:
            plan = task.plan
            write_dataset(plan, task.folder, memory=task.memory, report=lambda n, plan=plan: told.at(plan.id, n))  # type: ignore[misc]
            told.at(plan.id)
    elif executor is None:
        with processes(workers, preload=__name__) as pool:
            _run_on(pool, tasks, told)
    else:
        _run_on(executor, tasks, told)


def _run_on(executor: Executor, tasks: Sequence[_Task], told: _Told) -> None:
    """Make the data sets; at an error those that did not start are given up, running ones are waited for."""
    pending: dict[Future[None], _Task] = {executor.submit(_make, task): task for task in tasks}
    try:
        while pending:
            done, _ = wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED)
            for task in pending.values():
                if (cells := _read_progress(task.progress)) is not None:
                    told.at(task.plan.id, cells)
            for future in done:
                task = pending.pop(future)
                future.result()
                told.at(task.plan.id)
    finally:
        wait([future for future in pending if not future.cancel()])


def _make(task: _Task) -> None:
    """One data set, in a process of its own."""
    said = 0.0

    def report(cells: int) -> None:
        nonlocal said
        if time.monotonic() - said > _POLL:
            task.progress.write_text(str(cells))
            said = time.monotonic()

    write_dataset(task.plan, task.folder, memory=task.memory, report=report)
    task.progress.unlink(missing_ok=True)


def _read_progress(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or being written at this moment
        return None


@contextmanager
def _kept_or_removed(out: Path, request: Request) -> Iterator[None]:
    """After an error: what is done stays, and when nothing is, `out` is as it was before."""
    try:
        yield
    except Exception as error:
        done, of = sum(is_done(out, plan.id) for plan in request.plans), len(request.plans)
        if disk_is_full(error):
            raise IncompleteError(
                f"the disk of {out} is full: free some space and run the same command again: it resumes; "
                f"{done} of {of} data sets are done"
            ) from error
        if not isinstance(error, DataError | IncompleteError):
            raise
        abandon(out, request)
        if done:
            kept = f"{done} of {of} data sets are done and kept: the same command goes on when the file is put right"
            raise type(error)(f"{error}. ({kept})") from error
        raise


def write_record(out: Path, ids: list[str]) -> None:
    """atlas.json, the last thing to be written."""
    values, identifiers = stored_vocabulary(out, ids)
    record = {
        "format": FORMAT,
        "version": __version__,
        "datasets": ids,
        "manifests": {name: file_digest(out / "datasets" / name / DATASET_MARKER) for name in ids},
        "vocabulary": values,
        "identifiers": identifiers,
    }
    write_json_atomic(out / ATLAS_MARKER, record)


def stored_vocabulary(out: Path, ids: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The vocabulary of data sets of an atlas, and the columns that name cells, from their obs on disk."""
    folders = [out / "datasets" / name for name in ids]
    n_obs = sum(read_json(folder / DATASET_MARKER)["n_obs"] for folder in folders)
    return vocabulary([open_group(folder / "obs") for folder in folders], n_obs)
