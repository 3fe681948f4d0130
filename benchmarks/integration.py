#!/usr/bin/env python3
"""Quality of the latent space beside scvi-tools: the same cells, genes, options and epochs, scored by scib-metrics.

    python benchmarks/integration.py DATA --scorer-python SCIB/bin/python [--cases kang-scvi,…] [--seeds 3] [--same-start]

DATA is a folder with the h5ad files named in CASES. SCIB is an environment with scib-metrics, which needs JAX. Both
train with their own defaults for everything but the epochs and batches of 128 cells, on genes that ours chose (seurat_v3 per batch).
Every latent space of a case is scored in one call, raw values, no scaling. Printed are, for each metric, the mean and
the standard deviation over the seeds of both, and their difference. PeakVI and PoissonVI end in one of several solutions,
which their first weights decide: with --same-start ours begins with those that scvi-tools made for the seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

warnings.filterwarnings("ignore")

PROTEINS = "protein_expression"


@dataclass(frozen=True)
class Case:
    """One model on one data set."""

    model: str
    files: tuple[str, ...]
    genes: int | str
    epochs: int
    batch_key: str | None
    labels_key: str
    """Cell types, for the scores; SCANVI sees those of half of the cells."""


CASES = {
    "kang-scvi": Case("scvi", ("rna/kang2018_pbmc_4samples_celltypes.h5ad",), 1000, 100, "sample_id", "cluster_id"),
    "kang-scanvi": Case("scanvi", ("rna/kang2018_pbmc_4samples_celltypes.h5ad",), 1000, 40, "sample_id", "cluster_id"),
    "zheng-scvi": Case("scvi", ("rna/pbmc_facs_zheng2017.h5ad",), 1000, 50, None, "celltype"),
    "scmixology-scvi": Case(
        "scvi", ("rna/scmixology_3celllines_celseq2_dropseq.h5ad",), 2000, 200, "library", "cell_line_demuxlet"
    ),
    "cite-totalvi": Case(
        "totalvi",
        ("cite/pbmc_10k_protein_v3_200cells.h5ad", "cite/pbmc_5k_protein_v3_200cells.h5ad"),
        2000,
        100,
        "dataset",
        "cluster",
    ),
    "multiome-peakvi": Case("peakvi", ("atac/pbmc10k_multiome_bins500_derived.h5ad",), "all", 15, None, "celltype"),
    "multiome-poissonvi": Case(
        "poissonvi", ("atac/pbmc10k_multiome_bins500_derived.h5ad",), "all", 15, None, "celltype"
    ),
}
HIDDEN = "hidden_type"
"""obs column of half of the labels, the others "Unknown"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--scorer-python", help="interpreter with scib-metrics")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--same-start", action="store_true", help="peakvi, poissonvi: the first weights are scvi-tools'"
    )
    parser.add_argument("--json", type=Path, help="file for one JSON line a case")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.score:
        score(a.score)
        return
    for name in a.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            table = run(CASES[name], a, Path(folder))
        print(f"\n{name}\n{table.round(3).to_string()}", flush=True)
        if a.json:
            with a.json.open("a") as file:
                file.write(json.dumps({"case": name, "table": table.round(5).to_dict("index")}) + "\n")


def run(case: Case, a: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """Train both with every seed, score all latent spaces; (metrics, [ours, theirs, difference])."""
    from scviaduct.storage.convert import convert
    from scviaduct.storage.prepare import prepare

    paths = written(case, a.data, folder)
    obsm = (PROTEINS,) if case.model == "totalvi" else ()
    convert(paths, out=folder / "atlas.zarr", obsm=obsm)
    batch_key = None if case.batch_key == "dataset" else case.batch_key
    view = prepare(folder / "atlas.zarr", genes=case.genes, batch_key=batch_key, proteins=PROTEINS if obsm else None)
    cells = joined(case, paths, list(view.genes))
    spaces = {}
    for seed in range(a.seeds):
        model = their_model(case, cells, seed)
        start = deepcopy(model.module.state_dict()) if a.same_start else None
        spaces[f"theirs {seed}"] = theirs(case, model)
        spaces[f"ours {seed}"] = (
            ours(case, view, cells, folder, seed) if start is None else fitted(case, view, cells, start, seed)
        )
    scored = ad.AnnData(obs=cells.obs[[case.labels_key]].rename(columns={case.labels_key: "label"}))
    scored.obs["batch"] = cells.obs[case.batch_key] if case.batch_key else "one"
    scored.obsm.update(spaces)
    scored.write_h5ad(folder / "spaces.h5ad")
    command = [a.scorer_python, __file__, "--score", str(folder / "spaces.h5ad")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"scoring failed:\n{done.stderr[-3000:]}")
    values = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))  # spaces x metrics
    means, spread = (values.groupby(values.index.str.split().str[0]).agg(f).T for f in ("mean", "std"))
    table = means.join(spread.add_suffix(" sd"))
    table["ours - theirs"] = means["ours"] - means["theirs"]
    return table


