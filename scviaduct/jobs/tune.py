"""`scviaduct tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scviaduct.distributed.tuneconfig import TuneConfig
from scviaduct.jobs.display import Steps, going_on, output
from scviaduct.jobs.train import ConfigFile

if TYPE_CHECKING:
    from scviaduct.distributed.trials import Trial


def command(
    atlas: Path, /, *, config: Annotated[TuneConfig, Parameter(name="*")], config_file: ConfigFile = None
) -> int:
    """Search for the options with which a model is best.

    Each trial is a training with options of its own; trials that are worse than others are stopped early. Written are
    OUT/trials.csv and OUT/best.toml, for `scviaduct train --config`; the best trial's model is in MLflow's registry under
    the name of OUT.

    Args:
        atlas: An atlas with a view made by prepare.
        config_file: TOML file with options in a table [tune]; those given here come first.
    """
    from scviaduct.distributed.trials import folder_of
    from scviaduct.distributed.tune import tune

    def told(trials: list[Trial], best: Trial | None, n_trials: int) -> None:
        steps.at(sum(t.state != "running" for t in trials), trials_remark(trials, best), n_trials)

    again = going_on(config.out / "tune.json", f"tune {atlas} --resume --out {config.out}")
    with again, Steps("trial", config.n_trials) as steps:
        found = tune(atlas, config, on_progress=told)
    chosen = ", ".join(f"{name}={value}" for name, value in found.best.params.items())
    counts = found.table["state"].value_counts().to_dict()
    output.print(f"{found.out}: {len(found.table)} trials, {', '.join(f'{n} {state}' for state, n in counts.items())}.")
    output.print(f"Best is trial {found.best.number}, {found.goal.name} {found.best.value:.6g}: {chosen}")
    output.print(f"Its model: {folder_of(found.out, found.best.number)}", style="dim")
    output.print(f"To repeat it: scviaduct train {atlas} --config {found.out / 'best.toml'} --out RUN", style="dim")
    return 0


def trials_remark(trials: list[Trial], best: Trial | None) -> str:
    """Where a search stands, in a line."""
    counts = [(sum(t.state == state for t in trials), state) for state in ("running", "stopped", "failed")]
    told = [f"{n} {state}" for n, state in counts if n]
    return ", ".join(told) + (f" · best {best.value:.2f} (trial {best.number})" if best else "")
