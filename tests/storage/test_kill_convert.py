"""SIGKILL at any moment, and a full disk: what comes after is, byte for byte, what an undisturbed conversion makes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.errors import DataError, IncompleteError, OutputExistsError, UnreadableFileError
from scviaduct.storage import arrays, checkpoints, dataset, probe
from scviaduct.storage.arrays import Growing
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.check import check_block
from scviaduct.storage.convert import convert
from scviaduct.storage.csr import _weigh
from scviaduct.storage.h5ad import CountsFile
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
        patch.setattr(
            os, "fsync", lambda descriptor: None
        )  # a kill loses nothing that was written, and this is quicker
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
    sys.stdout.write(f"{kills} {rounds}\n")


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
        except BaseException:  # noqa: BLE001 - a fork must not return
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
    command = [sys.executable, __file__, str(tmp_path), "50"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    kills, _ = map(int, run.stdout.split())
    assert kills >= 50


KILLED = """
import sys, time
from scviaduct.storage import convert
convert.convert(sys.argv[2:], out=sys.argv[1], workers=2)
"""


def test_workers_end_with_their_parent_and_another_goes_on(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5ad", i) for i, name in enumerate("abcdef")]
    out = tmp_path / "atlas"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), *map(str, files)], stderr=subprocess.PIPE)
    while process.poll() is None and not list(out.glob("datasets/.*.partial")):
        time.sleep(0.01)
    process.kill()
    _, told = process.communicate()  # comes to an end when the last worker has
    assert b"Traceback" not in told
    convert(files, out=out)
    convert(files, out=tmp_path / "whole")
    assert tree_digest(out) == tree_digest(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {*(f.name for f in files), "atlas", "whole"}


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Files can have `after` bytes together: what shards and atomic writes add beyond fails as on a full disk."""
    written = [0]

    def counted(function: Callable) -> Callable:
        def call(path: Path, content: bytes | list[bytes]) -> object:
            written[0] += sum(map(len, content)) if isinstance(content, list) else len(content)
            if written[0] > after:
                raise OSError(28, "No space left on device", str(path))
            return function(path, content)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "write_parts", counted(arrays.write_parts))
        patch.setattr(checkpoints, "write_atomic", counted(checkpoints.write_atomic))
        yield


@pytest.mark.parametrize("after", [0, 9_000, 25_000])
def test_full_disk_is_told_and_resumed(tmp_path: Path, after: int) -> None:
    files = [write(tmp_path / f"{name}.h5ad", i, 70_000) for i, name in enumerate("ab")]
    with small_parts():
        convert(files, out=tmp_path / "whole")
        with full_disk(after), pytest.raises(IncompleteError, match=r"atlas is full: free some .* [01] of 2 data sets"):
            convert(files, out=tmp_path / "atlas")
        with pytest.raises(IncompleteError, match="not a complete atlas"):
            Atlas.open(tmp_path / "atlas")
        convert(files, out=tmp_path / "atlas")
    assert tree_digest(tmp_path / "atlas") == tree_digest(tmp_path / "whole")


def test_goes_on_inside_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, starts = write(tmp_path / "a.h5ad", 0, 70_000), []
    audited = CountsFile.audited

    def noted(self: CountsFile, *args: Any) -> Iterator:
        starts.append(args[-1])
        return audited(self, *args)

    monkeypatch.setattr(CountsFile, "audited", noted)
    with small_parts():
        with full_disk(12_000), pytest.raises(IncompleteError, match="0 of 1"):
            convert([source], out=tmp_path / "atlas")
        convert([source], out=tmp_path / "atlas")
    assert starts[0] == 0 and starts[1] > 0


