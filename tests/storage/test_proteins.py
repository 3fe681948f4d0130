"""Proteins in views: every cell's counts over all panels, what a batch measured, and what is refused."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scviaduct.storage.prepare as module
from scviaduct.errors import DataError, IncompleteError, NotCountsError, OutputExistsError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.loader import Loader
from scviaduct.storage.prepare import prepare
from scviaduct.storage.repair import repair
from scviaduct.storage.sampler import Sampler
from scviaduct.storage.verify import verify
from scviaduct.storage.view import View

GENES = [f"g{i}" for i in range(12)]
KEY = "protein_expression"


def cite(seed: int, n_obs: int, panel: list[str], how: str = "frame", largest: int = 90) -> ad.AnnData:
    """Cells with counts of genes and of a panel, the latter kept in one of the ways that files have."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2, (n_obs, len(GENES))) * (rng.random((n_obs, len(GENES))) < 0.6)
    obs = pd.DataFrame({"sample": rng.choice(["a", "b"], n_obs)}, index=[f"cell{i}" for i in range(n_obs)])
    data = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    proteins = rng.poisson(3, (n_obs, len(panel))) + 1
    if panel:
        proteins[n_obs // 2, 0] = largest
    if how == "frame":
        data.obsm[KEY] = pd.DataFrame(proteins, index=obs.index, columns=panel)
    elif how == "array":
        data.obsm[KEY], data.uns["protein_names"] = proteins.astype(np.float64), np.array(panel, object)
    elif how == "sparse":
        data.obsm[KEY], data.uns[f"{KEY}_names"] = sp.csr_matrix(proteins.astype(np.int32)), np.array(panel, object)
    return data


def make_atlas(folder: Path, *files: ad.AnnData, **options: Any) -> Atlas:
    paths = [folder / f"d{i}.h5ad" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        data.write_h5ad(path)
    return convert(paths, out=folder / "atlas.zarr", **{"obsm": [KEY]} | options)


def expected(files: list[ad.AnnData], names: tuple[str, ...]) -> list[np.ndarray]:
    """By data set: (cells, proteins) counts, 0 where the panel lacks a protein."""
    out = []
    for data in files:
        found = data.obsm.get(KEY)
        if found is None:
            out.append(np.zeros((data.n_obs, len(names))))
            continue
        if not isinstance(found, pd.DataFrame):
            dense = found.toarray() if sp.issparse(found) else found
            found = pd.DataFrame(dense, columns=list(data.uns.get("protein_names", data.uns.get(f"{KEY}_names"))))
        out.append(found.reindex(columns=list(names), fill_value=0).to_numpy())
    return out


def content(view: View) -> dict[str, bytes]:
    return {p.relative_to(view.path).as_posix(): p.read_bytes() for p in view.path.rglob("*") if p.is_file()}


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[3] ^= 1
    file.write_bytes(raw)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@settings(max_examples=5)
@given(data=st.data())
def test_a_view_has_every_cell_s_proteins_whatever_the_memory(data: st.DataObject) -> None:
    pool, ways = [f"p{i}" for i in range(6)], ["frame", "array", "sparse", "none"]
    files = [cite(0, 50, pool[:2])]
    for seed in range(1, data.draw(st.integers(1, 3)) + 1):
        panel = data.draw(st.lists(st.sampled_from(pool), min_size=1, unique=True))
        largest = data.draw(st.sampled_from([90, 255, 70_000]))
        files.append(cite(seed, data.draw(st.integers(1, 70)), panel, data.draw(st.sampled_from(ways)), largest))
    block = data.draw(st.sampled_from([4, 16, 1024]))
    with tempfile.TemporaryDirectory() as path:
        atlas = make_atlas(Path(path), *files)
        view = prepare(atlas, genes="all", proteins=KEY, block_rows=block)
        again = prepare(atlas, genes="all", proteins=KEY, block_rows=block, name="again", memory="50kB", workers=1)
        assert content(view) == content(again)
        assert verify(atlas.path).ok
        schema = view.schema(batch_key="dataset", proteins=True)
        panels = [set(expected([f], tuple(pool))[0].any(0).nonzero()[0]) for f in files]
        assert [{pool.index(p) for p, m in zip(schema.proteins, row, strict=True) if m} for row in schema.measured] == [
            panels[int(name[1:])] for name in schema.batch.categories
        ]
        source, wanted = view.source(schema), expected(files, schema.proteins)
        loader = Loader(source, Sampler(n_rows=view.n_rows, block_rows=block, batch_size=7, seed=1, n_lanes=3))
        datasets, rows = (np.concatenate([*_stored(view, f"source/{k}")]) for k in ("dataset", "row"))
        seen = 0
        with loader.epoch(0) as batches:
            for batch in batches:
                assert batch.proteins.dtype == np.float32
                for row, counts in zip(batch.rows, batch.proteins, strict=True):
                    np.testing.assert_array_equal(counts, wanted[datasets[row]][rows[row]])
                    seen += 1
        assert seen == view.n_rows


def _stored(view: View, name: str) -> Iterator[np.ndarray]:
    from scviaduct.storage.shards import Arrays, Slice

    yield from Arrays(view.path).read(Slice(name, 0, view.n_rows))


def test_the_type_is_the_smallest_whose_largest_value_is_no_count(folder: Path) -> None:
    atlas = make_atlas(folder, cite(0, 30, ["p0", "p1"], largest=254), cite(1, 30, ["p0"], largest=9))
    assert prepare(atlas, genes="all", proteins=KEY).panels.dtype == np.uint8
    (folder / "more").mkdir()
    wide = make_atlas(folder / "more", cite(0, 30, ["p0", "p1"], largest=255))
    assert prepare(wide, genes="all", proteins=KEY).panels.dtype == np.uint16


def test_a_view_that_grew_equals_one_made_at_once(folder: Path) -> None:
    files = [cite(0, 60, ["p1", "p0"]), cite(1, 40, [], "none"), cite(2, 50, ["p2", "p1"], "array", largest=500)]
    options = {"genes": GENES[:9], "proteins": KEY, "block_rows": 16}
    both = make_atlas(folder, *files)
    fresh = content(prepare(both, name="fresh", **options))
    for first in (1, 2):
        small = convert([folder / f"d{i}.h5ad" for i in range(first)], out=folder / f"small{first}", obsm=[KEY])
        shutil.copytree(prepare(small, **options).path, both.path / "views" / "default")  # as if the rest were appended
        view = prepare(both, **options)
        assert view.panels.names == ("p1", "p0", "p2")
        assert content(view) == fresh
        shutil.rmtree(view.path)


def test_a_run_that_was_killed_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = make_atlas(folder, cite(0, 60, ["p1", "p0"]), cite(1, 40, ["p0"], "array"))
    options = {"genes": "all", "proteins": KEY}
    fresh = content(prepare(atlas, name="fresh", **options))
    for where in ("spill", "write"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, where, _interrupt)
            prepare(atlas, **options)
    monkeypatch.setattr("scviaduct.storage.plan.find_panels", _interrupt)  # decided already
    assert content(prepare(atlas, **options)) == fresh


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_recipes_with_and_without_proteins_are_two(folder: Path) -> None:
    atlas = make_atlas(folder, cite(0, 30, ["p0"]))
    plain = prepare(atlas, genes="all")
    assert plain.panels is None and "proteins" not in plain.manifest and not (plain.path / "proteins").exists()
    with pytest.raises(OutputExistsError, match="another recipe, different: proteins"):
        prepare(atlas, genes="all", proteins=KEY)
    with pytest.raises(DataError, match=r"holds no proteins.*--proteins KEY"):
        plain.schema(batch_key="dataset", proteins=True)
    schema = prepare(atlas, genes="all", proteins=KEY, name="cite").schema(batch_key="dataset", proteins=True)
    with pytest.raises(DataError, match=r"model's 1 proteins.*--proteins protein_expression"):
        plain.source(schema)
    no_proteins = View.open(atlas.path, "cite").schema(batch_key="dataset")
    assert not no_proteins.proteins
    assert View.open(atlas.path, "cite").source(no_proteins).read(0).proteins.size == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1.0, r"of 60 values 1 are negative, e\.g\. -1\.0 of 'p1' in cell 'cell7'.*CLR"),
        (0.5, "1 are not whole numbers"),
        (np.nan, r"1 are not finite.*write 0: a protein that is 0 in a whole batch counts as missing"),
        (2.0**24, "1 are at least 16,777,216"),
    ],
)
@pytest.mark.parametrize("how", ["frame", "array"])
def test_values_that_are_no_counts_are_refused(folder: Path, value: float, words: str, how: str) -> None:
    data = cite(0, 30, ["p0", "p1"], how)
    values = np.asarray(data.obsm[KEY], np.float64).copy()
    values[7, 1] = value
    data.obsm[KEY] = pd.DataFrame(values, data.obs_names, ["p0", "p1"]) if how == "frame" else values
    atlas = make_atlas(folder, data)
    with pytest.raises(NotCountsError, match=rf"(?s)d0: obsm\['{KEY}'\] does not hold raw counts: .*{words}"):
        prepare(atlas, genes="all", proteins=KEY)
    assert not (atlas.path / "views").exists()


