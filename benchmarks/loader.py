#!/usr/bin/env python3
"""Shuffled batches: our loader beside annbatch's on the same cells, each measurement in a process of its own.

    python benchmarks/loader.py ATLAS --all all --genes hvg --collection COLLECTION.zarr --peer-python PEER/bin/python
    python benchmarks/loader.py ATLAS --genes hvg --train

ATLAS has a view of all genes (`prepare --genes all --name all`) and one of 2,000; COLLECTION is annbatch's own store of
the same files (`DatasetCollection(path).add_adatas(files)`); PEER is an interpreter with annbatch 0.3.1 and zarrs.
annbatch runs with its defaults (512 rows a chunk, 32 chunks a preload); it has no view of fewer genes, so it slices
after loading. Batches are CSR. Rounds are interleaved, ours then theirs, and medians are told with the range. Warm: the
page cache holds what was just read; cold: the cache is dropped before the clock starts (as root; else the files'
pages are given back one by one). Some thousand cells run
before the clock, for imports and compilation.

`--train` tells the share of time in which a training step of scVI waited for its batch instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

CASES = [("all", 4096), ("all", 128), ("genes", 4096), ("genes", 128)]
WARM_UP = 5_000


def main() -> None:
    options = parsed()
    if options.child:
        print(json.dumps(CHILDREN[json.loads(options.child)["who"]](json.loads(options.child))))
    elif options.train:
        train(options)
    else:
        compare(options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", nargs="?", help="our atlas, local")
    parser.add_argument("--all", default="all", help="name of its view of all genes")
    parser.add_argument("--genes", default="default", help="name of its view of 2,000 genes")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--collection", help="annbatch's store of the same cells")
    parser.add_argument("--peer-python", help="interpreter that has annbatch; left out, only ours are measured")
    parser.add_argument("--cells", type=int, default=100_000, help="cells a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--states", default="warm,cold")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--json", type=Path, help="file for one JSON line a measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace) -> None:
    peers = {"ours": sys.executable} | ({"theirs": options.peer_python} if options.peer_python else {})
    print(f"{'':24}{'ours, cells/s':>26}{'theirs, cells/s':>26}{'ratio':>7}{'per CPU-s':>11}{'bytes/cell':>16}")
    for state in options.states.split(","):
        for view, batch in CASES:
            found: dict[str, list[dict[str, Any]]] = {who: [] for who in peers}
            for _ in range(options.rounds):
                for who, python in peers.items():
                    found[who].append(measured(python, request(options, who, view, batch, state), options.json))
            tell(f"{state} {'20,000' if view == 'all' else '2,000'} genes x{batch}", found)


def request(options: argparse.Namespace, who: str, view: str, batch: int, state: str) -> dict[str, Any]:
    names = {"all": options.all, "genes": options.genes}
    return {
        "who": who,
        "atlas": options.atlas,
        "view": names[view],
        "subset": view == "genes",
        "collection": options.collection,
        "batch_key": options.batch_key,
        "batch": batch,
        "cells": options.cells,
        "state": state,
    }


def measured(python: str, job: dict[str, Any], log: Path | None) -> dict[str, Any]:
    run = subprocess.run(
        [python, __file__, "--child", json.dumps(job)], capture_output=True, text=True, check=False, timeout=1800
    )
    if run.returncode:
        sys.exit(f"{job['who']} failed:\n{run.stderr[-3000:]}")
    record = job | json.loads(run.stdout.splitlines()[-1])
    if log:
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return record


def tell(what: str, found: dict[str, list[dict[str, Any]]]) -> None:
    def median(who: str, key: str) -> float:
        return statistics.median(r[key] for r in found[who]) if who in found else float("nan")

    def speed(who: str) -> str:
        values = [r["cells_s"] for r in found.get(who, [])]
        return f"{statistics.median(values):>10,.0f} ({min(values):,.0f}-{max(values):,.0f})" if values else "-"

    ratio = median("ours", "cells_s") / median("theirs", "cells_s")
    per_cpu = median("ours", "cells_cpu_s") / median("theirs", "cells_cpu_s")
    read = " / ".join(f"{median(who, 'bytes_cell'):,.0f}" for who in found)
    print(f"{what:24}{speed('ours'):>26}{speed('theirs'):>26}{ratio:>7.1f}{per_cpu:>11.1f}{read:>16}", flush=True)


def clocked(batches: Callable[[], Generator[int]], job: dict[str, Any], files: list[Path]) -> dict[str, float]:
    """Cells/s of an endless iterator of batch sizes, after a warm-up.

    The clock starts before the iterator does, so that nothing is read ahead for free.
    """
    warm_up = batches()
    taken(warm_up, WARM_UP if job["state"] == "cold" else job["cells"])
    warm_up.close()
    if job["state"] == "cold":
        forget(files)
    before, begin = usage(), time.perf_counter()
    timed = batches()
    cells = taken(timed, job["cells"])
    seconds, after = time.perf_counter() - begin, usage()
    timed.close()
    cpu, read = (b - a for a, b in zip(before, after, strict=True))
    return {"cells": cells, "cells_s": cells / seconds, "cells_cpu_s": cells / cpu, "bytes_cell": read / cells}


def taken(batches: Generator[int], wanted: int) -> int:
    cells = 0
    while cells < wanted:
        cells += next(batches)
    return cells


def usage() -> tuple[float, float]:
    """CPU seconds of this process, and bytes it made the disk read."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return spent.ru_utime + spent.ru_stime, float(facts["read_bytes"])


