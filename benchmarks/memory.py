#!/usr/bin/env python3
"""Data larger than memory: convert, prepare and one epoch of training in a process tree that is limited to 1.5 GB.

    python benchmarks/memory.py FILE.h5ad… --work DIR [--limit 1500MB] [--memory 1GB] [--genes 2000]
    python benchmarks/memory.py FILE.h5ad… --work DIR --rss [--files 1,4,8] [--picture rss.png]

Each stage is a process of its own, measured with all processes it starts: the peak of the sum of their resident memory
(sampled every 50 ms), and where the kernel has a writable memory cgroup (version 1) the group's own peak, which counts
the page cache as well. The limit is the group's; without one it is RLIMIT_DATA, which holds for each process. With
`--rss` nothing is limited: convert and prepare run on the first 1, 4 and 8 files, and their peaks are drawn over cells.
Prints one line of JSON a stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.utils
import h5py

CGROUP = Path("/sys/fs/cgroup/memory")


@dataclass
class Stage:
    """One command under measurement."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scviaduct.jobs", *arguments]


def stages(files: list[Path], atlas: Path, options: argparse.Namespace) -> list[Stage]:
    memory = ["--memory", options.memory]
    genes = ["--genes", str(options.genes)]
    return [
        Stage("convert", cli("convert", *map(str, files), "--out", str(atlas), *memory)),
        Stage("prepare", cli("prepare", str(atlas), *genes, *memory)),
        Stage(
            "train",
            cli("train", str(atlas), "--model", "scvi", "--max-epochs", "1", "--out", str(atlas.with_suffix(".run"))),
            {"MLFLOW_TRACKING_URI": f"sqlite:///{atlas.with_suffix('.db')}"},
        ),
    ]


def tree(root: int) -> list[int]:
    """The processes that descend from one, itself included."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return sorted(found)


def resident(pid: int) -> int:
    """Bytes of resident memory; of pages that processes share, this one's part where the kernel tells it."""
    for name, label in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
                if line.startswith(label):
                    return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def group(limit: int | None) -> Iterator[Path | None]:
    """A memory cgroup of its own; None where the kernel has none that may be written."""
    path = CGROUP / f"scviaduct-benchmark-{os.getpid()}"
    try:
        path.mkdir()
        if limit:
            (path / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()


def run(stage: Stage, limit: int | None, log: Path) -> dict[str, Any]:
    """Run a stage to its end; raises SystemExit with the end of its log when it fails."""
    with group(limit) as cgroup, log.open("w") as out:

        def enter() -> None:
            if cgroup is not None:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            elif limit:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        begin, peak = time.monotonic(), 0
        process = subprocess.Popen(
            stage.command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | stage.environment, preexec_fn=enter
        )
        while process.poll() is None:
            peak = max(peak, sum(map(resident, tree(process.pid))))
            time.sleep(0.05)
        record: dict[str, Any] = {"stage": stage.name, "seconds": round(time.monotonic() - begin, 1)}
        record |= {"peak_rss": peak, "limited_by": None if not limit else "cgroup" if cgroup else "RLIMIT_DATA"}
        if cgroup is not None:
            record["peak_cgroup"] = int((cgroup / "memory.max_usage_in_bytes").read_text())
            record["limit_hits"] = int((cgroup / "memory.failcnt").read_text())
    if process.returncode:
        end = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise SystemExit(f"{stage.name} ended with {process.returncode} after {record}\n{end}")
    return record


def decoded(files: list[Path]) -> tuple[int, int]:
    """(cells, bytes of the counts as float32 with int32 indices) of h5ad files with CSR counts in X."""
    cells = values = 0
    for path in files:
        with h5py.File(path) as file:
            cells += len(file["X/indptr"]) - 1
            values += len(file["X/data"])
    return cells, 8 * values


def limited(options: argparse.Namespace) -> None:
    cells, n_bytes = decoded(options.data)
    limit = int(dask.utils.parse_bytes(options.limit))
    tell({"cells": cells, "decoded_bytes": n_bytes, "limit": limit, "memory": options.memory})
    if n_bytes < 5e9:
        sys.stderr.write(f"warning: {n_bytes / 1e9:.1f} GB decoded are less than the 5 GB this is meant for\n")
    atlas = options.work / "limited.zarr"
    for stage in stages(options.data, fresh(atlas), options):
        tell(run(stage, limit, options.work / f"{stage.name}.log"))


def growing(options: argparse.Namespace) -> None:
    records = []
    for n in map(int, options.files.split(",")):
        files = options.data[:n]
        cells, n_bytes = decoded(files)
        atlas = fresh(options.work / f"rss-{n}.zarr")
        for stage in stages(files, atlas, options)[:2]:
            record = run(stage, None, options.work / f"{stage.name}-{n}.log")
            records.append(record | {"files": n, "cells": cells, "decoded_bytes": n_bytes})
            tell(records[-1])
        shutil.rmtree(atlas)
    draw(records, options.picture)


def fresh(atlas: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(atlas, ignore_errors=True)
    shutil.rmtree(atlas.with_suffix(".run"), ignore_errors=True)
    atlas.with_suffix(".db").unlink(missing_ok=True)
    return atlas


def draw(records: list[dict[str, Any]], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for name in ("convert", "prepare"):
        line = [(r["cells"] / 1000, r["peak_rss"] / 2**30) for r in records if r["stage"] == name]
        axes.plot(*zip(*line, strict=True), "o-", label=name)
    data = sorted({(r["cells"] / 1000, r["decoded_bytes"] / 2**30) for r in records})
    axes.plot(*zip(*data, strict=True), ":", color="grey", label="the data, decoded")
    axes.set(xlabel="cells (thousands)", ylabel="peak memory (GiB)", ylim=(0, 4))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)


def tell(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, metavar="FILE.h5ad")
    parser.add_argument("--work", type=Path, required=True, help="folder for the atlases and logs")
    parser.add_argument("--limit", default="1500MB", help="of all memory of a stage")
    parser.add_argument("--memory", default="1GB", help="given to convert and prepare")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--rss", action="store_true", help="measure peaks over growing data instead of limiting")
    parser.add_argument("--files", default="1,4,8", help="with --rss: how many files each time")
    parser.add_argument("--picture", type=Path, default=Path("rss.png"), help="with --rss: where to draw")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    (growing if options.rss else limited)(options)


if __name__ == "__main__":
    main()
