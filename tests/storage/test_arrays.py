"""Shards are Zarr's own, the same values give the same bytes, and an array goes on where its writer was killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scviaduct.storage import arrays
from scviaduct.storage.arrays import Growing, encode_shard, make_array, open_array


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i8", "f4"])
@pytest.mark.parametrize("n", [1, 64, 200, 256])
def test_a_shard_is_what_zarr_writes(tmp_path: Path, codec: Any, dtype: str, n: int) -> None:
    values = np.random.default_rng(n).integers(1, 100, n).astype(dtype)
    options = {"shape": (n,), "dtype": values.dtype, "chunks": (64,), "shards": (256,), "fill": 0, "codec": codec}
    make_array(tmp_path / "x", **options)[:] = values
    theirs = (tmp_path / "x/c/0").read_bytes()
    ours = b"".join(encode_shard(values, chunk=64, per_shard=4, fill=0, codec=codec))
    assert ours == theirs
    (tmp_path / "x/c/0").write_bytes(ours)
    assert np.array_equal(open_array(tmp_path / "x")[:], values)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "SHARD", 64)
    monkeypatch.setattr(arrays, "CHUNK", 16)


def test_growing_array_widens(tmp_path: Path, small: None) -> None:
    array = Growing(tmp_path / "data", np.dtype("u1"), fill=0)
    values = np.concatenate([np.full(150, 7), np.full(20, 300), np.full(100, 70_000)]).astype(np.uint32)
    for start in range(0, 270, 10):
        array.append(values[start : start + 10])
    assert {p.name for p in tmp_path.iterdir()} == {"data.u1", "data.u2", "data.u4"}  # until the next checkpoint
    array.close()
    stored = zarr.open_array(tmp_path / "data", mode="r")
    assert stored.dtype == np.uint32
    assert np.array_equal(stored[:], values)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    parts=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 255, 256, 70_000])), min_size=1, max_size=8),
    saved=st.integers(0, 8),
    ended=st.booleans(),
)
def test_resumed_array_is_the_undisturbed_one(
    tmp_path: Path, small: None, parts: list[tuple[int, int]], saved: int, ended: bool
) -> None:
    """The state is taken after some parts, the writer goes on, even to its end, and is then continued from the state."""
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    values = [np.full(n, value, np.uint32) for n, value in parts]
    whole = Growing(tmp_path / "whole", np.dtype("u1"), fill=0)
    array = Growing(tmp_path / "again", np.dtype("u1"), fill=0)
    state = array.state[0].copy(), array.state[1]
    for number, part in enumerate(values, 1):
        whole.append(part)
        array.append(part)
        if number == saved:
            state = array.state[0].copy(), array.state[1]
            array.drop_old()
    whole.close()
    if ended and state[0].dtype == array.dtype:  # else the state would have been taken anew
        array.close()
    resumed = Growing.resume(tmp_path / "again", *state, fill=0)
    for part in values[saved if saved <= len(values) else 0 :]:
        resumed.append(part)
    resumed.close()
    wanted = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    found = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert found == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "whole"]
