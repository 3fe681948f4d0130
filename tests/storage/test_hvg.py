"""Highly variable genes out of core are those scanpy finds in memory, and tiny batches do no harm."""

import logging
import re
import warnings
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scviaduct.errors import ConfigError, DataError, MissingColumnError
from scviaduct.storage import scan
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.genes import Join
from scviaduct.storage.hvg import Flavor, _spread, highly_variable_genes
from scviaduct.storage.simulate import Biology
from scviaduct.storage.tasks import processes

KANG = Path(__file__).parents[3] / "shared/data/rna/kang2018_pbmc_4samples_celltypes.h5ad"


def write(folder: Path, **files: ad.AnnData) -> Atlas:
    for name, data in files.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    return convert([folder / f"{name}.h5ad" for name in files], out=folder / "atlas.zarr")


def scanpys(data: ad.AnnData, n_top_genes: int, batch_key: str | None, flavor: str = "seurat_v3") -> pd.DataFrame:
    if flavor != "seurat_v3":
        data = data.copy()
        sc.pp.normalize_total(data, target_sum=1e4)
        sc.pp.log1p(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.pp.highly_variable_genes(
            data, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
        )


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    assert set(ours.index[ours["highly_variable"]]) == set(theirs.index[theirs["highly_variable"]])
    if "variances_norm" in theirs:
        np.testing.assert_allclose(ours["variances_norm"], theirs["variances_norm"], rtol=1e-6)
        np.testing.assert_array_equal(ours["highly_variable_rank"], theirs["highly_variable_rank"])
        return
    for column in ("means", "dispersions"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=2e-5, atol=1e-9)
    # means and dispersions of float32 values, less the mean of a bin
    np.testing.assert_allclose(ours["dispersions_norm"], theirs["dispersions_norm"], rtol=1e-4, atol=1e-5)
    for column in {"highly_variable_nbatches", "highly_variable_intersection"} & set(theirs):
        assert np.array_equal(ours[column], theirs[column])


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Atlas, ad.AnnData]:
    biology = Biology.make(n_genes=600)
    parts = {f"s{i}": biology.study(i, n) for i, n in enumerate((900, 500, 300))}
    parts["s1"] = parts["s1"][:, np.random.default_rng(0).permutation(600)].copy()  # another gene order
    both = ad.concat(list(parts.values()), label="dataset", keys=list(parts))
    return write(tmp_path_factory.mktemp("hvg"), **parts), both[:, biology.genes].copy()


@pytest.mark.parametrize("flavor", get_args(Flavor))
@pytest.mark.parametrize("batch_key", [None, "dataset", "sample"])
def test_genes_are_scanpys(studies: tuple[Atlas, ad.AnnData], batch_key: str | None, flavor: Flavor) -> None:
    atlas, data = studies
    genes = list(data.var_names)
    ours = highly_variable_genes(atlas, n_top_genes=100, genes=genes, batch_key=batch_key, flavor=flavor)
    theirs = scanpys(data, 100, batch_key or "dataset", flavor)
    assert ours["highly_variable"].sum() == 100
    assert ours.index.tolist() == genes
    assert_same(ours, theirs)
    assert np.array_equal(ours["highly_variable_nbatches"], theirs["highly_variable_nbatches"])


def unseen(counts: sp.csr_matrix, n: int) -> sp.csr_matrix:
    """Without any count of the first n genes, which were measured."""
    return sp.csr_matrix(counts.multiply(np.arange(counts.shape[1]) >= n))


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> tuple[Atlas, dict[str, ad.AnnData]]:
    """Two data sets that measured different genes, in different orders, one of them with large counts."""
    biology = Biology.make(n_genes=700)
    rng = np.random.default_rng(3)
    parts = {
        "a": biology.study(0, 700)[:, :550].copy(),
        "b": biology.study(1, 500)[:, 100:][:, rng.permutation(600)].copy(),
    }
    parts["b"].X = parts["b"].X * 50
    parts["a"].X = unseen(parts["a"].X, 30)
    return write(tmp_path_factory.mktemp("unlike"), **parts), parts


@pytest.mark.parametrize("flavor", get_args(Flavor))
@pytest.mark.parametrize("join", get_args(Join))
@pytest.mark.parametrize("batch_key", [None, "sample"])
def test_joins(unlike: tuple[Atlas, dict[str, ad.AnnData]], batch_key: str | None, join: Join, flavor: Flavor) -> None:
    atlas, parts = unlike
    genes = list(atlas.genes(join))
    both = ad.concat(parts, label="dataset", join="outer", fill_value=0)[:, genes].copy()
    ours = highly_variable_genes(atlas, n_top_genes=60, genes=genes, batch_key=batch_key, flavor=flavor)
    assert_same(ours, scanpys(both, 60, batch_key or "dataset", flavor))


