"""The search under Ray Tune: one process a trial, ASHA stops the worse ones. Imported once Ray's environment is set.

Nothing of what Ray Tune keeps on disk is read again: a search goes on from the trials' own records (trials.py), so that
no pickle is ever loaded from a folder that was given to us.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from scviaduct.distributed.desk import Desk
from scviaduct.distributed.trialrun import run_trial


@dataclass(frozen=True)
class Rungs:
    """When ASHA compares trials: after `grace`, `grace` · `factor`, … epochs."""

    grace: int
    factor: int
    most: int

    def scheduler(self, curves: Iterable[tuple[int, list[float]]]) -> ASHAScheduler:
        """ASHA that knows already the curves of trials that ended before, by number."""
        asha = ASHAScheduler(
            "epoch",
            "compared",
            "min",
            max_t=self.most,
            grace_period=min(self.grace, self.most),
            reduction_factor=self.factor,
        )
        for number, curve in curves:
            trial = SimpleNamespace(trial_id=f"before-{number}")
            asha.on_trial_add(None, trial)  # type: ignore[arg-type]
            for epoch, value in enumerate(curve, 1):
                asha.on_trial_result(None, trial, {"epoch": epoch, "compared": value})  # type: ignore[arg-type]
        return asha


def run_trials(
    desk: Desk, out: Path, n: int, scheduler: ASHAScheduler, *, parallel: int, resources: dict[str, float]
) -> None:
    """Run `n` trials from the desk, at most `parallel` at a time, each in a process with these resources."""
    storage = out / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(_trial, tune.PlacementGroupFactory([resources])),
        param_space={"out": str(out)},
        tune_config=tune.TuneConfig(
            search_alg=_Suggestions(desk),
            scheduler=scheduler,
            num_samples=n,
            max_concurrent_trials=parallel,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _trial(place: dict[str, Any]) -> None:
    run_trial(Path(place["out"]), place["number"], tune.report)


class _Suggestions(Searcher):
    """Ray Tune's view of the desk."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._desk.next()
        if trial is None:
            return self.FINISHED
        self._numbers[trial_id] = trial.number
        return {"number": trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "epoch" in result:
            self._desk.heard(self._numbers[trial_id], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001
        lost = {"failed": "Its process was lost; memory may have run out (try fewer with --parallel)."}
        self._desk.end(self._numbers[trial_id], lost if error or not result else result)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles whatever a Tuner holds."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: what is to be kept is on disk already."""
