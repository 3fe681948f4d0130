"""Whatever is broken in an atlas is found, and said where, what, whom it concerns and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from scviaduct.errors import IncompleteError, UnreadableFileError
from scviaduct.storage.convert import convert
from scviaduct.storage.manifest import tree_digest
from scviaduct.storage.prepare import prepare
from scviaduct.storage.recount import recount
from scviaduct.storage.verify import verify

GENES = [f"g{i:03d}" for i in range(300)]


def study(n: int, seed: int, donors: list[str]) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(np.exp(rng.normal(-1, 1, 300)), (n, 300)).astype(np.float32))
    obs = pd.DataFrame(
        {"donor": pd.Categorical(rng.choice(donors, n)), "depth": rng.normal(size=n), "plate": rng.integers(0, 3, n)},
        index=[f"cell{i}" for i in range(n)],
    )
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame({"order": range(300)}, index=GENES))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas of two data sets with two views."""
    folder = tmp_path_factory.mktemp("made")
    study(260, 1, ["d1", "d2"]).write_h5ad(folder / "a.h5ad")
    study(180, 2, ["d2", "d3"]).write_h5ad(folder / "b.h5ad")
    convert([folder / "a.h5ad", folder / "b.h5ad"], out=folder / "atlas.zarr")
    prepare(folder / "atlas.zarr", genes=50, block_rows=64)
    prepare(folder / "atlas.zarr", genes="all", name="all", block_rows=64)
    return folder / "atlas.zarr"


