"""TRVAE through the jobs: trained from a store by one process and by two Ray workers, and mapped."""

import anndata as ad
import numpy as np
import pytest

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.map import map
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError

OPTIONS = {"model": "trvae", "preset": "default", "set": ("hidden_layer_sizes=32,16", "n_latent=5"), "max_epochs": 12}


@pytest.fixture(scope="module")
def trvae_run(atlas, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("trvae") / "reference"
    train(atlas, config(out, **OPTIONS))
    return out


def test_a_query_is_mapped(trvae_run, query_file, map_config, tmp_path):
    bundle = Bundle.open(trvae_run)
    assert bundle.facts["config"]["hidden_layer_sizes"] == [32, 16]
    history = bundle.facts["training"]["history"]
    assert history[-1]["loss_train"] < history[0]["loss_train"]
    map(trvae_run, [query_file], map_config(tmp_path / "mapped"))
    result = ad.read_h5ad(tmp_path / "mapped" / "query.h5ad")
    known = result.obs["cell_type_pred"] != "not mapped"
    assert (result.obs["cell_type_pred"].astype(str) == result.obs["cell_type"].astype(str))[known].mean() > 0.8
    assert np.isfinite(result.obsm["X_trVAE"][known]).all()


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_the_weights_of_one(atlas, config, tmp_path):
    """Equal up to rounding: the MMD is that of the global batch."""
    short = OPTIONS | {"max_epochs": 2}
    one, two = (train(atlas, config(tmp_path / str(n), workers=n, **short)).weights() for n in (1, 2))
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=1e-3, atol=1e-4, err_msg=name)


def test_lane_by_lane_is_refused(atlas, config, tmp_path):
    with pytest.raises(ConfigError, match="use_mmd=false"):
        train(atlas, config(tmp_path / "run", deterministic=True, **OPTIONS))
    options = OPTIONS | {"set": (*OPTIONS["set"], "use_mmd=false"), "max_epochs": 1}
    train(atlas, config(tmp_path / "run", deterministic=True, **options))
