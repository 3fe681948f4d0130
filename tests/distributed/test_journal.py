"""What MLflow is to be told, without MLflow: order, kills, turns of two processes, moved folders."""

import json

import pytest

from scviaduct.distributed import outbox as outbox_module
from scviaduct.distributed.journal import FOLDER, Journal, unsent
from scviaduct.distributed.mlflowstore import Refused
from scviaduct.distributed.outbox import Outbox


def event(number, kind="tag"):
    return {"kind": kind, "run": "r", "number": number}


class Store:
    """Takes events, or fails while it is away."""

    def __init__(self, uri, experiment):
        self.got, self.calls, self.error = [], 0, None

    def deliver(self, event, ids):
        self.calls += 1
        if self.error:
            raise self.error
        ids.setdefault("r", "id of r")
        self.got.append(event.get("path", event["number"]))
        return event["number"]


@pytest.fixture
def outbox(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox_module, "MlflowStore", Store)
    clock = [1000.0]
    monkeypatch.setattr(outbox_module.time, "monotonic", lambda: clock[0])
    made = Outbox("http://away", "e", tmp_path / FOLDER)
    made.clock, made.store = clock, made._store
    return made


def test_what_waits_is_sent_in_order_when_the_store_is_back(outbox, tmp_path, caplog):
    assert outbox.put(event(0)) == 0
    outbox.store.error = ConnectionError("refused")
    assert [outbox.put(event(n)) for n in (1, 2, 3)] == [None, None, None]
    assert outbox.store.calls == 2, "the second and third event did not wait for another try"
    assert unsent(tmp_path) == 3
    outbox.store.error = None
    outbox.clock[0] += 6
    assert outbox.put(event(4)) == 4
    assert outbox.store.got == [0, 1, 2, 3, 4] and unsent(tmp_path) == 0
    assert sum("goes on without it" in r.message for r in caplog.records) == 1


def test_tries_grow_rarer_and_a_success_resets_them(outbox):
    outbox.store.error = TimeoutError("late")
    for second in range(0, 1200, 5):
        outbox.clock[0] = 1000.0 + second
        outbox.put(event(second))
    assert outbox.store.calls == 9  # after 0, 5, 15, 35, 75, 155, 315, 615 and 915 s
    outbox.store.error = None
    outbox.send()
    outbox.store.error, calls = TimeoutError("late"), outbox.store.calls
    outbox.put(event(0))
    outbox.clock[0] += 5
    outbox.put(event(0))
    assert outbox.store.calls == calls + 2


def test_an_event_that_is_refused_does_not_stop_the_others(outbox, caplog):
    outbox.store.error = Refused("no such thing")
    outbox.put(event(0))
    outbox.store.error = None
    assert outbox.put(event(1)) == 1
    assert outbox.store.got == [1] and "no such thing" in caplog.text


def test_a_process_that_was_killed_loses_nothing_but_half_a_line(outbox, tmp_path):
    outbox.put(event(0))
    outbox.store.error = ConnectionError("refused")
    outbox.put(event(1))
    with (tmp_path / FOLDER / "events.jsonl").open("a") as file:
        file.write('{"kind": "ta')
    again = Outbox("http://away", "e", tmp_path / FOLDER)
    assert again.journal.ids == {"r": "id of r"}
    assert again.put(event(2)) == 2
    assert again._store.got == [1, 2]
    lines = (tmp_path / FOLDER / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2]


def test_two_processes_take_turns(outbox, tmp_path):
    outbox.store.error = ConnectionError("refused")
    outbox.put(event(0))
    outbox.put(event(1))
    other = Outbox("http://away", "e", tmp_path / FOLDER)
    other.send()
    assert other._store.got == [0, 1]
    outbox.store.error = None
    outbox.clock[0] += 6
    outbox.put(event(2))
    assert outbox.store.got == [2], "what the other sent is not sent again"


def test_only_one_sends_at_a_time(outbox, tmp_path):
    outbox.put(event(0))
    with Journal(tmp_path / FOLDER).sending() as first:
        assert first
        assert outbox.put(event(1)) is None
    assert outbox.put(event(2)) == 2 and outbox.store.got == [0, 1, 2]


def test_files_are_found_after_the_folder_has_moved(outbox, tmp_path):
    home = tmp_path / "run"
    journal = Journal(home / FOLDER)
    inside, outside = journal.noted(home / "bundle"), journal.noted(tmp_path / "elsewhere")
    for number, path in enumerate((inside, outside)):
        journal.append(event(number) | {"path": path})
    home.rename(tmp_path / "moved")
    moved = Outbox("http://away", "e", tmp_path / "moved" / FOLDER)
    moved.send()
    assert moved._store.got == [str(tmp_path / "moved" / "bundle"), str(tmp_path / "elsewhere")]


def test_a_run_that_is_removed_is_not_made_again_by_its_journal(tmp_path):
    journal = Journal(tmp_path / "run" / FOLDER)
    journal.append(event(0))
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "run").rmdir()
    journal.append(event(1))
    with journal.sending() as mine:
        assert mine
    assert not (tmp_path / "run").exists() and len(journal.waiting) == 2
