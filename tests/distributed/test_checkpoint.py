import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from scviaduct.distributed.cadence import Every
from scviaduct.distributed.checkpoint import Checkpoints, Progress
from scviaduct.distributed.optimizer import Adam, Group
from scviaduct.distributed.saver import Saver
from scviaduct.errors import ConfigError, IncompleteError

NOTHING = torch.zeros(4)


def made(seed=0, width=4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    return model, Adam([Group(model.parameters(), 1e-2)], "Adam", eps=1e-8, weight_decay=0.0)


def steps(model, optimizer, n):
    for k in range(n):
        optimizer.zero_grad()
        model(torch.arange(12.0).reshape(4, 3) + k).square().mean().backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def names(store):
    return [name.name.removeprefix("step-").lstrip("0") for name in store.names()]


@pytest.fixture(params=["here", "s3"])
def store(request, tmp_path):
    """An empty store of checkpoints, in a folder and in a bucket."""
    if request.param == "here":
        return Checkpoints(tmp_path / "checkpoints")
    from scviaduct.storage.places import place

    s3 = request.getfixturevalue("s3")
    client = s3.client()
    bucket = f"ckpt-{abs(hash(request.node.name)) % 10**8}"
    client.create_bucket(Bucket=bucket)
    client.close()
    return Checkpoints(place(f"s3://{bucket}/run/checkpoints"))


def test_going_on_from_a_checkpoint_equals_never_having_stopped(store):
    model, optimizer = made()
    steps(model, optimizer, 3)
    progress = Progress(epoch=1, step=3, best=2.0, best_weights={"w": torch.ones(2)})
    with Saver(store) as saver:
        saver.save(model, optimizer, progress, torch.arange(4, dtype=torch.float64), 13)
        steps(model, optimizer, 3)  # while it is written
    other, other_optimizer = made(seed=9)
    restored = store.restore(other, other_optimizer, store.newest(), rank=0)
    steps(other, other_optimizer, 3)
    assert same(model, other)
    assert (restored.epoch, restored.step, restored.best, restored.sums.tolist()) == (1, 3, 2.0, [0, 1, 2, 3])
    assert restored.best_weights["w"].tolist() == [1, 1]
    assert store.restore(*made(), 13, rank=1).sums.tolist() == [0, 0, 0, 0]  # the sums are carried on by one rank only


def test_the_learning_rate_is_restored(tmp_path):
    model, optimizer = made()
    steps(model, optimizer, 1)
    optimizer.groups[0].lr = 1e-5
    with Saver(Checkpoints(tmp_path)) as saver:
        saver.save(model, optimizer, Progress(), NOTHING, 1)
    other, other_optimizer = made()
    Checkpoints(tmp_path).restore(other, other_optimizer, 1, 0)
    assert other_optimizer.groups[0].lr == 1e-5


def test_the_newest_are_kept_and_the_last_of_a_best_epoch(store):
    model, optimizer = made()
    steps(model, optimizer, 1)
    kept = []
    with Saver(store, keep=2) as saver:
        for epoch, best in enumerate([-1, 0, 1, 1, 1, 4]):
            saver.save(model, optimizer, Progress(epoch=epoch, best_epoch=best), NOTHING, 10 * (epoch + 1))
            saver.save(model, optimizer, Progress(epoch=epoch, step=5, best_epoch=best), NOTHING, 10 * (epoch + 1) + 5)
            saver.wait()
            kept.append(names(store))
    assert kept == [
        ["10", "15"],
        ["20", "20"][:1] + ["25"],
        ["30", "35"],
        ["30", "40", "45"],
        ["30", "50", "55"],
        ["60", "65"],
    ]
    assert json.loads((store.names()[-1] / "state.json").read_text())["step"] == 5


def test_what_was_not_written_to_the_end_does_not_count(store):
    model, optimizer = made()
    steps(model, optimizer, 1)
    with Saver(store) as saver:
        saver.save(model, optimizer, Progress(step=1), NOTHING, 1)
        saver.save(model, optimizer, Progress(step=2), NOTHING, 2)
    (store.names()[-1] / "state.json").unlink()
    assert store.newest() == 1
    Saver(store).restored(*made(), 1, rank=1)  # only the rank that writes cleans up
    assert len({p.name for p in store.folder.iterdir()}) == 2
    assert Saver(store).restored(*made(), 1, rank=0).step == 1
    assert [p.name for p in store.folder.iterdir()] == ["step-000000001"]


def failing(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("scviaduct.distributed.checkpoint.write_json_atomic", fail)


def test_a_full_disk_is_told_at_the_next_step_and_the_checkpoint_before_is_intact(tmp_path, monkeypatch):
    model, optimizer = made()
    steps(model, optimizer, 1)
    store = Checkpoints(tmp_path / "run")
    saver = Saver(store)
    saver.save(model, optimizer, Progress(step=1), NOTHING, 1)
    saver.wait()
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    saver.save(model, optimizer, Progress(step=2), NOTHING, 2)
    message = (
        r"after step 2 could not be written to .*run: it needs 0 MB, and the disk is full \([\d,]+ MB free\)\. The one"
    )
    with pytest.raises(IncompleteError, match=message + r" after step 1 is intact; .*--resume"):
        for _ in range(200):
            saver.check()
            time.sleep(0.01)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-000000001"]
    assert store.restore(*made(), store.newest(), rank=0).step == 1


def test_the_last_checkpoint_is_waited_for_and_its_failure_is_raised(tmp_path, monkeypatch):
    model, optimizer = made()
    failing(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with (
        pytest.raises(IncompleteError, match=r"PermissionError: .*There is none before it"),
        Saver(Checkpoints(tmp_path)) as saver,
    ):
        saver.save(model, optimizer, Progress(), NOTHING, 1)
    with pytest.raises(ValueError, match="of the run"), Saver(Checkpoints(tmp_path)) as saver:
        saver.save(model, optimizer, Progress(), NOTHING, 1)
        raise ValueError("of the run")  # what went wrong first is what is told


def test_none_is_due_while_one_is_written(tmp_path, monkeypatch):
    model, optimizer = made()
    go_on = threading.Event()
    monkeypatch.setattr(Checkpoints, "write", lambda *_: go_on.wait(20))
    with Saver(Checkpoints(tmp_path), Every(seconds=0.0)) as saver:
        assert saver.due(16, improved=False)
        saver.save(model, optimizer, Progress(), NOTHING, 16)
        assert not saver.due(32, improved=False) and not saver.due(32, improved=True)
        go_on.set()
        saver.wait()
        assert saver.due(48, improved=False)


def test_when_a_checkpoint_is_due(tmp_path):
    model, optimizer = made()
    by_steps = Saver(Checkpoints(tmp_path / "steps"), Every.parse("25steps"))
    assert [p for p in range(1, 80) if by_steps.asked(p, epoch_ends=p == 30)] == [25, 30, 50, 75]
    assert by_steps.due(25, improved=False) and not by_steps.due(30, improved=False) and by_steps.due(30, improved=True)
    by_steps.save(model, optimizer, Progress(epoch=1, best_epoch=0), NOTHING, 30)
    by_steps.wait()
    assert not by_steps.due(40, improved=True) and by_steps.due(50, improved=False) and by_steps.due(60, improved=True)
    by_time = Saver(Checkpoints(tmp_path / "time"), Every.parse("1h"))
    assert [p for p in range(1, 50) if by_time.asked(p, epoch_ends=p == 30)] == [16, 30, 32, 48]
    assert not by_time.due(16, improved=False)
    by_time._last = by_time._last_best = (time.monotonic() - 3601, 0)
    by_time.save(model, optimizer, Progress(epoch=1, step=4), NOTHING, 16)
    by_time.wait()
    assert not by_time.due(32, improved=False) and by_time.due(32, improved=True)  # no best one for an hour


@pytest.mark.parametrize(
    ("text", "every"),
    [("30s", Every(30.0)), ("5min", Every(300.0)), ("1.5h", Every(5400.0)), ("500steps", Every(steps=500))],
)
def test_intervals(text, every):
    assert Every.parse(text) == every


@pytest.mark.parametrize("text", ["5", "", "5 minutes", "0s", "-1s", "1.5steps", "0steps", "steps", "5m"])
def test_what_is_no_interval(text):
    with pytest.raises(ConfigError, match="write 30s, 5min, 2h or 500steps"):
        Every.parse(text)


def test_copies_are_made_in_the_same_memory_and_hold_the_moment(tmp_path):
    model, optimizer = made()
    steps(model, optimizer, 1)
    saver, seen = Saver(Checkpoints(tmp_path)), []
    saver._write = lambda checkpoint: seen.append(({k: v.clone() for k, v in checkpoint.model.items()}, checkpoint))
    for position in (1, 2):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        saver.save(model, optimizer, Progress(), NOTHING, position)
        steps(model, optimizer, 1)
        saver.wait()
        assert all(torch.equal(seen[-1][0][name], tensor) for name, tensor in before.items())
    pointers = [[t.data_ptr() for t in checkpoint.model.values()] for _, checkpoint in seen]
    assert pointers[0] == pointers[1] and pointers[0] != [t.data_ptr() for t in model.state_dict().values()]


_ENDLESS = """
import os, sys, itertools, torch
from torch import nn
from scviaduct.distributed.checkpoint import Checkpoints, Progress
from scviaduct.distributed.optimizer import Adam, Group
from scviaduct.distributed.saver import Saver
torch.set_num_threads(1)
store = Checkpoints(__import__("pathlib").Path(sys.argv[1]))
for line in sys.stdin:
    child = os.fork()
    if not child:
        model = nn.Linear(3, 400_000)
        optimizer = Adam([Group(model.parameters(), 1e-3)], "Adam", eps=1e-8, weight_decay=0.0)
        saver = Saver(store, keep=2)
        saver.restored(model, optimizer, store.newest(), 0)
        for position in itertools.count(store.newest() + 1):
            nn.init.constant_(model.weight, position)
            nn.init.constant_(model.bias, position)
            saver.save(model, optimizer, Progress(step=position), torch.zeros(4), position)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_a_kill_while_it_is_written_leaves_the_one_before(tmp_path):
    """Twelve processes that do nothing but write checkpoints die at moments of all kinds; what is left is whole."""
    store, reached, torn = Checkpoints(tmp_path), 0, 0
    command = [sys.executable, "-c", _ENDLESS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        for k in range(12):
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            end = time.monotonic() + 30
            while store.newest() <= reached and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.007 * k)
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "dead\n"
            torn += bool(list(tmp_path.glob(".step-*.tmp")))
            model = nn.Linear(3, 400_000)
            position = store.newest()
            assert position > reached
            reached = position
            for name in store.names():
                at = int(name.name[5:])
                assert store.restore(model, None, at, 0).step == at
                assert (model.weight == at).all() and (model.bias == at).all()
    assert torn  # some kills did fall into the writing


def test_no_checkpoint_is_a_fresh_start(store):
    assert store.newest() == 0
    assert store.restore(*made(), store.newest(), rank=0).epoch == 0