@pytest.mark.parametrize("flavor", get_args(Flavor))
@pytest.mark.parametrize("batch_key", [None, "sample"])
def test_only_the_cells_that_are_kept_count(
    studies: tuple[Atlas, ad.AnnData], batch_key: str | None, flavor: Flavor
) -> None:
    atlas, data = studies
    rng = np.random.default_rng(8)
    keep = {info.id: rng.random(info.n_obs) < 0.6 for info in atlas.datasets}
    if batch_key:
        keep["s2"][:] = False  # all three batches of it
    left = data[np.concatenate(list(keep.values()))].copy()
    ours = highly_variable_genes(
        atlas, n_top_genes=80, genes=list(data.var_names), batch_key=batch_key, flavor=flavor, keep=keep
    )
    assert_same(ours, scanpys(left, 80, batch_key or "dataset", flavor))


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
@pytest.mark.parametrize("n_top_genes", [1, 50, 2000])
def test_one_data_set_is_not_divided(tmp_path: Path, flavor: Flavor, n_top_genes: int) -> None:
    data = Biology.make(n_genes=500).study(0, 600)
    data.X = unseen(data.X, 20)
    ours = highly_variable_genes(
        write(tmp_path, d=data), n_top_genes=n_top_genes, genes=list(data.var_names), flavor=flavor
    )
    theirs = scanpys(data, n_top_genes, None, flavor)
    assert ours.columns.tolist() == ["highly_variable", "means", "dispersions", "dispersions_norm"]
    assert_same(ours, theirs)


def test_ties_between_batches_are_in_the_order_of_names(tmp_path: Path) -> None:
    """More genes are asked for than vary: the rest, all 0, are taken by name."""
    data = tiny_batches({"a": 60, "b": 50}, n_genes=80)
    data.X = unseen(data.X, 30)
    data = data[:, np.random.default_rng(0).permutation(80)].copy()
    atlas = write(tmp_path, d=data)
    ours = highly_variable_genes(atlas, n_top_genes=60, genes=list(data.var_names), batch_key="batch", flavor="seurat")
    assert_same(ours, scanpys(data, 60, "batch", "seurat"))


def test_cell_ranger_where_many_genes_are_never_seen(tmp_path: Path) -> None:
    """Bins of equal edges, where scanpy fails, are one bin."""
    data = Biology.make(n_genes=500).study(0, 300)
    data.X = unseen(data.X, 200)
    with pytest.raises(ValueError, match="Bin edges must be unique"):
        scanpys(data, 50, None, "cell_ranger")
    atlas = write(tmp_path, d=data)
    ours = highly_variable_genes(atlas, n_top_genes=50, genes=list(data.var_names), flavor="cell_ranger")
    assert ours["highly_variable"].sum() == 50
    assert not ours["highly_variable"].iloc[:200].any()


