"""Runs that wait for workers: who started them, and who looks, is told for what."""

import json
import logging
import time

import pytest

from scviaduct.distributed import elastic, waiting
from scviaduct.distributed.runstatus import run_status
from scviaduct.distributed.waiting import Waiting, told_of_waiting, waits_for
from scviaduct.jobs.__main__ import app


@pytest.fixture
def begun(tmp_path, config):
    """The folder of a run that was started an hour ago."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"config": config(out, workers=2).to_dict()}))
    return out


def lacking(cores, unused, **changes):
    amounts = {"needed": {"CPU": 2.0}, "there": {"CPU": cores}, "free": {"CPU": unused}}
    return Waiting(**{"fewest": 2, "most": 2, "since": 1000.0, "at": 1090.0} | amounts | changes)


GPUS = {"needed": {"CPU": 2.0, "GPU": 2.0}, "there": {"CPU": 9.0, "GPU": 1.0}, "free": {"CPU": 9.0}}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (lacking(1, 1), "has waited 0:01:40 for 2 workers with 2 CPU; the cluster has 1 CPU (1 free). It goes on by"),
        (lacking(4, 1), "the cluster has 4 CPU (1 free): others have taken the rest, or its workers"),
        (lacking(9, 9, **GPUS), "for 2 workers with 2 CPU and 2 GPU; the cluster has 9 CPU (9 free) and 1 GPU (0 free). It"),
        (lacking(1, 1), "start a node, or stop it and go on with fewer: train --workers 1..2 --resume --out RUN."),
        (lacking(0, 0, fewest=1), "for a worker with 2 CPU; the cluster has 0 CPU (0 free). It"),
        (lacking(0, 0, fewest=1), "when there is room: start a node."),
    ],
)  # fmt: skip
def test_what_is_told(record, told):
    assert told in record.told("RUN", 1100.0)


def test_status_says_what_a_run_waits_for(begun, capsys):
    now = time.time()
    lacking(1, 1, since=now - 200, at=now).write(begun)
    found = run_status(begun, now=now)
    assert found.state == "waiting" and "has waited 0:03:20 for 2 workers with 2 CPU" in found.reason
    assert app(["status", str(begun)], result_action="return_value") == 0
    assert f"go on with fewer: train --workers 1..2 --resume --out {begun}." in capsys.readouterr().out
    assert run_status(begun, now=now + 1000).state == "stopped", "whoever wrote it is no more"


def test_the_driver_tells_once_and_cleans_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "_LOOK", 0.01)

    def until(text):
        end = time.monotonic() + 20
        while text not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.01)

    with caplog.at_level(logging.WARNING), told_of_waiting(tmp_path):
        lacking(1, 1, since=time.time() - 70, at=time.time()).write(tmp_path)
        until("has waited 0:01:10 for 2 workers with 2 CPU")
        lacking(1, 1, since=time.time() - 90, at=time.time()).write(tmp_path)
        time.sleep(0.1)
        (tmp_path / "waiting.json").unlink()
        until("The run goes on after 0:01:30")
        lacking(1, 1, at=time.time()).write(tmp_path)
    assert len(caplog.records) in {2, 3} and caplog.text.count("0:01:10") == 1
    assert not list(tmp_path.iterdir())


def test_the_controller_s_states_and_the_room_decide(tmp_path, monkeypatch):
    from ray.train.v2._internal.execution.controller import state as states

    monkeypatch.setattr(elastic, "EVERY", 0.02)
    made, lost = elastic.SayWaiting(tmp_path, 4, 4, 0), elastic.SayWaiting(tmp_path, 4, 4, 0.5)
    there = {"CPU": 4.0}
    monkeypatch.setattr(elastic, "_resources", lambda: ({"CPU": 4.0}, there))

    def becomes(previous, current, made=made):
        def one(name):
            kind = getattr(states, name)
            return kind.__new__(kind)  # what they carry does not matter here

        made.after_controller_state_update(one(previous), one(current))

    def says():
        time.sleep(0.3)
        return waits_for(tmp_path, time.time()) is not None

    made.after_controller_start(None)
    assert not says(), "there is room"
    there["CPU"] = 1.0
    assert says(), "a range of workers stays there until there is room"
    becomes("InitializingState", "SchedulingState")
    time.sleep(0.2)
    (tmp_path / "waiting.json").unlink()
    assert not says(), "Ray saw room"
    becomes("SchedulingState", "ReschedulingState")
    assert says(), "there was none"
    becomes("ReschedulingState", "SchedulingState")
    assert says()
    becomes("SchedulingState", "RunningState")
    assert not says()
    becomes("RunningState", "RestartingState")
    assert says()
    becomes("RestartingState", "ErroredState")
    assert not says()
    becomes("RestartingState", "SchedulingState", lost)
    assert says(), "the cluster has no GPU"
    becomes("SchedulingState", "RunningState", lost)
    assert not says()
    assert not says() and not list(tmp_path.iterdir())
