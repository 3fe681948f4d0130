import json

import pytest
import torch
from torch import nn

from scviaduct.distributed.checkpoint import Checkpoints, Progress


def made(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)


def steps(model, optimizer, n):
    for k in range(n):
        optimizer.zero_grad()
        model(torch.arange(12.0).reshape(4, 3) + k).square().mean().backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_going_on_from_a_checkpoint_equals_never_having_stopped(tmp_path):
    model, optimizer = made()
    store = Checkpoints(tmp_path)
    steps(model, optimizer, 3)
    progress = Progress(epoch=1, step=3, best=2.0, best_weights={"w": torch.ones(2)})
    store.save(model, optimizer, progress, torch.arange(4, dtype=torch.float64), 13)
    steps(model, optimizer, 3)
    other, other_optimizer = made(seed=9)
    restored = store.restore(other, other_optimizer, rank=0)
    steps(other, other_optimizer, 3)
    assert same(model, other)
    assert (restored.epoch, restored.step, restored.best, restored.sums.tolist()) == (1, 3, 2.0, [0, 1, 2, 3])
    assert restored.best_weights["w"].tolist() == [1, 1]
    assert store.restore(*made(), rank=1).sums.tolist() == [0, 0, 0, 0]  # the sums are carried on by one rank only


def test_the_learning_rate_is_restored(tmp_path):
    model, optimizer = made()
    steps(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 1e-5
    Checkpoints(tmp_path).save(model, optimizer, Progress(), torch.zeros(4), 1)
    other, other_optimizer = made()
    Checkpoints(tmp_path).restore(other, other_optimizer, 0)
    assert other_optimizer.param_groups[0]["lr"] == 1e-5


def test_newest_are_kept_and_the_state_is_readable(tmp_path):
    model, optimizer = made()
    steps(model, optimizer, 1)
    store = Checkpoints(tmp_path, keep=2)
    for position in (5, 40, 300):
        store.save(model, optimizer, Progress(step=position), torch.zeros(4), position)
    assert [p.name for p in store.names()] == ["step-000000040", "step-000000300"]
    assert json.loads((store.names()[-1] / "state.json").read_text())["step"] == 300


def test_a_half_written_checkpoint_is_never_seen(tmp_path, monkeypatch):
    model, optimizer = made()
    steps(model, optimizer, 1)
    store = Checkpoints(tmp_path)
    store.save(model, optimizer, Progress(step=1), torch.zeros(4), 1)
    monkeypatch.setattr(
        "scviaduct.distributed.checkpoint.write_json_atomic", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        store.save(model, optimizer, Progress(step=2), torch.zeros(4), 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    assert store.restore(*made(), rank=0).step == 1


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(*made(), rank=0).epoch == 0
