#!/usr/bin/env python3
"""A training step of PeakVI and PoissonVI beside scvi-tools' modules, interleaved in one process.

    python benchmarks/peaks_speed.py [--regions 50000] [--cells 128] [--seen 1500] [--rounds 15] [--threads 2]

A step is forward, backward and the optimiser: for scvi-tools the AdamW of its training plan, for ours the fused Adam of
the loop and, as `ratio_same_rule`, AdamW with torch's fused flag. scvi-tools' modules take dense cells; `densify` is the time its data loader needs
to make them from CSR, and `ratio` counts it, `ratio_without_densifying` does not. Ratios are medians over the rounds,
each of a pair of neighbouring steps. The load of the machine is printed too: both suffer from it, though not equally.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch

from scviaduct.models import model_class
from scviaduct.schema import Batch, Covariate, Schema

warnings.filterwarnings("ignore")


def cells(regions: int, n: int, seen: int, batches: int) -> list[sp.csr_matrix]:
    """Fragments of `n` cells each: gamma-distributed region probabilities with a mean of seen / regions."""
    rng = np.random.default_rng(0)
    p = rng.gamma(0.5, 2.0 * seen / regions, regions).clip(0, 0.8)
    out = []
    for _ in range(batches):
        x = sp.csr_matrix((rng.random((n, regions), np.float32) < p).astype(np.float32))
        x.data += rng.poisson(0.3, x.nnz).astype(np.float32)
        out.append(x)
    return out


def batch_of(x: sp.csr_matrix, codes: np.ndarray) -> Batch:
    return Batch(
        n_genes=x.shape[1], indptr=x.indptr.astype(np.int64), indices=x.indices.astype(np.int32), data=x.data,
        batch_index=codes, seeds=np.arange(x.shape[0], dtype=np.uint64),
    )  # fmt: skip


def ours(name: str, matrices: list[sp.csr_matrix], codes: np.ndarray, *, decoupled: bool) -> Callable[[int], None]:
    schema = Schema(genes=tuple(map(str, range(matrices[0].shape[1]))), batch=Covariate("batch", ("a", "b")))
    cls = model_class(name)
    model = cls(schema, cls.Config()).train()
    if decoupled:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-3, eps=1e-8, fused=True)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6, eps=0.01, fused=True)
    batches = [batch_of(x, codes) for x in matrices]

    def step(k: int) -> None:
        optimizer.zero_grad()
        model(batches[k % len(batches)]).loss.backward()
        optimizer.step()

    return step


def theirs(name: str, matrices: list[sp.csr_matrix], codes: np.ndarray) -> tuple[Callable[[int], None], Callable]:
    from scvi.module import PEAKVAE, VAE

    regions = matrices[0].shape[1]
    hidden = int(np.sqrt(regions))
    if name == "peakvi":
        module = PEAKVAE(regions, 2, n_cats_per_cov=[])
    else:
        leaky = {"activation_fn": torch.nn.LeakyReLU}
        module = VAE(
            regions, 2, n_hidden=hidden, n_latent=int(np.sqrt(hidden)), n_layers=2, gene_likelihood="poisson",
            use_batch_norm="none", use_layer_norm="both", extra_encoder_kwargs=leaky, extra_decoder_kwargs=leaky,
        )  # fmt: skip
    optimizer = torch.optim.AdamW(module.train().parameters(), lr=1e-4, weight_decay=1e-3, eps=1e-8)
    batch = torch.from_numpy(codes).unsqueeze(1)
    tensors: dict[str, torch.Tensor] = {"batch": batch, "labels": torch.zeros_like(batch)}

    def densify(k: int) -> None:
        tensors["X"] = torch.from_numpy(matrices[k % len(matrices)].toarray())

    def step(_: int) -> None:
        optimizer.zero_grad()
        module(tensors, loss_kwargs={"kl_weight": 1.0})[2].loss.backward()
        optimizer.step()

    return step, densify


def seconds(f: Callable[[int], None], k: int) -> float:
    begin = time.perf_counter()
    f(k)
    return time.perf_counter() - begin


def compare(name: str, a: argparse.Namespace) -> dict:
    matrices = cells(a.regions, a.cells, a.seen, 6)
    codes = np.random.default_rng(1).integers(0, 2, a.cells)
    step, densify = theirs(name, matrices, codes)
    runs = {
        "densify": densify,
        "theirs": step,
        "ours": ours(name, matrices, codes, decoupled=False),
        "ours_adamw": ours(name, matrices, codes, decoupled=True),
    }
    times: dict[str, list[float]] = {which: [] for which in runs}
    for k in range(a.rounds + 2):  # two to compile and to allocate
        for which, run in runs.items():
            times[which].append(seconds(run, k))
    t = {which: np.array(values[2:]) for which, values in times.items()}
    dense = t["theirs"] + t["densify"]
    return {
        "model": name, "regions": a.regions, "cells": a.cells, "threads": a.threads,
        "seen_per_cell": round(sum(m.nnz for m in matrices) / len(matrices) / a.cells),
        "ms": {which: round(float(np.median(v)) * 1e3, 1) for which, v in t.items()},
        "ms_fastest": {which: round(float(v.min()) * 1e3, 1) for which, v in t.items()},
        "ratio": round(float(np.median(dense / t["ours"])), 2),
        "ratio_without_densifying": round(float(np.median(t["theirs"] / t["ours"])), 2),
        "ratio_same_rule": round(float(np.median(dense / t["ours_adamw"])), 2),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="peakvi,poissonvi")
    parser.add_argument("--regions", type=int, default=50_000)
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--seen", type=int, default=1500, help="regions seen per cell")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.models.split(","):
        print(json.dumps(compare(name, a)), flush=True)


if __name__ == "__main__":
    main()
