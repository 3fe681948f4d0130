import json
import logging
import shutil
import socket
from pathlib import Path

import anndata as ad
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

import scviaduct
from scviaduct.distributed import systemmetrics
from scviaduct.distributed import train as train_module
from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import Reading, TrackingConfig
from scviaduct.distributed.journal import FOLDER
from scviaduct.distributed.map import map
from scviaduct.distributed.registered import store_uri
from scviaduct.distributed.tracking import Tracker, flat, sync
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError, UnreadableFileError
from scviaduct.storage.manifest import file_digest

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def client(tracking):
    return MlflowClient(tracking.tracking_uri)


def test_a_result_leads_back_to_the_source_files(
    atlas, studies, query_file, config, map_config, tracking, client, tmp_path
):
    """From the h5ad alone, through MLflow: query and result, mapping, version, training, view, files."""
    folder = tmp_path
    bundle = train(atlas, config(folder / "kang", tracking=tracking))
    map("models:/kang@current", [query_file], map_config(folder / "mapped", tracking=tracking))
    result = folder / "mapped" / "query.h5ad"

    told = ad.read_h5ad(result).uns["scviaduct"]
    assert told["query_sha256"] == file_digest(query_file)
    mapping = client.get_run(told["mlflow_run"])
    assert mapping.info.status == "FINISHED"
    experiment = mapping.info.experiment_id
    queries = client.search_runs([experiment], f"tags.result_sha256 = '{file_digest(result)}'")
    assert [q.data.tags["mlflow.parentRunId"] for q in queries] == [mapping.info.run_id]
    assert queries[0].inputs.dataset_inputs[0].dataset.digest == told["query_sha256"][:36]
    assert queries[0].data.tags["query_sha256"] == told["query_sha256"]
    assert queries[0].data.metrics["genes_matched"] == 290 and queries[0].info.status == "FINISHED"

    version = client.get_model_version(mapping.data.tags["model"], mapping.data.tags["model_version"])
    assert (version.name, str(version.version)) == (told["model"], told["model_version"])
    copied = Bundle.open(download_artifacts(artifact_uri=version.source, tracking_uri=tracking.tracking_uri))
    assert version.tags["bundle_digest"] == told["bundle_digest"] == copied.digest == bundle.digest
    assert version.tags["schema_digest"] == copied.schema.digest

    training = client.get_run(version.run_id)
    assert version.tags["run"] == mapping.data.tags["trained_by"] == training.info.run_id
    inputs = {i.tags[0].value: [] for i in training.inputs.dataset_inputs}
    for i in training.inputs.dataset_inputs:
        inputs[i.tags[0].value].append(i.dataset)
    (view,) = inputs["training"]
    assert version.tags["view_digest"] == training.data.tags["view_digest"] == told["view_digest"]
    assert view.digest == told["view_digest"][:36] and view.name == "atlas.zarr"
    sources = json.loads(view.profile)["sources"]
    assert sources == {path.stem: file_digest(path) for path in studies}
    assert {d.name: json.loads(d.profile)["sha256"] for d in inputs["source"]} == sources
    assert not list(folder.glob(f"*/{FOLDER}")), "nothing is left to be sent"


