"""Between a search and those who run it: hands out trials, takes their reports, tells MLflow and the display."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from scviaduct.distributed.follow import read_history
from scviaduct.distributed.study import Study
from scviaduct.distributed.tracking import Tracker, flat
from scviaduct.distributed.trialrun import Goal
from scviaduct.distributed.trials import Trial, best_of, folder_of
from scviaduct.distributed.tuneconfig import TuneConfig

OnProgress = Callable[[list[Trial], Trial | None, int], None]
"""Receives all trials, the best so far, and how many there will be, whenever a trial begins, goes on or ends."""


class Desk:
    """Hands trials to Ray Tune, takes their reports, and tells MLflow and the display."""

    def __init__(self, config: TuneConfig, goal: Goal, study: Study, tracker: Tracker, on_progress: OnProgress) -> None:
        self.study, self.goal, self.tracker, self._config = study, goal, tracker, config
        self._on_progress = on_progress
        self._children: dict[int, Tracker] = {}

    @property
    def best(self) -> Trial | None:
        """The best trial so far."""
        return best_of(list(self.study.trials.values()), highest=self.goal.scib)

    def history(self, number: int) -> list[dict[str, float]]:
        """A trial's epochs."""
        return read_history(folder_of(self._config.out, number))

    def curves(self) -> list[tuple[int, list[float]]]:
        """Of the trials that ended, by number, what each epoch was compared by."""
        ended = [t for t in self.study.trials.values() if t.state in {"done", "stopped"}]
        return [(t.number, [r[self.goal.curve] for r in self.history(t.number)[: t.epochs]]) for t in ended]

    def next(self) -> Trial | None:
        """The next trial, with a child run of its own."""
        trial = self.study.next()
        if trial is None:
            return None
        child = self._children[trial.number] = self.tracker.child(trial.mlflow_key)
        if not trial.mlflow_key:
            params = flat(self._config.fixed(trial.params).to_dict())
            child.start(f"trial {trial.number}", trial.params | params, {"trial": str(trial.number)})
            trial = dataclasses.replace(trial, mlflow_key=child.key)
            self.study.keep(trial)
        self._tell()
        return trial

    def heard(self, number: int, epoch: int) -> None:
        """A trial has done so many epochs."""
        self._log(number, epoch)
        self._tell()

    def _log(self, number: int, epochs: int) -> None:
        """Give MLflow the epochs that it does not know yet; those it was told of stay as they are."""
        known = self.history(number)[:epochs]
        self._children[number].history((int(record["epoch"]), record) for record in known)

    def end(self, number: int, result: dict[str, Any]) -> None:
        """Keep what became of a trial."""
        self._log(number, result.get("epoch", 0))
        trial, child = self.study.trials[number], self._children.pop(number)
        history = self.history(number)[: result.get("epoch")]
        facts: dict[str, Any] = {
            "epochs": len(history),
            "seconds": round(sum(record["seconds"] for record in history), 2),
        }
        if "failed" in result:
            facts |= {"state": "failed", "message": result["failed"]}
        elif "value" in result:
            scores = {name.partition("/")[2]: v for name, v in result.items() if name.startswith("scores/")}
            facts |= {"state": "done", "value": result["value"], "scores": scores}
            child.metrics(len(history), {"value": result["value"]} | scores)
        else:
            facts |= {"state": "stopped", "value": result["compared"]}
        trial = dataclasses.replace(trial, **facts)
        self.study.end(trial)
        child.end({"done": "FINISHED", "stopped": "KILLED"}.get(trial.state, "FAILED"))
        if self.best:
            self.tracker.metrics(number, {"best": float(self.best.value or 0)})
        self._tell()

    def _tell(self) -> None:
        self._on_progress([self.study.trials[n] for n in sorted(self.study.trials)], self.best, self.study.n_trials)
