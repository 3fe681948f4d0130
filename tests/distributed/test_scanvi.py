"""SCANVI through the jobs: trained on partly labelled cells, its classifier beside the neighbours in the results."""

import anndata as ad
import numpy as np
import pytest

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import SurgeryConfig
from scviaduct.distributed.map import map
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError, ScviaductError


@pytest.fixture(scope="module")
def scanvi_run(atlas, config, tmp_path_factory):
    """One of three types counts as unlabelled, so the classifier knows two."""
    out = tmp_path_factory.mktemp("scanvi") / "reference"
    train(atlas, config(out, model="scanvi", unlabeled_category="type 02"))
    return out


def test_a_partly_labelled_reference_classifies_queries(scanvi_run, query_file, map_config, tmp_path):
    bundle = Bundle.open(scanvi_run)
    share = float((bundle.labels() >= 0).mean())
    assert 0.2 < share < 0.95
    assert float(bundle.weights()["labelled_share"]) == pytest.approx(share, abs=1e-6)
    map(scanvi_run, [query_file], map_config(tmp_path / "mapped"))
    result = ad.read_h5ad(tmp_path / "mapped" / "query.h5ad")
    known = (result.obs["cell_type"] != "type 02") & (result.obs["cell_type_classified"] != "not mapped")
    right = result.obs["cell_type_classified"].astype(str) == result.obs["cell_type"].astype(str)
    assert right[known].mean() > 0.8
    assert set(result.obs["cell_type_classified"]) == {"type 00", "type 01", "not mapped"}
    assert result.obs["cell_type_probability"].iloc[7] == 0
    assert result.obs["cell_type_probability"].drop(result.obs_names[7]).between(0.5, 1).all()
    assert np.isnan(result.obsm["X_scANVI"][7]).all()


def test_a_query_s_own_labels_are_learnt_from_when_asked_for(scanvi_run, query_file, map_config, tmp_path):
    quick = {"fit": SurgeryConfig(max_epochs=15, lr=0.03, early_stopping=False, threads=1)}
    options = {"none": quick, "own": quick | {"labels_key": "cell_type"}}
    options["trained"] = options["own"] | {"train_classifier": True}
    results, labelled = {}, []
    for name, changes in options.items():
        labelled.append(map(scanvi_run, [query_file], map_config(tmp_path / name, **changes))["labelled"].iloc[0])
        results[name] = ad.read_h5ad(tmp_path / name / "query.h5ad").obs
    truth = results["none"]["cell_type"].drop(results["none"].index[7])
    known = truth.index[truth != "type 02"]
    assert labelled == [0, len(known), len(known)]
    none, own, trained = (results[name].loc[known, "cell_type_probability"].mean() for name in options)
    assert none < own < trained  # what the new columns can do, and what the classifier can do besides


def test_labels_of_a_query_that_cannot_be_used_are_refused(run, scanvi_run, query_file, map_config, tmp_path):
    for model, options, message in (
        (run, {"labels_key": "cell_type"}, r"for models with a classifier \(scanvi\), not SCVI"),
        (scanvi_run, {"labels_key": "celltype"}, "did you mean 'cell_type'"),
        (scanvi_run, {"labels_key": "study"}, r"no cell has a label of the reference in 'study' \(e\.g\. 'study 9'\)"),
    ):
        with pytest.raises(ScviaductError, match=message):
            map(model, [query_file], map_config(tmp_path / "out", **options))


def test_no_label_at_all_is_refused(atlas, config, tmp_path):
    with pytest.raises(ConfigError, match="labels_key"):
        train(atlas, config(tmp_path / "run", model="scanvi", labels_key=None))
    assert not (tmp_path / "run").exists()


def test_it_starts_from_a_trained_scvi(run, atlas, config, tmp_path):
    scvi = Bundle.open(run)
    still = train(atlas, config(tmp_path / "still", model="scanvi", init_from=run, preset="default", set=(), lr=1e-12))
    weights = still.weights()
    for name, tensor in scvi.weights().items():
        np.testing.assert_allclose(weights[name], tensor, atol=1e-6, err_msg=name)
    assert still.facts["config"]["n_latent"] == 5


def test_a_start_that_does_not_fit_is_refused(run, atlas, config, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="have no place in this SCANVI"):
        train(atlas, config(out, model="scanvi", init_from=run, set=("n_latent=7",)))
    with pytest.raises(ConfigError, match="other batch"):
        train(atlas, config(out, model="scanvi", init_from=run, batch_key="sample"))
    with pytest.raises(ConfigError, match=r"no place in this SCVI, e\.g"):
        train(atlas, config(out, init_from=run, set=("gene_likelihood=nb",)))
    assert not out.exists()
