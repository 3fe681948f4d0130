"""Conversion of h5ad files: cells a second, CPU, memory of all processes and size, beside annbatch on the same files.

    python benchmarks/convert.py FILES... --scratch DIR [--peer-python PYTHON] [--interleave] [--repeat 1]

Runs, each in a fresh interpreter and an empty folder: convert; prepare --genes all of what it made; prepare --genes 2000;
and, with the interpreter of an environment that has annbatch and zarrs, `DatasetCollection.add_adatas` (its
data sets are shuffled, so convert + prepare --genes all is what to compare it with). Prints one JSON line a run, then a table.
Memory is the largest sum of resident sets over the process tree, read from /proc every 50 ms; pages that processes share
count once for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONVERT = """
import json, sys
from scviaduct.storage.convert import convert
files, out, workers, memory = json.loads(sys.argv[1])
convert(files, out=out, workers=workers, memory=memory)
"""
PREPARE = """
import json, sys
from scviaduct.storage.prepare import prepare
out, genes, memory = json.loads(sys.argv[1])
prepare(out, genes=genes, name=f"view_{genes}", memory=memory)
"""
ANNBATCH = """
import json, sys
import annbatch, zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
files, out, size = json.loads(sys.argv[1])
annbatch.DatasetCollection(out).add_adatas(files, dataset_size=size, shuffle=True)
"""


def main() -> None:
    options = parsed()
    files = [str(f.absolute()) for f in options.files]
    cells = sum(map(n_cells, files))
    rounds = [(name, repeat) for repeat in range(options.repeat) for name in ("ours", "peer")]
    if not options.interleave:
        rounds.sort(key=lambda r: r[0])
    records = []
    for name, repeat in rounds:
        for record in ours(files, options) if name == "ours" else peer(files, options):
            full = {"repeat": repeat, "files": len(files), "cells": cells} | record
            full["cells_per_second"] = round(cells / record["wall_s"])
            full["bytes_per_cell"] = round(record["bytes"] / cells)
            records.append(full)
            print(json.dumps(full), flush=True)
    table(records)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--scratch", required=True, type=Path, help="folder for the stores; it must not exist")
    parser.add_argument("--peer-python", help="interpreter with annbatch and zarrs")
    parser.add_argument("--peer-dataset-size", default="2GB", help="annbatch's dataset_size; its default needs 20GB")
    parser.add_argument("--interleave", action="store_true", help="ours and the peer by turns")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--workers", type=int, help="of convert; default: its own choice")
    parser.add_argument("--memory", default="2GB")
    return parser.parse_args()


def n_cells(path: str) -> int:
    import h5py

    with h5py.File(path) as file:
        obs = file["obs"]
        return len(obs) if isinstance(obs, h5py.Dataset) else len(obs[obs.attrs["_index"]])


def ours(files: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """convert, then convert + each prepare, whose seconds are added to the conversion's."""
    out = options.scratch / "atlas.zarr"
    options.scratch.mkdir(parents=True)
    try:
        made = measured(sys.executable, CONVERT, [files, str(out), options.workers, options.memory])
        yield {"what": "convert"} | made | {"bytes": size(out / "datasets")}
        for genes in ("all", 2000):
            view = measured(sys.executable, PREPARE, [str(out), genes, options.memory])
            both = {key: round(made[key] + view[key], 2) for key in ("wall_s", "cpu_s")}
            both["peak_rss_mb"] = max(made["peak_rss_mb"], view["peak_rss_mb"])
            yield {"what": f"convert + prepare --genes {genes}", **both, "bytes": size(out / "views" / f"view_{genes}")}
    finally:
        shutil.rmtree(options.scratch)


def peer(files: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if not options.peer_python:
        return
    out = options.scratch / "annbatch.zarr"
    options.scratch.mkdir(parents=True)
    try:
        made = measured(options.peer_python, ANNBATCH, [files, str(out), options.peer_dataset_size])
        yield {"what": "annbatch add_adatas"} | made | {"bytes": size(out)}
    finally:
        shutil.rmtree(options.scratch)


def measured(python: str, code: str, arguments: list[Any]) -> dict[str, Any]:
    """Wall and CPU seconds (children included) and the peak memory of a process with its children."""
    begin, peak, done = time.perf_counter(), [0.0], threading.Event()
    process = subprocess.Popen([python, "-c", code, json.dumps(arguments)])
    cpu: dict[int, float] = {}

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], sample(process.pid, cpu))

    thread = threading.Thread(target=watch)
    thread.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    done.set()
    thread.join()
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")
    own = usage.ru_utime + usage.ru_stime
    others = sum(seconds for pid, seconds in cpu.items() if pid != process.pid)
    return {"wall_s": round(wall, 2), "cpu_s": round(own + others, 2), "peak_rss_mb": round(peak[0])}


def sample(root: int, cpu: dict[int, float]) -> float:
    """Resident MB of a process and all below it; notes the CPU seconds of each."""
    parents, resident = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            pages = int((entry / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
        pid = int(entry.name)
        parents[pid], resident[pid] = int(fields[1]), pages
        parents[-pid] = int(fields[11]) + int(fields[12])
    tree, grew = {root}, True
    while grew:
        found = {pid for pid, parent in parents.items() if pid > 0 and parent in tree}
        grew = not found <= tree
        tree |= found
    for pid in tree & resident.keys():
        cpu[pid] = parents[-pid] / os.sysconf("SC_CLK_TCK")
    return sum(resident.get(pid, 0) for pid in tree) * resource.getpagesize() / 2**20


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def table(records: list[dict[str, Any]]) -> None:
    columns = ("what", "cells_per_second", "wall_s", "cpu_s", "peak_rss_mb", "bytes_per_cell")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for record in records:
        print("| " + " | ".join(str(record[c]) for c in columns) + " |")


if __name__ == "__main__":
    main()
