"""embed, decode, evaluate and de over an atlas and over files: what is written, and that nothing depends on blocks."""

import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scviaduct.distributed import population
from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import Reading
from scviaduct.distributed.differential import de
from scviaduct.distributed.evaluate import evaluate
from scviaduct.distributed.outputs import decode, embed
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError, DataError, IncompleteError, OutputExistsError
from scviaduct.models.base import Quantity
from scviaduct.models.counts import Cells
from scviaduct.models.noise import Noise
from scviaduct.models.peakvi import PeakVI, PeakVIConfig
from scviaduct.storage import arrays, export
from scviaduct.storage import derived as derived_module
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.derived import derived
from scviaduct.storage.loader import stream
from scviaduct.storage.view import View


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's and zarr's, of the format's version
        return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


@pytest.fixture(scope="module")
def bundle(run):
    return Bundle.open(run)


@pytest.fixture(scope="module")
def known_file(biology, tmp_path_factory):
    """Cells of a study that the model knows: two have no counts, genes are in another order, five are missing."""
    data = biology.study(1, 120)
    data = data[:, np.random.default_rng(0).permutation(data.n_vars)[5:]].copy()
    data.X = data.X.multiply((~np.isin(np.arange(120), (0, 119)))[:, None]).tocsr()
    path = tmp_path_factory.mktemp("known") / "known.h5ad"
    data.write_h5ad(path)
    return path


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_latent_space_of_an_atlas(run, bundle, atlas, tmp_path, suffix):
    out = tmp_path / f"latent{suffix}"
    made = embed(run, atlas, out=out)
    result = read(out)
    assert (made.cells, made.features, made.without) == (900, 5, 0)
    np.testing.assert_allclose(result.obsm["X_scVI"], bundle.latent(), rtol=1e-4, atol=1e-5)
    # cell by cell: the name, the data set and the columns are those of the source
    store = Atlas.open(atlas)
    whole = pd.concat([store.obs(d.id) for d in store.datasets]).loc[result.obs_names]
    assert result.obs["study"].astype(str).tolist() == whole["study"].astype(str).tolist()
    assert result.obs["cell_type"].astype(str).tolist() == whole["cell_type"].astype(str).tolist()
    assert result.obs["dataset"].nunique() == 3 and result.obs_names.is_unique
    assert result.uns["scviaduct"]["model"] == "scvi"
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_a_file_s_genes_are_aligned_and_empty_cells_have_no_result(run, known_file, tmp_path):
    made = embed(run, known_file, out=tmp_path / "latent.h5ad")
    result = read(tmp_path / "latent.h5ad")
    assert (made.cells, made.without) == (120, 2)
    assert np.isnan(result.obsm["X_scVI"]).all(1).nonzero()[0].tolist() == [0, 119]
    assert result.obs["cell_type"].notna().all()
    decode(run, known_file, out=tmp_path / "x.zarr", features=["ENSG00000000007"])
    x = np.asarray(read(tmp_path / "x.zarr").X)
    assert np.isnan(x).all(1).nonzero()[0].tolist() == [0, 119]


def by_hand(bundle, atlas, quantity, code=None, seed=None):
    model = bundle.model()
    rows = []
    with stream(View.open(atlas).source(bundle.schema)) as blocks:
        for batch in blocks:
            noise = None if seed is None else Noise(population.seeds(batch, seed, 0))
            rows.append(model.decoded(batch, quantity, noise, transform_batch=code))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_normalised_expression_is_streamed(run, bundle, atlas, tmp_path, monkeypatch, suffix):
    out = tmp_path / f"x{suffix}"
    monkeypatch.setattr(derived_module, "_STEP", 5000)  # many shards, and blocks that end inside them
    monkeypatch.setattr(derived_module, "_CHUNK", 700)
    monkeypatch.setattr(population, "_VALUES", 300 * 25)
    genes = [bundle.schema.genes[i] for i in (7, 2, 299)]
    made = decode(run, atlas, out=out, features=genes, library_size=1e4, transform_batch=["study 2", "study 0"])
    result = read(out)
    assert made.features == 3 and result.var_names.tolist() == genes
    quantity = Quantity(name="expression", library_size=1e4, features=(7, 2, 299))
    expected = (by_hand(bundle, atlas, quantity, 2) + by_hand(bundle, atlas, quantity, 0)) / 2
    np.testing.assert_allclose(np.asarray(result.X), expected, rtol=1e-4)
    assert result.uns["scviaduct"]["library_size"] == 1e4