def test_columns_need_names_of_their_own(folder: Path) -> None:
    nameless = cite(0, 30, ["p0", "p1"], "array")
    del nameless.uns["protein_names"]
    atlas = make_atlas(folder, nameless)
    with pytest.raises(DataError, match=r"no names. Make it a DataFrame .* uns\['protein_expression_names'\]"):
        prepare(atlas, genes="all", proteins=KEY)
    (folder / "more").mkdir()
    twice = make_atlas(folder / "more", cite(0, 30, ["p0", "p0"], "array"))
    with pytest.raises(DataError, match=r"names 1 proteins twice, e\.g\. 'p0'"):
        prepare(twice, genes="all", proteins=KEY)
    words = cite(0, 30, ["p0", "p1"])
    words.obsm[KEY]["p1"] = "high"
    (folder / "words").mkdir()
    with pytest.raises(NotCountsError, match="columns that are not numbers"):
        prepare(make_atlas(folder / "words", words), genes="all", proteins=KEY)


def test_an_element_that_no_data_set_has_is_refused(folder: Path) -> None:
    atlas = make_atlas(folder, cite(0, 30, ["p0"]))
    with pytest.raises(DataError, match=r"obsm\['adt'\]: what was kept of obsm is protein_expression"):
        prepare(atlas, genes="all", proteins="adt")
    bare = convert([folder / "d0.h5ad"], out=folder / "bare.zarr")
    with pytest.raises(DataError, match=r"nothing was kept of obsm. Convert the files with --obsm protein_expression"):
        prepare(bare, genes="all", proteins=KEY)


