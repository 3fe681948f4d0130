"""`demo`: the whole line on simulated studies whose truth is known, with scores and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import FitConfig, MapConfig, SurgeryConfig, TrackingConfig, TrainConfig
from scviaduct.distributed.figures import before_and_after
from scviaduct.distributed.map import map
from scviaduct.distributed.train import train
from scviaduct.storage.convert import convert
from scviaduct.storage.manifest import refuse_existing
from scviaduct.storage.prepare import prepare
from scviaduct.storage.simulate import write_studies

TRUTH = "cell_type"


@dataclass(frozen=True)
class Demo:
    """What the demonstration made and measured."""

    out: Path
    table: pd.DataFrame
    """One row a query: summary.csv, and accuracy and macro_f1 of the transferred labels against the truth."""
    seconds: dict[str, float]
    """Wall time of each stage."""
    bundle: Bundle
    picture: Path
    tracking_uri: str


def demo(
    out: str | Path = "demo",
    *,
    seed: int = 0,
    workers: int = 1,
    cells: int = 4500,
    max_epochs: int = 20,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Simulate five studies of `cells` cells and three queries, and run convert, prepare, train and map on them.

    Raises:
        OutputExistsError: `out` exists.
    """
    out = refuse_existing(Path(out).absolute())
    seconds: dict[str, float] = {}
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{out / 'mlflow.db'}", experiment="demo")

    def stage(name: str, sentence: str) -> Callable[[], None]:
        say(f"{name}: {sentence}")
        begin = time.perf_counter()
        return lambda: seconds.__setitem__(name, time.perf_counter() - begin)

    done = stage("simulate", f"five studies of {cells:,} cells, three unseen queries, one of them broken")
    studies, queries = write_studies(out / "data", seed, cells=cells, query_cells=max(200, cells // 2))
    done()
    done = stage("convert", f"{len(studies)} h5ad files to {out / 'atlas.zarr'}, every count checked")
    convert(studies, out=out / "atlas.zarr")
    done()
    done = stage("prepare", "1,000 highly variable genes, cells shuffled on disk")
    view = prepare(out / "atlas.zarr", genes=1000, batch_key="study")
    done()
    done = stage("train", f"SCVI with the scarches preset, {max_epochs} epochs")
    fit = FitConfig(max_epochs=max_epochs, n_epochs_kl_warmup=max_epochs // 2, seed=seed)
    config = TrainConfig(
        out=out / "run", batch_key="study", labels_key=TRUTH, preset="scarches", fit=fit, tracking=tracking
    )
    bundle = train(out / "atlas.zarr", config)
    done()
    done = stage("map", f"{len(queries)} queries by surgery, labels by nearest neighbours")
    surgery = SurgeryConfig(max_epochs=60)
    mapping = MapConfig(out=out / "mapped", workers=workers, fit=surgery, tracking=tracking)
    summary = map(out / "run", queries, mapping)
    done()
    done = stage("picture", "UMAP before and after")
    results = [path for q in queries if (path := out / "mapped" / f"{q.stem}.h5ad").exists()]
    picture = before_and_after(view, bundle, results, TRUTH, out / "umap.png")
    done()
    table = summary.merge(scores(queries, out / "mapped"), on="query", how="left")
    return Demo(out, table, seconds, bundle, picture, str(tracking.tracking_uri))


def scores(queries: Sequence[Path], mapped: Path) -> pd.DataFrame:
    """Accuracy and macro-F1 of each result's labels against the truth in its obs; cells of types the reference knows."""
    rows = []
    for query in queries:
        result = mapped / f"{query.stem}.h5ad"
        if not result.exists():
            continue
        obs = ad.read_h5ad(result, backed="r").obs
        truth, pred = obs[TRUTH].astype(str), obs[f"{TRUTH}_pred"].astype(str)
        known = truth.isin(obs[f"{TRUTH}_pred"].cat.categories).to_numpy()
        novel = obs.loc[~known, f"{TRUTH}_uncertainty"]
        rows.append(
            {
                "query": query.stem,
                "accuracy": accuracy_score(truth[known], pred[known]),
                "macro_f1": f1_score(truth[known], pred[known], average="macro", zero_division=0),
                "unseen_cells": int((~known).sum()),
                "unseen_uncertainty": float(novel.mean()) if len(novel) else np.nan,
            }
        )
    return pd.DataFrame(rows)
