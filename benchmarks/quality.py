#!/usr/bin/env python3
"""Label transfer to a held-back batch, beside scvi-tools (SCVI + load_query_data) and two plain baselines, same split.

    python benchmarks/quality.py --data FILE.h5ad --batch-key sample_id --labels-key cluster_id --hold-back stim107 \
        [--genes 1000] [--preset scarches] [--seeds 5]

Every seed: highly variable genes of the reference alone (ours, seurat_v3 per batch); reference and query trained with the
same settings by both; labels by the same kNN rule on both latents. kNN on PCA (30 components, reference-fitted) and
logistic regression see log-normalised counts of the same genes.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from scviaduct.distributed.config import FitConfig, MapConfig, SurgeryConfig, TrackingConfig, TrainConfig
from scviaduct.distributed.map import map as map_queries
from scviaduct.distributed.train import train
from scviaduct.distributed.transfer import Neighbours
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare

warnings.filterwarnings("ignore")

SCARCHES = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}


def score(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    return accuracy_score(truth, predicted), f1_score(truth, predicted, average="macro", zero_division=0)


def baselines(reference: ad.AnnData, query: ad.AnnData, labels_key: str, seed: int) -> dict[str, tuple[float, float]]:
    both = ad.concat([reference, query], keys=["r", "q"], label="side", index_unique="-")
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    r = (both.obs["side"] == "r").to_numpy()
    x, y = both.X.toarray(), both.obs[labels_key].astype(str).to_numpy()
    pca = sc.pp.pca(x[r], n_comps=30, return_info=True, random_state=seed)
    components, centre = pca[1], x[r].mean(0)
    z = (x - centre) @ components.T
    knn = KNeighborsClassifier(15, weights="distance").fit(z[r], y[r])
    logistic = LogisticRegression(max_iter=500, random_state=seed).fit(x[r], y[r])
    return {
        "kNN on PCA": score(y[~r], knn.predict(z[~r])),
        "logistic regression": score(y[~r], logistic.predict(x[~r])),
    }


def scvi_tools(
    reference: ad.AnnData, query: ad.AnnData, a: argparse.Namespace, options: dict, seed: int
) -> dict[str, tuple[float, float]]:
    import scvi

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    reference, query = reference.copy(), query.copy()
    scvi.model.SCVI.setup_anndata(reference, batch_key=a.batch_key)
    model = scvi.model.SCVI(reference, n_latent=a.n_latent, gene_likelihood=a.likelihood, **options)
    model.train(max_epochs=a.epochs, plan_kwargs={"n_epochs_kl_warmup": a.warmup}, **quiet)
    mapped = scvi.model.SCVI.load_query_data(query, model)
    mapped.train(max_epochs=a.query_epochs, plan_kwargs={"weight_decay": 0.0, "n_epochs_kl_warmup": 0}, **quiet)
    return transferred(
        model.get_latent_representation(), reference, mapped.get_latent_representation(), query, a, "scvi-tools"
    )


def transferred(
    z_reference: np.ndarray,
    reference: ad.AnnData,
    z_query: np.ndarray,
    query: ad.AnnData,
    a: argparse.Namespace,
    who: str,
) -> dict[str, tuple[float, float]]:
    labels = pd.Categorical(reference.obs[a.labels_key].astype(str))
    truth = query.obs[a.labels_key].astype(str).to_numpy()
    out = {}
    for k in (15, 50):
        codes = Neighbours(z_reference, labels.codes, k).transfer(z_query).codes
        out[f"{who}, {k} neighbours"] = score(truth, np.asarray(labels.categories)[codes])
    return out


def ours(
    reference: ad.AnnData, query: ad.AnnData, a: argparse.Namespace, options: dict, seed: int, folder: Path
) -> dict:
    tracking = TrackingConfig(tracking_uri="none")
    fit = FitConfig(max_epochs=a.epochs, n_epochs_kl_warmup=a.warmup, seed=seed)
    config = TrainConfig(
        out=folder / f"run{seed}",
        batch_key=a.batch_key,
        labels_key=a.labels_key,
        set=tuple(f"{k}={str(v).lower()}" for k, v in options.items())
        + (f"n_latent={a.n_latent}", f"gene_likelihood={a.likelihood}"),
        fit=fit,
        tracking=tracking,
    )
    bundle = train(folder / "atlas.zarr", config)
    surgery = SurgeryConfig(max_epochs=a.query_epochs, early_stopping=a.early_stopping, seed=seed)
    out = {}
    for k in (15, 50):
        target = folder / f"mapped{seed}-{k}"
        map_queries(
            bundle.path, [folder / "query.h5ad"], MapConfig(out=target, n_neighbors=k, fit=surgery, tracking=tracking)
        )
        result = ad.read_h5ad(target / "query.h5ad")
        out[f"scviaduct, {k} neighbours"] = score(
            result.obs[a.labels_key].astype(str), result.obs[f"{a.labels_key}_pred"].astype(str)
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch-key", help="default: reference and query are random halves")
    parser.add_argument("--labels-key", required=True)
    parser.add_argument("--hold-back", help="category of batch-key that is the query")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--architecture", choices=["default", "scarches"], default="scarches")
    parser.add_argument("--likelihood", default="zinb")
    parser.add_argument("--n-latent", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--query-epochs", type=int, default=60)
    parser.add_argument("--early-stopping", action="store_true", help="let our surgery stop early")
    parser.add_argument("--warmup", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    a = parser.parse_args()
    data = ad.read_h5ad(a.data)
    options = SCARCHES if a.architecture == "scarches" else {}
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(a.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            held = split(data, a, seed)
            write(data[~held].copy(), folder / "reference.h5ad", a)
            write(data[held].copy(), folder / "query.h5ad", a)
            convert([folder / "reference.h5ad"], out=folder / "atlas.zarr")
            view = prepare(folder / "atlas.zarr", genes=a.genes, batch_key=a.batch_key)
            genes = list(view.genes)
            reference, query = (ad.read_h5ad(folder / f"{n}.h5ad")[:, genes].copy() for n in ("reference", "query"))
            for name, value in (
                baselines(reference, query, a.labels_key, seed)
                | scvi_tools(reference, query, a, options, seed)
                | ours(reference, query, a, options, seed, folder)
            ).items():
                rows.setdefault(name, []).append(value)
    print(
        f"{a.data.name}, query {a.hold_back or 'half'}, {a.genes} genes, {a.architecture}, {a.epochs}+{a.query_epochs} epochs"
    )
    for name, values in rows.items():
        accuracy, f1 = np.array(values).T
        record = {
            "method": name,
            "accuracy": f"{accuracy.mean():.3f} ± {accuracy.std():.3f}",
            "macro_f1": f"{f1.mean():.3f} ± {f1.std():.3f}",
            "seeds": len(values),
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)


def split(data: ad.AnnData, a: argparse.Namespace, seed: int) -> np.ndarray:
    if a.hold_back:
        return (data.obs[a.batch_key] == a.hold_back).to_numpy()
    held = np.random.default_rng(seed).random(data.n_obs) < 0.5
    a.batch_key = "half"
    data.obs["half"] = pd.Categorical(np.where(held, "query", "reference"))
    return held


def write(data: ad.AnnData, path: Path, a: argparse.Namespace) -> None:
    for column in data.obs.columns:
        if isinstance(data.obs[column].dtype, pd.CategoricalDtype):
            data.obs[column] = data.obs[column].cat.remove_unused_categories()
    data.write_h5ad(path)


if __name__ == "__main__":
    main()
