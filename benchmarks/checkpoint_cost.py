#!/usr/bin/env python3
"""What a checkpoint costs the steps of a training, written beside them and written while they wait.

    python benchmarks/checkpoint_cost.py [--regions 50000] [--steps 30] [--rounds 5] [--threads 1]

PeakVI at 50,000 regions (33 million parameters, 400 MB with Adam's moments), batches of 128 cells, one thread. A round takes
`steps` steps without a checkpoint, with one in their middle that is written beside them, and with one that is waited
for; the cost of a checkpoint is the difference, the median over the rounds. The last line of a round of the second kind
waits for the writer outside of the measured time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from scviaduct.distributed.checkpoint import Checkpoints, Progress
from scviaduct.distributed.optimizer import Adam, Group
from scviaduct.distributed.saver import Saver
from scviaduct.models.peakvi import PeakVI
from scviaduct.schema import Batch, Covariate, Schema


def cells(regions: int, n: int, seen: int) -> Batch:
    """Cells of two batches with so many of the regions seen on average, each once."""
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.choice(regions, rng.poisson(seen), replace=False)).astype(np.int32) for _ in range(n)]
    indices = np.concatenate(rows)
    return Batch(
        n_genes=regions,
        indptr=np.cumsum([0, *map(len, rows)]),
        indices=indices,
        data=np.ones(len(indices), np.float32),
        batch_index=np.arange(n) % 2,
        seeds=np.arange(n, dtype=np.uint64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    batch = cells(a.regions, 128, 1500)
    model = PeakVI(Schema(genes=tuple(map(str, range(a.regions))), batch=Covariate("batch", ("a", "b"))))
    optimizer = Adam([Group(model.parameters(), 1e-4)], "AdamW", eps=1e-8, weight_decay=0.01)
    times: dict[str, list[float]] = {"none": [], "beside": [], "waited for": []}
    copies: list[float] = []

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(batch, kl_weight=1.0).loss.backward()
            optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Checkpoints(Path(folder)))
        steps(3)
        saver.save(model, optimizer, Progress(), torch.zeros(4), 1)
        saver.wait()
        for number in range(a.rounds):
            for position, (which, taken) in enumerate(times.items(), 2 + 3 * number):
                begin = time.perf_counter()
                steps(a.steps // 2)
                if which != "none":
                    copy = time.perf_counter()
                    saver.save(model, optimizer, Progress(), torch.zeros(4), position)
                    copies.append(time.perf_counter() - copy)
                    if which == "waited for":
                        saver.wait()
                steps(a.steps - a.steps // 2)
                taken.append(time.perf_counter() - begin)
                saver.wait()
        size = sum(f.stat().st_size for f in Checkpoints(Path(folder)).names()[-1].iterdir())

    none = statistics.median(times["none"])
    cost = {
        which: round(statistics.median(v - n for v, n in zip(times[which], times["none"], strict=True)), 3)
        for which in ("beside", "waited for")
    }
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "checkpoint_MB": round(size / 1e6),
                "s_per_step": round(none / a.steps, 4),
                "s_per_checkpoint": cost,
                "of_which_copying": round(statistics.median(copies), 3),
                "all": {k: [round(s, 2) for s in v] for k, v in times.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
