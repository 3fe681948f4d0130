import os
import shutil
import tempfile
from dataclasses import fields, replace

import numpy as np
import pytest

from scviaduct.distributed.config import FitConfig, MapConfig, SurgeryConfig, TrackingConfig, TrainConfig
from scviaduct.distributed.train import train
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.simulate import Biology

NO_TRACKING = TrackingConfig(tracking_uri="none")
QUICK = FitConfig(max_epochs=6, batch_size=32, lr=3e-3, n_epochs_kl_warmup=100, threads=1)
QUICK_SURGERY = SurgeryConfig(max_epochs=5, threads=1)
SMALL = ("n_hidden=32", "n_latent=5")


@pytest.fixture(scope="session")
def biology():
    return Biology.make(n_types=3, n_genes=300, n_lineages=3, seed=3)


@pytest.fixture(scope="session")
def studies(biology, tmp_path_factory):
    """Three h5ad files of 300 cells."""
    folder = tmp_path_factory.mktemp("studies")
    paths = []
    for number in range(3):
        paths.append(folder / f"study_{number}.h5ad")
        biology.study(number, 300).write_h5ad(paths[-1])
    return paths


@pytest.fixture(scope="session")
def query_file(biology, tmp_path_factory):
    """A study of its own, genes in another order, ten of them missing, one cell without counts."""
    data = biology.study(9, 150)
    data = data[:, np.random.default_rng(0).permutation(data.n_vars)[10:]].copy()
    data.X = data.X.multiply((np.arange(150) != 7)[:, None]).tocsr()
    path = tmp_path_factory.mktemp("query") / "query.h5ad"
    data.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def atlas(studies, tmp_path_factory):
    """A converted and prepared atlas."""
    path = tmp_path_factory.mktemp("atlas") / "atlas.zarr"
    convert(studies, out=path)
    prepare(path, genes="all", block_rows=64)
    return path


@pytest.fixture(scope="session")
def config():
    """Makes a quick TrainConfig; keyword arguments replace its fields, those of the fit included."""

    def make(out, **changes):
        of_fit = {f.name for f in fields(QUICK)}
        fit = replace(QUICK, **{k: v for k, v in changes.items() if k in of_fit})
        options = {"batch_key": "study", "labels_key": "cell_type", "preset": "scarches", "set": SMALL}
        options |= {"tracking": NO_TRACKING, **{k: v for k, v in changes.items() if k not in of_fit}}
        return TrainConfig(out=out, fit=fit, **options)

    return make


@pytest.fixture(scope="session")
def map_config():
    """Makes a quick MapConfig."""
    return lambda out, **changes: MapConfig(out=out, **{"fit": QUICK_SURGERY, "tracking": NO_TRACKING} | changes)


@pytest.fixture(scope="session")
def run(atlas, config, tmp_path_factory):
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("run") / "reference"
    train(atlas, config(out))
    return out


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory):
    """An MLflow database with its tables and nothing in them; making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(mlflow_database, tmp_path):
    """An MLflow store of the test's own."""
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return TrackingConfig(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="test")


@pytest.fixture(scope="session")
def ray_cluster():
    """One embedded Ray for all tests."""
    import ray

    folder = tempfile.TemporaryDirectory(prefix="scv-", ignore_cleanup_errors=True)
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
        _temp_dir=folder.name,
    )
    yield ray
    ray.shutdown()
    folder.cleanup()
    os.environ.pop("RAY_ADDRESS", None)
