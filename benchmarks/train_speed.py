#!/usr/bin/env python3
"""Training speed beside scvi-tools' own training, by turns, each in a process of its own, with the loss both reach.

    python benchmarks/train_speed.py [--models scvi,scanvi,totalvi] [--batch 128,1024] [--rounds 4]
    python benchmarks/train_speed.py --models peakvi,poissonvi --cells 4000 --batch 128
    python benchmarks/train_speed.py --data FILE.h5ad --batch-key batch [--labels-key cell_type] --models scvi

scvi-tools trains on an AnnData in memory; ours on a Zarr view on disk, through convert and prepare. Times are those of an
epoch (Lightning's own callback; our history record), without start-up. A round trains a new model of each for `--epochs`
epochs; the ratio is the median over the rounds of (their seconds / our seconds) of neighbouring runs. Half of the cells
have their label hidden from SCANVI; totalVI has 30 simulated proteins beside the genes; PeakVI and PoissonVI have 50,000 regions, 1,500 of them seen in a cell.
Processes are apart because ours
tells malloc to keep memory, which would help the other, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.datafacts import tell_data
from scviaduct.distributed.loop import fit
from scviaduct.models import model_class
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.simulate import Biology
from scviaduct.storage.view import View

warnings.filterwarnings("ignore")

LABELS, PROTEINS = "half_labelled", "protein_expression"
PEAKS = ("peakvi", "poissonvi")
SIZES = {"n_hidden": 128, "n_layers": 2, "n_latent": 30}


def simulated(cells: int) -> ad.AnnData:
    """2,000 genes at about 16 % density in eight batches."""
    biology = Biology.make(seed=1)
    parts = [biology.study(k, cells // 8) for k in range(8)]
    data = ad.concat(parts)
    rng = np.random.default_rng(0)
    data.X.data = rng.binomial(data.X.data.astype(int), 0.28).astype(np.float32)  # thinned to a shallower depth
    data.X.eliminate_zeros()
    data.obs["batch"] = data.obs["study"].astype("category")
    data = data[np.asarray(data.X.sum(1)).ravel() > 0].copy()
    data.obs[LABELS] = np.where(rng.random(data.n_obs) < 0.5, "Unknown", data.obs["cell_type"].astype(str))
    levels = rng.gamma(1.0, 20.0, (data.obs["cell_type"].cat.categories.size, 30))[data.obs["cell_type"].cat.codes]
    proteins = rng.poisson(rng.gamma(3.0, levels / 3.0 + 1.0)).astype(np.float32)
    names = [f"protein {k}" for k in range(30)]
    data.obsm[PROTEINS] = pd.DataFrame(proteins, index=data.obs_names, columns=names)
    return data


def simulated_peaks(cells: int, regions: int = 50_000, seen: int = 1500) -> ad.AnnData:
    """Fragments in two batches: gamma-distributed region probabilities with a mean of seen / regions."""
    rng = np.random.default_rng(0)
    p = rng.gamma(0.5, 2.0 * seen / regions, regions).clip(0, 0.8)
    parts = [sp.csr_matrix(rng.random((min(500, cells - k), regions), np.float32) < p) for k in range(0, cells, 500)]
    x = sp.vstack(parts).astype(np.float32)
    x.data += rng.poisson(0.3, x.nnz).astype(np.float32)
    data = ad.AnnData(x, obs={"batch": rng.choice(["a", "b"], x.shape[0])})
    data.var_names = [f"chr1:{1000 * k}-{1000 * k + 500}" for k in range(regions)]
    return data


def theirs(
    file: Path, name: str, a: argparse.Namespace, options: dict, batch_size: int, seed: int
) -> tuple[list, list]:
    import lightning
    import scvi

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    keys = {
        "scvi": {},
        "scanvi": {"labels_key": a.labels_key, "unlabeled_category": "Unknown"},
        "totalvi": {"protein_expression_obsm_key": PROTEINS},
    }.get(name, {})
    kind = {
        "scvi": scvi.model.SCVI,
        "scanvi": scvi.model.SCANVI,
        "totalvi": scvi.model.TOTALVI,
        "peakvi": scvi.model.PEAKVI,
        "poissonvi": scvi.external.POISSONVI,
    }[name]
    data = ad.read_h5ad(file)
    kind.setup_anndata(data, batch_key=a.batch_key, **keys)
    seconds: list[float] = []

    class Clock(lightning.pytorch.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            seconds.append(time.perf_counter() - self.begin)

    model = kind(data, **options)
    warm_up = {"n_steps_kl_warmup": 1} if name == "totalvi" else {}
    stops = {"totalvi": {"early_stopping": False, "reduce_lr_on_plateau": False}}
    stops |= {key: {"early_stopping": False, "n_epochs_kl_warmup": 1} for key in PEAKS}
    model.train(
        max_epochs=a.epochs,
        batch_size=batch_size,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[Clock()],
        plan_kwargs={"n_epochs_kl_warmup": 0} | warm_up if name not in PEAKS else None,
        **stops.get(name, {}),
    )
    return seconds, list(model.history["elbo_train"]["elbo_train"])


def ours(
    atlas: Path, name: str, a: argparse.Namespace, options: dict, batch_size: int, seed: int, epochs: int
) -> tuple[list, list, list]:
    view = View.open(atlas, "default")
    labels = a.labels_key if name == "scanvi" else None
    schema = view.schema(batch_key=a.batch_key, labels_key=labels, proteins=name == "totalvi")
    torch.manual_seed(seed)
    kind = model_class(name)
    model, source = kind(schema, kind.Config(**options)), view.source(schema)
    tell_data(model, source)
    config = FitConfig(
        max_epochs=epochs, batch_size=batch_size, validation_size=0.0, seed=seed, n_epochs_kl_warmup=0,
        early_stopping=False, reduce_lr_on_plateau=False,
    )  # fmt: skip
    history = fit(model, source, config).history
    return [r["seconds"] for r in history], [r["elbo_train"] for r in history], [r["data_wait"] for r in history]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="h5ad with counts; default: simulated")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--labels-key", default=LABELS)
    parser.add_argument("--models", default="scvi")
    parser.add_argument("--cells", type=int, default=16000)
    parser.add_argument("--batch", default="128,1024")
    parser.add_argument("--likelihood", default="nb")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        process(a.threads) as their_process,
        process(a.threads) as our_process,
    ):
        for name, likelihood in itertools.product(a.models.split(","), a.likelihood.split(",")):
            here = Path(folder) / ("peaks" if name in PEAKS else "genes")
            if not here.exists():
                here.mkdir()
                prepared(here, a, peaks=name in PEAKS)
            options = {} if name in PEAKS else {"gene_likelihood": likelihood}
            options |= SIZES if name in ("scvi", "scanvi") else {}
            for batch_size in map(int, a.batch.split(",")):
                run(here, their_process, our_process, name, a, options, batch_size)


def prepared(folder: Path, a: argparse.Namespace, *, peaks: bool) -> None:
    """cells.h5ad and atlas.zarr with its view."""
    data = ad.read_h5ad(a.data)[: a.cells].copy() if a.data else (simulated_peaks if peaks else simulated)(a.cells)
    data.write_h5ad(folder / "cells.h5ad")
    proteins = PROTEINS if PROTEINS in data.obsm else None
    convert([folder / "cells.h5ad"], out=folder / "atlas.zarr", obsm=[proteins] if proteins else [])
    prepare(folder / "atlas.zarr", genes="all", batch_key=a.batch_key, proteins=proteins)


def process(threads: int) -> ProcessPoolExecutor:
    """One process, new, for all calls."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))


def run(
    folder: Path,
    their_process: ProcessPoolExecutor,
    our_process: ProcessPoolExecutor,
    name: str,
    a: argparse.Namespace,
    options: dict,
    batch_size: int,
) -> None:
    atlas, file = folder / "atlas.zarr", folder / "cells.h5ad"
    our_process.submit(ours, atlas, name, a, options, batch_size, 0, 1).result()  # compiles the kernels
    t, o, waits, elbo_t, elbo_o = [], [], [], [], []
    for seed in range(a.rounds):
        seconds, elbo = their_process.submit(theirs, file, name, a, options, batch_size, seed).result()
        t.append(float(np.median(seconds)))
        elbo_t.append(elbo[-1])
        seconds, elbo, wait = our_process.submit(ours, atlas, name, a, options, batch_size, seed, a.epochs).result()
        o.append(float(np.median(seconds)))
        elbo_o.append(elbo[-1])
        waits += wait
    data = ad.read_h5ad(file)
    record = {
        "model": name,
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
