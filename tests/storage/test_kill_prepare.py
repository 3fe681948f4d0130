"""prepare killed with SIGKILL at every step it takes, and at random times: the next run gives the same bytes.

This file is also the program that does it. It imports everything and compiles the loops, but runs no thread, so that it
can be forked: a fork takes no time to start, and a process with threads must not be forked.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

GIVE_UP = 300
"""Seconds."""
KILLED, HALF, DIFFERENT, FINE = 1, 2, 4, 64
OPTIONS: dict[str, Any] = {"genes": [f"g{i}" for i in range(5, 40)], "workers": 2}


def cells(seed: int, n_obs: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2, (n_obs, 40)) * (rng.random((n_obs, 40)) < 0.3)
    obs = pd.DataFrame({"sample": pd.Categorical(rng.choice([f"s{9 - seed}", "a"], n_obs)), "age": np.arange(n_obs)})
    obs.index = obs.index.astype(str)
    genes = pd.DataFrame(index=[f"g{i}" for i in range(40)])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=genes)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from scviaduct.storage.convert import convert
    from scviaduct.storage.prepare import prepare

    folder = tmp_path_factory.mktemp("kill")
    files = [folder / f"d{i}.h5ad" for i in range(2)]
    for i, file in enumerate(files):
        cells(i, 90 - 20 * i).write_h5ad(file)
    prepare(convert(files[:1], out=folder / "small.zarr"), **OPTIONS)
    atlas = convert(files, out=folder / "atlas.zarr")
    prepare(atlas, name="fresh", **OPTIONS)
    shutil.copytree(folder / "small.zarr/views/default", atlas.path / "views/grown")
    prepare(atlas, name="grown", **OPTIONS)
    command = [sys.executable, __file__, str(folder)]
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=GIVE_UP, check=False, env=alone)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_at_least_fifty_runs_were_killed(told: dict[str, Any]) -> None:
    assert told["steps"] == 50
    assert told["timed"] >= 4


def test_the_next_run_gives_the_same_bytes_and_leaves_nothing_else(told: dict[str, Any]) -> None:
    assert told["failed"] == told["different"] == []


def test_no_reader_ever_saw_a_view_that_was_not_whole(told: dict[str, Any]) -> None:
    assert told["half"] == []


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class Killer:
    """Kills this process at the n-th step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, itertools.count(1)

    def step(self) -> None:
        if next(self.steps) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """A step before and one after each call."""
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.step()
            result = real(*arguments, **options)
            self.step()
            return result

        setattr(owner, name, call)

    def halfway(self, owner: Any, name: str) -> None:
        """A step when half of an array is in its file."""
        real = getattr(owner, name)

        def save(file: Any, array: Any) -> None:
            start = file.tell()
            real(file, array[: len(array) // 2])
            file.flush()
            self.step()
            file.seek(start)
            file.truncate()
            real(file, array)

        setattr(owner, name, save)

    def arm(self) -> None:
        from scviaduct.storage import manifest, merge, plan, spill

        for owner, name in (
            *((os, name) for name in ("replace", "rename", "rmdir")),
            *((plan, name) for name in ("write_facts", "sync_tree")),
            *((merge, name) for name in ("_store", "_bucket", "make_array", "make_group")),
            *((manifest, name) for name in ("sync_tree", "sync_directory")),
        ):
            self.around(owner, name)
        self.around(shutil, "rmtree")
        self.halfway(spill, "_save")


def prepared(atlas: Path, name: str, killer: Killer | None = None) -> None:
    from scviaduct.storage.prepare import prepare

    if killer:
        killer.arm()
    prepare(atlas, name=name, **OPTIONS)


def child(work: Callable[[], int | None]) -> int:
    """Run in a fork, which exits with FINE plus the result; its process id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = FINE | (work() or 0)
        except BaseException:  # noqa: BLE001 - told, and the process ends
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def killed(pid: int) -> bool:
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != FINE:
        raise RuntimeError("a run failed")
    return False


def attempt(folder: Path, kind: str, name: str, at: int, seconds: float | None) -> int:
    """Kill a run at step `at` or after some seconds, run again, and compare; a sum of KILLED, HALF and DIFFERENT."""
    from scviaduct.storage.view import View

    atlas, path = folder / "atlas.zarr", folder / "atlas.zarr/views" / name
    if kind == "grown":
        shutil.copytree(folder / "small.zarr/views/default", path)
    pid = child(lambda: prepared(atlas, name, Killer(at)))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    found = KILLED * killed(pid)
    if path.exists():
        try:
            View(atlas, name, json.loads((path / "view.json").read_text()))._check_files()
        except Exception:  # noqa: BLE001 - whatever a reader would meet
            found |= HALF
    if killed(child(lambda: prepared(atlas, name))):
        raise RuntimeError("killed by another")
    same = content(path) == content(atlas / "views" / kind) and not list(path.parent.glob(f".{name}.*"))
    shutil.rmtree(path)
    return found if same else found | DIFFERENT


def count_steps(folder: Path, kind: str) -> tuple[int, float]:
    """How many steps an undisturbed run takes, and seconds."""
    killer, counted, begin = Killer(-1), folder / f"steps of {kind}", time.monotonic()
    if kind == "grown":
        shutil.copytree(folder / "small.zarr/views/default", folder / f"atlas.zarr/views/count-{kind}")

    def work() -> None:
        prepared(folder / "atlas.zarr", f"count-{kind}", killer)
        counted.write_text(str(next(killer.steps) - 1))

    if killed(child(work)):
        raise RuntimeError("killed by another")
    return int(counted.read_text()), time.monotonic() - begin


def serve(folder: Path) -> dict[str, Any]:
    warm()
    rng = random.Random(0)
    (fresh, took), (grown, _) = (count_steps(folder, kind) for kind in ("fresh", "grown"))
    plans: list[tuple[str, int, float | None]] = []
    plans += [("fresh", at, None) for at in sorted(rng.sample(range(1, fresh + 1), 34))]
    plans += [("grown", at, None) for at in sorted(rng.sample(range(1, grown + 1), 16))]
    plans += [(rng.choice(["fresh", "grown"]), -1, rng.uniform(0.02, 0.8 * took)) for _ in range(8)]
    told: dict[str, Any] = {"steps": 0, "timed": 0, "different": [], "half": [], "failed": []}
    running: dict[int, tuple[str, int, float | None]] = {}

    def collect() -> None:
        pid, status = os.wait()
        plan, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        if code < FINE:
            told["failed"].append(plan)
            return
        told["steps" if plan[2] is None else "timed"] += bool(code & KILLED)
        told["different"] += [plan] if code & DIFFERENT else []
        told["half"] += [plan] if code & HALF else []

    for number, plan in enumerate(plans):
        running[child(lambda n=number, p=plan: attempt(folder, p[0], f"k{n}", *p[1:]))] = plan
        while len(running) > 1:
            collect()
    while running:
        collect()
    return told


def warm() -> None:
    """Import and compile; no thread may start, and none of the arrays be opened."""
    from scviaduct.storage import genes, prepare, shuffle  # noqa: F401

    indptr, columns = np.array([0, 2]), np.array([0, -1], np.int32)
    for data in (np.array([1, 2], np.uint8),):
        for index in (np.uint16,):
            indices = np.array([0, 1], index)
            genes.pick(indptr, indices, data, columns, np.zeros(1, np.int64), indices.copy(), data.copy())
            shuffle.gather(np.array([0]), indptr, indices, data, indices.copy(), data.copy())
    names = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")}
    names -= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # pyarrow's, which survives a fork
    assert not names, names


if __name__ == "__main__":
    sys.stdout.write(json.dumps(serve(Path(sys.argv[1]))))
