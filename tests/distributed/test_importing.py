"""Models of scvi-tools and scArches become bundles, and bundles models of scvi-tools, with the same latents and weights."""

import dataclasses
import importlib
import json
import pickle
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.exporting import export_model
from scviaduct.distributed.importing import import_model
from scviaduct.distributed.map import map as map_queries
from scviaduct.distributed.proof import random_cells
from scviaduct.errors import ConfigError, DataError, OutputExistsError, UnreadableFileError
from scviaduct.models.counts import Cells
from scviaduct.models.peakvi import PeakVI
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.totalvi import TotalVI
from scviaduct.models.upstream import load_upstream
from scviaduct.schema import Covariate, Schema

REAL = Path(__file__).parents[3] / "shared" / "data" / "models"
GOLDEN = Path(__file__).parents[1] / "golden" / "trvae"
SMALL = {"n_hidden": 12, "n_latent": 4}
COVARIATES = {"categorical_covariate_keys": ["donor", "site"], "continuous_covariate_keys": ["age", "dose"]}


@pytest.fixture(scope="module")
def scvi():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        found = pytest.importorskip("scvi")
        importlib.import_module("scvi.external")
    return found


@pytest.fixture(autouse=True)
def quiet():
    """scvi-tools warns of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_cells(seed=0, n=120, genes=30, batches=("b1", "b2", "b3")):
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.5, 2.0, (n, genes))).astype(np.float32)
    x[:, 0] += 1
    obs = pd.DataFrame(
        {
            "batch": np.array(batches)[np.arange(n) % len(batches)],
            "run": np.arange(n) % 3 + 7,
            "type": np.array(["T", "A", "B", "C"])[rng.integers(0, 4, n)],
            "donor": np.array(["d2", "d1"])[rng.integers(0, 2, n)],
            "site": np.array(["s1", "s2", "s3"])[rng.integers(0, 3, n)],
            "age": rng.normal(size=n),
            "dose": rng.normal(size=n),
            "sf": rng.uniform(1, 9, n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    adata = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene, {g}" for g in range(genes)]))
    names = [f"p{k}" for k in range(5)]
    proteins = rng.poisson(20, (n, 5)).astype(np.float32)
    proteins[np.ix_(obs["batch"].to_numpy() == "b2", [1, 3])] = 0  # b2 has another panel
    adata.obsm["adt"] = pd.DataFrame(proteins, index=obs.index, columns=names)
    return adata


@pytest.fixture(scope="module")
def cells():
    return make_cells()


CASES = {
    "SCVI": ("SCVI", {"batch_key": "batch"}, {}),
    "SCVI, no batch": ("SCVI", {}, {"n_layers": 2}),
    "SCVI, scarches, covariates": (
        "SCVI",
        {"batch_key": "run", "labels_key": "type"} | COVARIATES,
        {
            "n_layers": 2,
            "encode_covariates": True,
            "deeply_inject_covariates": False,
            "use_layer_norm": "both",
            "use_batch_norm": "none",
            "gene_likelihood": "nb",
            "dispersion": "gene-batch",
        },
    ),
    "SCVI, deep": ("SCVI", {"batch_key": "batch"} | COVARIATES, {"n_layers": 3, "encode_covariates": True}),
    "SCVI, gene-label": ("SCVI", {"batch_key": "batch", "labels_key": "type"}, {"dispersion": "gene-label"}),
    "SCVI, gene-label without labels": ("SCVI", {"batch_key": "batch"}, {"dispersion": "gene-label"}),
    "SCVI, gene-cell, normal": (
        "SCVI",
        {"batch_key": "batch"},
        {"dispersion": "gene-cell", "gene_likelihood": "normal"},
    ),
    "SCVI, size factor, poisson": (
        "SCVI",
        {"batch_key": "batch", "size_factor_key": "sf"},
        {"gene_likelihood": "poisson"},
    ),
    "SCVI, latent library": ("SCVI", {"batch_key": "batch"}, {"use_observed_lib_size": False}),
    "SCANVI": ("SCANVI", {"batch_key": "batch", "labels_key": "type", "unlabeled_category": "B"}, {"n_layers": 2}),
    "SCANVI, linear, covariates": (
        "SCANVI",
        {"labels_key": "type", "unlabeled_category": "B"} | COVARIATES,
        {"linear_classifier": True, "encode_covariates": True},
    ),
    "TOTALVI": ("TOTALVI", {"batch_key": "batch", "protein_expression_obsm_key": "adt"}, {}),
    "TOTALVI, covariates": (
        "TOTALVI",
        {"batch_key": "batch", "protein_expression_obsm_key": "adt"} | COVARIATES,
        {
            "gene_likelihood": "zinb",
            "gene_dispersion": "gene-batch",
            "protein_dispersion": "protein-batch",
            "n_layers_decoder": 2,
            "use_batch_norm": "none",
            "extra_decoder_kwargs": {"activation_function_bg": "exp"},
        },
    ),
    "PEAKVI": ("PEAKVI", {"batch_key": "batch"} | COVARIATES, {}),
    "PEAKVI, encoded": (
        "PEAKVI",
        {"batch_key": "batch", "labels_key": "type"},
        {
            "encode_covariates": True,
            "deeply_inject_covariates": True,
            "use_batch_norm": "both",
            "region_factors": False,
        },
    ),
    "PEAKVI, no depth": ("PEAKVI", {}, {"model_depth": False}),
    "POISSONVI": ("POISSONVI", {"batch_key": "batch"}, {"encode_covariates": True}),
}


def model_class(scvi, kind):
    return getattr(scvi.external if kind == "POISSONVI" else scvi.model, kind)


def make_model(scvi, kind, setup, options, adata):
    """An untrained model whose tensors are all random; batch norms too."""
    torch.manual_seed(0)
    cls = model_class(scvi, kind)
    cls.setup_anndata(adata, **setup)
    small = {} if kind in ("PEAKVI", "POISSONVI") else SMALL
    model = cls(adata, **small | options)
    for name, tensor in model.module.state_dict().items():
        if "running_var" in name or name.endswith(".1.weight"):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
        elif tensor.is_floating_point() and name not in ("y_prior", "library_log_vars"):
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.is_trained_ = True
    model.module.eval()
    return model


def latent(model, adata=None):
    return model.get_latent_representation(adata)


def elbo(model):
    torch.manual_seed(1)
    return float(model.get_elbo())


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, scvi, cells, tmp_path):
    kind, setup, options = CASES[case]
    adata = cells.copy()
    theirs = make_model(scvi, kind, setup, options, adata)
    theirs.save(tmp_path / "theirs", prefix="my_", save_anndata=True)
    bundle = import_model(
        tmp_path / "theirs", out=tmp_path / "bundle", prefix="my_", unlabeled_category="B", verify=True
    )
    wanted = latent(theirs)
    assert bundle.facts["imported"]["largest_difference"] < 1e-5
    np.testing.assert_allclose(bundle.latent(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    if "labels_key" in setup:
        known = np.array([*bundle.schema.labels.categories, "B"])
        assert known[bundle.labels()].tolist() == cells.obs["type"].tolist()

    if kind == "TOTALVI":
        every, other = (True,) * 5, (True, False, True, False, True)
        assert bundle.schema.measured == (every, other, every) and bundle.schema.proteins_key == "adt"

    folder = export_model(bundle, tmp_path / "exported")
    again = model_class(scvi, kind).load(folder, cells.copy())
    np.testing.assert_allclose(latent(again), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert elbo(again) == pytest.approx(elbo(theirs), rel=1e-5)  # the decoder, the dispersion, the library, the labels

    third = import_model(folder, out=tmp_path / "third", unlabeled_category="B")
    assert third.schema == bundle.schema and third.facts["config"] == bundle.facts["config"]
    weights = third.weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bundle.weights().items())


@pytest.mark.parametrize("kind", ["SCVI", "SCANVI", "PEAKVI", "TOTALVI"])
def test_a_model_after_load_query_data(kind, scvi, cells, tmp_path):
    """scvi-tools appends new columns at the end of all; the file is what scvi-tools computes with, right or not."""
    setup = {"batch_key": "batch"} | COVARIATES
    setup |= {"labels_key": "type", "unlabeled_category": "B"} if kind == "SCANVI" else {}
    setup |= {"protein_expression_obsm_key": "adt"} if kind == "TOTALVI" else {}
    reference = make_model(scvi, kind, setup, {"encode_covariates": True}, cells.copy())
    query = make_cells(1, batches=("b2", "b9", "b4"))
    query.obs["site"] = np.array(["s2", "s9"])[np.arange(120) % 2]
    surgery = model_class(scvi, kind).load_query_data(query, reference)
    surgery.is_trained_ = True
    surgery.save(tmp_path / "query", save_anndata=True)
    bundle = import_model(tmp_path / "query", out=tmp_path / "bundle", verify=True)
    assert bundle.schema.batch.categories == ("b1", "b2", "b3", "b4", "b9")
    assert bundle.schema.categorical[1].categories == ("s1", "s2", "s3", "s9")
    np.testing.assert_allclose(bundle.latent(), latent(surgery), rtol=1e-5, atol=1e-5)


REAL_FILES = {
    "scvi_data_080/080_scvi": ("SCVI", 100, 2, "labels"),
    "scvi_data_080/080_totalvi": ("TOTALVI", 100, 2, "labels"),
    "scvi_data_0150/0150_scvi": ("SCVI", 100, 2, "labels"),
    "scvi_data_0150/0150_totalvi": ("TOTALVI", 100, 2, None),
    "scvi_tools/pre_logits_fix_scanvi": ("SCANVI", 100, 1, "labels"),
    "scvi_tools/exp_activation_totalvi": ("TOTALVI", 100, 2, None),
    "scvi_tools/saved_model": ("TOTALVI", 100, 2, None),
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_of_all_ages(name, scvi, tmp_path):
    folder = REAL / name
    if not folder.exists():
        pytest.skip("the shared data are not here")
    kind, n_genes, n_batches, labels = REAL_FILES[name]
    bundle = import_model(folder, out=tmp_path / "bundle", verify=True)
    assert bundle.facts["imported"]["from"].startswith(f"{kind} of scvi-tools")
    assert bundle.facts["imported"]["largest_difference"] < 1e-5
    schema = bundle.schema
    assert (len(schema.genes), len(schema.batch)) == (n_genes, n_batches)
    assert (schema.labels.key if schema.labels else None) == labels
    assert bundle.facts["training"]["cells"] == 400


def test_real_files_tell_their_age(tmp_path):
    if not REAL.exists():
        pytest.skip("the shared data are not here")
    for name, encoder_input, background_std in (
        ("scvi_data_080/080_totalvi", "log1p", "exp"),
        ("scvi_tools/exp_activation_totalvi", "log1p", "exp"),
        ("scvi_tools/saved_model", "log1p", "softplus"),
        ("scvi_data_0150/0150_totalvi", "log1p_share", "softplus"),
    ):
        bundle = import_model(REAL / name, out=tmp_path / name)
        config = bundle.facts["config"]
        assert (config["encoder_input"], config["background_std"]) == (encoder_input, background_std), name
        if encoder_input == "log1p":
            with pytest.raises(DataError, match="scvi-tools has no encoder_input='log1p'"):
                export_model(bundle, tmp_path / "x")


def test_scanvi_before_the_logits_predicts_what_it_did(scvi, tmp_path):
    folder = REAL / "scvi_tools/pre_logits_fix_scanvi"
    if not folder.exists():
        pytest.skip("the shared data are not here")
    bundle = import_model(folder, out=tmp_path / "bundle")
    theirs = scvi.model.SCANVI.load(folder)
    np.testing.assert_allclose(bundle.latent(), latent(theirs), rtol=1e-5, atol=1e-6)
    assert bundle.schema.unlabeled_category == "label_0" and bundle.schema.labels.categories == ("label_2", "label_1")
    soft = theirs.predict(soft=True)
    x = np.asarray(theirs.adata.X, np.float32)
    batch = as_batch(x, np.zeros(len(x), np.int64))
    ours = bundle.model().predict(batch).numpy()
    np.testing.assert_allclose(ours, soft[["label_2", "label_1"]].to_numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"), [("scvi_tools/condscvi_pre_batch", "CondSCVI"), ("plaque_atlas_scpoli_level1", "scPoli")]
)
def test_other_classes_are_refused_by_name(name, kind, tmp_path):
    if not (REAL / name).exists():
        pytest.skip("the shared data are not here")
    with pytest.raises(DataError, match=f"holds a {kind}, which cannot be imported; SCVI, SCANVI"):
        import_model(REAL / name, out=tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def as_old_files(folder, attributes, weights, genes):
    """What scvi-tools < 0.15 and scArches write."""
    folder.mkdir()
    torch.save(weights, folder / "model_params.pt")
    (folder / "attr.pkl").write_bytes(pickle.dumps(attributes))
    np.savetxt(folder / "var_names.csv", np.array(genes), fmt="%s")


@pytest.mark.parametrize("case", ["nb", "zinb_bn_mmd_y", "mse", "nb_three_hidden"])
def test_trvae_of_scarches(case, tmp_path):
    record, numbers = json.loads((GOLDEN / f"{case}.json").read_text()), np.load(GOLDEN / f"{case}.npz")
    options = {"mmd_boundary": None, "beta": 1.0, "is_trained": True, "condition_key": "batch"} | record["config"]
    state = {n.removeprefix("state/"): torch.tensor(numbers[n]) for n in numbers.files if n.startswith("state/")}
    genes = [f"g,{i}" for i in range(numbers["input/x"].shape[1])]
    as_old_files(tmp_path / "saved", {f"{k}_": v for k, v in options.items()}, state, genes)
    bundle = import_model(tmp_path / "saved", out=tmp_path / "bundle")
    assert bundle.name == "trvae" and bundle.facts["imported"]["from"] == "trVAE of scArches"
    assert bundle.schema == Schema(genes=tuple(genes), batch=Covariate("batch", tuple(options["conditions"])))
    mean = bundle.model().encode(as_batch(numbers["input/x"], numbers["input/cond"])).mean
    np.testing.assert_allclose(mean, numbers["out_eval/z_mean"], rtol=1e-5, atol=2e-6)
    with pytest.raises(ConfigError, match="cannot be verified"):
        import_model(tmp_path / "saved", out=tmp_path / "other", verify=True)
    with pytest.raises(DataError, match="no counterpart of TRVAE"):
        export_model(bundle, tmp_path / "exported")


def as_batch(x, codes):
    n = len(x)
    return dataclasses.replace(
        random_cells(Schema(genes=tuple(map(str, range(x.shape[1]))), batch=Covariate("b", ("a",))), n),
        indptr=np.concatenate([[0], np.cumsum((x > 0).sum(1))]).astype(np.int64),
        indices=np.nonzero(x)[1].astype(np.int32),
        data=x[x > 0].astype(np.float32),
        batch_index=codes,
    )


SAVED = {"batch_key": "batch", "labels_key": "type"}


@pytest.fixture(scope="module")
def saved(scvi, cells, tmp_path_factory):
    """A SCVI of scvi-tools, saved with its cells."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_model(scvi, "SCVI", SAVED, {"n_layers": 1}, cells.copy()).save(folder, save_anndata=True)
    return folder