def written(case: Case, data: Path, folder: Path) -> list[Path]:
    """The files with what training needs in obs and obsm, without cells that have no count, which `prepare` leaves out."""
    paths = []
    for name in case.files:
        cells = ad.read_h5ad(data / name)
        cells = cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()  # scvi-tools' PoissonVI takes their logarithm
        if case.labels_key not in cells.obs:
            cells.obs[case.labels_key] = "unknown"
        hide = np.random.default_rng(0).random(cells.n_obs) < 0.5
        types = cells.obs[case.labels_key].astype(str)
        cells.obs[HIDDEN] = pd.Categorical(np.where(hide, "Unknown", types))
        if case.model == "totalvi" and not isinstance(cells.obsm[PROTEINS], pd.DataFrame):
            names = [str(n) for n in cells.uns["protein_names"]]
            cells.obsm[PROTEINS] = pd.DataFrame(cells.obsm[PROTEINS], index=cells.obs_names, columns=names)
        cells.write_h5ad(folder / Path(name).name)
        paths.append(folder / Path(name).name)
    return paths


def joined(case: Case, paths: list[Path], genes: list[str]) -> ad.AnnData:
    """All cells over the view's genes, in the order of the files; clusters for those without cell types."""
    parts = {path.stem: ad.read_h5ad(path)[:, genes].copy() for path in paths}
    cells = ad.concat(parts, label="dataset", index_unique="-")
    if case.model == "totalvi":
        panels = [p.obsm[PROTEINS].set_axis(p.obs_names + "-" + k) for k, p in parts.items()]
        cells.obsm[PROTEINS] = pd.concat(panels).fillna(0).loc[cells.obs_names]
    if cells.obs[case.labels_key].nunique() < 2:
        cells.obs[case.labels_key] = clusters(cells)
    cells.obs[case.labels_key] = cells.obs[case.labels_key].astype(str).astype("category")
    return cells


def clusters(cells: ad.AnnData) -> np.ndarray:
    """Six k-means clusters of principal components that are centred within each data set."""
    from sklearn.cluster import KMeans

    x = cells.copy()
    sc.pp.normalize_total(x)
    sc.pp.log1p(x)
    z = pd.DataFrame(sc.pp.pca(x.X.toarray() if hasattr(x.X, "toarray") else np.asarray(x.X), n_comps=20))
    z -= z.groupby(cells.obs["dataset"].to_numpy()).transform("mean")
    return KMeans(6, random_state=0, n_init=10).fit_predict(z).astype(str)


def ours(case: Case, view, cells: ad.AnnData, folder: Path, seed: int) -> np.ndarray:
    if case.model == "scanvi":  # starts from an SCVI model, as scvi-tools advises
        first = trained(case, view, folder / f"scvi{seed}", seed, 2 * case.epochs, model="scvi").path
        bundle = trained(case, view, folder / f"run{seed}", seed, case.epochs, labels_key=HIDDEN, init_from=first)
    else:
        bundle = trained(case, view, folder / f"run{seed}", seed, case.epochs)
    latent = np.full((cells.n_obs, bundle.latent().shape[1]), np.nan, np.float32)
    latent[places(view, cells)] = bundle.latent()
    return latent


def fitted(case: Case, view, cells: ad.AnnData, start: dict, seed: int) -> np.ndarray:
    """As `ours`, with the weights that scvi-tools starts with."""
    from scviaduct.distributed.config import FitConfig
    from scviaduct.distributed.loop import embedded, fit
    from scviaduct.models import model_class
    from scviaduct.models.upstream import load_upstream
    from scviaduct.models.upstream_peaks import load_peakvi

    kind, schema = model_class(case.model), view.schema(batch_key=case.batch_key or "dataset")
    model, source = kind(schema, kind.Config()), view.source(schema)
    {"peakvi": load_peakvi, "poissonvi": load_upstream}[case.model](model, start)
    fit(model, source, FitConfig(max_epochs=case.epochs, batch_size=128, seed=seed))
    latent = np.full((cells.n_obs, model.config.n_latent), np.nan, np.float32)
    latent[places(view, cells)] = embedded(model, source)
    return latent


