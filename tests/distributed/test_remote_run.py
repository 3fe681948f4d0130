"""A run whose folder is in an object store."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.checkpoint import Checkpoints
from scviaduct.distributed.config import TrackingConfig
from scviaduct.distributed.inspect import inspect
from scviaduct.distributed.map import map as map_queries
from scviaduct.distributed.runstatus import run_status
from scviaduct.distributed.tracking import sync
from scviaduct.distributed.train import train
from scviaduct.errors import ConfigError, IncompleteError, OutputExistsError, ScviaductError, UnreadableFileError
from scviaduct.storage.places import place


@pytest.fixture(scope="module")
def bucket(s3):
    client = s3.client()
    client.create_bucket(Bucket="runs")
    client.close()
    return "s3://runs"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scviaduct" / "bundles"


def weights(bundle):
    return load_file(bundle.path / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Gone(Exception):
    pass


def test_a_run_in_a_bucket_is_stopped_resumed_looked_at_and_mapped_onto(
    atlas, config, map_config, query_file, bucket, tmp_path, cache
):
    here = train(atlas, config(tmp_path / "here", max_epochs=4))
    out, told = Path(f"{bucket}/one"), []  # a Path, as the command line makes it
    made = config(out, max_epochs=4, checkpoint_every="0.01s", max_failures=0)

    def stop(record):
        if record["epoch"] == 1:
            raise Gone

    with pytest.raises(ScviaductError, match="in s3://runs/one was given up after 0 restarts"):
        train(atlas, made, on_epoch=stop)
    assert json.loads((place(out) / "run.json").read_text())["config"]["out"] == "s3://runs/one"
    status = run_status(out)
    assert (status.state, status.epoch, status.attempt) == ("running", 2, 1) and status.checkpoint_age < 600
    with pytest.raises(IncompleteError, match="has not finished"):
        Bundle.open(out)
    with pytest.raises(OutputExistsError, match="s3://runs/one exists already"):
        train(atlas, made)
    there = train(atlas, config(out, max_epochs=4, resume=True), on_epoch=lambda r: told.append(r["epoch"]))
    assert same(weights(here), weights(there))
    np.testing.assert_array_equal(here.latent(), there.latent())
    np.testing.assert_array_equal(here.labels(), there.labels())
    assert told[-1] == 3 and run_status(out).state == "finished"
    assert there.path.parent == cache and Bundle.open(str(place(out))).path == there.path
    names = {p.name for p in place(out).iterdir()}
    assert names == {"run.json", "history.jsonl", "attempts.json", "checkpoints", "bundle"}
    assert inspect(out).kind == "run" and inspect(f"{out}/bundle").kind == "bundle"
    assert train(atlas, config(out, max_epochs=4, resume=True)).path == there.path  # nothing to do
    summary = map_queries(out, [query_file], map_config(tmp_path / "mapped"))
    assert list(summary["status"]) == ["mapped"]


def test_what_is_not_whole_in_a_bucket_is_refused(run, s3, bucket, cache):
    def uploaded(name):
        return place(s3.upload(run / "bundle", f"b-{name}", "bundle"))

    lacking = uploaded("lacking")
    (lacking / "model.safetensors").unlink()
    with pytest.raises(IncompleteError, match="lacks a file"):
        Bundle.open(str(lacking))
    changed = uploaded("changed")
    (changed / "model.safetensors").write_bytes(b"0" * 99)
    with pytest.raises(IncompleteError, match="other sha256"):
        Bundle.open(str(changed))
    outside = uploaded("outside")
    facts = json.loads((outside / "model.json").read_text())
    facts["files"]["../../stolen"] = "0"
    (outside / "model.json").write_text(json.dumps(facts))
    with pytest.raises(UnreadableFileError, match=r"names a file outside of its folder: '\.\./\.\./stolen'"):
        Bundle.open(str(outside))
    assert not cache.exists() or not list(cache.iterdir())  # nothing half is kept
    with pytest.raises(UnreadableFileError, match="s3://runs/nothing does not exist"):
        Bundle.open(f"{bucket}/nothing")


def test_what_a_bucket_cannot_take_is_refused(atlas, config, bucket):
    with pytest.raises(ConfigError, match="--log-cells writes at each step"):
        train(atlas, config(Path(f"{bucket}/logged"), log_cells=True))
    with pytest.raises(ConfigError, match="There is no run to resume in s3://runs/none"):
        train(atlas, config(Path(f"{bucket}/none"), resume=True))
    assert not place(f"{bucket}/logged").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_mlflow_was_not_told_of_a_run_in_a_bucket_is_sent_from_there(
    atlas, config, bucket, mlflow_database, tmp_path, monkeypatch, caplog
):
    """The machine that ran it is gone meanwhile, and its temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "store").touch()  # not a folder: no store can be made in it
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/store/mlflow.db", experiment="test")
    out = Path(f"{bucket}/untold")

    def stop(record):
        raise Gone

    with pytest.raises(ScviaductError, match="given up"):
        train(atlas, config(out, max_epochs=2, max_failures=0, tracking=tracking), on_epoch=stop)
    (scratch,) = (tmp_path / "temporary").glob("scviaduct-*")
    assert f"What this machine holds of the run is kept in {scratch}" in caplog.text
    shutil.rmtree(scratch)
    train(atlas, config(out, max_epochs=2, resume=True, tracking=tracking))
    assert not list((tmp_path / "temporary").glob("scviaduct-*"))
    assert "Send them with: scviaduct sync s3://runs/untold" in caplog.text
    waiting = run_status(out).unsent
    assert waiting > 5
    (tmp_path / "store").unlink()
    (tmp_path / "store").mkdir()
    shutil.copy(mlflow_database, tmp_path / "store")
    assert sync(out) == (waiting, 0) and sync(out) == (0, 0)
    left = {"run.json", "history.jsonl", "attempts.json", "checkpoints", "bundle"}
    assert {p.name for p in place(out).iterdir()} == left
    client = MlflowClient(tracking.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "elbo_train")] == [0, 1]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"bundle", "plots"}
    assert client.get_model_version_by_alias("untold", "current").run_id == run.info.run_id


TRAIN = """
import json, sys
from scviaduct.distributed.config import TrainConfig
from scviaduct.distributed.train import train
train(sys.argv[1], TrainConfig.from_dict(json.load(sys.stdin)))
"""


def test_two_workers_write_parts_of_their_own(atlas, config, bucket, tmp_path):
    """Under a Ray of their own, whose workers know the store: those of the other tests may have begun before it."""
    options = {"deterministic": True, "max_epochs": 2}
    one = train(atlas, config(tmp_path / "one", **options))
    made = json.dumps(config(Path(f"{bucket}/two"), workers=2, **options).to_dict())
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, str(atlas)]
    done = subprocess.run(command, input=made, text=True, capture_output=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    two = Bundle.open(f"{bucket}/two")
    assert same(weights(one), weights(two))
    np.testing.assert_array_equal(one.latent(), two.latent())
    np.testing.assert_array_equal(one.labels(), two.labels())
    assert Checkpoints(place(f"{bucket}/two/checkpoints")).newest() > 0
