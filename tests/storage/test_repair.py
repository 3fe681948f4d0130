"""What was damaged comes back byte for byte, or it is said why it cannot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.errors import OutputExistsError, UnreadableFileError
from scviaduct.storage import repair as module
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.manifest import tree_digest
from scviaduct.storage.prepare import prepare
from scviaduct.storage.repair import repair
from scviaduct.storage.request import alone
from scviaduct.storage.verify import verify
from scviaduct.storage.view import View

GENES = [f"g{i:03d}" for i in range(200)]
A, B, V = "datasets/a", "datasets/b", "views/default"


def study(n: int, seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(np.exp(rng.normal(-1, 1, 200)), (n, 200)).astype(np.float32))
    obs = pd.DataFrame({"donor": pd.Categorical(rng.choice([f"d{seed}", "d9"], n)), "depth": rng.normal(size=n)})
    obs.index = pd.Index([f"cell{i}" for i in range(n)])
    data = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))
    data.obsm["spatial"] = rng.normal(size=(n, 2))
    data.layers["spliced"] = counts.copy()
    return data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and their atlas, with obsm, a layer and two views, made in the folder where they lie."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "files").mkdir()
    study(150, 1).write_h5ad(folder / "files/a.h5ad")
    study(90, 2).write_h5ad(folder / "files/b.h5ad")
    before = Path.cwd()
    os.chdir(folder)
    try:
        convert(["files/a.h5ad", "files/b.h5ad"], out="atlas.zarr", counts="X", obsm=["spatial"], layers=["spliced"])
        prepare("atlas.zarr", genes=40, batch_key="donor", block_rows=64, seed=5)
        prepare("atlas.zarr", genes="all", name="all", block_rows=64)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def flip(file: Path, offset: int = 60) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 4
    file.write_bytes(raw)


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


DAMAGES = {
    "flipped byte": lambda p: flip(p / A / "X/data/c/0"),
    "deleted shard": lambda p: (p / A / "X/indices/c/0").unlink(),
    "truncated shard": lambda p: (p / B / "X/data/c/0").write_bytes(b"123"),
    "a file of zero bytes": lambda p: (p / B / "obs/depth/c/0").write_bytes(b""),
    "obsm": lambda p: shutil.rmtree(p / A / "obsm"),
    "layers": lambda p: flip(p / A / "layers/spliced/data/c/0"),
    "numbers in a manifest": lambda p: edit(p / A / "manifest.json", lambda m: m.update(nnz=1)),
    "swapped data sets": lambda p: swap(p / A, p / B),
    "swapped shards": lambda p: swap(p / A / "X/data/c/0", p / B / "X/data/c/0"),
    "both data sets": lambda p: (flip(p / A / "X/data/c/0"), flip(p / B / "X/data/c/0")),
    "vocabulary": lambda p: edit(p / "atlas.json", lambda r: r["vocabulary"].update(donor=["x"])),
    "identifiers": lambda p: edit(p / "atlas.json", lambda r: r.update(identifiers=["donor"])),
    "atlas.json gone": lambda p: (p / "atlas.json").unlink(),
    "atlas.json broken": lambda p: (p / "atlas.json").write_text("{"),
    "groups": lambda p: ((p / "zarr.json").unlink(), (p / "datasets/zarr.json").write_text("x")),
    "a shard of a view": lambda p: flip(p / V / "data/c/0"),
    "a column of a view": lambda p: shutil.rmtree(p / V / "obs/donor"),
    "numbers of a view": lambda p: edit(p / V / "view.json", lambda m: m.update(n_rows=3)),
    "digests of a view": lambda p: edit(p / V / "view.json", lambda m: m["files"]["zarr.json"].update(bytes=1)),
    "a view of all genes": lambda p: flip(p / "views/all/indices/c/0"),
    "everything at once": lambda p: (
        *(flip(p / part / "X/data/c/0") for part in (A, B)),
        *(flip(p / f"views/{name}/data/c/0") for name in ("default", "all")),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_it_comes_back_byte_for_byte(folder: Path, name: str) -> None:
    atlas = folder / "atlas.zarr"
    before = tree_digest(folder)
    DAMAGES[name](atlas)
    assert not verify(atlas).ok
    report = repair("atlas.zarr")
    assert report.ok and report.done, list(report.lines())
    assert tree_digest(folder) == before  # also: nothing is left beside the atlas
    assert View.open(atlas).n_rows == 240 and Atlas.open(atlas).n_obs == 240


@pytest.mark.parametrize(
    "damage", [lambda p: shutil.rmtree(p / A), lambda p: (p / A / "manifest.json").write_text("{")]
)
def test_a_data_set_without_a_manifest_is_known_by_its_name(folder: Path, damage: Callable[[Path], None]) -> None:
    """Its options are gone with the manifest; what it is made with shows, and atlas.json knows the digest."""
    study(30, 7).write_h5ad(folder / "files/plain.h5ad")
    os.chdir(folder)
    convert(["files/plain.h5ad"], out="plain.zarr")
    before = tree_digest(folder / "plain.zarr")
    shutil.rmtree(folder / "plain.zarr/datasets/plain")
    assert repair("plain.zarr", sources=["files/plain.h5ad"]).ok
    assert tree_digest(folder / "plain.zarr") == before
    damage(folder / "atlas.zarr")
    report = repair("atlas.zarr", sources=["files"])
    gone = not (folder / "atlas.zarr" / A).exists()
    assert report.ok != gone
    if gone:  # that it had obsm and a layer is not known any more
        assert "does not give what was recorded" in "".join(report.lines())


@pytest.mark.parametrize("how", ["a file", "another name", "a folder", "deep in a folder"])
def test_sources_are_known_by_their_content(folder: Path, how: str) -> None:
    before = tree_digest(folder / "atlas.zarr")
    flip(folder / "atlas.zarr" / A / "X/data/c/0")
    moved = {"a file": "moved/a.h5ad", "another name": "x.h5ad", "a folder": "m/a.h5ad", "deep in a folder": "m/n/o/y"}[
        how
    ]
    (folder / moved).parent.mkdir(parents=True, exist_ok=True)
    (folder / "files/a.h5ad").rename(folder / moved)
    report = repair("atlas.zarr")
    assert not report.ok and not report.done
    (finding,) = report.findings
    assert "its source a.h5ad (sha256 " in finding.remedy and "looked at files/a.h5ad" in finding.remedy
    assert "--source" in finding.remedy and finding.affected == "150 cells: 0-149"
    given = folder / "m" if "folder" in how else folder / moved
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m/decoy.h5ad").write_bytes(b"0" * (folder / moved).stat().st_size)
    assert repair("atlas.zarr", sources=[given]).ok
    assert tree_digest(folder / "atlas.zarr") == before


def test_another_file_under_the_same_name_is_not_taken(folder: Path) -> None:
    flip(folder / "atlas.zarr" / A / "X/data/c/0")
    damaged = tree_digest(folder / "atlas.zarr")
    study(150, 3).write_h5ad(folder / "files/a.h5ad")
    report = repair("atlas.zarr")
    assert "was not found" in report.findings[0].remedy
    assert tree_digest(folder / "atlas.zarr") == damaged


def test_what_cannot_be_repaired_is_said(folder: Path) -> None:
    atlas = folder / "atlas.zarr"
    (atlas / V / "view.json").unlink()
    flip(atlas / A / "X/data/c/0")
    report = repair(atlas)
    assert [line.partition(":")[0] for line in report.done] == ["datasets/a"]
    (finding,) = report.findings
    assert finding.part == V and "its genes and options are not known; scviaduct prepare" in finding.remedy


def test_a_view_whose_recipe_was_changed_is_not_trusted(folder: Path) -> None:
    edit(folder / "atlas.zarr" / V / "view.json", lambda m: m["recipe"].update(seed=6))
    damaged = tree_digest(folder / "atlas.zarr")
    report = repair("atlas.zarr")
    assert "it is not what was lost" in report.findings[0].remedy
    assert tree_digest(folder / "atlas.zarr") == damaged


def test_atlas_json_is_not_made_of_damaged_data_sets(folder: Path) -> None:
    atlas = folder / "atlas.zarr"
    (atlas / "atlas.json").unlink()
    flip(atlas / A / "X/data/c/0")
    (folder / "files/a.h5ad").unlink()
    report = repair(atlas)
    assert not report.done
    assert any(f.part == "atlas.json" and "data sets are damaged too" in f.remedy for f in report.findings)


def test_what_is_no_damage_is_left_alone(folder: Path) -> None:
    """Unfinished work, files nobody knows and stale views are told, and stay."""
    atlas = folder / "atlas.zarr"
    (atlas / "datasets/.c.partial").mkdir()
    (atlas / "notes.txt").write_text("mine")
    shutil.copytree(atlas / A, atlas / "datasets/c")
    before = tree_digest(atlas)
    report = repair(atlas)
    assert [f.kind for f in report.findings] == ["unfinished", "unfinished", "unknown"]
    assert not report.done and tree_digest(atlas) == before and (atlas / "datasets/.c.partial").is_dir()


def test_nothing_to_repair(folder: Path) -> None:
    before = tree_digest(folder)
    report = repair("atlas.zarr")
    assert report.ok and not report.done and tree_digest(folder) == before
    with pytest.raises(UnreadableFileError, match="does not exist"):
        repair(folder / "nothing.zarr")


def test_not_while_another_process_makes_the_atlas(folder: Path) -> None:
    flip(folder / "atlas.zarr" / A / "X/data/c/0")
    with alone((folder / "atlas.zarr").absolute()), pytest.raises(OutputExistsError, match="another process"):
        repair(folder / "atlas.zarr")


def test_killed_while_it_swaps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames the data set is only at its old name; the next repair makes it again."""
    atlas, before = folder / "atlas.zarr", tree_digest(folder)
    flip(atlas / A / "X/data/c/0")
    rename, calls = Path.rename, []

    def dying(self: Path, target: Path) -> Path:
        calls.append(target)
        if target == atlas / A:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        repair(atlas)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert calls and not (atlas / A).exists() and (atlas / "datasets/.a.old").exists()
    assert repair(atlas).ok
    assert tree_digest(folder) == before


def test_one_damage_does_not_keep_another_from_being_mended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = folder / "atlas.zarr"
    flip(atlas / A / "X/data/c/0")
    flip(atlas / B / "X/data/c/0")
    (folder / "files/a.h5ad").write_bytes(b"x")
    report = repair(atlas)
    assert [line.partition(":")[0] for line in report.done] == [B]
    assert {f.part for f in report.findings} == {A}
    assert module.repair is repair
