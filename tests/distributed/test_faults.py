"""Faults, injected: what is tried again, what is told, and that the model is the one of an undisturbed run."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scviaduct.distributed import launch, loop
from scviaduct.distributed.celllog import CellLog, read_cells
from scviaduct.distributed.checkpoint import Checkpoints
from scviaduct.distributed.failures import WorkerHangsError, may_pass
from scviaduct.distributed.runstatus import run_status
from scviaduct.distributed.train import train
from scviaduct.distributed.watch import hanging
from scviaduct.errors import ConfigError, IncompleteError, ScviaductError, UnreadableFileError
from scviaduct.storage.sampler import Split
from scviaduct.storage.view import View

OPTIONS = {"max_epochs": 3, "batch_size": 16, "checkpoint_every": "0.01s"}


@pytest.fixture(scope="module")
def undisturbed(atlas, config, tmp_path_factory):
    """The weights of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return load_file(train(atlas, config(out, **OPTIONS)).path / "model.safetensors")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(launch, "_PAUSE", 0.0)


@pytest.fixture
def raises(monkeypatch):
    """Makes the training raise an error after each of some steps (epoch, step), once."""

    def plan(error, *moments):
        left, write = list(moments), CellLog.write

        def wrapped(self, epoch, step, rows):
            write(self, epoch, step, rows)
            if left and (epoch, step) == left[0]:
                left.pop(0)
                raise error

        monkeypatch.setattr(CellLog, "write", wrapped)
        return left

    return plan


def is_undisturbed(out, atlas, undisturbed, n_epochs=3):
    """Asserts that each training cell was seen once an epoch, and that the weights have the same bits."""
    log, n_rows = read_cells(out / "cells"), View.open(atlas).n_rows
    expected = np.flatnonzero(~Split(0.1, 0).validation(np.arange(n_rows)))
    assert sorted(log["epoch"].unique()) == list(range(n_epochs))
    for _, epoch in log.groupby("epoch"):
        np.testing.assert_array_equal(np.sort(epoch["row"]), expected)
    weights = load_file(out / "bundle" / "model.safetensors")
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def starts(out):
    return len(json.loads((out / "attempts.json").read_text()))


def read_failed(cause):
    error = IncompleteError("View 'default' of a.zarr: rows 0 to 63 cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (RuntimeError("Connection closed by peer"), True),
        (WorkerHangsError("worker 1 hangs"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError("shapes"), False),
        (KeyError("gene"), False),
        (ZeroDivisionError(), False),
        (UnreadableFileError("truncated"), False),
        (ConfigError("options"), False),
        (read_failed(OSError(errno.EIO, "Input/output error")), True),
        (read_failed(ValueError("a checksum is wrong")), False),
    ],
)
def test_an_error_is_tried_again_where_it_may_pass(error, passes):
    assert may_pass(error) is passes


def test_an_error_that_passes_is_survived(atlas, config, tmp_path, raises, undisturbed, caplog):
    left = raises(OSError(errno.EIO, "Input/output error"), (0, 20), (1, 3), (1, 4))
    train(atlas, config(tmp_path / "run", log_cells=True, **OPTIONS))
    assert left == [] and starts(tmp_path / "run") == 4
    assert caplog.text.count("Input/output error; going on from the last checkpoint") == 3
    is_undisturbed(tmp_path / "run", atlas, undisturbed)


def test_an_error_that_does_not_pass_ends_the_run_within_its_budget(atlas, config, tmp_path, raises, undisturbed):
    out = tmp_path / "run"
    raises(OSError(errno.EIO, "Input/output error"), (0, 20), (1, 3))
    with pytest.raises(ScviaductError, match=r"given up after 1 restarts \(OSError: .*Input/output error.*--resume"):
        train(atlas, config(out, log_cells=True, max_failures=1, **OPTIONS))
    assert starts(out) == 2 and run_status(out).state != "refused"
    train(atlas, config(out, resume=True, log_cells=True, **OPTIONS))
    is_undisturbed(out, atlas, undisturbed)


def test_an_error_of_the_code_is_not_tried_again(atlas, config, tmp_path, raises, undisturbed):
    out = tmp_path / "run"
    raises(ValueError("operands could not be broadcast"), (1, 3))
    with pytest.raises(ValueError, match="broadcast"):
        train(atlas, config(out, log_cells=True, **OPTIONS))
    assert starts(out) == 1
    status = run_status(out)
    assert status.state == "refused"
    assert "ValueError: operands could not be broadcast" in status.reason
    assert "in wrapped" in (out / "traceback.txt").read_text()
    train(atlas, config(out, resume=True, log_cells=True, **OPTIONS))
    assert run_status(out).state == "finished"
    is_undisturbed(out, atlas, undisturbed)


@contextmanager
def nan(_):
    backward = loop.backward
    loop.backward = lambda net, batch, kl, *rest, **named: backward(net, batch, float("nan"), *rest, **named)
    yield
    loop.backward = backward


def largest_shard(atlas):
    return max((p for p in (atlas / "views").rglob("c/*") if p.is_file()), key=lambda p: p.stat().st_size)


