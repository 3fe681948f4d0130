"""`scviaduct status`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from scviaduct.jobs.display import epoch_remark, output

if TYPE_CHECKING:
    from scviaduct.distributed.runstatus import RunStatus


def command(run: Path, /, *, as_json: bool = False) -> int:
    """Say how far a training run is, from its folder alone.

    Args:
        run: Folder that train writes (its --out).
        as_json: One JSON object instead of sentences.
    """
    from scviaduct.distributed.runstatus import run_status

    found = run_status(run)
    if as_json:
        output.print(json.dumps(asdict(found) | {"run": str(found.run)}))
    else:
        for line in _lines(found):
            output.print(line)
    return 0


def _lines(s: RunStatus) -> list[str]:
    of = f" of at most {s.max_epochs}" if s.max_epochs else ""
    workers = f"{s.workers} workers" if s.workers > 1 else "one process"
    lines = [f"{s.run}: {s.model}, {s.state}; epoch {s.epoch}{of}, {workers}, start {s.attempt}"]
    if s.record:
        lines.append(f"  last epoch: {epoch_remark(s.record)}")
    if s.checkpoint_age is not None:
        step = f" at step {s.step:,} of epoch {s.epoch + 1}" if s.step else ""
        lines.append(f"  last checkpoint: {_time(s.checkpoint_age)} ago{step}")
    if s.state == "running" and s.seconds_left is not None:
        lines.append(f"  {_time(s.seconds_left)} left, if no early stopping comes before")
    if s.state == "stopped":
        lines.append(f"  nothing was written for {_time(s.silent)}: train --resume --out {s.run} goes on from there")
    if s.state == "refused":
        lines.append(f"  {s.reason}")
    if s.unsent:
        lines.append(f"  {s.unsent} records wait for MLflow: scviaduct sync {s.run}")
    return lines


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
