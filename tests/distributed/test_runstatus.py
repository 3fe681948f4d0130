import json
import os
import shutil

import pytest

from scviaduct.distributed.runstatus import run_status
from scviaduct.errors import UnreadableFileError
from scviaduct.jobs.__main__ import app


@pytest.fixture
def unfinished(run, tmp_path):
    """A copy of a run's folder, as it was after its last epoch."""
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "bundle")
    return tmp_path / "r"


def newest(folder):
    return max(p.stat().st_mtime for p in folder.rglob("*"))


def test_a_finished_run(run):
    found = run_status(run)
    assert (found.state, found.epoch, found.max_epochs, found.workers, found.attempt) == ("finished", 6, 6, 1, 1)
    assert found.cells_per_second > 0
    assert found.record["epoch"] == 5


def test_a_run_is_running_until_it_is_silent_for_too_long(unfinished):
    now = newest(unfinished)
    assert run_status(unfinished, now=now + 100).state == "running"
    assert run_status(unfinished, now=now + 1000).state == "stopped"


def test_what_is_left_is_counted_from_the_last_epochs(unfinished):
    lines = (unfinished / "history.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"seconds": 10.0} for line in lines[:2]]
    text = "\n".join(map(json.dumps, [*records, records[1]]))  # an epoch done again after a kill
    (unfinished / "history.jsonl").write_text(text + '\n{"epoch": 2, "sec')
    found = run_status(unfinished, now=newest(unfinished))
    assert found.epoch == 2
    assert found.seconds_left == 4 * 10.0


def test_a_refused_run_says_why(unfinished):
    (unfinished / "refused.json").write_text('{"error": "DataError", "message": "the loss is not finite"}')
    found = run_status(unfinished)
    assert (found.state, found.reason) == ("refused", "the loss is not finite")


def test_the_verb_says_it_in_sentences_and_in_json(run, unfinished, capsys):
    assert app(["status", str(run)], result_action="return_value") == 0
    assert "scvi, finished; epoch 6 of at most 6, one process, start 1" in capsys.readouterr().out
    for path in [unfinished, *unfinished.rglob("*")]:
        os.utime(path, (0, 0))
    app(["status", str(unfinished)], result_action="return_value")
    assert f"train --resume --out {unfinished}" in capsys.readouterr().out
    app(["status", str(run), "--as-json"], result_action="return_value")
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UnreadableFileError, match="not the folder of a training run"):
        run_status(tmp_path)
