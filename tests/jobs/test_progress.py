"""What a person sees while a job runs: a bar that fits the terminal, or plain lines in a file."""

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from scviaduct.jobs import display
from scviaduct.jobs.display import Steps, epoch_remark

RECORD = {"elbo_train": 412.3, "elbo_validation": 431.07, "cells_per_second": 51234.5, "data_wait": 0.04}


def seen(text):
    """Lines as they stood in the terminal one after the other, without colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return [line.strip("\n") for line in re.split(r"\r", plain) if line.strip()]


def in_a_terminal(arguments, cwd, columns):
    """Runs a command whose stderr is a terminal of so many columns; gives (exit code, stdout, stderr)."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "MLFLOW_TRACKING_URI": "none"}
    with subprocess.Popen(arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=there, env=environment) as process:
        os.close(there)
        written = b""
        while True:
            try:
                piece = os.read(here, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            written += piece
        output = process.stdout.read().decode()
    os.close(here)
    return process.returncode, output, written.decode()


def test_a_bar_in_a_terminal_fits_eighty_columns(place, tmp_path):
    options = ["--batch-key", "study", "--max-epochs", "80", "--threads", "1", "--set", "n_hidden=16"]
    line = [sys.executable, "-m", "scviaduct.jobs", "train", "atlas.zarr", *options, "--out", str(tmp_path / "r")]
    code, output, written = in_a_terminal(line, place, 80)
    assert code == 0 and "after 80 epochs" in output, written
    lines = seen(written)
    assert max(map(len, lines)) <= 80
    last = lines[-1]
    assert re.match(r"epoch ━+ +80/80 +0:00:00 [\d,]+ cells/s · \d+% data wait · elbo \d+", last), last
    assert any(re.search(r" [1-7]?\d/80 +0:0\d:\d\d ", line) for line in lines), "the time left is told on the way"


@pytest.fixture
def log_file(monkeypatch):
    """What Steps writes to a file, with a clock that goes on by six seconds at every look."""
    ticks = itertools.count(step=6.0)
    console = Console(record=True, force_terminal=False, width=80, highlight=False, markup=False, file=io.StringIO())
    monkeypatch.setattr(display, "console", console)
    monkeypatch.setattr(display.time, "monotonic", lambda: next(ticks))
    return console


def test_plain_lines_in_a_log_file(log_file):
    with Steps("epoch") as steps:
        for epoch in range(1, 5):
            steps.at(epoch, epoch_remark(RECORD), 400)
    lines = log_file.export_text().splitlines()
    assert lines[-1].startswith("epoch 4/400 51,234 cells/s · 4% data wait · elbo 412.30 validation 431.07 · ")
    assert re.search(r" · \d+:\d\d:\d\d left$", lines[-1])
    assert all(line.startswith("epoch ") for line in lines) and 2 <= len(lines) <= 4
    assert not set("━╸╺\x1b") & set("".join(lines))


def test_cells_a_second_and_what_was_done_before(log_file):
    with Steps("convert", 1000, unit="cells") as steps:
        steps.at(500, "a.h5ad")
        steps.at(620, "a.h5ad")
    (line,) = log_file.export_text().splitlines()[-1:]
    rate = float(re.search(r"([\d,]+) cells/s", line)[1])
    assert line.startswith("convert 620/1000 a.h5ad · ") and 0 < rate <= 20, "500 cells were done before"


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=told))
    begun = tmp_path / "run.json"
    for exists in (False, True):
        if exists:
            begun.touch()
        with pytest.raises(KeyboardInterrupt), display.going_on(begun, "train a.zarr --resume --out run"):
            raise KeyboardInterrupt
        assert ("To go on: scviaduct train a.zarr --resume --out run" in told.getvalue()) == exists