def changed(saved, folder, change):
    """The saved model with something in it changed."""
    content = torch.load(saved / "model.pt", weights_only=False)
    change(content)
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "model.pt")
    return folder


def option(**options):
    return lambda content: content["attr_dict"]["init_params_"]["non_kwargs"].update(options)


def registry(*path, value):
    def change(content):
        at = content["attr_dict"]["registry_"]
        for name in path[:-1]:
            at = at[name]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return change


def weight(name, value):
    def change(content):
        if value is None:
            del content["model_state_dict"][name]
        else:
            content["model_state_dict"][name] = value

    return change


def laughs():
    nested = []
    for _ in range(60):
        nested = [nested] * 9
    return nested


STATE, FIELDS = "model_state_dict", ("field_registries", "batch", "state_registry")
WRONG = {
    "batch embedding": (option(batch_representation="embedding"), "made with batch_representation='embedding'"),
    "unknown option": (option(new_thing=3), "made with new_thing=3, which scvi has not"),
    "option of no type": (option(n_layers=[1]), "option n_layers is a list"),
    "text for a number": (option(n_layers="1"), "cannot be imported"),
    "a bomb for an option": (option(new_thing=laughs()), "made with new_thing=a list"),
    "no such likelihood": (option(gene_likelihood="gamma"), "gene_likelihood='gamma'"),
    "layers the weights have not": (option(n_layers=2), "no tensor 'z_encoder"),
    "a model larger than its file": (option(n_hidden=90_000), "not of one model"),
    "another class": (registry("model_name", value="AUTOZI"), "holds a AUTOZI, which cannot be imported"),
    "ancient": (registry("scvi_version", value="0.6.7"), r"saved by scvi-tools 0\.6\.7"),
    "no categories": (registry(*FIELDS, value={"original_key": "batch"}), "categories of 'batch'"),
    "categories of the same name": (
        registry(*FIELDS, "categorical_mapping", value=np.array(["1", 1], object)),
        "categories of 'batch'",
    ),
    "another number of categories": (
        registry(*FIELDS, "categorical_mapping", value=np.array(["a", "b"], object)),
        "inputs, the model",
    ),
    "no registry": (lambda c: c["attr_dict"].pop("registry_"), "neither registry_ nor"),
    "no fields": (registry("field_registries", value=3), "no field_registries"),
    "no options": (lambda c: c["attr_dict"].pop("init_params_"), "lacks init_params_"),
    "no attributes": (lambda c: c.pop("attr_dict"), "lacks model_state_dict, var_names or attr_dict"),
    "genes twice": (lambda c: c["var_names"].__setitem__(1, c["var_names"][0]), "1 of them repeat"),
    "a gene less": (lambda c: c.update(var_names=c["var_names"][1:]), "has 30 inputs, the model 29"),
    "a tensor less": (weight("z_encoder.mean_encoder.bias", None), "no tensor 'z_encoder.mean_encoder.bias'"),
    "a tensor more": (weight("z_encoder.extra", torch.zeros(2)), "1 tensors of the weights have no place"),
    "not a number": (weight("px_r", torch.full((30,), torch.nan)), "hold NaN or infinity, e.g. 'px_r'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_missing_or_unsupported_is_said(name, saved, tmp_path):
    change, message = WRONG[name]
    folder = changed(saved, tmp_path / "changed", change)
    with pytest.raises((DataError, UnreadableFileError), match=message) as refused:
        import_model(folder, out=tmp_path / "bundle")
    assert str(folder) in str(refused.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "change",
    [
        registry("setup_method_name", value=None),  # older than 1.0, and many models on the hub
        registry("field_registries", "size_factor", value=None),
        registry("field_registries", "extra_categorical_covs", value=None),
        registry("field_registries", "extra_continuous_covs", value=None),
        registry("field_registries", "X", "state_registry", value={"n_vars": 30}),
        registry("setup_args", value=None),
        lambda c: c[STATE].pop("pyro_param_store", None),
        lambda c: c["attr_dict"].update(history_=None, train_indices_=None),
        lambda c: c["attr_dict"].update(
            init_params_={"n_hidden": 12, "n_latent": 4, "use_cuda": True, "model_kwargs": {}}
        ),
    ],
)
def test_what_other_ages_lack_is_no_matter(change, saved, tmp_path):
    whole = import_model(saved, out=tmp_path / "whole")
    less = import_model(changed(saved, tmp_path / "changed", change), out=tmp_path / "less")
    assert less.schema == whole.schema and less.facts["config"] == whole.facts["config"]


def test_numbers_for_categories_are_numbers_again(scvi, cells, tmp_path):
    theirs = make_model(scvi, "SCVI", {"batch_key": "run"}, {}, cells.copy())
    theirs.save(tmp_path / "saved")
    bundle = import_model(tmp_path / "saved", out=tmp_path / "bundle")
    assert bundle.schema.batch == Covariate("run", ("7", "8", "9"))
    again = scvi.model.SCVI.load(export_model(bundle, tmp_path / "exported"), cells.copy())
    np.testing.assert_allclose(latent(again), latent(theirs), rtol=1e-5, atol=1e-5)


def test_a_latent_library_needs_its_prior(scvi, cells, tmp_path):
    theirs = make_model(scvi, "SCVI", {"batch_key": "batch"}, {"use_observed_lib_size": False}, cells.copy())
    theirs.save(tmp_path / "saved")
    folder = changed(tmp_path / "saved", tmp_path / "old", weight("library_log_means", None))
    with pytest.raises(DataError, match=r"lacks the prior of it, which scvi-tools before 0\.14 did not save"):
        import_model(folder, out=tmp_path / "bundle")


def test_files_that_are_not_there(tmp_path, saved):
    with pytest.raises(UnreadableFileError, match="is no folder"):
        import_model(tmp_path / "nothing", out=tmp_path / "bundle")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnreadableFileError, match="holds no saved model"):
        import_model(tmp_path / "folder", out=tmp_path / "bundle")
    (tmp_path / "folder" / "hlca_model.pt").write_bytes((saved / "model.pt").read_bytes())
    with pytest.raises(UnreadableFileError, match="give --prefix hlca_"):
        import_model(tmp_path / "folder", out=tmp_path / "bundle")
    assert import_model(tmp_path / "folder" / "hlca_model.pt", out=tmp_path / "bundle").name == "scvi"
    with pytest.raises(OutputExistsError):
        import_model(saved, out=tmp_path / "bundle")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model_params.pt").touch()
    with pytest.raises(UnreadableFileError, match=r"has model_params\.pt, but lacks attr\.pkl, var_names\.csv"):
        import_model(tmp_path / "old", out=tmp_path / "other")


def test_cells_of_the_reference(saved, cells, tmp_path):
    assert import_model(saved, out=tmp_path / "beside").latent().shape == (120, 4)
    alone = import_model(saved / "model.pt", out=tmp_path / "given", adata=[saved / "adata.h5ad", saved / "adata.h5ad"])
    assert alone.latent().shape == (240, 4)
    assert sorted(set(alone.labels())) == [0, 1, 2, 3]

    other = cells.copy()
    other.obs["batch"] = "b7"
    other.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(DataError, match=r"'batch' has 1 values that the model does not know, e\.g\. 'b7'"):
        import_model(saved, out=tmp_path / "x", adata=[tmp_path / "other.h5ad"])
    folder = changed(saved, tmp_path / "without", lambda content: None)
    other.write_h5ad(folder / "adata.h5ad")
    bundle = import_model(folder, out=tmp_path / "unlike")
    assert bundle.latent() is None and bundle.labels() is None
    assert "the model does not know" in bundle.facts["imported"]["without_reference"]
    assert not (bundle.path / "reference").exists()


def test_a_totalvi_of_a_mudata(scvi, cells, tmp_path):
    mudata = importlib.import_module("mudata")
    proteins = anndata.AnnData(cells.obsm["adt"].to_numpy(), obs=cells.obs[[]], var=pd.DataFrame(index=list("pqrst")))
    both = mudata.MuData({"rna": anndata.AnnData(cells.X, obs=cells.obs[[]], var=cells.var), "prot": proteins})
    both.obs["batch"] = cells.obs["batch"].to_numpy()
    torch.manual_seed(0)
    modalities = {"rna_layer": "rna", "protein_layer": "prot"}
    scvi.model.TOTALVI.setup_mudata(both, batch_key="batch", modalities=modalities)
    theirs = scvi.model.TOTALVI(both, n_hidden=12, n_latent=4)
    theirs.is_trained_ = True
    theirs.module.eval()
    theirs.save(tmp_path / "saved", save_anndata=True)
    bundle = import_model(tmp_path / "saved", out=tmp_path / "bundle", verify=True)
    assert bundle.schema.genes == tuple(cells.var_names) and bundle.schema.proteins == tuple("pqrst")
    assert bundle.facts["imported"]["reference"] == ["mdata.h5mu"]
    np.testing.assert_allclose(bundle.latent(), latent(theirs), rtol=1e-5, atol=1e-6)


def test_the_background_of_totalvi_before_1_2():
    schema = Schema(genes=("a", "b"), batch=Covariate("s", ("x",)), proteins=("p", "q"), measured=((True, True),))
    torch.manual_seed(0)
    new, old = (TotalVI(schema, TotalVI.Config(n_hidden=8, background_std=how)) for how in ("softplus", "exp"))
    old.load_state_dict(new.state_dict())
    cells = Cells.of(random_cells(schema, 5), schema, torch.device("cpu"))
    z = torch.randn(5, 20)
    with torch.no_grad():
        soft, exp = (m.eval().generative(z, cells, None)[1].background.std for m in (new, old))
    torch.testing.assert_close(exp, torch.expm1(soft), rtol=1e-4, atol=1e-6)  # exp(x) and log(1 + exp(x))


def test_cells_without_the_proteins_are_not_those_of_a_totalvi(scvi, cells, tmp_path):
    setup = {"batch_key": "batch", "protein_expression_obsm_key": "adt"}
    make_model(scvi, "TOTALVI", setup, {}, cells.copy()).save(tmp_path / "saved")
    other = cells.copy()
    other.obsm["adt"] = other.obsm["adt"].drop(columns=["p3"])
    other.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(DataError, match=r"obsm\['adt'\] has 4 of the model's 5 proteins"):
        import_model(tmp_path / "saved", out=tmp_path / "bundle", adata=[tmp_path / "other.h5ad"])


def test_queries_are_mapped_onto_an_import(saved, tmp_path, map_config):
    query = make_cells(5, batches=("q1",))
    query.write_h5ad(tmp_path / "query.h5ad")
    folder = changed(saved, tmp_path / "alone", lambda content: None)
    without = import_model(folder, out=tmp_path / "without")
    assert (
        map_queries(without.path, [tmp_path / "query.h5ad"], map_config(tmp_path / "m1"))["status"] == "mapped"
    ).all()
    mapped = anndata.read_h5ad(tmp_path / "m1" / "query.h5ad")
    assert mapped.obsm["X_scVI"].shape == (120, 4) and "type_pred" not in mapped.obs
    whole = import_model(saved, out=tmp_path / "whole")
    assert (map_queries(whole.path, [tmp_path / "query.h5ad"], map_config(tmp_path / "m2"))["status"] == "mapped").all()
    again = anndata.read_h5ad(tmp_path / "m2" / "query.h5ad")
    assert set(again.obs["type_pred"]) <= {"A", "B", "C", "T"}
    np.testing.assert_allclose(again.obsm["X_scVI"], mapped.obsm["X_scVI"], rtol=1e-5, atol=1e-6)


def test_what_our_models_have_and_scvi_tools_has_not(tmp_path):
    schema = Schema(genes=("a", "b"), batch=Covariate("batch", ("x", "y")), labels=Covariate("type", ("t", "u")))
    facts = {"model": "peakvi", "training": {}}
    binary = Bundle.save(tmp_path / "binary", PeakVI(schema, PeakVI.Config(encoder_input="binary")), facts, {})
    with pytest.raises(DataError, match="scvi-tools has no encoder_input='binary'"):
        export_model(binary, tmp_path / "x")
    options = SCANVI.Config(dispersion="gene-label", n_hidden=4)
    labels = Bundle.save(tmp_path / "labels", SCANVI(schema, options), {"model": "scanvi", "training": {}}, {})
    with pytest.raises(DataError, match="no SCANVI with dispersion"):
        export_model(labels, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_ours_to_scvi_tools_and_back(run, scvi, studies, tmp_path):
    """A run of ours: latents are scvi-tools' own on the same cells, and the import of the export is the bundle."""
    bundle = Bundle.open(run)
    folder = export_model(run, tmp_path / "exported")
    adata = anndata.concat([anndata.read_h5ad(path) for path in studies], merge="same")[
        :, list(bundle.schema.genes)
    ].copy()
    theirs = latent(scvi.model.SCVI.load(folder, adata))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = import_model(folder, out=tmp_path / "again", adata=[tmp_path / "cells.h5ad"])
    np.testing.assert_allclose(again.latent(), theirs, rtol=1e-5, atol=1e-5)
    assert again.schema == bundle.schema
    weights = again.weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bundle.weights().items())


def test_nothing_of_scvi_tools_is_needed(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    monkeypatch.setitem(sys.modules, "scvi.module", None)
    bundle = import_model(saved, out=tmp_path / "bundle")
    export_model(bundle, tmp_path / "exported")
    with pytest.raises(ConfigError, match="pip install scvi-tools"):
        import_model(saved, out=tmp_path / "other", verify=True)


def test_a_wrong_model_is_not_proven(saved, tmp_path, monkeypatch):
    from scviaduct.distributed import translate

    def shifted(model, weights):
        load_upstream(model, weights)
        with torch.no_grad():
            model.z_encoder.mean_and_log_var.bias += 0.01

    monkeypatch.setattr(translate, "_loader", lambda name: shifted)
    with pytest.raises(DataError, match="latent means differ from scvi-tools'"):
        import_model(saved, out=tmp_path / "bundle", verify=True)
    assert not (tmp_path / "bundle").exists()


def legacy(theirs, adata, **attributes):
    """The files of scvi-tools 0.8 with the content of a newer model: the record of the data had another form."""
    state = {f: r["state_registry"] for f, r in theirs.registry["field_registries"].items()}
    setup = {
        "scvi_version": "0.8.1",
        "categorical_mappings": {
            f"_scvi_{f}": {"original_key": state[f]["original_key"], "mapping": state[f]["categorical_mapping"]}
            for f in ("batch", "labels")
        },
        "data_registry": {
            "X": {"attr_name": "X", "attr_key": "None"},
            "batch_indices": {"attr_name": "obs", "attr_key": "_scvi_batch"},
            "local_l_mean": {"attr_name": "obs", "attr_key": "_scvi_local_l_mean"},
            "labels": {"attr_name": "obs", "attr_key": "_scvi_labels"},
            "cat_covs": {"attr_name": "obsm", "attr_key": "_scvi_extra_categoricals"},
        },
        "summary_stats": {"n_cells": len(adata)},
    }
    extra = state["extra_categorical_covs"]
    setup["extra_categoricals"] = {"mappings": extra["mappings"], "keys": extra["field_keys"]}
    setup["extra_continuous_keys"] = state["extra_continuous_covs"]["columns"]
    made_with = theirs.init_params_
    own = made_with["non_kwargs"] | {"use_cuda": True, "model_kwargs": made_with["kwargs"]["model_kwargs"]}
    return {"scvi_setup_dict_": setup, "init_params_": own, "is_trained_": True, **attributes}


@pytest.mark.parametrize("order", ["last", "sorted"])
def test_the_old_files_of_scanvi(order, scvi, cells, tmp_path):
    """As the public atlas of the lung has them: attr.pkl, model_params.pt, var_names.csv with commas in names."""
    setup = {"batch_key": "batch", "labels_key": "type", "unlabeled_category": "B"} | COVARIATES
    theirs = make_model(scvi, "SCANVI", setup, {"n_layers": 2, "encode_covariates": True}, cells.copy())
    attributes = legacy(theirs, cells, unlabeled_category_="B")
    if order == "sorted":  # before the model swapped the unlabelled category with the last
        mapping = attributes["scvi_setup_dict_"]["categorical_mappings"]["_scvi_labels"]
        mapping["mapping"] = np.sort(mapping["mapping"].astype(str)).astype(object)
    weights = theirs.module.state_dict()
    as_old_files(tmp_path / "old", attributes, weights, list(cells.var_names))
    cells.write_h5ad(tmp_path / "old" / "adata.h5ad")
    bundle = import_model(tmp_path / "old", out=tmp_path / "bundle", verify=True)
    assert bundle.name == "scanvi" and bundle.facts["imported"]["from"] == "SCANVI of scvi-tools 0.8.1"
    assert bundle.schema.labels.categories == ("A", "T", "C") and bundle.schema.unlabeled_category == "B"
    assert [c.key for c in bundle.schema.categorical] == ["donor", "site"] and bundle.schema.continuous == (
        "age",
        "dose",
    )
    np.testing.assert_allclose(bundle.latent(), latent(theirs), rtol=1e-5, atol=1e-5)


def test_a_totalvi_that_scvi_tools_converted_keeps_its_input(tmp_path):
    folder = REAL / "scvi_data_080/080_totalvi"
    if not folder.exists():
        pytest.skip("the shared data are not here")
    (tmp_path / "copy").mkdir()
    for name in ("attr.pkl", "var_names.csv"):
        (tmp_path / "copy" / name).write_bytes((folder / name).read_bytes())
    weights = torch.load(folder / "model_params.pt", weights_only=True)
    torch.save(weights | {"log_per_batch_efficiency": torch.zeros(100, 2)}, tmp_path / "copy" / "model_params.pt")
    assert import_model(tmp_path / "copy", out=tmp_path / "bundle").facts["config"]["encoder_input"] == "log1p"
