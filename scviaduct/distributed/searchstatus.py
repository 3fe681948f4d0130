"""How far a search is, from the files in its folder alone."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scviaduct.distributed.runstatus import run_status
from scviaduct.distributed.trials import Trial, best_of, folder_of, read_trials
from scviaduct.errors import UnreadableFileError
from scviaduct.storage.manifest import read_json

_STARTING = 180.0
"""Seconds that a trial's process may take to begin."""


@dataclass(frozen=True)
class SearchStatus:
    """Where a search stands."""

    out: Path
    state: Literal["finished", "running", "stopped"]
    """"stopped": no trial writes any more; `tune --resume` goes on."""
    model: str
    objective: str
    n_trials: int
    counts: dict[str, int]
    """Trials by their state: done, stopped, failed, running."""
    best: Trial | None
    """The best one that ran to its end."""
    running: dict[int, tuple[int, int | None]]
    """Of the trials that run, by number, epochs done and at most."""


def search_status(out: str | Path, *, now: float | None = None) -> SearchStatus:
    """The status of a search's folder.

    Raises:
        UnreadableFileError: there is no search.
    """
    folder = Path(out)
    if not (folder / "tune.json").is_file():
        raise UnreadableFileError(f"{folder} is not the folder of a search: it has no tune.json.")
    now = time.time() if now is None else now
    settings, trials = read_json(folder / "tune.json"), read_trials(folder)
    n_trials, scib = settings["config"]["n_trials"], settings["goal"]["scib"]
    counts = Counter(str(trial.state) for trial in trials)
    alive = {t.number: _alive(folder, t.number, now) for t in trials if t.state == "running"}
    ended = len(trials) - len(alive) >= n_trials
    return SearchStatus(
        out=folder,
        state="finished" if ended else "running" if any(alive.values()) or _young(folder, now) else "stopped",
        model=settings["config"]["model"],
        objective="scib total" if scib else settings["goal"]["curve"],
        n_trials=n_trials,
        counts=dict(counts),
        best=best_of(trials, highest=scib),
        running={number: _epochs(folder_of(folder, number)) for number in alive},
    )


def _alive(out: Path, number: int, now: float) -> bool:
    """Whether a trial's run goes on, or is about to begin."""
    run = folder_of(out, number)
    if (run / "run.json").is_file():
        return run_status(run, now=now).state in {"running", "waiting"}
    return now - run.with_suffix(".json").stat().st_mtime < _STARTING


def _young(out: Path, now: float) -> bool:
    """Whether the search itself was written to a moment ago: between two trials none runs."""
    written = [out / "tune.json", *(out / "trials").glob("*.json")]
    return now - max(path.stat().st_mtime for path in written) < _STARTING


def _epochs(run: Path) -> tuple[int, int | None]:
    if not (run / "run.json").is_file():
        return 0, None
    status = run_status(run)
    return status.epoch, status.max_epochs
