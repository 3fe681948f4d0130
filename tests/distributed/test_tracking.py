import logging

import pytest
from mlflow import MlflowClient

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import TrackingConfig
from scviaduct.distributed.map import map
from scviaduct.distributed.tracking import Tracker, flat
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def test_data_run_model_and_query_are_linked(atlas, query_file, config, map_config, tmp_path):
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="lineage")
    bundle = train(atlas, config(tmp_path / "kang", tracking=tracking))
    client = MlflowClient(tracking.tracking_uri)
    run = client.get_run(bundle.facts["training"]["mlflow_run"])
    assert run.info.status == "FINISHED"
    assert run.data.params["fit.max_epochs"] == "6" and run.data.params["batch_key"] == "study"
    assert run.data.tags["view_digest"] == bundle.facts["training"]["view_digest"]
    assert run.inputs.dataset_inputs[0].dataset.name == "atlas.zarr"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "elbo_validation")]
    assert steps == list(range(6))
    version = client.get_model_version_by_alias("kang", "current")
    assert version.run_id == run.info.run_id and version.tags["model"] == "scvi"

    map("models:/kang@current", [query_file], map_config(tmp_path / "mapped", tracking=tracking))
    cohort = client.search_runs([run.info.experiment_id], "tags.trained_by = '" + run.info.run_id + "'")[0]
    child = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{cohort.info.run_id}'")[0]
    assert child.data.tags["query" if "query" in child.data.tags else "mlflow.runName"].endswith("query")
    assert child.data.metrics["genes_matched"] == 290 and child.info.status == "FINISHED"
    assert Bundle.open(client.download_artifacts(run.info.run_id, "bundle")).schema == bundle.schema


def test_a_model_that_is_not_registered(query_file, map_config, tmp_path):
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ConfigError, match="models:/nothing@current is not in the registry"):
        map("models:/nothing@current", [query_file], map_config(tmp_path / "mapped", tracking=tracking))


def test_a_job_goes_on_without_its_tracking_store(atlas, config, tmp_path, caplog):
    (tmp_path / "file").touch()  # not a folder: the store cannot be made below it
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with caplog.at_level(logging.WARNING):
        bundle = train(atlas, config(tmp_path / "run", tracking=tracking, max_epochs=1))
    assert bundle.facts["training"]["epochs"] == 1
    assert sum("The job goes on without it" in r.message for r in caplog.records) == 1


def test_no_tracking_at_all():
    tracker = Tracker(TrackingConfig(tracking_uri="none"))
    tracker.start("x", {}, {})
    tracker.metrics(0, {"a": 1.0})
    tracker.end("FINISHED")
    assert tracker.run_id is None and tracker.register("m", {}) is None


def test_flat():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
