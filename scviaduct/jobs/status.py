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
    from scviaduct.distributed.searchstatus import SearchStatus


def command(run: Path, /, *, as_json: bool = False) -> int:
    """Say how far a training run or a search is, from its folder alone.

    Args:
        run: Folder that train or tune writes (its --out).
        as_json: One JSON object instead of sentences.
    """
    from scviaduct.distributed.runstatus import run_status
    from scviaduct.distributed.searchstatus import search_status

    found: RunStatus | SearchStatus
    if (run / "tune.json").is_file():
        found = search_status(run)
        lines = _search_lines(found)
    else:
        found = run_status(run)
        lines = _lines(found)
    output.print(json.dumps(asdict(found), default=str) if as_json else "\n".join(lines))
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
    if s.reason:
        lines.append(f"  {s.reason}")
    if s.unsent:
        lines.append(f"  {s.unsent} records wait for MLflow: scviaduct sync {s.run}")
    return lines


def _search_lines(s: SearchStatus) -> list[str]:
    counts = ", ".join(f"{n} {state}" for state, n in s.counts.items()) or "none begun"
    lines = [f"{s.out}: search for {s.model}, {s.state}; {counts} of {s.n_trials} trials"]
    if s.best:
        options = " ".join(f"{name}={value}" for name, value in s.best.params.items())
        lines.append(f"  best so far: trial {s.best.number}, {s.objective} {s.best.value:.6g}: {options}")
    for number, (epoch, most) in s.running.items():
        lines.append(f"  trial {number}: epoch {epoch}" + (f" of at most {most}" if most else ""))
    if s.state == "stopped":
        lines.append(f"  nothing is written any more: tune --resume --out {s.out} goes on from there")
    return lines


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
