import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.celllog import read_cells
from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.train import train
from scviaduct.errors import (
    ConfigError,
    DataError,
    IncompleteError,
    MissingColumnError,
    OutputExistsError,
    UnreadableFileError,
)
from scviaduct.storage.sampler import Split
from scviaduct.storage.view import View


def weights(bundle):
    return load_file(bundle.path / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def every_training_cell_once_an_epoch(out, view, config):
    """Asserts it from the sampler's log; returns the log."""
    log = read_cells(out / "cells")
    held_out = Split(config.fit.validation_size, config.fit.seed).validation(np.arange(view.n_rows))
    expected = np.flatnonzero(~held_out)
    assert sorted(log["epoch"].unique()) == list(range(config.fit.max_epochs))
    for _, epoch in log.groupby("epoch"):
        np.testing.assert_array_equal(np.sort(epoch["row"]), expected)
    return log


def test_a_run_becomes_a_bundle(run, atlas):
    bundle, view = Bundle.open(run), View.open(atlas)
    facts = bundle.facts
    assert facts["model"] == "scvi" and facts["training"]["epochs"] == 6
    assert facts["training"]["view_digest"] == view.digest
    assert bundle.schema.genes == view.genes and bundle.schema.batch.categories == ("study 0", "study 1", "study 2")
    assert not list(run.rglob("*.pkl")) and not list(run.rglob("*.pt"))
    latent = bundle.latent()
    assert latent.shape == (view.n_rows, 5) and latent.dtype == np.float32
    # row k of the reference is row k of the view
    block = view.source(bundle.schema).read(3)
    with torch.no_grad():
        again = bundle.model().encode(block).mean.numpy()
    np.testing.assert_allclose(latent[block.rows], again, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(bundle.labels()[block.rows], block.labels)
    assert len((run / "history.jsonl").read_text().splitlines()) == 6


def test_an_atlas_in_an_object_store_trains_the_same_model(atlas, config, s3, tmp_path):
    address = s3.upload(atlas, "training", "atlas.zarr")
    here = train(atlas, config(tmp_path / "here", max_epochs=1))
    there = train(Path(address), config(tmp_path / "there", max_epochs=1))  # as the command line gives it
    assert same(weights(here), weights(there))
    assert json.loads((tmp_path / "there/run.json").read_text())["atlas"] == address


def test_each_type_gives_its_share_to_validation(atlas, config, tmp_path):
    made = config(tmp_path / "run", log_cells=True, max_epochs=1, validation_stratify_by="cell_type")
    train(atlas, made)
    log, view = read_cells(tmp_path / "run" / "cells"), View.open(atlas)
    codes = view.source(view.schema(batch_key="study")).strata("cell_type")
    held_out = np.ones(view.n_rows, bool)
    held_out[log["row"]] = False
    assert np.bincount(codes, held_out).tolist() == np.floor(0.1 * np.bincount(codes) + 0.5).tolist()
    with pytest.raises(MissingColumnError, match="did you mean 'cell_type'"):
        train(atlas, config(tmp_path / "other", validation_stratify_by="celltype"))
    assert not (tmp_path / "other").exists()


def test_the_cell_log_shows_every_cell_once_an_epoch(atlas, config, tmp_path):
    made = config(tmp_path / "run", log_cells=True)
    train(atlas, made)
    every_training_cell_once_an_epoch(tmp_path / "run", View.open(atlas), made)


def test_a_finished_run_is_not_overwritten_and_not_repeated(run, atlas, config):
    with pytest.raises(OutputExistsError, match="exists already; nothing was written"):
        train(atlas, config(run))
    before = (run / "bundle" / "model.json").stat().st_mtime_ns
    assert train(atlas, config(run, resume=True)).path == run / "bundle"
    assert (run / "bundle" / "model.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_key": "studdy"}, MissingColumnError, "did you mean 'study'"),
        ({"labels_key": "celltype"}, MissingColumnError, "did you mean 'cell_type'"),
        ({"view": "other"}, IncompleteError, "scviaduct prepare"),
        ({"set": ("n_latnt=3",)}, ConfigError, "did you mean 'n_latent'"),
        ({"model": "scvj"}, ConfigError, "no model 'scvj'"),
        ({"resume": True}, ConfigError, "no run to resume"),
        ({"deterministic": True, "preset": "default"}, ConfigError, "batch norm mixes"),
        ({"precision": "tf32"}, ConfigError, "this worker has none"),
    ],
)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(atlas, config, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(atlas, config(tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_model_s_own_defaults_are_decided_and_recorded(atlas, config, tmp_path):
    plain = FitConfig(max_epochs=2, threads=1)
    bundle = train(atlas, replace(config(tmp_path / "run", model="trvae", preset="default", set=()), fit=plain))
    fit = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["fit"]
    assert (fit["weight_decay"], fit["lr_factor"], fit["batch_size"], fit["max_epochs"]) == (0.04, 0.1, 128, 2)
    assert fit["early_stopping"] is True and fit["n_epochs_kl_warmup"] == 0
    assert [r["kl_weight"] for r in bundle.facts["training"]["history"]] == [1.0, 1.0]
    assert bundle.facts["training"]["config"]["fit"] == fit


def test_resuming_with_other_options_is_refused(atlas, config, tmp_path):
    out = tmp_path / "run"
    train(atlas, config(out, max_epochs=1))
    (out / "bundle").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="batch_key: the run has study, now sample"):
        train(atlas, config(out, resume=True, max_epochs=1, batch_key="sample"))
    with pytest.raises(ConfigError, match=r"options: lr: the run has 0\.003, now 0\.1\.$"):
        train(atlas, config(out, resume=True, max_epochs=1, lr=0.1))


def test_a_view_that_changed_meanwhile_is_refused(atlas, config, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    record = {"config": config(out).to_dict(), "view_digest": "another", "mlflow_run": None}
    (out / "run.json").write_text(json.dumps(record))
    told = f"The view 'default' of {atlas} is not the one the run in {out} was started on."
    with pytest.raises(ConfigError, match=re.escape(told)):
        train(atlas, config(out, resume=True))
    assert [p.name for p in out.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda b: (b / "model.json").unlink(), UnreadableFileError, "not a model: it holds no model.json"),
        (lambda b: (b / "model.json").write_text("{}"), UnreadableFileError, "not a scviaduct model of format"),
        (lambda b: (b / "model.safetensors").unlink(), IncompleteError, "lacks model.safetensors"),
        (lambda b: (b / "reference" / "latent.npy").write_bytes(b"0" * 99), IncompleteError, "other sha256"),
    ],
)
def test_a_spoilt_bundle_is_refused(run, tmp_path, spoil, error, message):
    import shutil

    copy = Path(shutil.copytree(run / "bundle", tmp_path / "copy"))
    assert Bundle.open(copy)
    spoil(copy)
    with pytest.raises(error, match=message):
        Bundle.open(copy)


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(UnreadableFileError, match="does not exist"):
        Bundle.open(tmp_path / "nothing")


def command(atlas, config, **flags):
    """The command line of a configuration."""
    options = {"batch-key": config.batch_key, "labels-key": config.labels_key, "preset": config.preset}
    options |= {"max-epochs": config.fit.max_epochs, "batch-size": config.fit.batch_size, "threads": 1}
    options |= {
        "out": config.out,
        "tracking-uri": "none",
        "n-epochs-kl-warmup": 100,
        "lr": config.fit.lr,
        "checkpoint-every": "0.01s",
    }
    words = [str(w) for k, v in {**options, **flags}.items() for w in ([f"--{k}", v] if v is not True else [f"--{k}"])]
    words += [w for option in config.set for w in ("--set", option)]
    return [sys.executable, "-m", "scviaduct.jobs", "train", str(atlas), "--log-cells", *words]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_killed_driver_is_resumed_exactly(atlas, config, tmp_path):
    view = View.open(atlas)
    made = config(tmp_path / "run", max_epochs=5, batch_size=8, log_cells=True)
    undisturbed = train(atlas, config(tmp_path / "undisturbed", max_epochs=5, batch_size=8))
    rng = np.random.default_rng(0)
    for attempt in range(2):
        flags = {"resume": True} if attempt else {}
        process = subprocess.Popen(command(atlas, made, **flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        size = len(read_cells(made.out / "cells")) if attempt else 0
        goal = size + int(rng.integers(300, 1200))
        files = lambda: sum(f.stat().st_size for f in (made.out / "cells").glob("*")) // 24  # noqa: E731
        before = files() if attempt else 0
        wait_for(lambda: process.poll() is not None or files() - before > goal - size)  # noqa: B023
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (made.out / "bundle").exists()
    done = subprocess.run(command(atlas, made, resume=True), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = every_training_cell_once_an_epoch(made.out, view, made)
    assert log["attempt"].nunique() > 1  # the kills did fall into the training
    assert same(weights(Bundle.open(made.out)), weights(undisturbed))


def worker_pids():
    """Ray Train's worker processes below this one."""
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True) if "TrainWorker" in " ".join(p.cmdline())]


def test_two_workers_equal_one_and_survive_a_kill(atlas, config, tmp_path, ray_cluster):
    view = View.open(atlas)
    options = {"deterministic": True, "max_epochs": 4, "batch_size": 16, "log_cells": True}
    one = train(atlas, config(tmp_path / "one", **options))
    made = config(tmp_path / "two", workers=2, checkpoint_every="0.01s", **options)
    killed = []

    def kill():
        cells = made.out / "cells"
        wait_for(lambda: sum(f.stat().st_size for f in cells.glob("attempt-0001.rank-0001*")) > 24 * 500)
        killed.append(worker_pids()[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    two = train(atlas, made)
    killer.join()
    log = every_training_cell_once_an_epoch(made.out, view, made)
    assert killed and log["rank"].nunique() == 2 and log["attempt"].nunique() == 2
    assert same(weights(one), weights(two))
    np.testing.assert_array_equal(one.latent(), two.latent())
    histories = [[r["elbo_validation"] for r in b.facts["training"]["history"]] for b in (one, two)]
    assert histories[0] == pytest.approx(histories[1], rel=1e-12)
    every = [json.loads(line)["epoch"] for line in (made.out / "history.jsonl").read_text().splitlines()]
    assert sorted(set(every)) == [0, 1, 2, 3]


FAMILY = {
    "scanvi": {"unlabeled_category": "type 02", "set": ("n_hidden=32", "n_latent=5", "n_samples_per_label=40")},
}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("model", FAMILY)
def test_two_workers_give_the_bits_of_one(atlas, config, tmp_path, model):
    options = FAMILY[model] | {"model": model, "deterministic": True, "max_epochs": 2}
    one, two = (train(atlas, config(tmp_path / str(n), workers=n, **options)) for n in (1, 2))
    assert same(weights(one), weights(two))
    np.testing.assert_array_equal(one.latent(), two.latent())
    other = FAMILY[model] | {"set": FAMILY[model]["set"][:2], "model": model, "deterministic": True, "max_epochs": 2}
    assert not same(weights(one), weights(train(atlas, config(tmp_path / "other", **other))))


def test_a_refusal_in_a_worker_is_not_tried_again(atlas, config, tmp_path, ray_cluster):
    begin = time.monotonic()
    with pytest.raises(DataError, match="The loss became"):
        train(atlas, config(tmp_path / "run", workers=2, lr=1e30, preset="scarches"))
    assert len(json.loads((tmp_path / "run" / "attempts.json").read_text())) == 1
    assert time.monotonic() - begin < 120
