"""Training beside a real MLflow server that is killed, comes back, or is not there at all."""

import os
import shutil
import subprocess
import time

import pytest
from mlflow import MlflowClient

from scviaduct.distributed import outbox
from scviaduct.distributed.config import TrackingConfig
from scviaduct.distributed.journal import FOLDER
from scviaduct.distributed.runstatus import run_status
from scviaduct.distributed.train import train
from scviaduct.jobs.__main__ import app
from scviaduct.storage.manifest import read_json
from tests.distributed.mlflow_server import Server

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
EPOCHS = 8


@pytest.fixture(scope="module")
def server(mlflow_database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    made = Server(folder, shutil.copy(mlflow_database, folder / "mlflow.db"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def client(server):
    return MlflowClient(server.uri)


def told(client, run_id, name="elbo_validation"):
    return [m.step for m in client.get_metric_history(run_id, name)]


def until(true):
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_server_that_is_killed_in_mid_run_and_comes_back_knows_every_epoch_once(
    server, client, atlas, config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(outbox, "_FIRST_WAIT", 0.01)  # else the few epochs of a test would be over

    def on_epoch(record):
        if record["epoch"] == 2:
            server.kill()
        if record["epoch"] == 5:
            until(lambda: run_status(tmp_path / "away").unsent >= 3)
            server.start()
        if record["epoch"] == 7:  # what waited is told before the run ends
            run_id = read_json(tmp_path / "away" / "run.json")["mlflow_run"]
            until(lambda: set(told(client, run_id)) >= set(range(7)))

    tracking = TrackingConfig(tracking_uri=server.uri, experiment="away")
    bundle = train(atlas, config(tmp_path / "away", tracking=tracking, max_epochs=EPOCHS), on_epoch=on_epoch)
    run_id = bundle.facts["training"]["mlflow_run"]
    for name in ("elbo_train", "seconds", "kl_weight"):
        assert told(client, run_id, name) == list(range(EPOCHS))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and len(client.search_runs([run.info.experiment_id])) == 1
    assert client.get_model_version_by_alias("away", "current").run_id == run_id
    assert not (tmp_path / "away" / FOLDER).exists()
    assert sum("goes on without it" in r.message for r in caplog.records) == 1


def test_a_run_that_never_met_its_server_is_told_by_sync(server, client, atlas, config, tmp_path, capsys):
    out, begin = tmp_path / "early", time.time()
    nobody = TrackingConfig(tracking_uri="http://127.0.0.1:9", experiment="early")
    bundle = train(atlas, config(out, tracking=nobody, max_epochs=3))
    end = time.time()
    assert bundle.facts["training"]["mlflow_run"] is None
    waiting = run_status(out).unsent
    assert waiting > 6
    out = out.rename(tmp_path / "moved")
    assert app(["status", str(out)], result_action="return_value") == 0
    assert f"{waiting} records wait for MLflow: scviaduct sync" in capsys.readouterr().out.replace("\n", " ")
    assert app(["sync", str(out)], result_action="return_value") == 1
    assert run_status(out).unsent == waiting

    assert app(["sync", str(out), "--tracking-uri", server.uri], result_action="return_value") == 0
    (run,) = client.search_runs([client.get_experiment_by_name("early").experiment_id])
    assert begin <= run.info.start_time / 1000 + 0.01 and run.info.end_time / 1000 <= end
    assert run.info.status == "FINISHED" and told(client, run.info.run_id) == [0, 1, 2]
    assert int(client.get_model_version_by_alias("early", "current").version) == 1
    assert len(run.inputs.dataset_inputs) == 4
    assert not (out / FOLDER).exists()
    assert app(["sync", str(out)], result_action="return_value") == 0


@pytest.mark.skipif(
    "SCVIADUCT_BROWSER" not in os.environ, reason="SCVIADUCT_BROWSER is not set to a Chromium, e.g. /usr/bin/chromium"
)
def test_the_page_of_a_run_shows_its_charts(server, client, atlas, config, tmp_path):
    tracking = TrackingConfig(tracking_uri=server.uri, experiment="page")
    bundle = train(atlas, config(tmp_path / "kang", tracking=tracking, max_epochs=4))
    run = client.get_run(bundle.facts["training"]["mlflow_run"])
    page = f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    program = [os.environ["SCVIADUCT_BROWSER"], "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    program += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    program += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=60000", "--window-size=1600,1400"]
    done = subprocess.run([*program, "--dump-dom", page], capture_output=True, text=True, timeout=300)
    for shown in ("train kang", "elbo_validation", "view_digest", "atlas.zarr"):
        assert shown in done.stdout
