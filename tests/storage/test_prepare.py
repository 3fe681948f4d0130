"""prepare: every cell once with its own counts, whatever the memory; recipes, faults, and what is refused."""

import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import scviaduct.storage.prepare as module
from scviaduct.errors import ConfigError, DataError, IncompleteError, MissingColumnError, OutputExistsError
from scviaduct.storage import plan
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.shuffle import shuffle_keys
from scviaduct.storage.simulate import Biology
from scviaduct.storage.view import View


def random_cells(seed: int, n_obs: int, genes: list[str], density: float = 0.15) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3, (n_obs, len(genes))) * (rng.random((n_obs, len(genes))) < density)
    counts[0, 0] = 300 + seed % 2 * 70_000  # u8 is not enough, sometimes not even u16
    obs = pd.DataFrame(
        {
            "sample": pd.Categorical(rng.choice(["b", "a", "c"], n_obs)),
            "age": rng.integers(20, 80, n_obs),
            "score": rng.normal(size=n_obs),
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def make_atlas(folder: Path, files: dict[str, ad.AnnData]) -> Atlas:
    for name, data in files.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    return convert([folder / f"{name}.h5ad" for name in files], out=folder / "atlas.zarr")


def two_files(seed: int, sizes: tuple[int, int]) -> dict[str, ad.AnnData]:
    return {
        "one": random_cells(seed, sizes[0], [f"g{i}" for i in range(12)]),
        "two": random_cells(seed + 1, sizes[1], [f"g{i}" for i in range(14, 4, -1)]),
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def stored(view: View) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    """(data set, row, counts) of all rows of a view, read with plain zarr."""
    group = zarr.open_group(str(view.path), mode="r")
    arrays = [np.asarray(group[name][:]) for name in ("data", "indices", "indptr")]
    counts = sp.csr_matrix(tuple(arrays), shape=(view.n_rows, len(view.genes)))
    return np.asarray(group["source/dataset"][:]), np.asarray(group["source/row"][:]), counts


def content(view: View) -> dict[str, bytes]:
    """Every file of a view, byte for byte."""
    return {p.relative_to(view.path).as_posix(): p.read_bytes() for p in view.path.rglob("*") if p.is_file()}


def source_counts(files: dict[str, ad.AnnData], genes: tuple[str, ...]) -> list[np.ndarray]:
    frames = [
        pd.DataFrame(d.X.toarray(), columns=d.var_names).reindex(columns=list(genes), fill_value=0)
        for d in files.values()
    ]
    return [frame.to_numpy() for frame in frames]


@settings(max_examples=6)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    join=st.sampled_from(["intersection", "union"]),
    memory=st.sampled_from(["2GB", "20kB"]),
    block_rows=st.sampled_from([1, 7, 1024]),
)
def test_every_cell_with_counts_is_stored_once_with_its_counts(
    seed: int, sizes: tuple[int, int], join: str, memory: str, block_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = two_files(seed, sizes)
        atlas = make_atlas(Path(folder), files)
        view = prepare(atlas, genes="all", join=join, memory=memory, block_rows=block_rows, seed=seed)
        expected = source_counts(files, view.genes)
        dataset, row, counts = stored(view)
        assert len(view.genes) == (7 if join == "intersection" else 15)
        assert np.array_equal(counts.toarray(), np.array([expected[d][r] for d, r in zip(dataset, row, strict=True)]))
        kept = [(d, int(r)) for d, c in enumerate(expected) for r in np.flatnonzero(c.sum(1))]
        assert sorted(zip(dataset.tolist(), row.tolist(), strict=True)) == kept
        assert view.excluded == sum(sizes) - len(kept)
        zero = view.manifest["zero_count_cells"]
        assert zero == {name: int((c.sum(1) == 0).sum()) for name, c in zip(files, expected, strict=True)}
        assert view.manifest["sum"] == sum(int(c.sum()) for c in expected)
        view.verify()


def test_order_is_a_function_of_the_seed_alone(folder: Path) -> None:
    atlas = make_atlas(folder, two_files(3, (700, 300)))
    options = {"a": (0, "2GB"), "b": (0, "30kB"), "c": (1, "2GB")}
    rows, digests = {}, {}
    for name, (seed, memory) in options.items():
        view = prepare(atlas, genes="all", name=name, seed=seed, memory=memory)
        dataset, row, counts = stored(view)
        digests[name] = view.digest
        rows[name] = list(zip(dataset.tolist(), row.tolist(), counts.sum(1).A1.tolist(), strict=True))
    assert (rows["a"], digests["a"]) == (rows["b"], digests["b"])
    assert rows["a"] != rows["c"]
    assert digests["a"] != digests["c"]
    assert sorted(rows["a"]) == sorted(rows["c"])


def test_the_order_is_a_random_permutation() -> None:
    keys = np.concatenate([shuffle_keys(0, name, np.arange(20_000)) for name in ("a", "b")])
    assert len(np.unique(keys)) == 40_000
    rank = np.argsort(np.argsort(keys))
    # In a random order of 40,000, neighbours are uncorrelated and half of each quarter is of data set a (sd 50).
    assert abs(np.corrcoef(rank[:-1], rank[1:])[0, 1]) < 0.03
    assert all(abs((np.argsort(keys)[i : i + 10_000] < 20_000).sum() - 5000) < 300 for i in range(0, 40_000, 10_000))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    biology = Biology.make(n_genes=300)
    files = {"s1": biology.study(1, 500), "s2": biology.study(2, 300)}
    files["s1"].obs["barcode"] = files["s1"].obs_names
    return make_atlas(tmp_path_factory.mktemp("atlas"), files)


def test_highly_variable_genes_are_taken_in_the_atlas_order(atlas: Atlas) -> None:
    view = prepare(atlas, genes=50, batch_key="sample", name="hvg")
    common = atlas.genes("intersection")
    assert len(view.genes) == 50
    assert list(view.genes) == sorted(view.genes, key=common.index)
    assert prepare(atlas, genes=50, name="by dataset".replace(" ", "_")).genes != view.genes


def test_more_genes_than_there_are_means_all(atlas: Atlas) -> None:
    assert prepare(atlas, genes=5000, name="many").genes == tuple(atlas.genes("intersection"))


def test_named_genes_come_from_a_list_or_a_file_in_their_order(atlas: Atlas, tmp_path: Path) -> None:
    names = ["ENSG00000000007.3", "ENSG00000000002"]
    (tmp_path / "genes.txt").write_text("\n".join(names) + "\n\n")
    view = prepare(atlas, genes=names, name="named")
    assert view.genes == ("ENSG00000000007", "ENSG00000000002")
    assert prepare(atlas, genes=tmp_path / "genes.txt", name="named").digest == view.digest


def test_the_same_recipe_reuses_the_view_and_another_is_refused(atlas: Atlas) -> None:
    first = prepare(atlas, genes="all", name="again")
    marker = first.path / "view.json"
    written = marker.stat().st_mtime_ns
    assert prepare(str(atlas.path), genes="all", name="again", memory="1GB").digest == first.digest
    assert marker.stat().st_mtime_ns == written
    with pytest.raises(OutputExistsError, match="different: seed"):
        prepare(atlas, genes="all", name="again", seed=1)
    for other in ({"genes": 30}, {"block_rows": 64}, {"batch_key": "sample"}, {"join": "union"}):
        with pytest.raises(OutputExistsError, match=f"different: {next(iter(other))}"):
            prepare(atlas, **{"genes": "all", "name": "again"} | other)
    assert prepare(atlas, genes="all", name="again", seed=1, overwrite=True).digest != first.digest
    assert not list(first.path.parent.glob(".again.*"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_key": "smaple"}, MissingColumnError, "did you mean 'sample'"),
        ({"genes": 0}, ConfigError, "genes must be at least 1"),
        ({"genes": "no/such/file.txt"}, ConfigError, "no/such/file.txt is no file"),
        ({"genes": ["ENSG00000000001", "ENSG00000000001.2"]}, DataError, "1 genes are named twice: ENSG00000000001"),
        ({"genes": []}, DataError, "No gene"),
        ({"genes": ["ENSG00000000001", "ACTB"]}, DataError, "ACTB"),
        ({"block_rows": 0}, ConfigError, "block_rows"),
        ({"memory": "a lot"}, ConfigError, "memory must be a size"),
        ({"name": "../outside"}, ConfigError, "name"),
        ({"name": ".hidden"}, ConfigError, "name"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(atlas: Atlas, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        prepare(atlas, **{"genes": 20, "name": "refused"} | options)
    assert not (atlas.path / "views/refused").exists()


def test_named_genes_must_be_in_every_data_set_unless_union(folder: Path) -> None:
    atlas = make_atlas(folder, two_files(0, (20, 20)))
    with pytest.raises(DataError, match=r"'two' lacks 1 of the 2 .*g1"):
        prepare(atlas, genes=["g1", "g7"])
    assert prepare(atlas, genes=["g1", "g7"], join="union").genes == ("g1", "g7")


def test_cells_without_any_of_the_genes_leave_nothing_to_train_on(folder: Path) -> None:
    data = random_cells(0, 5, ["g0", "g1"], density=0)
    with pytest.raises(DataError, match="No cell"):
        prepare(make_atlas(folder, {"d": data}), genes=["g1"])


@pytest.mark.parametrize("where", ["planned", "spill", "write", "tree_digest", "write_json_atomic", "replace_folder"])
def test_a_full_disk_is_told_and_the_next_run_goes_on(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = make_atlas(folder, two_files(5, (50, 40)))
    expected = content(prepare(atlas, genes="all", name="undisturbed"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(IncompleteError, match=r"disk of .* is full.* run the same"):
        patch.setattr(module, where, fail)
        prepare(atlas, genes="all")
    with pytest.raises(IncompleteError, match="scviaduct prepare"):
        View.open(atlas.path)
    assert content(prepare(atlas, genes="all")) == expected
    assert not list((atlas.path / "views").glob(".*"))


def test_another_error_keeps_its_name_and_what_is_done(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(module, "write", fail)
        prepare(atlas, genes=40, name="broken")
    with monkeypatch.context() as patch:
        patch.setattr(module, "spill", fail)
        patch.setattr(plan, "highly_variable_genes", fail)
        assert prepare(atlas, genes=40, name="broken").n_rows > 0


def test_what_another_run_left_is_not_taken_for_this_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = make_atlas(folder, two_files(5, (50, 40)))
    expected = content(prepare(atlas, genes="all", name="undisturbed", seed=1))

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "replace_folder", fail)
        prepare(atlas, genes="all", seed=0)
    assert (atlas.path / "views/.default.partial/view/view.json").exists()
    assert content(prepare(atlas, genes="all", seed=1)) == expected


def test_the_old_view_comes_back_when_a_run_was_killed_while_it_took_its_place(folder: Path) -> None:
    atlas = make_atlas(folder, two_files(5, (50, 40)))
    view = prepare(atlas, genes="all")
    written = (view.path / "view.json").stat().st_mtime_ns
    view.path.rename(view.path.with_name(".default.old"))
    assert prepare(atlas, genes="all").path.joinpath("view.json").stat().st_mtime_ns == written
    assert os.listdir(view.path.parent) == ["default"]


def test_marker_is_the_last_file_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = module.write_json_atomic

    def spy(path: Path, record: object) -> None:
        seen.append(sorted(str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file()))
        real(path, record)

    monkeypatch.setattr(module, "write_json_atomic", spy)
    view = prepare(make_atlas(folder, two_files(5, (50, 40))), genes="all")
    assert seen == [sorted(view.manifest["files"])]
    assert set(os.listdir(view.path)) == {"data", "indices", "indptr", "obs", "source", "zarr.json", "view.json"}


def test_types_are_the_smallest_that_hold_the_values(folder: Path) -> None:
    atlas = make_atlas(folder, {"small": random_cells(0, 30, ["a", "b"]), "large": random_cells(1, 30, ["a", "b"])})
    group = zarr.open_group(str(prepare(atlas, genes="all").path), mode="r")
    assert [group[n].dtype for n in ("data", "indices", "indptr")] == [np.uint32, np.uint16, np.int64]
    assert [group[f"obs/{n}"].dtype for n in ("sample", "age", "dataset")] == [np.int8, np.float64, np.int8]
    narrow = prepare(atlas, genes=["b"], name="b")
    assert zarr.open_group(str(narrow.path), mode="r")["data"].dtype == np.uint8


def test_obs_columns_are_those_of_the_source_cells(folder: Path) -> None:
    files = two_files(9, (40, 30))
    files["two"].obs = files["two"].obs.drop(columns="sample").rename(columns={"age": "age two"})
    view = prepare(make_atlas(folder, files), genes="all")
    dataset, row, _ = stored(view)
    group = zarr.open_group(str(view.path), mode="r")
    both = [files["one"].obs, files["two"].obs]
    sample = [both[d]["sample"].iloc[r] if d == 0 else None for d, r in zip(dataset, row, strict=True)]
    codes = group["obs/sample"][:]
    assert [view.categories["sample"][c] if c >= 0 else None for c in codes] == sample
    for column in ("age", "age two", "score"):
        expected = [both[d][column].iloc[r] if column in both[d] else np.nan for d, r in zip(dataset, row, strict=True)]
        np.testing.assert_array_equal(group[f"obs/{column}"][:], expected)
    assert set(view.numeric) == {"age", "age two", "score"}


def test_columns_that_name_cells_are_not_stored(atlas: Atlas) -> None:
    view = prepare(atlas, genes="all", name="identifiers")
    assert view.manifest["identifiers"] == ["barcode"]
    assert "barcode" not in view.categories


def test_an_obs_column_called_dataset_does_not_hide_the_data_set_ids(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = two_files(9, (40, 30))
    for name, data in files.items():
        data.obs["dataset"] = pd.Categorical([f"study of {name}"] * data.n_obs)
    with caplog.at_level(logging.WARNING):
        view = prepare(make_atlas(folder, files), genes="all")
    assert "'obs.dataset'" in caplog.text
    assert view.categories["dataset"] == ("one", "two")
    assert view.categories["obs.dataset"] == ("study of one", "study of two")


def test_digest_tells_views_apart_and_is_in_the_file(atlas: Atlas) -> None:
    one, two = (prepare(atlas, genes="all", name=f"digest{s}", seed=s) for s in (1, 2))
    assert one.digest != two.digest
    assert json.loads((one.path / "view.json").read_text())["digest"] == one.digest
