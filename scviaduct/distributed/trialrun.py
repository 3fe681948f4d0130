"""One trial of a search, in the process that it has for itself."""

from __future__ import annotations

import logging
import math
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.follow import read_history
from scviaduct.distributed.train import train
from scviaduct.distributed.trials import Trial, folder_of
from scviaduct.distributed.tuneconfig import TuneConfig
from scviaduct.errors import DataError, ScviaductError
from scviaduct.storage.locks import locked
from scviaduct.storage.manifest import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Goal:
    """What trials are compared by."""

    curve: str
    """The number of each epoch by which ASHA stops trials, e.g. elbo_validation; the lower the better."""
    scib: bool = False
    """Judged at the end by scib-metrics, the higher the better; else by the curve at the model's epoch."""

    @property
    def name(self) -> str:
        """What a trial's value is."""
        return "scib total" if self.scib else self.curve


def run_trial(out: Path, number: int, report: Callable[[dict[str, Any]], object]) -> None:
    """Train the trial whose record lies in `out` and report its epochs, then its value or why it failed.

    The last epoch is not reported by itself: it comes with the value. A trial that goes on tells its first epochs again,
    for a scheduler that does not know them.
    """
    settings = read_json(out / "tune.json")
    config, goal = TuneConfig.from_dict(settings["config"]), Goal(**settings["goal"])
    trial = Trial(**read_json(out / "trials" / f"{number:03d}.json"))
    folder, lock = folder_of(out, number), out / "trials" / f".{number:03d}.lock"
    told = 0

    def tell(record: dict[str, float]) -> None:
        nonlocal told
        epoch = int(record["epoch"]) + 1
        if told < epoch < read_json(folder / "run.json")["config"]["fit"]["max_epochs"]:
            told = epoch
            report({"epoch": epoch, "compared": record[goal.curve]})

    try:
        # the trial's process of a driver that was killed may live on for some seconds
        with locked(lock, busy=f"Another process trains in {folder}.", patience=60):
            if folder.exists() and not (folder / "run.json").is_file():  # killed before it began
                shutil.rmtree(folder)
            for record in read_history(folder):
                tell(record)
            bundle = train(settings["atlas"], config.trial(folder, trial.params), on_epoch=tell)
            result = judged(bundle, settings["atlas"], config, goal)
    except ScviaductError as error:
        result = {"failed": str(error)}
    except Exception as error:  # noqa: BLE001 - one trial's failure must not end the search
        log.error("Trial %d failed:\n%s", number, traceback.format_exc())
        result = {"failed": f"{type(error).__name__}: {error}"}
    report(result)


def judged(bundle: Bundle, atlas: str, config: TuneConfig, goal: Goal) -> dict[str, Any]:
    """The value of a trained model and what it is made of.

    Raises:
        DataError: it is not a number.
    """
    facts = bundle.facts["training"]
    history, scores = facts["history"], dict[str, float]()
    kept = history[facts["best_epoch"] if facts["config"]["fit"]["early_stopping"] else -1]
    value = float(kept[goal.curve])
    if goal.scib:
        from scviaduct.distributed.integration import integration_scores

        scores = integration_scores(bundle, atlas, config) | {goal.curve: value}
        value = scores.pop("total")
    if not math.isfinite(value):
        raise DataError(f"The model's {goal.name} is {value}.")
    return {"epoch": len(history), "compared": kept[goal.curve], "value": value, "scores": scores}
