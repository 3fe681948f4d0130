#!/usr/bin/env python3
"""Training speed beside scvi-tools' SCVI.train, interleaved in one process, with the loss both reach.

    python benchmarks/train_speed.py [--data FILE.h5ad --batch-key batch] [--rounds 4] [--batch 128,1024]

scvi-tools trains on an AnnData in memory; ours on a Zarr view on disk, through convert and prepare. Times are those of an
epoch (Lightning's own callback; our history record), without start-up. A round trains a new model of each for `--epochs`
epochs; the ratio is the median over the rounds of (their seconds / our seconds) of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import torch

from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.loop import fit
from scviaduct.models.scvi import SCVI
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.simulate import Biology

warnings.filterwarnings("ignore")


def simulated(cells: int) -> ad.AnnData:
    """2,000 genes at about 16 % density in eight batches."""
    biology = Biology.make(seed=1)
    parts = [biology.study(k, cells // 8) for k in range(8)]
    data = ad.concat(parts)
    rng = np.random.default_rng(0)
    data.X.data = rng.binomial(data.X.data.astype(int), 0.28).astype(np.float32)  # thinned to a shallower depth
    data.X.eliminate_zeros()
    data.obs["batch"] = data.obs["study"].astype("category")
    return data[np.asarray(data.X.sum(1)).ravel() > 0].copy()


def theirs(
    data: ad.AnnData, batch_key: str, options: dict, batch_size: int, epochs: int, seed: int
) -> tuple[list, list]:
    import lightning
    import scvi

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(data, batch_key=batch_key)
    seconds: list[float] = []

    class Clock(lightning.pytorch.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            seconds.append(time.perf_counter() - self.begin)

    model = scvi.model.SCVI(data, n_hidden=128, **options)
    model.train(
        max_epochs=epochs,
        batch_size=batch_size,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[Clock()],
        plan_kwargs={"n_epochs_kl_warmup": 0},
    )
    return seconds, list(model.history["elbo_train"]["elbo_train"])


def ours(view, batch_key: str, options: dict, batch_size: int, epochs: int, seed: int) -> tuple[list, list, list]:
    schema = view.schema(batch_key=batch_key)
    torch.manual_seed(seed)
    model = SCVI(schema, SCVI.Config(n_hidden=128, **options))
    config = FitConfig(max_epochs=epochs, batch_size=batch_size, validation_size=0.0, seed=seed, n_epochs_kl_warmup=0)
    history = fit(model, view.source(schema), config).history
    return [r["seconds"] for r in history], [r["elbo_train"] for r in history], [r["data_wait"] for r in history]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="h5ad with counts; default: simulated")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--cells", type=int, default=16000)
    parser.add_argument("--batch", default="128,1024")
    parser.add_argument("--likelihood", default="nb")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    data = ad.read_h5ad(a.data)[: a.cells].copy() if a.data else simulated(a.cells)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "cells.h5ad"
        data.write_h5ad(source)
        convert([source], out=Path(folder) / "atlas.zarr")
        view = prepare(Path(folder) / "atlas.zarr", genes="all", batch_key=a.batch_key)
        for likelihood in a.likelihood.split(","):
            options = {"n_layers": 2, "n_latent": 30, "gene_likelihood": likelihood}
            for batch_size in map(int, a.batch.split(",")):
                run(data, view, a, options, batch_size)


def run(data: ad.AnnData, view, a: argparse.Namespace, options: dict, batch_size: int) -> None:
    ours(view, a.batch_key, options, batch_size, 1, 0)  # compiles the kernels
    t, o, waits, elbo_t, elbo_o = [], [], [], [], []
    for seed in range(a.rounds):
        seconds, elbo = theirs(data, a.batch_key, options, batch_size, a.epochs, seed)
        t.append(float(np.median(seconds)))
        elbo_t.append(elbo[-1])
        seconds, elbo, wait = ours(view, a.batch_key, options, batch_size, a.epochs, seed)
        o.append(float(np.median(seconds)))
        elbo_o.append(elbo[-1])
        waits += wait
    record = {
        "cells": data.n_obs,
        "genes": data.n_vars,
        "density": round(data.X.nnz / data.n_obs / data.n_vars, 3),
        "batch_size": batch_size,
        **options,
        "threads": a.threads,
        "scvi_tools_cells_s": round(data.n_obs / np.median(t)),
        "scviaduct_cells_s": round(data.n_obs / np.median(o)),
        "ratio": round(float(np.median(np.array(t) / np.array(o))), 2),
        "ratios": [round(x / y, 2) for x, y in zip(t, o, strict=True)],
        "elbo_scvi_tools": [round(float(x), 2) for x in elbo_t],
        "elbo_scviaduct": [round(float(x), 2) for x in elbo_o],
        "data_wait": round(float(np.mean(waits)), 3),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
