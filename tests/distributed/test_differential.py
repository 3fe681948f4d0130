"""Differential expression: the formulas and whole tables against scvi-tools, known genes, what is read."""

import logging
import warnings
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from scviaduct.distributed import population
from scviaduct.distributed.bayes import Hypothesis, is_de, pseudocount
from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import Reading
from scviaduct.distributed.differential import Sampled, de
from scviaduct.distributed.evaluate import evaluate
from scviaduct.distributed.outputs import Decoder, decode, embed
from scviaduct.errors import ConfigError, DataError, MissingColumnError, OutputExistsError
from scviaduct.models.base import Quantity
from scviaduct.models.scvi import SCVI, SCVIConfig
from scviaduct.models.upstream import load_upstream
from scviaduct.schema import Covariate, Schema
from scviaduct.storage.view import View

FACTS = {"training": {"cells": 0, "epochs": 0, "history": [], "mlflow_run": None}}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only get in each other's way with nets this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def upstream(biology, tmp_path_factory):
    """A model that scvi-tools trained, its data as a file, and the same weights in a bundle of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi = pytest.importorskip("scvi")
        data = ad.concat([biology.study(number, 300) for number in (0, 1)])[:, :200].copy()
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(data, batch_key="study")
        theirs = scvi.model.SCVI(data, n_hidden=32, n_latent=5, gene_likelihood="nb")
        theirs.train(
            max_epochs=30, plan_kwargs={"lr": 5e-3, "n_epochs_kl_warmup": 15}, enable_progress_bar=False, logger=False,
            enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("upstream")
        data.write_h5ad(folder / "data.h5ad")
    schema = Schema(genes=tuple(data.var_names), batch=Covariate("study", ("study 0", "study 1")))
    ours = SCVI(schema, SCVIConfig(n_hidden=32, n_latent=5, gene_likelihood="nb"))
    load_upstream(ours, theirs.module.state_dict())
    Bundle.save(folder / "bundle", ours, FACTS | {"model": "scvi", "name": "upstream"}, {})
    return SimpleNamespace(theirs=theirs, data=data, bundle=folder / "bundle", file=folder / "data.h5ad")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="scvi")
        warnings.filterwarnings("ignore", message=".*chunks is larger.*")
        yield


def test_latent_space_and_expression_are_scvi_tools(upstream, tmp_path, monkeypatch):
    embed(upstream.bundle, upstream.file, out=tmp_path / "z.h5ad")
    latent = ad.read_h5ad(tmp_path / "z.h5ad").obsm["X_scVI"]
    np.testing.assert_allclose(latent, upstream.theirs.get_latent_representation(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda dist, shape=(): dist.loc)
    genes = list(upstream.data.var_names[[3, 50, 199]])
    expected = upstream.theirs.get_normalized_expression(
        transform_batch=["study 0", "study 1"], gene_list=genes, library_size=1e4
    )
    options = {"transform_batch": ["study 0", "study 1"], "features": genes, "library_size": 1e4}
    decode(upstream.bundle, upstream.file, out=tmp_path / "x.h5ad", **options)
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    assert found.obs_names.equals(expected.index) and found.var_names.equals(expected.columns)
    np.testing.assert_allclose(found.X, expected, rtol=1e-4)


def test_scores_are_scvi_tools(upstream):
    """Both are means over random draws; they differ by a few standard errors at most."""
    ours = evaluate(upstream.bundle, upstream.file, n_samples=10, n_mc_samples=50)
    elbos = [float(upstream.theirs.get_elbo()) for _ in range(10)]
    errors = [float(upstream.theirs.get_reconstruction_error()["reconstruction_loss"]) for _ in range(10)]
    spread = max(np.std(elbos), np.std(errors))
    assert abs(ours.elbo - np.mean(elbos)) < 2 * spread + 0.02
    assert abs(ours.reconstruction_error - np.mean(errors)) < 2 * spread + 0.02
    # its own mean is one of minibatches' means, in which the last, small one weighs as much as any
    theirs = upstream.theirs.get_marginal_ll(n_mc_samples=50, n_mc_samples_per_pass=50, return_mean=False)
    assert abs(ours.log_likelihood - float(theirs.mean())) < 0.1
    assert ours.elbo + 0.5 < ours.log_likelihood


@pytest.mark.parametrize("correct", [False, True], ids=["own batches", "batch correction"])
@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_tables_are_scvi_tools(upstream, mode, correct):
    options = {"groupby": "cell_type", "mode": mode, "batch_correction": correct}
    theirs = upstream.theirs.differential_expression(
        **options, group1="type 00", group2="type 01", silent=True, fdr_target=0.05, delta=0.3
    )
    ours = de(upstream.bundle, upstream.file, **options, group1=["type 00"], group2="type 01", delta=0.3)
    assert set(theirs.columns) == set(ours.columns) and theirs["comparison"].iloc[0] == ours["comparison"].iloc[0]
    theirs = theirs.loc[ours.index]
    for name in (c for c in theirs if c.startswith(("raw_", "non_zeros"))):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours["scale1"], theirs["scale1"], rtol=0.05, atol=1e-5)
    p = "proba_de" if mode == "change" else "proba_m1"
    assert (ours[p] - theirs[p]).abs().max() < 0.06 and (ours[p] - theirs[p]).abs().mean() < 0.015
    assert ours["bayes_factor"].is_monotonic_decreasing
    if mode == "change":
        assert spearmanr(ours["lfc_mean"], theirs["lfc_mean"]).statistic > 0.99
        assert ours["pseudocounts"].iloc[0] == pytest.approx(theirs["pseudocounts"].iloc[0], rel=0.3)
        both, either = (
            f(ours["is_de_fdr_0.05"], theirs["is_de_fdr_0.05"]).sum() for f in (np.logical_and, np.logical_or)
        )
        assert both > 0.85 * either > 0


def test_genes_that_differ_come_first(upstream, biology):
    table = de(upstream.bundle, upstream.file, groupby="cell_type", group1=["type 01"], group2="type 02")
    change = biology.profiles[1, :200] - biology.profiles[2, :200]
    truth = pd.Series(change, upstream.data.var_names).loc[table.index]
    strong, none = table["proba_de"][truth.abs() > 1], table["proba_de"][truth == 0]
    assert (strong.to_numpy()[:, None] > none.to_numpy()).mean() > 0.9  # area under the ROC curve
    high = truth.abs() > 1
    assert (np.sign(table["lfc_mean"][high]) == np.sign(truth[high])).mean() >= 0.9


@pytest.fixture(scope="module")
def scores():
    """Posterior draws as they may be: 400 pairs of 30 features, some hardly seen."""
    rng = np.random.default_rng(0)
    base = rng.lognormal(-6, 2, 30)
    one = rng.lognormal(np.log(base), 0.3, (400, 30)).astype(np.float32)
    two = rng.lognormal(np.log(base * rng.choice([1, 1, 2, 0.4], 30)), 0.3, (400, 30)).astype(np.float32)
    return one, two, base < 1e-3


@pytest.mark.parametrize("sides", ["three", "two"])
def test_formulas_are_scvi_tools(scores, sides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        differential = pytest.importorskip("scvi.model.base._differential")
        core = pytest.importorskip("scvi.model.base._de_core")
    one, two, unseen = scores
    offset = differential.estimate_pseudocounts_offset(one, two, unseen, unseen)
    assert pseudocount(one, two, unseen, unseen) == pytest.approx(float(offset), rel=1e-6)
    found = Hypothesis(delta=0.5, sides=sides)(one, two, (unseen, unseen))
    change = np.log2(one + offset) - np.log2(two + offset)
    up, down = (change >= 0.5).mean(0), (change < -0.5).mean(0)
    np.testing.assert_allclose(found["proba_de"], up + down if sides == "two" else np.maximum(up, down), atol=0.003)
    described = differential.describe_continuous_distrib(np.log2(one + 1e-3 * offset) - np.log2(two + 1e-3 * offset))
    for name, values in described.items():
        np.testing.assert_allclose(found[f"lfc_{name}"], values, rtol=1e-3, atol=1e-4)
    for fdr in (0.01, 0.05, 0.3):
        expected = core._fdr_de_prediction(found["proba_de"], fdr)
        assert is_de(found["proba_de"].to_numpy(), fdr).sum() == expected.sum()
    auto = Hypothesis(delta="auto")(one, two, (unseen, unseen))["delta"].iloc[0]
    assert auto == pytest.approx(float(differential.estimate_delta(change.mean(0))), rel=0.1)


def test_pseudocounts_without_unseen_features(scores):
    one, two, unseen = scores
    assert pseudocount(one, two, np.zeros_like(unseen), np.zeros_like(unseen)) == 1e-10
    assert pseudocount(one, two, None, None) == 1e-10


def test_a_rare_set_of_discoveries():
    assert is_de(np.array([0.2, 0.99, 0.9]), 0.05).tolist() == [False, True, False]
    assert is_de(np.array([0.2, 0.99, 0.92]), 0.05).tolist() == [False, True, True]
    assert not is_de(np.array([0.2, 0.3]), 0.05).any()


def test_only_blocks_that_hold_the_sample_are_read(run, atlas, monkeypatch):
    bundle = Bundle.open(run)
    cells = population.open_population(atlas, bundle.schema, Reading())
    decoder = Decoder.of(bundle.model(), Quantity(name="expression"), seed=3)
    codes, _ = cells.groups("cell_type")
    rows = np.flatnonzero(codes == 0)
    opened, original = [], cells.source.read
    monkeypatch.setattr(cells.source, "read", lambda block: opened.append(block) or original(block))
    draws = Sampled(decoder, (None,), 30).draws(cells, rows)
    assert draws.shape == (30, 300) and len(opened) <= 5 < -(-cells.source.n_rows // cells.source.block_rows)
    chosen = cells.sampled(rows, 30, 3)
    assert len(chosen) == 30 and np.isin(chosen, rows).all() and len(np.unique(chosen)) == 30
    np.testing.assert_array_equal(chosen, cells.sampled(rows[::-1], 30, 3))
    assert not np.array_equal(chosen, cells.sampled(rows, 30, 4))
    for n in (1, len(rows) - 1, len(rows), len(rows) + 9):
        assert len(np.unique(cells.sampled(rows, n, 3))) == min(n, len(rows))
    # every cell is drawn in the end, and the blocks that are held at once change nothing
    everything = Sampled(decoder, (None,), 2 * len(rows)).draws(cells, rows)
    monkeypatch.setattr(population, "_VALUES", 300 * 5)
    monkeypatch.setattr(population, "_BLOCKS", 2)
    again = Sampled(decoder, (None,), 2 * len(rows)).draws(cells, rows)
    np.testing.assert_allclose(everything, again, rtol=1e-3)


def test_draws_are_decoded_as_cells_of_their_batch(run, atlas):
    """With a fixed cell and no noise in the latent state the two halves of the draws are the two batches."""
    bundle = Bundle.open(run)
    cells = population.open_population(atlas, bundle.schema, Reading())
    model, quantity = bundle.model(), Quantity(name="expression")
    draws = Sampled(Decoder.of(model, quantity), (2, 0), 1000).draws(cells, np.array([5]))
    one = population.gather([(cells.source.read(0), np.array([5]))])
    means = [draws[:500].mean(0), draws[500:].mean(0)]
    for mean, code in zip(means, (2, 0), strict=True):
        at = model.decoded(one, quantity, transform_batch=code)[0].numpy()
        other = model.decoded(one, quantity, transform_batch=2 - code)[0].numpy()
        assert np.abs(np.log(mean / at)).mean() < 0.5 * np.abs(np.log(mean / other)).mean()


def test_every_group_against_the_rest(run, atlas, tmp_path):
    told = []
    table = de(
        run, atlas, groupby="cell_type", n_samples=200, out=tmp_path / "de.csv", on_progress=lambda *at: told.append(at)
    )
    names = ["type 00", "type 01", "type 02"]
    assert table["comparison"].unique().tolist() == [f"{n} vs Rest" for n in names] and told[-1] == (3, 3)
    assert len(table) == 900 and table["raw_mean2"].notna().all()
    written = pd.read_csv(tmp_path / "de.csv", index_col="feature")
    pd.testing.assert_frame_equal(written, table, check_names=False, check_dtype=False, check_index_type=False)
    # the rest is what the other two hold
    view = View.open(atlas)
    batch = [view.source(Bundle.open(run).schema).read(b) for b in range(15)]
    codes = view.source(Bundle.open(run).schema).strata("cell_type")
    dense = np.concatenate([population_counts(b) for b in batch])
    first = table[table["group1"] == "type 00"].loc[list(view.genes)]
    order = view.categories["cell_type"].index("type 00")
    np.testing.assert_allclose(first["raw_mean2"], dense[codes != order].mean(0), rtol=1e-6)
    np.testing.assert_allclose(first["non_zeros_proportion1"], (dense[codes == order] > 0).mean(0), rtol=1e-6)


def population_counts(batch):
    x = np.zeros((batch.n_cells, batch.n_genes))
    x[np.repeat(np.arange(batch.n_cells), np.diff(batch.indptr)), batch.indices] = batch.data
    return x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groupby": "celltype"}, MissingColumnError, "did you mean 'cell_type'"),
        ({"group1": ["type 0"]}, DataError, "No cell has 'type 0' in 'cell_type'; did you mean 'type 0"),
        ({"group1": ["type 00"], "group2": "type 00"}, DataError, "cannot be compared with itself"),
        ({"what": "counts"}, ConfigError, "'counts' are random draws; compare expression"),
        ({"mode": "changes"}, ConfigError, "neither 'vanilla' nor 'change'"),
        ({"delta": -1.0}, ConfigError, "delta=-1.0 must be 0 or more"),
        ({"fdr": 5.0}, ConfigError, "between 0 and 1"),
        ({"pseudocounts": 0.0}, ConfigError, "must be above 0"),
        ({"transform_batch": ["study 0"]}, ConfigError, "add batch_correction"),
        ({"n_samples": 1}, ConfigError, "at least 2"),
    ],
)
def test_what_cannot_be_compared_is_said(run, atlas, options, error, message):
    with pytest.raises(error, match=message):
        de(run, atlas, **{"groupby": "cell_type"} | options)


def test_a_table_is_not_overwritten(run, atlas, tmp_path):
    (tmp_path / "de.csv").touch()
    with pytest.raises(OutputExistsError, match="nothing was written"):
        de(run, atlas, groupby="cell_type", out=tmp_path / "de.csv")
