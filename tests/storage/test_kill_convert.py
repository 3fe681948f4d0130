"""SIGKILL at any moment, and a full disk: what comes after is, byte for byte, what an undisturbed conversion makes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.errors import DataError, IncompleteError, OutputExistsError, UnreadableFileError
from scviaduct.storage import arrays, dataset, probe
from scviaduct.storage.arrays import Growing
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.check import check_block
from scviaduct.storage.convert import convert
from scviaduct.storage.csr import _weigh
from scviaduct.storage.manifest import tree_digest

KEPT = {"obsm": ("protein", "table"), "layers": ("spliced",)}


def write(path: Path, seed: int, largest: int = 3) -> Path:
    """64 cells whose large counts come late, so that the type widens when shards are on disk already."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random((64, 30)) < 0.4, rng.integers(1, 4, (64, 30)), 0)
    counts[30, 3], counts[60, 7] = min(largest, 300), largest
    names = [f"c{i}" for i in range(64)]
    obs = pd.DataFrame({"kind": pd.Categorical(rng.choice(["B", "T"], 64)), "x": rng.normal(size=64)}, index=names)
    data = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=[f"g{i}" for i in range(30)]))
    data.obsm["protein"] = rng.normal(size=(64, 4))
    data.obsm["table"] = pd.DataFrame({"a": range(64), "b": rng.random(64)}, index=names)
    data.layers["spliced"] = sp.csr_matrix(counts * 0.5)
    data.write_h5ad(path)
    return path


@contextmanager
def small_parts() -> Iterator[None]:
    """Shards of 256 values, blocks of 16 cells, and a checkpoint after each: many moments to be killed at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARD", 256)
        patch.setattr(arrays, "CHUNK", 64)
        patch.setattr(dataset, "BLOCK", 16)
        patch.setattr(dataset, "PAUSE", 0.0)
        yield


@contextmanager
def killed_at(n: int) -> Iterator[list[int]]:
    """SIGKILL before the n-th step that changes the disk; the list counts them."""
    count = [0]

    def counted(function: Callable) -> Callable:
        def call(*args: object, **options: object) -> object:
            count[0] += 1
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses nothing that was written, and this is quicker
        for owner, name in [
            *((os, n) for n in ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir")),
            (Growing, "_write"),
            (Growing, "_widen"),
            (shutil, "rmtree"),
        ]:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield count


def drive(folder: Path, wanted: int) -> None:
    """In a process without threads, which may fork: kill conversions at `wanted` moments and compare what becomes."""
    rng = np.random.default_rng(0)
    files = [write(folder / f"{name}.h5ad", i, n) for i, (name, n) in enumerate([("a", 70_000), ("b", 300)])]
    more = [write(folder / f"{name}.h5ad", i) for i, name in enumerate("cd", 5)]
    never = 10**9
    _weigh(np.ones(1, np.uint32), np.ones(1, np.int32), np.uint64(0))  # loads code into the parent, once for all
    check_block(np.ones(1, np.float32), np.zeros(1, np.int32), np.array([0, 1], np.int32), 1)
    assert not run_killed(never, lambda: convert(files, out=folder / "two", **KEPT))
    assert not run_killed(never, lambda: convert([*files, *more], out=folder / "four", **KEPT))
    two, four = tree_digest(folder / "two"), tree_digest(folder / "four")
    kills = rounds = 0
    while kills < wanted:
        out, rounds = folder / f"out{rounds}", rounds + 1
        kills += until_done(rng, out, lambda out=out: convert(files, out=out, **KEPT))
        assert tree_digest(out) == two, rounds
        before = times(out)
        kills += until_done(rng, out, lambda out=out: convert(more, out=out, append=True, **KEPT), readable=True)
        assert tree_digest(out) == four, rounds
        assert before.items() <= times(out).items()
        shutil.rmtree(out)
    print(kills, rounds)


def until_done(rng: np.random.Generator, out: Path, convert_it: Callable[[], object], *, readable: bool = False) -> int:
    """Begin again until nothing kills it; the number of kills. Every fourth kill comes at some time, not at a step."""
    kills = 0
    while run_killed(int(rng.integers(1, 600)), convert_it, float(rng.uniform(0.02, 0.4)) if kills % 4 == 3 else None):
        kills += 1
        if readable:
            assert [d.id for d in Atlas.open(out).datasets] in (["a", "b"], ["a", "b", "c", "d"])
        elif out.exists() and not (out / "atlas.json").exists():
            with pytest.raises(IncompleteError, match="run scviaduct convert again"):
                Atlas.open(out)
    return kills


def times(out: Path) -> dict[str, int]:
    """When each file of the first two data sets was written."""
    return {str(p): p.stat().st_mtime_ns for name in "ab" for p in (out / "datasets" / name).rglob("*")}


def run_killed(step: int, convert_it: Callable[[], object], seconds: float | None = None) -> bool:
    """In a fork: whether it was killed, at a step or after some seconds, before it came to its end."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with killed_at(step if seconds is None else 10**9):
                convert_it()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_sigkill_at_fifty_moments(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), "56"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    kills, _ = map(int, run.stdout.split())
    assert kills >= 56


if __name__ == "__main__":
    with small_parts():
        drive(Path(sys.argv[1]), int(sys.argv[2]))
