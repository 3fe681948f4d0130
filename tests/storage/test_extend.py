"""A view that grows: the same bytes as one made of all data sets at once, and what cannot grow is refused."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scviaduct.errors import DataError, IncompleteError, OutputExistsError
from scviaduct.storage import plan as planning
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.qc import Filters
from scviaduct.storage.tasks import processes
from scviaduct.storage.view import View

GENES = [f"g{i:02d}" for i in range(30)]


def cells(seed: int, n_obs: int, genes: list[str] = GENES) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2, (n_obs, len(genes))) * (rng.random((n_obs, len(genes))) < 0.2)
    counts[0, 0] = 300 if seed == 2 else 1  # one data set needs a wider type than the others
    obs = pd.DataFrame(
        {
            "sample": pd.Categorical(rng.choice([f"s{9 - seed}", f"s{8 - seed}"], n_obs)),  # later ones sort first
            "age": rng.integers(20, 80, n_obs),
            f"only {seed}": rng.choice(["x", "y"], n_obs),
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def write(folder: Path, *files: ad.AnnData) -> list[Path]:
    paths = [folder / f"d{i}.h5ad" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        data.write_h5ad(path)
    return paths


def content(view: View) -> dict[str, bytes]:
    return {p.relative_to(view.path).as_posix(): p.read_bytes() for p in view.path.rglob("*") if p.is_file()}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def grown(folder: Path, files: list[Path], first: int, **options: Any) -> tuple[View, View]:
    """(a view of the first files that grew to all of them, one made of all at once)."""
    small = prepare(convert(files[:first], out=folder / f"small{first}.zarr"), **options)
    both = convert(files, out=folder / f"all{first}.zarr")
    fresh = prepare(both, **options)
    (both.path / "views" / "default").rename(folder / f"fresh{first}")
    shutil.copytree(small.path, both.path / "views" / "default")  # as if the rest had been appended
    view = prepare(both, **options | {"memory": "50kB", "workers": 1})
    view.verify()
    fresh.path = folder / f"fresh{first}"
    return view, fresh


@settings(max_examples=5)
@given(data=st.data())
def test_a_view_that_grew_equals_one_made_at_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=2, max_size=4))
    options = {
        "genes": data.draw(st.lists(st.sampled_from(GENES), min_size=5, unique=True)),
        "codec": data.draw(st.sampled_from(["lz4", "zstd", "none"])),
        "seed": data.draw(st.integers(0, 5)),
        "filters": Filters(min_counts=data.draw(st.sampled_from([0, 2]))),
    }
    with tempfile.TemporaryDirectory() as path:
        files = write(Path(path), *(cells(seed, n) for seed, n in enumerate(sizes)))
        view, fresh = grown(Path(path), files, data.draw(st.integers(1, len(sizes) - 1)), **options)
        assert content(view) == content(fresh)


def test_the_genes_stay_and_the_view_says_where_they_were_chosen(folder: Path) -> None:
    files = write(folder, cells(0, 120), cells(1, 90), cells(2, 60))
    view, fresh = grown(folder, files, 1, genes=12)
    small = View.open(folder / "small1.zarr")
    assert view.genes == small.genes != View(fresh.atlas_path, "default", fresh.manifest).genes
    assert view.manifest["genes_chosen_from"] == ["d0"]
    assert list(view.manifest["datasets"]) == ["d0", "d1", "d2"]
    same_genes = prepare(view.atlas_path, genes=view.genes, name="same")
    both = content(view), content(same_genes)
    assert both[0].pop("view.json") != both[1].pop("view.json")
    assert both[0] == both[1]
    marker = (view.path / "view.json").stat().st_mtime_ns
    assert prepare(view.atlas_path, genes=12).path.joinpath("view.json").stat().st_mtime_ns == marker
    chosen_anew = prepare(view.atlas_path, genes=12, overwrite=True)
    assert chosen_anew.manifest["genes_chosen_from"] == ["d0", "d1", "d2"]
    assert content(chosen_anew) == content(fresh)


@pytest.mark.parametrize("change", ["numbers become text", "an identifier becomes a category"])
def test_columns_that_do_not_follow_from_the_view_are_read_again(folder: Path, change: str) -> None:
    first, second = cells(0, 60), cells(1, 90)
    if change == "numbers become text":
        second.obs["age"] = "old"
    else:
        first.obs["donor"] = second.obs["donor"] = None
        first.obs["donor"] = [f"donor {i}" for i in range(60)]
        second.obs["donor"] = "donor 1"
    view, fresh = grown(folder, write(folder, first, second), 1, genes=GENES[:10])
    assert content(view) == content(fresh)
    assert {"numbers become text": "age", "an identifier becomes a category": "donor"}[change] in view.categories


def test_growing_reads_only_new_data_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(folder, cells(0, 50), cells(1, 40))
    small = prepare(convert(files[:1], out=folder / "small.zarr"), genes="all")
    atlas = convert(files, out=folder / "all.zarr")
    shutil.copytree(small.path, atlas.path / "views" / "default")
    shutil.rmtree(atlas.path / "datasets/d0/X/data/c")  # not a cell of it can be read any more
    opened = Atlas.open(atlas.path)
    monkeypatch.setattr("scviaduct.storage.atlas.check_files", lambda *_: None)
    assert prepare(opened, genes="all").n_rows > small.n_rows


def test_a_data_set_without_the_genes_cannot_come_in(folder: Path) -> None:
    files = write(folder, cells(0, 50), cells(1, 40, GENES[:20]))
    small = prepare(convert(files[:1], out=folder / "small.zarr"), genes="all")
    atlas = convert(files, out=folder / "all.zarr")
    shutil.copytree(small.path, atlas.path / "views" / "default")
    with pytest.raises(DataError, match=r"'d1' lacks 10 of the 30 .*cannot grow.*--overwrite.*--name"):
        prepare(atlas, genes="all")
    assert View.open(atlas.path).digest == small.digest
    assert prepare(atlas, genes="all", overwrite=True).genes == tuple(GENES[:20])


def test_none_of_the_new_cells_may_pass_the_filters(folder: Path) -> None:
    dim = cells(1, 40)
    dim.X = (dim.X > 0).astype(np.float32)
    files = write(folder, cells(0, 50), dim)
    filters = Filters(min_counts=15)
    view, fresh = grown(folder, files, 1, genes="all", filters=filters)
    assert view.manifest["filtered_cells"]["d1"]["min_counts"] == 40
    assert content(view)["data/c/0"] == content(fresh)["data/c/0"]


def test_changed_removed_and_reordered_data_sets_are_refused(folder: Path) -> None:
    files = write(folder, cells(0, 50), cells(1, 40), cells(2, 30))
    made = prepare(convert(files[:2], out=folder / "a.zarr"), genes="all")
    cells(7, 40).write_h5ad(folder / "d1.h5ad")
    cases = {
        "changed": (files, r"the atlas has changed: data set 'd1' was changed or removed"),
        "removed": (files[:1], r"data set 'd1' was changed or removed"),
        "before": ([files[2], files[0], files[1]], r"'d1' was changed"),
    }
    for name, (order, words) in cases.items():
        atlas = convert(order, out=folder / f"{name}.zarr")
        shutil.copytree(made.path, atlas.path / "views" / "default")
        with pytest.raises(OutputExistsError, match=words):
            prepare(atlas, genes="all")
    cells(1, 40).write_h5ad(folder / "d1.h5ad")
    atlas = convert([files[1], files[0]], out=folder / "order.zarr")
    shutil.copytree(made.path, atlas.path / "views" / "default")
    with pytest.raises(OutputExistsError, match=r"their order has changed.*--overwrite"):
        prepare(atlas, genes="all")


@pytest.mark.parametrize("array", ["data", "source/row", "obs/sample", "indptr"])
def test_a_view_with_a_damaged_chunk_does_not_grow(folder: Path, array: str) -> None:
    files = write(folder, cells(0, 50), cells(1, 40))
    small = prepare(convert(files[:1], out=folder / "small.zarr"), genes="all")
    atlas = convert(files, out=folder / "all.zarr")
    shutil.copytree(small.path, atlas.path / "views" / "default")
    file = atlas.path / "views/default" / array / "c/0"
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(IncompleteError, match=r"'default'.*cannot be read.*--overwrite"):
        prepare(atlas, genes="all")
    assert prepare(atlas, genes="all", overwrite=True).n_rows > small.n_rows


def test_neither_memory_workers_tasks_nor_executor_change_a_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = convert(write(folder, cells(0, 60), cells(1, 40), cells(2, 20)), out=folder / "atlas.zarr")
    options: dict[str, Any] = {"genes": 12, "batch_key": "sample", "filters": Filters(min_genes=4), "block_rows": 16}
    expected = content(prepare(atlas, name="once", **options))
    assert json.loads(expected["view.json"])["filtered_cells"]["d0"]["min_genes"] > 0
    assert content(prepare(atlas, name="little", memory="20kB", workers=1, **options)) == expected
    assert content(prepare(atlas, name="many", workers=5, **options)) == expected
    with processes(2, preload="scviaduct.storage.spill") as pool:
        assert isinstance(pool, ProcessPoolExecutor)
        assert content(prepare(atlas, name="processes", executor=pool, **options)) == expected
    monkeypatch.setattr(planning, "TASK_CELLS", 7)
    progress: list[tuple[str, int, int]] = []
    small = prepare(atlas, name="small", workers=3, on_progress=lambda *step: progress.append(step), **options)
    assert content(small) == expected
    phases = list(dict.fromkeys(phase for phase, _, _ in progress))
    assert phases == ["choose genes", "shuffle", "write"]
    for phase in phases:
        done = [step[1] for step in progress if step[0] == phase]
        assert done == sorted(done)
        assert [step for step in progress if step[0] == phase][-1][1:] == (
            (120, 120) if phase != "write" else (small.n_rows, small.n_rows)
        )
    assert len([step for step in progress if step[0] == "shuffle"]) > 17