@contextmanager
def flipped_chunk(atlas):
    """Half of a file's bytes are wrong."""
    shard = largest_shard(atlas)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + bytes(b ^ 255 for b in content[len(content) // 2 :]))
    yield
    shard.write_bytes(content)


@contextmanager
def cut_chunk(atlas):
    """A file ends in its middle."""
    shard = largest_shard(atlas)
    content = shard.read_bytes()
    os.truncate(shard, len(content) // 2)
    yield
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (nan, r"The loss became nan at epoch 1, step 1 \(cells at rows \[\d+, .*The last checkpoint is intact"),
        (
            flipped_chunk,
            r"View 'default' of .*atlas\.zarr: rows \d+ to \d+ cannot be read \(a checksum of \w+/c/0 is wrong",
        ),
        (cut_chunk, r"View 'default' of .*atlas\.zarr: rows \d+ to \d+ cannot be read \(\w+/c/0 is too short"),
    ],
)
def test_what_does_not_pass_is_told_once_and_mended(atlas, config, tmp_path, monkeypatch, undisturbed, fault, message):
    mine = tmp_path / "atlas.zarr"
    shutil.copytree(atlas, mine)
    out, write, spoilt = tmp_path / "run", CellLog.write, ExitStack()

    def spoils(self, epoch, step, rows):
        write(self, epoch, step, rows)
        if (epoch, step) == (1, 0):
            spoilt.enter_context(fault(mine))

    monkeypatch.setattr(CellLog, "write", spoils)
    with spoilt, pytest.raises(ScviaductError, match=message):
        train(mine, config(out, log_cells=True, **OPTIONS))
    assert starts(out) == 1
    assert run_status(out).state == "refused"
    monkeypatch.setattr(CellLog, "write", write)
    train(mine, config(out, resume=True, log_cells=True, **OPTIONS))
    is_undisturbed(out, mine, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is for root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    atlas, config, small_disk, undisturbed, monkeypatch
):
    out, write = small_disk / "run", CellLog.write
    ballast = small_disk / "ballast"

    def fills(self, epoch, step, rows):
        write(self, epoch, step, rows)
        if (epoch, step) == (1, 0):
            with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    monkeypatch.setattr(CellLog, "write", fills)
    with pytest.raises(ScviaductError, match=r"disk (of .*run )?is full.* intact.*--resume"):
        train(atlas, config(out, log_cells=True, **OPTIONS))
    assert starts(out) == 1
    monkeypatch.setattr(CellLog, "write", write)
    ballast.unlink()
    train(atlas, config(out, resume=True, log_cells=True, **OPTIONS))
    is_undisturbed(out, atlas, undisturbed)


HANGS = """
    import pickle, sys, time
    from datetime import timedelta
    from pathlib import Path
    from torch import distributed
    from scviaduct.distributed.celllog import CellLog
    from scviaduct.distributed.checkpoint import Checkpoints
    from scviaduct.distributed.failures import attempt
    from scviaduct.distributed.train import work

    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    write = CellLog.write

    def stuck_in_a_read(self, epoch, step, rows):
        write(self, epoch, step, rows)
        if rank == 1 and (epoch, step) == (1, 2):
            time.sleep(600)

    CellLog.write = stuck_in_a_read
    job = pickle.loads((folder / "job.pickle").read_bytes())
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=4))
    try:
        attempt(work, job)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_worker_that_hangs_is_named_by_the_one_that_waits(atlas, config, tmp_path, monkeypatch):
    """Two processes as under Ray, without it."""

    def run_on_workers(work, job, config):
        (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
        raise InterruptedError

    made = config(tmp_path / "run", workers=2, hang_seconds=2.0, log_cells=True, deterministic=True, **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("scviaduct.distributed.train.run_on_workers", run_on_workers)
        train(atlas, made)
    code = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HANGS), str(tmp_path)]
    waits, hangs = (subprocess.Popen([*code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2))
    told, _ = waits.communicate(timeout=120)
    hangs.kill()
    hangs.communicate()
    assert "WorkerHangsError: worker 1 hangs in <string>, line 17, in stuck_in_a_read (its stacks: " in told
    assert hanging(made.out / "stacks", 1) == [told.strip().removeprefix("WorkerHangsError: ")]
    assert "stuck_in_a_read" in (made.out / "stacks" / "attempt-0001.rank-0001.txt").read_text()
    assert run_status(made.out).workers == 2 and run_status(made.out).state == "running"
    lanes = config(tmp_path / "lanes", deterministic=True, **OPTIONS)
    train(atlas, replace(lanes, out=made.out, resume=True, log_cells=True))  # now with one worker
    assert run_status(made.out).workers == 1
    is_undisturbed(made.out, atlas, load_file(train(atlas, lanes).path / "model.safetensors"))


def test_gpus_that_a_machine_does_not_have_are_an_error_at_once(atlas, config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--gpus-per-worker 0\.5, but this machine has no GPU"):
        train(atlas, config(tmp_path / "run", gpus_per_worker=0.5))
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_is_to_grow_is_let_reach_a_checkpoint(tmp_path):
    from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState

    from scviaduct.distributed.elastic import GrowAtCheckpoints

    hook, moments = GrowAtCheckpoints(Checkpoints(tmp_path)), []

    def write():
        moments.append(time.monotonic())
        (tmp_path / "step-000000016").mkdir()
        (tmp_path / "step-000000016" / "state.json").write_text("{}")

    hook.after_controller_state_update(None, RunningState())  # waits for nothing
    writer = threading.Timer(0.5, write)
    writer.start()
    hook.after_controller_state_update(None, ResizingState(scaling_decision=None))
    assert moments and time.monotonic() - moments[0] < 0.5
    writer.join()


@pytest.mark.slow
def test_a_lost_node_shrinks_the_run_and_a_new_one_lets_it_grow(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "faults.py"
    options = ["node_lost", "--times", "1", "--between", "20", "60", "--work", tmp_path]
    command = [sys.executable, "-W", "ignore", script, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    # Ray tells on the same stream that a node is gone
    lost, added = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    for row in (lost, added):
        assert (row["injected"], row["recovered"], row["wrong_cells"], row["equal"]) == (1, 1, 0, True)
    assert (lost["fault"], added["fault"]) == ("node lost (2 → 1 workers)", "node added (1 → 2 workers)")