def test_a_batch_measured_what_all_its_data_sets_count(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = cite(0, 40, ["p0", "p1", "p2"]), cite(1, 40, ["p1", "p2", "p3"])
    one.obs["sample"] = ["a"] * 20 + ["both"] * 20
    two.obs["sample"] = ["both"] * 20 + ["b"] * 20
    one.obsm[KEY].loc[one.obs["sample"] == "a", "p2"] = 0
    view = prepare(make_atlas(folder, one, two), genes="all", proteins=KEY)
    with caplog.at_level(logging.WARNING):
        schema = view.schema(batch_key="sample", proteins=True)
    assert schema.proteins == ("p0", "p1", "p2", "p3") and schema.proteins_key == KEY
    assert dict(zip(schema.batch.categories, schema.measured, strict=True)) == {
        "a": (True, True, False, False),
        "b": (False, True, True, True),
        "both": (False, True, True, False),
    }
    assert "batch 'a': 1 proteins are 0 in all its cells and count as not measured there, e.g. p2" in caplog.text
    block = view.source(schema).read(0)
    of_both = block.proteins[block.batch_index == schema.batch.categories.index("both")]
    assert (of_both[:, [0, 3]] == 0).all() and (of_both[:, [1, 2]] > 0).all()


def test_damage_is_found_told_and_repaired(folder: Path) -> None:
    atlas = make_atlas(folder, cite(0, 60, ["p1", "p0"]), cite(1, 40, ["p0"], "array"))
    view = prepare(atlas, genes="all", proteins=KEY, block_rows=16)
    schema, before = view.schema(batch_key="dataset", proteins=True), content(view)
    flip(view.path / "proteins/c/0")
    (finding,) = verify(atlas.path).findings
    assert finding.place == "views/default/proteins/c/0" and finding.affected.startswith("rows 0-")
    with pytest.raises(IncompleteError, match=r"rows 0 to 15 cannot be read.*proteins"):
        view.source(schema).read(0)
    with pytest.raises(IncompleteError, match="proteins"):
        view.schema(batch_key="dataset", proteins=True)
    assert repair(atlas.path).ok
    assert content(view) == before


def test_counts_that_a_panel_cannot_have_are_found(folder: Path) -> None:
    atlas = make_atlas(folder, cite(0, 60, ["p1", "p0"]), cite(1, 40, ["p0"]))
    marker = prepare(atlas, genes="all", proteins=KEY).path / "view.json"
    manifest = json.loads(marker.read_text())
    manifest["proteins"]["datasets"]["d0"] = ["p0"]
    manifest["proteins"]["largest"] = 7
    marker.write_text(json.dumps(manifest))
    told = " ".join(f.what for f in verify(atlas.path).findings)
    assert "counts of proteins that the panel of the cell's data set lacks" in told
    assert "a count is 90, view.json says at most 7" in told


def test_an_atlas_keeps_the_names_of_arrays_and_its_data_sets_can_be_opened_as_files(folder: Path) -> None:
    atlas = make_atlas(folder, cite(0, 30, ["p0", "p1"], "array"), cite(1, 20, ["p1"], "frame"))
    names = ad.io.read_zarr(atlas.path / "datasets/d0").uns[f"{KEY}_names"]
    assert list(names) == ["p0", "p1"]
    assert not ad.io.read_zarr(atlas.path / "datasets/d1").uns
    with open_counts(atlas.path / "datasets/d0") as file:  # shards that are not full are there all the same
        assert file.obsm_columns(KEY) == ("p0", "p1") and file.audit().n_obs == 30