def test_a_training_s_numbers_pictures_and_version(atlas, config, tracking, client, tmp_path):
    bundle = train(atlas, config(tmp_path / "kang", tracking=tracking, alias="new", max_epochs=3))
    run = client.get_run(bundle.facts["training"]["mlflow_run"])
    assert run.info.status == "FINISHED"
    assert run.data.params["fit.max_epochs"] == "3" and run.data.params["batch_key"] == "study"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "elbo_validation")]
    assert steps == [0, 1, 2]
    picture = client.download_artifacts(run.info.run_id, "plots/losses.png")
    assert Path(picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    version = client.get_model_version_by_alias("kang", "new")
    assert version.run_id == run.info.run_id and version.tags["model"] == "scvi"
    assert client.get_registered_model("kang").aliases == {"new": version.version}
    assert Bundle.open(client.download_artifacts(run.info.run_id, "bundle")).schema == bundle.schema


def test_a_training_that_was_broken_off_and_resumed_is_one_run(atlas, config, tracking, client, tmp_path, monkeypatch):
    """The driver dies before it has told of the last epochs."""
    out = tmp_path / "kang"

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "_bundle", dies)
        patch.setattr(train_module, "_listeners", lambda tracker: [only_the_first_two(tracker)])
        train(atlas, config(out, tracking=tracking, max_epochs=4))
    run_id = json.loads((out / "run.json").read_text())["mlflow_run"]
    assert client.get_run(run_id).info.status == "FAILED"
    assert [m.step for m in client.get_metric_history(run_id, "elbo_train")] == [0, 1]

    bundle = train(atlas, config(out, tracking=tracking, max_epochs=4, resume=True))
    assert bundle.facts["training"]["mlflow_run"] == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and len(client.search_runs([run.info.experiment_id])) == 1
    assert [m.step for m in client.get_metric_history(run_id, "elbo_train")] == [0, 1, 2, 3]
    assert client.get_model_version_by_alias("kang", "current").run_id == run_id


def only_the_first_two(tracker):
    return lambda record: tracker.metrics(int(record["epoch"]), record) if record["epoch"] < 2 else None


@pytest.fixture
def registered(run, tracking, tmp_path):
    """A tracker whose run has a bundle and a version of it, "m@current"."""
    tracker = Tracker(tracking, tmp_path / "home")
    tracker.start("t", {"a": 1}, {"b": "c"})
    tracker.artifacts(run / "bundle", "bundle")
    assert tracker.register("m", {"view_digest": "v"}) == "1"
    return tracker


def test_versions_are_appended_and_the_alias_moves_to_one_that_loads(registered, run, tracking, client, tmp_path):
    second = Tracker(tracking, tmp_path / "second")
    second.start("t", {}, {})
    second.artifacts(run / "bundle", "bundle")
    assert second.register("m", {}) == "2"
    assert int(client.get_model_version_by_alias("m", "current").version) == 2
    assert {int(v.version) for v in client.search_model_versions("name = 'm'")} == {1, 2}

    third = Tracker(tracking, tmp_path / "third")
    third.start("t", {}, {})
    third.artifacts(run / "bundle", "bundle")
    stored = next((tmp_path / "mlartifacts").glob(f"{third.run_id}/**/model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"\xff")  # the disk that keeps it is bad
    assert third.register("m", {}) is None
    assert int(client.get_model_version_by_alias("m", "current").version) == 2


@pytest.fixture(scope="module")
def loaded(run, mlflow_database, tmp_path_factory):
    """What `mlflow.pyfunc.load_model("models:/m@current")` gives."""
    folder = tmp_path_factory.mktemp("pyfunc")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracker = Tracker(TrackingConfig(tracking_uri=uri))
    tracker.start("t", {}, {})
    tracker.artifacts(run / "bundle", "bundle")
    assert tracker.register("m", {}) == "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        yield mlflow.pyfunc.load_model("models:/m@current")


@pytest.fixture(scope="module")
def cells(studies):
    return ad.read_h5ad(studies[1])


@pytest.fixture(scope="module")
def table(cells):
    return cells.to_df().assign(study=cells.obs["study"].astype(str), percent_mito=0.25)


def test_pyfunc_gives_what_embed_writes(loaded, run, studies, cells, table, tmp_path):
    scviaduct.embed(run, studies[1], out=tmp_path / "latent.h5ad", reading=Reading())
    expected = ad.read_h5ad(tmp_path / "latent.h5ad").obsm["X_scVI"]
    for given in (table, cells, table.to_dict("records")):
        found = loaded.predict(given)
        assert found.shape == (300, 5) and np.abs(found.to_numpy() - expected).max() < 1e-6
    assert list(loaded.predict(table).index) == list(cells.obs_names)


def test_pyfunc_matches_genes_by_name(loaded, table):
    renamed = table.rename(columns=lambda name: f"{name}.3" if name.startswith("ENS") else name)
    mixed = renamed.sample(frac=1, axis=1, random_state=0).assign(UNKNOWN=7)
    np.testing.assert_array_equal(loaded.predict(mixed), loaded.predict(table))
    empty = table.copy()
    empty.iloc[3, : empty.shape[1] - 2] = 0
    assert np.isnan(loaded.predict(empty).to_numpy()).all(1).nonzero()[0].tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="study"), "no batch column 'study'"),
        (lambda t: t.assign(study="elsewhere"), "unknown to the model, e.g. 'elsewhere'"),
        (lambda t: t.assign(**{t.columns[5]: 0.5}), "no matrix holds raw counts"),
        (lambda t: t.assign(**{t.columns[5]: "many"}), "is a gene of the model, but holds no numbers"),
        (lambda t: t.rename(columns=lambda c: f"{c}x" if c.startswith("ENS") else c), "has 0 of the reference's 300"),
        (lambda t: t.to_numpy(), "must be a DataFrame or an AnnData of counts, not a ndarray"),
    ],
)
def test_pyfunc_says_what_is_wrong_with_its_input(loaded, table, change, message):
    with pytest.raises(MlflowException, match=message) as raised:
        loaded.predict(change(table.drop(columns="percent_mito")))
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE" and "/" not in str(raised.value).partition(":")[0]