def forget(files: list[Path]) -> None:
    """Drop what the page cache holds of the files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def everything_below(folder: str | Path) -> list[Path]:
    return [p for p in Path(folder).rglob("*") if p.is_file()]


def ours(job: dict[str, Any]) -> dict[str, float]:
    from scviaduct.storage.loader import Loader
    from scviaduct.storage.sampler import Sampler
    from scviaduct.storage.view import View

    view = View.open(job["atlas"], job["view"])
    source = view.source(view.schema(batch_key=job["batch_key"]))
    loader = Loader(source, Sampler(n_rows=view.n_rows, block_rows=view.block_rows, batch_size=job["batch"]))

    epochs = itertools.count()

    def batches() -> Generator[int]:
        for epoch in epochs:
            with loader.epoch(epoch) as made:
                for batch in made:
                    yield batch.n_cells

    return clocked(batches, job, everything_below(view.path))


def theirs(job: dict[str, Any]) -> dict[str, float]:
    import annbatch
    import anndata as ad
    import numpy as np
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})

    def load(group: Any) -> ad.AnnData:
        obs = ad.io.read_elem(group["obs"])[[job["batch_key"]]]
        return ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=obs, var=ad.io.read_elem(group["var"]))

    loader = annbatch.Loader(batch_size=job["batch"], shuffle=True, to=None, preload_to_gpu=False)
    loader.use_collection(annbatch.DatasetCollection(job["collection"], mode="r"), load_adata=load)
    chosen = None
    if job["subset"]:
        genes = json.loads(Path(job["atlas"], "views", job["view"], "view.json").read_text())["genes"]
        chosen = np.flatnonzero(loader.var.index.isin(genes))

    def batches() -> Generator[int]:
        while True:
            for batch in loader:
                counts = batch["X"] if chosen is None else batch["X"][:, chosen]
                yield counts.shape[0]

    return clocked(batches, job, everything_below(job["collection"]))


class Part:
    """The first cells of a source, in whole blocks."""

    def __init__(self, source: Any, cells: int) -> None:
        self._source = source
        self.n_genes, self.block_rows, self.readers = source.n_genes, source.block_rows, source.readers
        self.n_rows = min(source.n_rows, -(-cells // source.block_rows) * source.block_rows)
        self.read, self.strata = source.read, source.strata


def waiting(job: dict[str, Any]) -> dict[str, float]:
    import torch

    from scviaduct.distributed.config import FitConfig
    from scviaduct.distributed.loop import fit
    from scviaduct.models.scvi import SCVI
    from scviaduct.storage.view import View

    view = View.open(job["atlas"], job["view"])
    schema = view.schema(batch_key=job["batch_key"])
    config = FitConfig(max_epochs=2, batch_size=job["batch"], validation_size=0.0)
    torch.set_num_threads(config.threads_for(1, torch.multiprocessing.cpu_count()))
    torch.manual_seed(0)
    history = fit(SCVI(schema, SCVI.Config()), Part(view.source(schema), job["cells"]), config).history
    return {name: history[-1][name] for name in ("data_wait", "cells_per_second")}


CHILDREN = {"ours": ours, "theirs": theirs, "waiting": waiting}


def train(options: argparse.Namespace) -> None:
    for batch in (128, 1024):
        job = request(options, "waiting", "genes", batch, "warm")
        found = [measured(sys.executable, job, options.json) for _ in range(options.rounds)]
        wait, speed = (statistics.median(r[key] for r in found) for key in ("data_wait", "cells_per_second"))
        print(f"scVI, batches of {batch}: {wait:.2%} of the time waiting for data, {speed:,.0f} cells/s", flush=True)


if __name__ == "__main__":
    main()