def test_full_tmpfs(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        files = [write(tmp_path / f"{name}.h5ad", i) for i, name in enumerate("abcdefghijkl")]
        with pytest.raises(IncompleteError, match=r"is full: free some space .* it resumes; [1-9]\d? of 12 data sets"):
            convert(files, out=disk / "atlas")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        convert(files, out=disk / "atlas")
        convert(files, out=tmp_path / "whole")
        assert tree_digest(disk / "atlas") == tree_digest(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_small_a_disk_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.h5ad", 0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(IncompleteError, match=r"atlas will take about 0\.0 MB, but the disk of \S+ has 0\.0 MB free"):
        convert([source], out=tmp_path / "x/atlas")
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


def test_another_command_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5ad", i) for i, name in enumerate("abc")]
    with full_disk(9_000), pytest.raises(IncompleteError):
        convert(files[:2], out=tmp_path / "atlas", layers=["spliced"])
    before = tree_digest(tmp_path / "atlas")
    for change, message in [
        ({"layers": []}, r"layers was \['spliced'\] and is \[\] now"),
        ({"files": files}, r"1 files are not in both, e\.g\. \S+c\.h5ad"),
        ({"files": files[1::-1]}, "another order"),
    ]:
        options = {"files": files[:2], "layers": ["spliced"]} | change
        with pytest.raises(OutputExistsError, match=message):
            convert(out=tmp_path / "atlas", **options)
    assert tree_digest(tmp_path / "atlas") == before


def test_file_that_changed_since_is_converted_anew(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5ad", i, 70_000) for i, name in enumerate("ab")]
    with small_parts():
        with full_disk(25_000), pytest.raises(IncompleteError, match="1 of 2"):
            convert(files, out=tmp_path / "atlas")
        for path in files:  # one is done, the other has a checkpoint
            write(path, 9)
        convert(files, out=tmp_path / "atlas")
        convert(files, out=tmp_path / "whole")
    assert tree_digest(tmp_path / "atlas") == tree_digest(tmp_path / "whole")


def test_finished_data_sets_need_no_source_any_more(tmp_path: Path) -> None:
    """Somebody makes room on a full disk by removing what is converted."""
    files = [write(tmp_path / f"{name}.h5ad", i, 70_000) for i, name in enumerate("ab")]
    with small_parts():
        convert(files, out=tmp_path / "whole")
        with full_disk(25_000), pytest.raises(IncompleteError, match="1 of 2"):
            convert(files, out=tmp_path / "atlas")
        files[0].unlink()
        convert(files, out=tmp_path / "atlas")
    assert tree_digest(tmp_path / "atlas") == tree_digest(tmp_path / "whole")


def test_bad_file_leaves_the_others(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.h5ad", 0), write(tmp_path / "bad.h5ad", 1)
    data = ad.read_h5ad(bad)
    data.X.data[-1] = 0.5
    data = ad.concat([data] * 300, index_unique="-")  # the sample that is looked at does not see it
    data.X.data[:] = np.ceil(data.X.data)
    data.X.data[len(data.X.data) // 3] = 0.5
    data.write_h5ad(bad)
    with pytest.raises(DataError, match=r"not whole numbers.*1 of 2 data sets are done and kept"):
        convert([good, bad], out=tmp_path / "atlas", workers=2)
    assert sorted(p.name for p in (tmp_path / "atlas/datasets").glob("[!z]*")) == ["good"]
    write(bad, 1)
    assert convert([good, bad], out=tmp_path / "atlas").n_obs == 128


def test_adding(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{name}.h5ad", i) for i, name in enumerate("abc"))
    out, seen = tmp_path / "atlas", []
    with pytest.raises(UnreadableFileError, match="does not exist"):
        convert([a], out=out, append=True)
    convert([a], out=out)
    before = times(out)
    assert convert([a, b], out=out, append=True, on_progress=lambda *told: seen.append(told)).n_obs == 128
    assert seen[0][0] == "a is in the atlas already" and seen[-1] == ("b", 64, 64)
    assert before.items() <= times(out).items()
    once, changed = tree_digest(out), (out / "atlas.json").stat().st_mtime_ns
    convert([b, a], out=out, append=True)
    assert tree_digest(out) == once and (out / "atlas.json").stat().st_mtime_ns == changed
    write(b, 7)
    with pytest.raises(OutputExistsError, match=r"has a data set 'b' of another file"):
        convert([c, b], out=out, append=True)
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="has a data set 'a' already; rename"):
        convert([a.rename(tmp_path / "sub/A.h5ad")], out=out, append=True)
    data = ad.read_h5ad(c)
    data.var_names = [f"other{i}" for i in range(30)]
    data.write_h5ad(c)
    with pytest.raises(DataError, match=r"c\.h5ad shares no gene .* data set 'a' has symbol names \(g0"):
        convert([c], out=out, append=True)
    assert tree_digest(out) == once


def test_bytes_do_not_depend_on_memory_or_workers(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5ad", i) for i, name in enumerate("ab")]
    convert(files, out=tmp_path / "1", **KEPT)
    convert(files, out=tmp_path / "2", **KEPT, workers=2, memory="4GB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "BLOCK", 16)
        convert(files, out=tmp_path / "3", **KEPT, memory="600MB")
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "2") == tree_digest(tmp_path / "3")


def test_obsm_and_layers(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", 0)
    data = ad.read_h5ad(source)
    data.obsm["sparse"], data.layers["dense"] = sp.csr_matrix(np.eye(64)), data.X.toarray().astype(np.int16)
    data.write_h5ad(source)
    convert([source], out=tmp_path / "x", obsm=["protein", "table", "sparse"], layers=["spliced", "dense"])
    found = ad.io.read_zarr(tmp_path / "x/datasets/a")
    assert np.array_equal(found.obsm["protein"], data.obsm["protein"])
    pd.testing.assert_frame_equal(found.obsm["table"], data.obsm["table"])
    assert (found.obsm["sparse"] != data.obsm["sparse"]).nnz == 0
    for name in ("spliced", "dense"):
        assert found.layers[name].dtype == data.layers[name].dtype
        assert (found.layers[name] != sp.csr_matrix(data.layers[name])).nnz == 0
    with pytest.raises(DataError, match=r"no file has 'protien' in obsm; did you mean 'protein'"):
        convert([source], out=tmp_path / "y", obsm=["protien"])
    assert not (tmp_path / "y").exists()


if __name__ == "__main__":
    with small_parts():
        drive(Path(sys.argv[1]), int(sys.argv[2]))