def trained(case: Case, view, out: Path, seed: int, epochs: int, model: str | None = None, **options):
    from scviaduct.distributed.config import FitConfig, TrackingConfig, TrainConfig
    from scviaduct.distributed.train import train

    config = TrainConfig(
        out=out,
        model=model or case.model,
        batch_key=case.batch_key or "dataset",
        fit=FitConfig(max_epochs=epochs, batch_size=128, seed=seed),
        tracking=TrackingConfig(tracking_uri="none"),
        **options,
    )
    return train(view.atlas_path, config)


def places(view, cells: ad.AnnData) -> np.ndarray:
    """(rows of the view,) the row in `cells` of each."""
    from scviaduct.storage.arrays import open_array

    starts = np.concatenate([[0], np.cumsum(cells.obs["dataset"].value_counts(sort=False))])
    ids = list(view.categories["dataset"])
    order = [list(cells.obs["dataset"].cat.categories).index(i) for i in ids]
    dataset, row = (np.asarray(open_array(view.path / "source" / n)[:]) for n in ("dataset", "row"))
    return starts[np.array(order)[dataset]] + row


def their_model(case: Case, cells: ad.AnnData, seed: int):
    import scvi
    from scvi.external import POISSONVI

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    data = cells.copy()
    key = case.batch_key
    if case.model == "totalvi":
        scvi.model.TOTALVI.setup_anndata(data, batch_key=key, protein_expression_obsm_key=PROTEINS)
        model = scvi.model.TOTALVI(data)
    elif case.model == "peakvi":
        scvi.model.PEAKVI.setup_anndata(data, batch_key=key)
        model = scvi.model.PEAKVI(data)
    elif case.model == "poissonvi":
        POISSONVI.setup_anndata(data, batch_key=key)
        model = POISSONVI(data)
    else:
        scvi.model.SCVI.setup_anndata(data, batch_key=key)
        model = scvi.model.SCVI(data)
    return model


def theirs(case: Case, model) -> np.ndarray:
    import scvi

    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    if case.model == "scanvi":
        model.train(max_epochs=2 * case.epochs, batch_size=128, **quiet)
        model = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category="Unknown", labels_key=HIDDEN)
    model.train(max_epochs=case.epochs, batch_size=128, **quiet)
    return model.get_latent_representation()


def score(path: Path) -> None:
    """Run by the interpreter that has scib-metrics: one JSON record of raw values."""
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    given = ad.read_h5ad(path)
    keys, several = list(given.obsm), given.obs["batch"].nunique() > 1
    obs = given.obs.astype("category")
    spaces = dict(given.obsm) | {"before": given.obsm[keys[0]]}
    cells = ad.AnnData(np.zeros((given.n_obs, 1), np.float32), obs=obs, obsm=spaces)
    bio = BioConservation(isolated_labels=several)
    correction = BatchCorrection(pcr_comparison=False) if several else None
    bench = Benchmarker(
        cells, "batch", "label", keys, bio_conservation_metrics=bio, batch_correction_metrics=correction,
        pre_integrated_embedding_obsm_key="before", n_jobs=2, progress_bar=False,
    )  # fmt: skip
    bench.benchmark()
    frame = bench.get_results(min_max_scale=False).drop(index="Metric Type").astype(float)
    frame = frame.join(many_starts(dict(given.obsm), obs["label"]))
    print(json.dumps(frame.to_dict()))


def many_starts(spaces: dict[str, np.ndarray], labels: pd.Series) -> pd.DataFrame:
    """NMI and ARI of the best of 20 k-means; scib-metrics' single one ends in another optimum in one of three seeds."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = {name: KMeans(labels.nunique(), n_init=20, random_state=0).fit_predict(z) for name, z in spaces.items()}
    scores = {"20 starts NMI": normalized_mutual_info_score, "20 starts ARI": adjusted_rand_score}
    return pd.DataFrame({of: {name: f(labels, c) for name, c in found.items()} for of, f in scores.items()})


if __name__ == "__main__":
    main()
