"""`scviaduct train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scviaduct.distributed.config import TrainConfig
from scviaduct.jobs.display import Steps, epoch_remark, going_on, output

ConfigFile = Annotated[Path | None, Parameter(name="--config")]


def command(
    atlas: Path, /, *, config: Annotated[TrainConfig, Parameter(name="*")], config_file: ConfigFile = None
) -> int:
    """Train a model on a view; the result is a bundle and an MLflow version.

    The bundle is OUT/bundle; the version is in MLflow's registry under the name of OUT.

    Args:
        atlas: An atlas with a view made by prepare.
        config_file: TOML file with options in a table [train]; those given here come first.
    """
    from scviaduct.distributed.runstatus import run_status
    from scviaduct.distributed.train import train
    from scviaduct.storage.places import place

    most = config.fit.max_epochs

    def told(record: dict[str, float]) -> None:
        nonlocal most
        most = most or run_status(config.out).max_epochs  # left open by the options, the run decides it
        steps.at(int(record["epoch"]) + 1, epoch_remark(record), most)

    out = place(config.out)
    again = going_on(out / "run.json", f"train {atlas} --resume --out {out}")
    with again, Steps("epoch", most) as steps:
        bundle = train(atlas, config, on_epoch=told)
    facts = bundle.facts["training"]
    output.print(f"{out / 'bundle'}: {bundle.name} of {facts['cells']:,} cells after {facts['epochs']} epochs.")
    output.print(f"Next: scviaduct map {out} QUERY.h5ad --out mapped", style="dim")
    return 0
