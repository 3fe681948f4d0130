"""totalVI through the jobs: panels that differ, one process and two Ray workers, queries of another panel or none."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scviaduct.distributed.background import background, tell_background
from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.differential import de
from scviaduct.distributed.loop import optimizer_of
from scviaduct.distributed.map import map
from scviaduct.distributed.outputs import decode
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError, DataError
from scviaduct.models.totalvi import TotalVI, TotalVIConfig
from scviaduct.schema import Covariate, Schema
from scviaduct.storage.convert import convert
from scviaduct.storage.loader import MemorySource
from scviaduct.storage.prepare import prepare
from scviaduct.storage.view import View

KEY = "protein_expression"
PROTEINS = tuple(f"CD{k}" for k in range(1, 13))
OPTIONS = {"model": "totalvi", "preset": "default", "max_epochs": 50, "lr": 4e-3, "n_epochs_kl_warmup": 50}
SMALL = ("n_hidden=32", "n_latent=5", "use_batch_norm=none", "use_layer_norm=both", "dropout_rate_encoder=0.05")


def with_proteins(data, panel, seed):
    """Every type has three proteins of its own at ten times the background."""
    rng = np.random.default_rng(seed)
    kind = data.obs["cell_type"].cat.codes.to_numpy()
    high = (np.arange(len(PROTEINS)) // 3)[None, :] == kind[:, None]
    counts = rng.poisson(rng.gamma(5.0, np.where(high, 40.0, 4.0)))
    frame = pd.DataFrame(counts, index=data.obs_names, columns=PROTEINS)
    data.obsm[KEY] = frame.reindex(columns=panel, fill_value=7)
    return data


@pytest.fixture(scope="module")
def cite_atlas(biology, tmp_path_factory):
    """Two data sets of 300 cells; the second panel lacks two proteins of the first, and its names are in uns."""
    folder = tmp_path_factory.mktemp("cite")
    first = with_proteins(biology.study(0, 300), list(PROTEINS), 0)
    second = with_proteins(biology.study(1, 300), list(PROTEINS[:1:-1]), 1)
    second.uns[f"{KEY}_names"] = np.array(second.obsm[KEY].columns, object)
    second.obsm[KEY] = second.obsm[KEY].to_numpy()
    for name, data in (("first", first), ("second", second)):
        data.write_h5ad(folder / f"{name}.h5ad")
    convert([folder / "first.h5ad", folder / "second.h5ad"], out=folder / "atlas.zarr", obsm=[KEY])
    prepare(folder / "atlas.zarr", genes="all", proteins=KEY, block_rows=64)
    return folder / "atlas.zarr"


@pytest.fixture(scope="module")
def cite_run(cite_atlas, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("totalvi") / "reference"
    train(cite_atlas, config(out, set=SMALL, **OPTIONS))
    return out


def test_a_reference_of_two_panels_is_trained(cite_run):
    bundle = Bundle.open(cite_run)
    assert bundle.schema.proteins == PROTEINS and bundle.schema.proteins_key == KEY
    assert np.array(bundle.schema.measured).sum(1).tolist() == [12, 10]
    history = bundle.facts["training"]["history"]
    assert history[-1]["elbo_train"] < 0.9 * history[0]["elbo_train"]
    weights = bundle.weights()
    assert weights["background_mean.weight"].shape == (2, 12) and "adversary.logits.weight" in weights
    # the prior began at what the cells look like, log(1 + 20), not at 3
    assert (weights["background_mean.weight"] - 3).abs().min() > 0.005


def test_queries_of_another_panel_and_of_none_are_mapped(cite_run, biology, map_config, tmp_path):
    other = with_proteins(biology.study(7, 120), [*PROTEINS[:2:-1], "CD99"], 7)
    bare = biology.study(8, 120)
    foreign = with_proteins(biology.study(9, 120), list(PROTEINS), 9)
    foreign.obsm[KEY].columns = [f"{name}_TotalSeq" for name in PROTEINS]
    for name, data in (("other", other), ("bare", bare), ("foreign", foreign)):
        data.write_h5ad(tmp_path / f"{name}.h5ad")
    queries = [tmp_path / f"{name}.h5ad" for name in ("other", "bare", "foreign")]
    summary = map(cite_run, queries, map_config(tmp_path / "mapped")).set_index("query")
    assert summary["status"].to_dict() == {"other": "mapped", "bare": "mapped", "foreign": "failed"}
    columns = ["proteins_matched", "proteins", "proteins_ignored"]
    assert summary.loc["other", columns].tolist() == [9, 12, 1]
    assert summary.loc["bare", columns].tolist() == [0, 12, 0]
    assert "none of the 12 proteins" in summary.loc["foreign", "message"]
    for name, least in (("other", 0.9), ("bare", 0.8)):
        result = ad.read_h5ad(tmp_path / "mapped" / f"{name}.h5ad")
        assert np.isfinite(result.obsm["X_totalVI"]).all()
        right = result.obs["cell_type_pred"].astype(str) == result.obs["cell_type"].astype(str)
        assert right.mean() > least
    rna = map(cite_run, queries[2:], map_config(tmp_path / "rna", proteins="none"))
    assert rna["status"].tolist() == ["mapped"] and rna["proteins_matched"].tolist() == [0]


def test_a_batch_that_is_reused_has_its_panel(cite_run, biology, map_config, tmp_path):
    data = with_proteins(biology.study(0, 60), list(PROTEINS[3:]), 3)
    data.write_h5ad(tmp_path / "again.h5ad")
    with pytest.raises(DataError, match=r"lack 3 proteins that the reference measured.*CD1\..*--reuse-batches"):
        map(cite_run, [tmp_path / "again.h5ad"], map_config(tmp_path / "out", reuse_batches=True))
    with_proteins(data, list(PROTEINS), 3).write_h5ad(tmp_path / "again.h5ad")
    summary = map(cite_run, [tmp_path / "again.h5ad"], map_config(tmp_path / "out", reuse_batches=True))
    assert summary[["status", "epochs"]].values.tolist() == [["mapped", 0]]


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_the_bits_of_one(cite_atlas, config, tmp_path):
    short = OPTIONS | {"max_epochs": 2, "deterministic": True, "set": SMALL, "n_lanes": 4}
    one, two = (train(cite_atlas, config(tmp_path / str(n), workers=n, **short)).weights() for n in (1, 2))
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor), name


def test_what_does_not_fit_is_refused(cite_atlas, atlas, config, tmp_path):
    with pytest.raises(ConfigError, match="use_batch_norm=none"):
        train(cite_atlas, config(tmp_path / "run", deterministic=True, set=("n_latent=5",), **OPTIONS))
    with pytest.raises(DataError, match="holds no proteins"):
        train(atlas, config(tmp_path / "run", set=SMALL, **OPTIONS))


def test_the_plan_is_scvi_tools(cite_atlas):
    plan = TotalVI.plan.settled(1000)
    assert (plan.lr, plan.batch_size, plan.n_steps_kl_warmup) == (4e-3, 256, 750)
    assert plan.early_stopping and plan.reduce_lr_on_plateau
    model = TotalVI(View.open(cite_atlas).schema(batch_key="study", proteins=True))
    first, second = optimizer_of(model, plan).groups
    assert (first.lr, second.lr) == (4e-3, 1e-3)
    assert {id(p) for p in second.parameters} == {id(p) for p in model.adversary.parameters()}
    assert len(first.parameters) + len(second.parameters) == len(list(model.parameters()))


@pytest.mark.parametrize("missing", [False, True])
def test_the_kl_weight_rises_as_in_scvi_tools(biology, monkeypatch, missing):
    """Step by step; where a batch lacks proteins, Lightning counts the steps of the adversary's optimiser as well."""
    import warnings

    cells = with_proteins(biology.study(0, 80), list(PROTEINS), 0)
    cells.obs["half"] = np.where(np.arange(80) < 40, "a", "b")
    if missing:
        cells.obsm[KEY].iloc[:40, :2] = 0
    weights = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi = pytest.importorskip("scvi")
        scvi.model.TOTALVI.setup_anndata(cells, batch_key="half", protein_expression_obsm_key=KEY)
        theirs = scvi.model.TOTALVI(cells, empirical_protein_background_prior=False, n_hidden=8)
        loss = theirs.module.loss

        def spy(*given, kl_weight, **further):
            if theirs.module.training:
                weights.append(float(kl_weight))
            return loss(*given, kl_weight=kl_weight, **further)

        monkeypatch.setattr(theirs.module, "loss", spy)
        quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
        theirs.train(max_epochs=5, batch_size=18, **quiet)
    measured = np.ones((2, len(PROTEINS)), bool)
    measured[0, :2] = not missing
    schema = Schema(
        genes=tuple(cells.var_names),
        batch=Covariate("half", ("a", "b")),
        proteins=PROTEINS,
        measured=tuple(tuple(row) for row in measured.tolist()),
    )
    plan = FitConfig().plan(TotalVI(schema, TotalVIConfig(n_hidden=8)).training_plan, cells.n_obs)
    assert len(weights) == 20
    assert [plan.kl_weight(step // 4, step) for step in range(20)] == pytest.approx(weights)


def test_the_background_s_prior_begins_as_in_scvi_tools(cite_atlas, monkeypatch):
    view = View.open(cite_atlas)
    schema = view.schema(batch_key="study", proteins=True)
    cells = view.source(schema).read(0)
    model = TotalVI(schema, TotalVIConfig(n_hidden=8))
    tell_background(model, MemorySource(cells))
    for batch, measured in enumerate(np.array(schema.measured)):
        counts = cells.proteins[cells.batch_index == batch][:, measured]
        mean, std = upstream_prior(counts, monkeypatch)
        # scikit-learn's fit starts at random there, and some cells have more than one optimum
        assert background(counts)[0] == pytest.approx(mean, rel=0.05)
        assert background(counts)[1] == pytest.approx(std, rel=0.15)
        told = (float(table.weight[batch, 0].detach()) for table in (model.background_mean, model.background_log_std))
        assert tuple(told) == pytest.approx((background(counts)[0], np.log(background(counts)[1])), rel=1e-6)
    assert background(np.zeros((3, 12), np.float32)) == pytest.approx((0.0, 0.05 / np.sqrt(3)))
    assert background(np.ones((3, 4), np.float32)) == (0.0, 0.05)


def upstream_prior(counts, monkeypatch):
    """Mean and scale of scvi-tools for one batch, all of whose cells it takes, once each."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi = pytest.importorskip("scvi")
        data = ad.AnnData(np.ones((len(counts), 3), np.float32), obsm={KEY: counts})
        scvi.model.TOTALVI.setup_anndata(data, protein_expression_obsm_key=KEY)
        model = scvi.model.TOTALVI(data, empirical_protein_background_prior=False, n_hidden=4)
    monkeypatch.setattr(np.random, "choice", lambda cells, size: cells if np.ndim(cells) else np.zeros(size, int))
    means, scales = model._get_totalvi_protein_priors(data, n_cells=len(counts))
    return float(means[0, 0]), float(scales[0, 0])


def test_denoised_proteins_and_which_differ(cite_run, cite_atlas, tmp_path):
    for what in ("foreground", "proteins", "protein_counts"):
        made = decode(cite_run, cite_atlas, out=tmp_path / f"{what}.h5ad", what=what, features=PROTEINS[2:])
        assert (made.cells, made.features) == (600, 10)
    foreground, proteins = (ad.read_h5ad(tmp_path / f"{what}.h5ad") for what in ("foreground", "proteins"))
    kind = foreground.obs["cell_type"].str[-1].astype(int).to_numpy()
    own = (np.arange(2, 12) // 3)[None, :] == kind[:, None]
    assert foreground.var_names.tolist() == list(PROTEINS[2:])
    assert foreground.X[own].mean() > foreground.X[~own].mean() + 0.3
    assert proteins.X[own].mean() > 3 * proteins.X[~own].mean()
    table = de(cite_run, cite_atlas, groupby="cell_type", group1=["type 01"], what="proteins", pseudocounts=0.1)
    decode(cite_run, cite_atlas, out=tmp_path / "drawn.h5ad", what="proteins", n_samples=10)
    drawn = ad.read_h5ad(tmp_path / "drawn.h5ad")
    for column, group in (("scale1", kind == 1), ("scale2", kind != 1)):
        means = pd.Series(np.asarray(drawn.X)[group].mean(0), drawn.var_names)
        np.testing.assert_allclose(table[column], means.loc[table.index], rtol=0.1)
    assert table.loc["CD4", "proba_de"] > 0.9 and table.loc["CD4", "raw_mean1"] > 3 * table.loc["CD4", "raw_mean2"]
