"""How far a training run is, from the files in its folder alone: works from any machine that sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scviaduct.distributed.cadence import Every
from scviaduct.distributed.failures import refusal
from scviaduct.distributed.follow import read_history
from scviaduct.distributed.journal import unsent
from scviaduct.distributed.waiting import waits_for
from scviaduct.errors import UnreadableFileError
from scviaduct.storage.manifest import read_json
from scviaduct.storage.places import Place, exists, place

_SILENT = 3.0
"""A run that has written nothing for this many checkpoint intervals, and epochs, is taken to have stopped."""

State = Literal["finished", "running", "waiting", "stopped", "refused"]


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    run: Place
    state: State
    """"waiting": for workers. "stopped": nothing was written for longer than checkpoints and epochs take; `train --resume` goes on."""
    model: str
    workers: int
    """Of the last start."""
    attempt: int
    """Times that it was started."""
    epoch: int
    """Epochs done."""
    max_epochs: int | None
    step: int
    """Steps of the current epoch that the newest checkpoint holds."""
    checkpoint_age: float | None
    """Seconds since the newest checkpoint; None without one."""
    silent: float
    """Seconds since anything was written."""
    cells_per_second: float | None
    """Of the last epoch."""
    seconds_left: float | None
    """Of all epochs that may come; early stopping may end them sooner."""
    record: dict[str, float]
    """The last epoch's numbers."""
    reason: str = ""
    """Why it was refused, or what it waits for."""
    unsent: int = 0
    """Records that MLflow has not been told of; `scviaduct sync` does."""


def run_status(run: str | Path, *, now: float | None = None) -> RunStatus:
    """The status of a run folder.

    Raises:
        UnreadableFileError: there is no run.
    """
    folder = place(run)
    if not exists(folder / "run.json"):
        raise UnreadableFileError(f"{folder} is not the folder of a training run: it has no run.json.")
    now = time.time() if now is None else now
    config = read_json(folder / "run.json")["config"]
    history = read_history(folder)
    newest = _newest(folder)
    at = read_json(newest) if newest else {"epoch": 0, "step": 0, "finished": False}
    last = history[-1] if history else {}
    silent = now - _last_written(folder)
    refused, waiting = refusal(folder), waits_for(folder, now)
    starts = read_json(folder / "attempts.json") if (folder / "attempts.json").exists() else []
    return RunStatus(
        run=folder,
        state="waiting" if waiting else _state(folder, config, last, silent),
        model=config["model"],
        workers=starts[-1]["workers"] if starts else 0,
        attempt=len(starts),
        epoch=len(history),
        max_epochs=config["fit"]["max_epochs"],
        step=at["step"] if at["epoch"] >= len(history) else 0,
        checkpoint_age=now - newest.stat().st_mtime if newest else None,
        silent=silent,
        cells_per_second=last.get("cells_per_second"),
        seconds_left=_left(history, config["fit"]["max_epochs"]),
        record=last,
        reason=str(refused) if refused else waiting.told(folder, now) if waiting else "",
        unsent=unsent(folder),
    )


def _newest(folder: Place) -> Place | None:
    """state.json of the newest checkpoint."""
    return max((folder / "checkpoints").glob("step-*/state.json"), key=lambda state: state.parent.name, default=None)


def _last_written(folder: Place) -> float:
    watched = [folder / name for name in ("run.json", "history.jsonl", "attempts.json")]
    watched += [*(folder / "reference.partial").glob("*"), *(folder / "cells").glob("*")]
    watched += [*(folder / "checkpoints").glob("step-*/state.json")]
    return max(path.stat().st_mtime for path in watched if path.exists())


def _state(folder: Place, config: dict[str, Any], last: dict[str, float], silent: float) -> State:
    if (folder / "bundle" / "model.json").exists():
        return "finished"
    if (folder / "refused.json").exists():
        return "refused"
    interval = Every.parse(config["checkpoint_every"]).seconds or 0.0
    patience = max(60.0, _SILENT * max(interval, last.get("seconds", 0.0)))
    return "stopped" if silent > patience else "running"


def _left(history: list[dict[str, float]], max_epochs: int | None) -> float | None:
    if not history or max_epochs is None:
        return None
    recent = history[-5:]
    return (max_epochs - len(history)) * sum(record["seconds"] for record in recent) / len(recent)