@pytest.mark.parametrize("flavor", get_args(Flavor))
def test_the_same_bits_for_any_chunks_threads_and_processes(
    unlike: tuple[Atlas, dict[str, ad.AnnData]], flavor: Flavor, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas, _ = unlike

    def found(executor: Executor | None = None) -> pd.DataFrame:
        genes = atlas.genes("union")
        return highly_variable_genes(
            atlas, n_top_genes=60, genes=genes, batch_key="sample", flavor=flavor, executor=executor
        )

    monkeypatch.setattr(scan, "_ROWS", 128)
    wanted = found()
    with ThreadPoolExecutor(3) as threads:
        pd.testing.assert_frame_equal(found(threads), wanted, check_exact=True)
    if flavor == "seurat_v3":  # one is enough: starting processes takes seconds
        with processes(1, preload="scviaduct.storage.hvg") as others:
            pd.testing.assert_frame_equal(found(others), wanted, check_exact=True)
    monkeypatch.setattr(scan, "_VALUES", 9_999)
    monkeypatch.setattr(scan, "_AHEAD", 3)
    monkeypatch.setattr(scan, "_MEMORY", 1)  # one task at a time
    pd.testing.assert_frame_equal(found(), wanted, check_exact=True)
    monkeypatch.setattr(scan, "_ROWS", 16_384)
    # whole numbers are exact in any order; floats are added up task by task
    pd.testing.assert_frame_equal(found(), wanted, check_exact=flavor == "seurat_v3", rtol=1e-12)


def test_no_such_flavor(studies: tuple[Atlas, ad.AnnData]) -> None:
    with pytest.raises(ConfigError, match="no flavor 'seurat_v4': did you mean 'seurat_v3'"):
        highly_variable_genes(studies[0], n_top_genes=5, genes=["x"], flavor="seurat_v4")


def test_batches_are_not_pooled(studies: tuple[Atlas, ad.AnnData]) -> None:
    atlas, data = studies
    by_sample = highly_variable_genes(atlas, n_top_genes=100, genes=list(data.var_names), batch_key="sample")
    pooled = scanpys(data, 100, None)
    assert set(by_sample.index[by_sample["highly_variable"]]) != set(pooled.index[pooled["highly_variable"]])


@pytest.mark.skipif(not KANG.exists(), reason="needs the shared data")
@pytest.mark.parametrize("flavor", get_args(Flavor))
@pytest.mark.parametrize("batch_key", [None, "sample_id"])
def test_kang_genes_are_scanpys(tmp_path: Path, batch_key: str | None, flavor: Flavor) -> None:
    data = ad.read_h5ad(KANG)
    atlas = convert([KANG], out=tmp_path / "atlas.zarr")
    ours = highly_variable_genes(atlas, n_top_genes=300, genes=list(data.var_names), batch_key=batch_key, flavor=flavor)
    assert_same(ours, scanpys(data, 300, batch_key, flavor))


def tiny_batches(sizes: dict[str, int], n_genes: int = 300) -> ad.AnnData:
    rng = np.random.default_rng(1)
    names = np.repeat(list(sizes), list(sizes.values()))
    counts = rng.poisson(rng.gamma(0.5, 1, n_genes), (len(names), n_genes)).astype(np.float32)
    obs = pd.DataFrame({"batch": pd.Categorical(names)}, index=[f"c{i}" for i in range(len(names))])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def test_scanpy_fails_where_a_small_batch_needs_a_wider_span(tmp_path: Path) -> None:
    data = tiny_batches({"a": 200, "small": 4})
    with pytest.raises(ValueError, match="singularities"):
        scanpys(data, 50, "batch")
    ours = highly_variable_genes(write(tmp_path, d=data), n_top_genes=50, genes=list(data.var_names), batch_key="batch")
    assert ours["highly_variable"].sum() == 50
    assert ours["highly_variable_nbatches"].max() == 2  # the small batch took part
    assert np.isfinite(ours["variances_norm"]).all()


@pytest.mark.parametrize("flavor", get_args(Flavor))
def test_a_batch_of_one_cell_takes_no_part_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flavor: Flavor
) -> None:
    data = tiny_batches({"a": 200, "b": 150, "lonely": 1})
    with caplog.at_level(logging.WARNING):
        ours = highly_variable_genes(
            write(tmp_path, d=data), n_top_genes=50, genes=list(data.var_names), batch_key="batch", flavor=flavor
        )
    assert "lonely (1 cells)" in caplog.text
    assert_same(ours, scanpys(data[data.obs["batch"] != "lonely"].copy(), 50, "batch", flavor))


@pytest.mark.parametrize("flavor", get_args(Flavor))
def test_no_usable_batch_is_an_error_that_says_so(tmp_path: Path, flavor: Flavor) -> None:
    data = tiny_batches({"a": 1, "b": 1})
    atlas, genes = write(tmp_path, d=data), list(data.var_names)
    for keep, left_out in (
        (None, "a (1 cells), b (1 cells)"),
        ({"d": np.array([True, False])}, "a (1 cells)"),
        ({"d": np.zeros(2, bool)}, "no cell is left"),
    ):
        with pytest.raises(DataError, match=re.escape(f"({left_out})")):
            highly_variable_genes(atlas, n_top_genes=50, genes=genes, batch_key="batch", flavor=flavor, keep=keep)


def test_missing_column_and_missing_values_are_refused(tmp_path: Path) -> None:
    data = tiny_batches({"a": 20, "b": 20})
    data.obs["holes"] = pd.Categorical([None, None, *["x"] * 38])
    atlas, genes = write(tmp_path, d=data), list(data.var_names)
    with pytest.raises(MissingColumnError, match="did you mean 'batch'"):
        highly_variable_genes(atlas, n_top_genes=5, genes=genes, batch_key="bacth")
    with pytest.raises(DataError, match=r"2 cells of data set 'd' have no holes .*c0"):
        highly_variable_genes(atlas, n_top_genes=5, genes=genes, batch_key="holes")


def test_genes_that_no_data_set_has_are_refused(tmp_path: Path) -> None:
    data = tiny_batches({"a": 20, "b": 20})
    with pytest.raises(DataError, match=r"1 of 2 genes .*nowhere"):
        highly_variable_genes(write(tmp_path, d=data), n_top_genes=1, genes=["g1", "nowhere"], batch_key="batch")


@pytest.mark.parametrize("value", [1, 3, 977, 20_011])
def test_a_constant_gene_has_no_variance_at_all(value: int) -> None:
    n = np.array([[10_000_019]])
    assert _spread(n, n * value, n * float(value) ** 2)[0, 0] == 0


def test_variance_of_sums_beyond_int64_is_close() -> None:
    n, value = 10**9, 2**20  # half of the cells have the value
    squares, total = np.array([[n / 2 * value**2]]), np.array([[n // 2 * value]])
    np.testing.assert_allclose(_spread(np.array([[n]]), total, squares)[0, 0], (n / 2 * value) ** 2, rtol=1e-9)