def test_draws_belong_to_cells_whatever_the_blocks(run, bundle, atlas, tmp_path, monkeypatch):
    quantity = Quantity(name="expression", library_size=None)
    (tmp_path / "genes.txt").write_text("\n".join(bundle.schema.genes))
    options = {"library_size": "latent", "n_samples": 3, "seed": 4, "features": tmp_path / "genes.txt"}
    decode(run, atlas, out=tmp_path / "one.h5ad", **options)
    monkeypatch.setattr(population, "_VALUES", 300 * 7)
    decode(run, atlas, out=tmp_path / "other.zarr", **options)
    one, other = (np.asarray(read(tmp_path / name).X) for name in ("one.h5ad", "other.zarr"))
    np.testing.assert_allclose(one, other, rtol=1e-4)
    assert not np.allclose(one, by_hand(bundle, atlas, quantity), rtol=1e-2)
    decode(run, atlas, out=tmp_path / "first.h5ad", **options | {"n_samples": 1})
    first = np.asarray(read(tmp_path / "first.h5ad").X)
    np.testing.assert_allclose(first, by_hand(bundle, atlas, quantity, seed=4), rtol=1e-4)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_posterior_predictive_counts_are_sparse_layers(run, bundle, atlas, known_file, tmp_path, suffix):
    out = tmp_path / f"counts{suffix}"
    decode(run, atlas, out=out, what="counts", n_samples=2)
    result = read(out)
    one, two = result.layers["draw_0"], result.layers["draw_1"]
    assert sp.issparse(one) and one.shape == (900, 300) and (one != two).nnz > 1000
    assert (one.data == np.round(one.data)).all() and one.data.min() >= 1
    assert (one.toarray() != by_hand(bundle, atlas, Quantity(name="counts"), seed=0)).mean() < 1e-4
    decode(run, known_file, out=tmp_path / f"file{suffix}", what="counts")
    x = read(tmp_path / f"file{suffix}").X
    assert x.shape == (120, 300) and x[[0, 119]].nnz == 0 and (x[1:119].sum(1) > 0).all()


def test_evaluation_is_that_of_each_cell(run, bundle, atlas, tmp_path, monkeypatch):
    found = evaluate(run, atlas, n_samples=2, n_mc_samples=30, out=tmp_path / "scores.h5ad")
    obs = read(tmp_path / "scores.h5ad").obs
    for name in ("elbo", "reconstruction_error", "kl", "log_likelihood"):
        assert getattr(found, name) == pytest.approx(obs[name].mean())
    np.testing.assert_allclose(obs["elbo"], -obs["reconstruction_error"] - obs["kl"], rtol=1e-6)
    # importance sampling with more draws is a tighter bound
    assert found.log_likelihood > found.elbo and (obs["log_likelihood"] > obs["elbo"] - 5).all()
    model, batch = bundle.model(), View.open(atlas).source(bundle.schema).read(3)
    with model.evaluating():
        cells = Cells.of(batch, model.schema, model.device)
        q = model.inference(cells, None)
        parts = [model.score(q, cells, Noise(population.seeds(batch, 0, k))) for k in range(2)]
    elbo = sum(p.log_likelihood - p.kl for p in parts) / 2
    np.testing.assert_allclose(obs["elbo"].to_numpy()[batch.rows], elbo.numpy(), rtol=1e-4)
    monkeypatch.setattr(population, "_VALUES", 300 * 9)
    again = evaluate(run, atlas, n_samples=2)
    assert again.elbo == pytest.approx(found.elbo, rel=1e-5) and again.log_likelihood is None


def test_scanvi_predicts(atlas, known_file, config, tmp_path):
    out = tmp_path / "scanvi"
    train(atlas, config(out, model="scanvi", max_epochs=4))
    embed(out, known_file, out=tmp_path / "predicted.h5ad", predict=True)
    result = read(tmp_path / "predicted.h5ad")
    soft = result.obsm["cell_type_probabilities"]
    names = list(result.uns["scviaduct"]["cell_type_probabilities_names"])
    there = np.arange(1, 119)
    np.testing.assert_allclose(soft[there].sum(1), 1, rtol=1e-5)
    assert [names[k] for k in soft[there].argmax(1)] == result.obs["cell_type_classified"].iloc[there].tolist()
    np.testing.assert_allclose(result.obs["cell_type_probability"].iloc[there], soft[there].max(1), rtol=1e-6)
    assert result.obs["cell_type_classified"].iloc[[0, 119]].isna().all() and np.isnan(soft[[0, 119]]).all()