def test_a_model_s_signature_and_that_no_code_lies_in_it(loaded):
    signature = loaded.metadata.signature
    assert signature.inputs.required_input_names() == ["study"]
    assert len(signature.inputs.optional_input_names()) == 300
    assert signature.outputs.input_names() == [f"latent_{i}" for i in range(5)]
    assert loaded.metadata.flavors["python_function"]["loader_module"] == "scviaduct.distributed.pyfunc"
    assert loaded.metadata.flavors["python_function"]["code"] is None


def test_a_model_that_is_not_registered(query_file, map_config, tracking, tmp_path):
    with pytest.raises(ConfigError, match="models:/nothing@current is not in the registry"):
        map("models:/nothing@current", [query_file], map_config(tmp_path / "mapped", tracking=tracking))


def test_a_registry_that_does_not_answer(query_file, map_config, tmp_path):
    away = TrackingConfig(tracking_uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"kang@current cannot be looked up at http://127\.0\.0\.1:9"):
        map("models:/kang@current", [query_file], map_config(tmp_path / "mapped", tracking=away))


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "mysql+pymysql"])
def test_a_database_server_that_is_away_is_noticed_at_once(query_file, map_config, tmp_path, scheme, caplog):
    """MLflow would try ten times, for two minutes; it is not even asked, as its drivers are not installed here."""
    with socket.socket() as silent:  # bound, but it does not listen
        silent.bind(("127.0.0.1", 0))
        away = TrackingConfig(tracking_uri=f"{scheme}://me:secret@127.0.0.1:{silent.getsockname()[1]}/mlflow")
        tracker = Tracker(away, tmp_path)
        tracker.start("one", {}, {})
        tracker.end("FINISHED")
        assert len(tracker._outbox.journal.waiting) == 3
        assert "cannot be told (ConnectionRefusedError" in caplog.text
        assert "://me:…@127.0.0.1" in caplog.text and "secret" not in caplog.text
        with pytest.raises(
            ConfigError, match=r"kang@current cannot be looked up: the database of --tracking-uri does not"
        ):
            map("models:/kang@current", [query_file], map_config(tmp_path / "mapped", tracking=away))


def test_a_job_goes_on_without_its_tracking_store(atlas, config, tmp_path, caplog):
    (tmp_path / "file").touch()  # not a folder: the store cannot be made below it
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with caplog.at_level(logging.WARNING):
        bundle = train(atlas, config(tmp_path / "run", tracking=tracking, max_epochs=1))
    assert bundle.facts["training"]["epochs"] == 1
    assert sum("The job goes on without it" in r.message for r in caplog.records) == 1
    assert f"scviaduct sync {tmp_path / 'run'}" in caplog.text


