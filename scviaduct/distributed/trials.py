"""The trials of a search as they lie on disk: plain JSON, one file a trial, readable while the search runs.

out/search.toml       the recipe
    tune.json         configuration, identity of the data, MLflow run; decides what --resume continues
    trials/003.json   options, state and result of a trial
    trials/003/       its run folder, as `train` makes it
    trials.csv        all trials, best first
    best.toml         the best trial's options, for `train --config`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from scviaduct.storage.manifest import read_json, write_json_atomic

State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial. "stopped" are those that ASHA ended before their time: they have numbers, but no model."""

    number: int
    params: dict[str, Any]
    state: State = "running"
    value: float | None = None
    """What the search is for; of a stopped trial the last value that was compared."""
    scores: dict[str, float] = field(default_factory=dict)
    """Further numbers that the value is made of."""
    epochs: int = 0
    seconds: float = 0.0
    message: str = ""
    """Why it failed."""
    mlflow_key: str | None = None
    """The tracker's name of its run."""

    def save(self, out: Path) -> None:
        """Write the trial's record, whole or not at all."""
        write_json_atomic(out / "trials" / f"{self.number:03d}.json", asdict(self))


def folder_of(out: Path, number: int) -> Path:
    """A trial's run folder."""
    return out / "trials" / f"{number:03d}"


def read_trials(out: Path) -> list[Trial]:
    """All trials of a search, in their order."""
    return [Trial(**read_json(path)) for path in sorted((out / "trials").glob("*.json"))]


def best_of(trials: Sequence[Trial], *, highest: bool) -> Trial | None:
    """The best trial that ran to its end; the earlier of equals."""
    done = [t for t in trials if t.state == "done" and t.value is not None]
    return min(done, key=lambda t: (-t.value if highest else t.value, t.number), default=None)  # type: ignore[operator]


def table_of(trials: Sequence[Trial], *, highest: bool) -> pd.DataFrame:
    """One row a trial: those that ran to their end, best first, then the stopped and the failed."""
    order = {"done": 0, "stopped": 1, "failed": 2, "running": 3}
    value = {t.number: float("inf") if t.value is None else -t.value if highest else t.value for t in trials}
    rows = [
        {"trial": t.number, "state": t.state, "value": t.value, **t.scores, "epochs": t.epochs, "seconds": t.seconds}
        | t.params
        | {"message": t.message}
        for t in sorted(trials, key=lambda t: (order[t.state], value[t.number], t.number))
    ]
    return pd.DataFrame(rows)