def test_peaks_have_depths_and_factors(atlas, tmp_path):
    view = View.open(atlas)
    schema = view.schema(batch_key="study")
    torch.manual_seed(0)
    model = PeakVI(schema, PeakVIConfig()).eval()
    torch.nn.init.normal_(model.region_logits)
    facts = {
        "model": "peakvi",
        "name": "peaks",
        "training": {"cells": 0, "epochs": 0, "history": [], "mlflow_run": None},
    }
    Bundle.save(tmp_path / "peaks", model, facts, {})
    embed(tmp_path / "peaks", atlas, out=tmp_path / "latent.h5ad")
    block = view.source(schema).read(0)
    obs = read(tmp_path / "latent.h5ad").obs
    np.testing.assert_allclose(obs["depth"].to_numpy()[block.rows], model.depths(block).numpy(), rtol=1e-4)
    decode(tmp_path / "peaks", atlas, out=tmp_path / "p.h5ad", normalize_regions=True, features=list(schema.genes[5:9]))
    result = read(tmp_path / "p.h5ad")
    np.testing.assert_allclose(result.var["region_factor"], model.region_factors()[5:9].numpy(), rtol=1e-6)
    expected = model.decoded(block, Quantity(name="accessibility", normalize_regions=True, features=(5, 6, 7, 8)))
    np.testing.assert_allclose(np.asarray(result.X)[block.rows], expected.numpy(), rtol=1e-4)
    table = de(tmp_path / "peaks", atlas, groupby="cell_type", group1=["type 00"], n_samples=100)
    assert set(table.index) == set(schema.genes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"what": "proteins"}, ConfigError, "SCVI does not give 'proteins'; available: 'expression', 'counts'"),
        ({"features": ["ENSG0007"]}, ConfigError, "model's genes lack 1 of those named, e.g. 'ENSG0007'; did you mean"),
        ({"transform_batch": ["study 7"]}, ConfigError, r"batches \(study\) lack 1 .* did you mean 'study"),
        ({"normalize_cells": True}, ConfigError, "normalize_cells does not concern 'expression'"),
        ({"what": "counts", "library_size": 10}, ConfigError, "library_size does not concern 'counts'"),
        (
            {"what": "counts", "transform_batch": ["study 0", "study 1"]},
            ConfigError,
            "drawn for one batch; 2 were named",
        ),
        ({"n_samples": 0}, ConfigError, "n_samples must be at least 1"),
        ({"out": "x.csv"}, ConfigError, "name it x.h5ad or x.zarr"),
        ({"reading": Reading(batch_key="study")}, ConfigError, "batch_key is an option for a file"),
        ({"reading": Reading(view="other")}, IncompleteError, "scviaduct prepare"),
    ],
)
def test_what_cannot_be_decoded_is_said_and_leaves_nothing(run, atlas, tmp_path, options, error, message):
    out = tmp_path / options.pop("out", "x.h5ad")
    with pytest.raises(error, match=message):
        decode(run, atlas, out=out, **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_batches_are_mapped_first(run, query_file, atlas, tmp_path):
    with pytest.raises(
        DataError, match=r"1 categories of 'study' are unknown to the model.*scviaduct map MODEL query\.h5ad"
    ):
        embed(run, query_file, out=tmp_path / "x.h5ad")
    with pytest.raises(ConfigError, match="view is an option for an atlas"):
        embed(run, query_file, out=tmp_path / "x.h5ad", reading=Reading(view="default"))
    with pytest.raises(ConfigError, match="SCVI has no classifier"):
        embed(run, atlas, out=tmp_path / "x.h5ad", predict=True)
    (tmp_path / "x.h5ad").touch()
    with pytest.raises(OutputExistsError, match="nothing was written"):
        embed(run, atlas, out=tmp_path / "x.h5ad")


def write(out, values, sparse, between=lambda store: None):
    names = [pd.DataFrame(index=[str(k) for k in range(n)]) for n in values.shape]
    with derived(out, len(values)) as store:
        store.matrix("X", values.shape[1], sparse=sparse).append(values)
        between(store)
        store.describe(*names, {})


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_disk_that_loses_data_is_noticed(tmp_path, monkeypatch, suffix, sparse):
    values = np.random.default_rng(0).random((50, 8), np.float32)
    monkeypatch.setattr(derived_module, "_STEP", 100)
    monkeypatch.setattr(derived_module, "_CHUNK", 40)
    write(tmp_path / f"good{suffix}", values, sparse)
    x = read(tmp_path / f"good{suffix}").X
    assert sp.issparse(x) == sparse
    np.testing.assert_array_equal(x.toarray() if sparse else np.asarray(x), values)

    def change(store):
        store._root["X"][3] = np.full(8, 7, np.float32)

    def other(values, *rest, encode, **options):
        return encode(values + values.dtype.type(values.dtype == np.float32), *rest, **options)

    if sparse:
        module, name = (export, "_deflate") if suffix == ".h5ad" else (arrays, "encode_shard")
        monkeypatch.setattr(module, name, partial(other, encode=getattr(module, name)))
    with pytest.raises(IncompleteError, match="read back"):
        write(tmp_path / f"bad{suffix}", values, sparse, (lambda store: None) if sparse else change)
    assert [p.name for p in tmp_path.iterdir()] == [f"good{suffix}"]


def test_a_failure_leaves_nothing(tmp_path):
    for suffix in (".h5ad", ".zarr"):
        with pytest.raises(RuntimeError), derived(tmp_path / f"x{suffix}", 5) as store:
            store.matrix("X", 2).append(np.zeros((3, 2), np.float32))
            raise RuntimeError
        with pytest.raises(ValueError, match="3 of 5 rows"), derived(tmp_path / f"x{suffix}", 5) as store:
            store.matrix("X", 2).append(np.zeros((3, 2), np.float32))
    assert list(tmp_path.iterdir()) == []
