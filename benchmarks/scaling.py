#!/usr/bin/env python3
"""What Ray Train and DistributedDataParallel cost a step, and how far two workers are from twice the speed.

    python benchmarks/scaling.py [--cells 48000] [--batch 1024,8192] [--rounds 3] [--epochs 4]

The same run (SCVI, nb, two layers of 128, 2,000 genes at 16 %), one thread a process: as the bare loop in this process,
under Ray with one worker, and under Ray with two. A round does all three; times are medians over its epochs, the first
left out, and over the rounds. `overhead` is Ray's one worker against the bare loop, `efficiency` half of the speed-up of
two workers over one. `all_reduce_ms` is gloo alone: a tensor of the model's size summed over two processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}

from scviaduct.distributed.config import FitConfig, TrackingConfig, TrainConfig
from scviaduct.distributed.train import train
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare

logging.getLogger("ray").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=48_000)
    parser.add_argument("--batch", default="1024,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    a = parser.parse_args()
    import ray
    from train_speed import simulated

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        simulated(a.cells).write_h5ad(here / "cells.h5ad")
        convert([here / "cells.h5ad"], out=here / "atlas.zarr")
        prepare(here / "atlas.zarr", genes="all", batch_key="batch")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            for batch in map(int, a.batch.split(",")):
                print(json.dumps(measured(here, batch, a)), flush=True)
        finally:
            ray.shutdown()


def measured(folder: Path, batch: int, a: argparse.Namespace) -> dict:
    seconds: dict[str, list[float]] = {"bare": [], "ray 1": [], "ray 2": []}
    for seed in range(a.rounds):
        for which, times in seconds.items():
            times.append(epoch_seconds(folder, which, batch, a.epochs, seed))
    bare, one, two = (statistics.median(v) for v in seconds.values())
    steps = max(1, round(a.cells / batch))
    return {
        "batch": batch,
        "ms_per_step": {which: round(statistics.median(v) / steps * 1e3, 2) for which, v in seconds.items()},
        "all_epochs_s": {which: [round(s, 2) for s in v] for which, v in seconds.items()},
        "overhead": round(one / bare - 1, 3),
        "efficiency": round(bare / (2 * two), 3),
        "all_reduce_ms": round(all_reduce_ms(folder), 2),
    }


def epoch_seconds(folder: Path, which: str, batch: int, epochs: int, seed: int) -> float:
    config = TrainConfig(
        out=folder / f"{which.replace(' ', '')}-{uuid.uuid4().hex[:6]}",
        batch_key="batch",
        set=("n_layers=2", "n_latent=30", "gene_likelihood=nb", "use_batch_norm=none", "use_layer_norm=both"),
        workers=2 if which == "ray 2" else 1,
        address="auto" if which == "ray 1" else None,
        fit=FitConfig(max_epochs=epochs, batch_size=batch, validation_size=0.0, threads=1, seed=seed),
        tracking=TrackingConfig(tracking_uri="none"),
        checkpoint_every="1h",
    )
    torch.set_num_threads(1)
    history = train(folder / "atlas.zarr", config).facts["training"]["history"]
    return statistics.median(record["seconds"] for record in history[1:])


def all_reduce_ms(folder: Path) -> float:
    """Median of 50 sums of 1.3 million float32 over two processes."""
    out = folder / f"reduce-{uuid.uuid4().hex[:6]}"
    mp.spawn(_reduce, args=(str(out),), nprocs=2)
    return float(out.read_text())


def _reduce(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    values, times = torch.ones(1_300_000), []
    for _ in range(50):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - begin)
    if rank == 0:
        Path(out).write_text(str(statistics.median(times) * 1e3))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