@pytest.fixture
def atlas(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "atlas.zarr"))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file as a person with an editor does."""
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record, indent=1))


def flip(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1 << (offset % 8)
    file.write_bytes(raw)


def rewritten(folder: Path, marker: str) -> None:
    """The digests of the files as they are now, so that only the numbers can tell."""
    edit(folder / marker, lambda m: m.update(files=tree_digest(folder, exclude=(marker,))))


def poke(array: Path, at: int, value: int) -> None:
    zarr.open_array(array, mode="r+")[at] = value


def double(source: Path) -> None:
    """The second of two rows of data set 0 gets the source of the first."""
    first, second = np.flatnonzero(zarr.open_array(source / "dataset", mode="r")[:] == 0)[:2]
    poke(source / "row", int(second), zarr.open_array(source / "row", mode="r")[int(first)])


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


A, B, V = "datasets/a", "datasets/b", "views/default"
DAMAGES = {
    "deleted shard": (lambda p: (p / A / "X/data/c/0").unlink(), f"{A}/X/data/c/0", "missing", "260 cells: 0-259"),
    "deleted indptr": (lambda p: (p / A / "X/indptr/c/0").unlink(), f"{A}/X/indptr/c/0", "missing", "all cells"),
    "deleted metadata": (
        lambda p: (p / A / "X/data/zarr.json").unlink(),
        f"{A}/X/data/zarr.json",
        "missing",
        "all cells",
    ),
    "deleted column": (
        lambda p: shutil.rmtree(p / A / "obs/depth"),
        f"{A}/obs/depth/c/0",
        "missing",
        "obs column 'depth'",
    ),
    "truncated shard": (
        lambda p: (p / B / "X/indices/c/0").write_bytes((p / B / "X/indices/c/0").read_bytes()[:-7]),
        f"{B}/X/indices/c/0",
        "bytes, the manifest says",
        "180 cells: 0-179",
    ),
    "empty shard": (
        lambda p: (p / B / "X/data/c/0").write_bytes(b""),
        f"{B}/X/data/c/0",
        "it has 0 bytes",
        "180 cells",
    ),
    "flipped byte": (lambda p: flip(p / A / "X/data/c/0", 99), f"{A}/X/data/c/0", "another sha256", "260 cells: 0-259"),
    "swapped shards": (
        lambda p: swap(p / A / "X/data/c/0", p / B / "X/data/c/0"),
        f"{A}/X/data/c/0",
        "bytes, the manifest says",
        "260 cells",
    ),
    "swapped data sets": (
        lambda p: swap(p / A, p / B),
        f"{A}/manifest.json",
        "not the manifest that atlas.json",
        "all of it",
    ),
    "no data set": (lambda p: shutil.rmtree(p / A), A, "the data set is gone", "all of it"),
    "no manifest": (
        lambda p: (p / A / "manifest.json").unlink(),
        A,
        "manifest.json is missing: it is unfinished",
        "all",
    ),
    "broken manifest": (
        lambda p: (p / A / "manifest.json").write_text("{"),
        A,
        "manifest.json is damaged",
        "all of it",
    ),
    "a manifest of another kind": (lambda p: (p / A / "manifest.json").write_text("[]"), A, "is damaged", "all of it"),
    "cells in manifest": (
        lambda p: edit(p / A / "manifest.json", lambda m: m.update(n_obs=261)),
        f"{A}/manifest.json",
        "n_obs is 261, but the arrays hold 260",
        "all of it",
    ),
    "genes in manifest": (
        lambda p: edit(p / A / "manifest.json", lambda m: m.update(n_vars=1)),
        f"{A}/manifest.json",
        "n_vars is 1, but X has 300 and var has 300",
        "all of it",
    ),
    "non-zeros in manifest": (
        lambda p: edit(p / A / "manifest.json", lambda m: m.update(nnz=5)),
        f"{A}/manifest.json",
        "nnz is 5, but the arrays hold",
        "all of it",
    ),
    "sum in manifest": (
        lambda p: edit(p / A / "manifest.json", lambda m: m.update(sum=m["sum"] + 1)),
        f"{A}/manifest.json",
        "but the arrays hold",
        "all of it",
    ),
    "a count and all digests": (
        lambda p: (poke(p / A / "X/data", 7, 99), rewritten(p / A, "manifest.json")),
        f"{A}/manifest.json",
        "largest is",
        "all of it",
    ),
    "a gene index and all digests": (
        lambda p: (poke(p / A / "X/indices", 7, 300), rewritten(p / A, "manifest.json")),
        f"{A}/X/indices",
        "a gene index is 300, there are 300 genes",
        "",
    ),
    "vocabulary with another value": (
        lambda p: edit(p / "atlas.json", lambda r: r["vocabulary"].update(donor=["d1", "d2", "d4"])),
        "atlas.json",
        "the vocabulary of 'donor' does not match obs in 2 values, e.g. 'd3'",
        "obs column 'donor'",
    ),
    "vocabulary in another order": (
        lambda p: edit(p / "atlas.json", lambda r: r["vocabulary"]["donor"].reverse()),
        "atlas.json",
        "does not match obs in 1 values, e.g. 'their order'",
        "obs column 'donor'",
    ),
    "vocabulary without a column": (
        lambda p: edit(p / "atlas.json", lambda r: r["vocabulary"].pop("donor")),
        "atlas.json",
        "the vocabulary of 'donor' lacks it",
        "obs column 'donor'",
    ),
    "vocabulary of numbers": (
        lambda p: edit(p / "atlas.json", lambda r: r["vocabulary"].update(depth=["1"])),
        "atlas.json",
        "it is no text column",
        "obs column 'depth'",
    ),
    "no atlas.json": (lambda p: (p / "atlas.json").unlink(), "atlas.json", "missing or damaged", "every reader"),
    "broken atlas.json": (
        lambda p: (p / "atlas.json").write_text("{"),
        "atlas.json",
        "missing or damaged",
        "every reader",
    ),
    "half an atlas.json": (
        lambda p: edit(p / "atlas.json", lambda r: r.pop("vocabulary")),
        "atlas.json",
        "it lacks vocabulary",
        "",
    ),
    "no group": (lambda p: (p / "datasets/zarr.json").unlink(), "datasets/zarr.json", "it is no Zarr group", "anndata"),
    "broken group": (lambda p: (p / "zarr.json").write_text("{"), "zarr.json", "it is no Zarr group", "anndata"),
    "unfinished data set": (
        lambda p: shutil.copytree(p / A, p / "datasets/.c.partial"),
        "datasets/.c.partial",
        "unfinished: left behind",
        "",
    ),
    "unknown data set": (lambda p: shutil.copytree(p / A, p / "datasets/c"), "datasets/c", "does not know it", ""),
    "unknown file": (lambda p: (p / A / "X/data/c/1").write_bytes(b"x"), f"{A}/X/data/c/1", "no manifest knows", ""),
    "unknown file beside": (lambda p: (p / "notes.txt").write_text("x"), "notes.txt", "no manifest knows", ""),
    "unfinished view": (lambda p: (p / V / "view.json").unlink(), V, "view.json is missing: it is unfinished", "all"),
    "view killed": (lambda p: (p / "views/.v.partial").mkdir(), "views/.v.partial", "unfinished: left behind", ""),
    "flipped byte in a view": (lambda p: flip(p / V / "data/c/0", 50), f"{V}/data/c/0", "another sha256", "rows: 0-"),
    "deleted column of a view": (
        lambda p: (p / V / "obs/donor/c/0").unlink(),
        f"{V}/obs/donor/c/0",
        "missing",
        "rows 0-439 of the view",
    ),
    "rows in view.json": (
        lambda p: edit(p / V / "view.json", lambda m: m.update(nnz=3)),
        f"{V}/view.json",
        "nnz is 3, but the arrays hold",
        "all of it",
    ),
    "categories in view.json": (
        lambda p: edit(p / V / "view.json", lambda m: m["columns"]["donor"]["categories"].reverse()),
        f"{V}/view.json",
        "its digest does not fit",
        "all of it",
    ),
    "codes of a view": (
        lambda p: (poke(p / V / "obs/donor", 3, 5), rewritten(p / V, "view.json")),
        f"{V}/obs/donor",
        "code 5 where there are 3 categories",
        "1 rows, e.g. 3",
    ),
    "codes of a view within categories": (
        lambda p: (poke(p / V / "obs/donor", 3, -1), rewritten(p / V, "view.json")),
        f"{V}/view.json",
        "of column 'donor' do not match its values",
        "column 'donor'",
    ),
    "sources of a view": (
        lambda p: (poke(p / V / "source/row", 3, 100_000), rewritten(p / V, "view.json")),
        f"{V}/source/row",
        "cells, e.g. 100,000 is none of them",
        "1 rows",
    ),
    "a cell twice in a view": (
        lambda p: (double(p / V / "source"), rewritten(p / V, "view.json")),
        f"{V}/source/row",
        "cells of data set 'a' occur more than once",
        "1 rows",
    ),
    "stale view": (
        lambda p: edit(p / B / "manifest.json", lambda m: m.update(source="other.h5ad")),
        f"{V}/view.json",
        "stale: data set 'b' has changed since it was made",
        "all of it",
    ),
}
ARRAYS_ONLY = {
    *("flipped byte", "flipped byte in a view", "cells in manifest", "genes in manifest", "non-zeros in manifest"),
    *("sum in manifest", "a count and all digests", "a gene index and all digests", "rows in view.json"),
    *("codes of a view", "codes of a view within categories", "sources of a view", "a cell twice in a view"),
    *("vocabulary with another value", "vocabulary in another order"),
    *("vocabulary without a column", "vocabulary of numbers"),
}
"""What needs the arrays to be read: `quick` does not see these (but may see the manifest that was changed on the way)."""


def test_a_whole_atlas_is_whole(atlas: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = verify(atlas, on_progress=lambda *facts: seen.append(facts))
    assert report.ok and not list(report.lines())
    assert report.files == sum(p.is_file() for p in atlas.rglob("*"))
    assert [done for _, done, _ in seen] == list(range(1, seen[-1][2] + 1))
    assert verify(atlas, quick=True).ok
    with ThreadPoolExecutor(1) as executor:
        assert verify(atlas, executor=executor) == report


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(atlas: Path, name: str) -> None:
    damage, place, what, concerns = DAMAGES[name]
    damage(atlas)
    before = tree_digest(atlas)
    report = verify(atlas)
    found = [f for f in report.findings if f.place == place and what in f.what and concerns in f.affected]
    assert found, list(report.lines())
    assert found[0].remedy or name == "a gene index and all digests"
    assert tree_digest(atlas) == before  # looking changes nothing
    if name not in ARRAYS_ONLY:
        assert any(f.place == place and what in f.what for f in verify(atlas, quick=True).findings)


def test_one_damage_is_one_finding(atlas: Path) -> None:
    """No flood: a damaged file is told once, not again as numbers that do not match."""
    flip(atlas / A / "X/data/c/0", 1234)
    assert [f.place for f in verify(atlas).findings] == [f"{A}/X/data/c/0"]


def test_any_flipped_byte_is_found(atlas: Path) -> None:
    rng = np.random.default_rng(3)
    groups = {atlas / "zarr.json", atlas / "datasets/zarr.json"}  # hold nothing that is used
    files = sorted(p for p in atlas.rglob("*") if p.is_file() and p.stat().st_size and p not in groups)
    for _ in range(25):
        file = files[rng.integers(len(files))]
        raw = file.read_bytes()
        flip(file, int(rng.integers(len(raw))))
        place = file.relative_to(atlas).as_posix()
        part = "/".join(place.split("/")[:2])
        found = verify(atlas).findings
        assert any(f.part == part for f in found), (place, found)
        file.write_bytes(raw)
    assert verify(atlas).ok


def test_the_cells_of_a_damaged_chunk(tmp_path: Path) -> None:
    """Of a shard with several chunks only the cells whose counts lie in the bad one are named."""
    counts = sp.random(3000, 300, 0.5, format="csr", dtype=np.float32, random_state=1)
    counts.data[:] = 1
    ad.AnnData(counts).write_h5ad(tmp_path / "a.h5ad")
    convert([tmp_path / "a.h5ad"], out=tmp_path / "atlas.zarr")
    shard = tmp_path / "atlas.zarr" / A / "X/indices/c/0"
    flip(shard, 10)
    (finding,) = verify(tmp_path / "atlas.zarr").findings
    with ThreadPoolExecutor(1) as pool:
        numbers = recount([shard.parents[2]], pool)[shard.parents[2]]
    ((lo, hi),) = numbers.unreadable["indices"]  # type: ignore[union-attr]
    first, last = (int(np.searchsorted(counts.indptr, x, side)) - 1 for x, side in ((lo, "right"), (hi, "left")))
    assert 0 < hi - lo < counts.nnz / 2
    assert finding.affected == f"{last - first + 1:,} cells: {first:,}-{last:,}"


def test_what_is_no_atlas_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, message in (("nothing", "does not exist"), ("file", "it is a file"), (".", "neither atlas.json nor")):
        with pytest.raises(UnreadableFileError, match=message):
            verify(tmp_path / name)


def test_another_format_is_refused(atlas: Path) -> None:
    edit(atlas / "atlas.json", lambda r: r.update(format=99))
    with pytest.raises(IncompleteError, match="has the atlas format 99"):
        verify(atlas)