def test_a_run_whose_creation_was_not_answered_is_made_once(tracking, client, tmp_path, monkeypatch):
    made, create = [], MlflowClient.create_run

    def unanswered(self, *args):
        made.append(create(self, *args))
        raise ConnectionError("the answer was lost")

    tracker = Tracker(tracking, tmp_path / "home")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", unanswered)
        tracker.start("t", {"a": 1}, {})
    assert tracker.run_id is None and len(made) == 1
    assert sync(tmp_path / "home") == (2, 0)
    runs = client.search_runs([made[0].info.experiment_id])
    assert [r.info.run_id for r in runs] == [made[0].info.run_id] and runs[0].data.params == {"a": "1"}


def test_a_version_whose_making_was_not_answered_is_made_once(registered, client, tmp_path):
    """Everything is told a second time, as after a kill between MLflow's answer and the note of it."""
    registered.metrics(0, {"loss": 1.0})
    events = (tmp_path / "home" / FOLDER / "events.jsonl").read_text()
    (tmp_path / "home" / FOLDER / "sent.json").unlink()
    assert sync(tmp_path / "home") == (events.count("\n"), 0)
    assert [int(v.version) for v in client.search_model_versions("name = 'm'")] == [1]
    assert len(client.get_metric_history(registered.run_id, "loss")) == 1
    assert len(client.search_runs([client.get_experiment_by_name("test").experiment_id])) == 1


def test_an_epoch_that_is_done_again_is_told_once(tracking, client, tmp_path):
    tracker = Tracker(tracking, tmp_path / "home")
    tracker.start("t", {}, {})
    for step in (0, 1, 1, 0, 2):
        tracker.metrics(step, {"loss": float(step), "other": 1.0})
    again = Tracker(tracking, tmp_path / "home")  # another driver, after the first was killed
    again.resume(None)
    again.history((step, {"loss": step + 0.5, "other": 1.0}) for step in range(5))
    assert again.run_id == tracker.run_id
    found = client.get_metric_history(tracker.run_id, "loss")
    assert [(m.step, m.value) for m in found] == [(0, 0), (1, 1), (2, 2), (3, 3.5), (4, 4.5)]


def test_system_metrics(tracking, client, tmp_path, monkeypatch):
    monkeypatch.setattr(systemmetrics, "SECONDS", 0.05)
    tracker = Tracker(TrackingConfig(**vars(tracking) | {"system_metrics": True}), tmp_path / "home")
    tracker.start("t", {}, {})
    with tracker.closing():
        while not client.get_run(tracker.run_id).data.metrics:
            pass
    assert "system/cpu_utilization_percentage" in client.get_run(tracker.run_id).data.metrics


def test_nothing_to_sync(run, tmp_path):
    assert sync(run) == (0, 0)
    with pytest.raises(UnreadableFileError, match="is not a folder that train or map wrote"):
        sync(tmp_path / "nowhere")


def test_a_store_s_path_means_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = f"sqlite:///{tmp_path}/mlflow.db"
    assert [store_uri(TrackingConfig(tracking_uri=uri)) for uri in (None, "sqlite:///mlflow.db", here)] == [here] * 3
    assert store_uri(TrackingConfig(tracking_uri="http://a:5000")) == "http://a:5000"


def test_no_tracking_at_all(tmp_path):
    tracker = Tracker(TrackingConfig(tracking_uri="none"), tmp_path / "home")
    with tracker.closing():
        tracker.start("x", {}, {})
        tracker.metrics(0, {"a": 1.0})
        tracker.child().start("y", {}, {})
    assert tracker.run_id is None and tracker.register("m", {}) is None and not list(tmp_path.iterdir())


def test_flat():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
