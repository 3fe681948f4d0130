"""What a search knows and decides next: Optuna's TPE over the recipe, from the trials on disk. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from scviaduct.distributed.follow import read_history
from scviaduct.distributed.recipe import Option, Recipe
from scviaduct.distributed.trials import Trial, folder_of

_STATES = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Study:
    """Hands out trials and learns from those that end; what it knows is always on disk as well.

    A trial that was running when a search was killed is handed out again, first and with its number. What is suggested
    depends on the seed, the trial's number and the results that are known, not on how often the search was resumed.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        *,
        seed: int,
        n_trials: int,
        highest: bool,
        curve: str | None,
        known: Sequence[Trial],
    ) -> None:
        self.trials = {trial.number: trial for trial in known}
        self._out, self._seed, self.n_trials, self._curve = out, seed, n_trials, curve
        self._again = [trial for trial in known if trial.state == "running"]
        self._space = {option.name: distribution(option) for option in recipe.options}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize" if highest else "minimize")
        self._asked: dict[int, optuna.Trial] = {}
        for trial in known:
            if trial.state != "running":
                self._tell(self._ask(trial.number, trial.params), trial)

    @property
    def left(self) -> int:
        """Trials still to be run, those begun and not ended included."""
        return self.n_trials - sum(trial.state != "running" for trial in self.trials.values())

    def next(self) -> Trial | None:
        """The next trial, on disk as running; None when there are enough."""
        if self._again:
            trial = self._again.pop(0)
            self._asked[trial.number] = self._ask(trial.number, trial.params)
            return trial
        if len(self.trials) >= self.n_trials:
            return None
        number = len(self.trials)
        self._asked[number] = self._ask(number)
        trial = Trial(number, self._asked[number].params)
        self.keep(trial)
        return trial

    def end(self, trial: Trial) -> None:
        """A trial has ended: its record is kept and learnt from."""
        self.keep(trial)
        self._tell(self._asked.pop(trial.number), trial)

    def keep(self, trial: Trial) -> None:
        """Replace a trial's record, here and on disk."""
        self.trials[trial.number] = trial
        trial.save(self._out)

    def _ask(self, number: int, params: dict[str, Any] | None = None) -> optuna.Trial:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        # constant_liar: trials under way count as bad ones, so that those at the same time look elsewhere
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        if params is not None:
            self._study.enqueue_trial(params)
        return self._study.ask(self._space)

    def _tell(self, asked: optuna.Trial, trial: Trial) -> None:
        if self._curve and trial.state == "stopped":  # how far it came and how good it was then
            for record in read_history(folder_of(self._out, trial.number))[: trial.epochs]:
                asked.report(record[self._curve], int(record["epoch"]) + 1)
        value = trial.value if trial.state == "done" else None
        self._study.tell(asked, value, state=_STATES[trial.state])


def distribution(option: Option) -> BaseDistribution:
    """Optuna's word for an option's values."""
    if option.choices:
        return CategoricalDistribution(option.choices)
    if option.kind == "int":
        return IntDistribution(int(option.low), int(option.high))
    return FloatDistribution(option.low, option.high, log=option.kind == "log")


def failed(trial: Trial, message: str) -> Trial:
    """The trial's record when it gave no number."""
    return dataclasses.replace(trial, state="failed", message=message)
