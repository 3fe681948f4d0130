"""Highly variable genes out of core are those scanpy finds in memory, and tiny batches do no harm."""

import logging
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scviaduct.errors import DataError, MissingColumnError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.hvg import _spread, highly_variable_genes
from scviaduct.storage.simulate import Biology

KANG = Path(__file__).parents[3] / "shared/data/rna/kang2018_pbmc_4samples_celltypes.h5ad"


def write(folder: Path, **files: ad.AnnData) -> Atlas:
    for name, data in files.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    return convert([folder / f"{name}.h5ad" for name in files], out=folder / "atlas.zarr")


def scanpys(data: ad.AnnData, n_top_genes: int, batch_key: str | None) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.pp.highly_variable_genes(
            data, n_top_genes=n_top_genes, flavor="seurat_v3", batch_key=batch_key, inplace=False
        )


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    assert set(ours.index[ours["highly_variable"]]) == set(theirs.index[theirs["highly_variable"]])
    np.testing.assert_allclose(ours["variances_norm"], theirs["variances_norm"], rtol=1e-6)
    np.testing.assert_array_equal(ours["highly_variable_rank"], theirs["highly_variable_rank"])


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Atlas, ad.AnnData]:
    biology = Biology.make(n_genes=600)
    parts = {f"s{i}": biology.study(i, n) for i, n in enumerate((900, 500, 300))}
    parts["s1"] = parts["s1"][:, np.random.default_rng(0).permutation(600)].copy()  # another gene order
    both = ad.concat(list(parts.values()), label="dataset", keys=list(parts))
    return write(tmp_path_factory.mktemp("hvg"), **parts), both[:, biology.genes].copy()


@pytest.mark.parametrize("batch_key", [None, "dataset", "sample"])
def test_genes_are_scanpys(studies: tuple[Atlas, ad.AnnData], batch_key: str | None) -> None:
    atlas, data = studies
    ours = highly_variable_genes(atlas, n_top_genes=100, genes=list(data.var_names), batch_key=batch_key)
    theirs = scanpys(data, 100, batch_key or "dataset")
    assert ours["highly_variable"].sum() == 100
    assert_same(ours, theirs)
    assert np.array_equal(ours["highly_variable_nbatches"], theirs["highly_variable_nbatches"])


def test_batches_are_not_pooled(studies: tuple[Atlas, ad.AnnData]) -> None:
    atlas, data = studies
    by_sample = highly_variable_genes(atlas, n_top_genes=100, genes=list(data.var_names), batch_key="sample")
    pooled = scanpys(data, 100, None)
    assert set(by_sample.index[by_sample["highly_variable"]]) != set(pooled.index[pooled["highly_variable"]])


@pytest.mark.skipif(not KANG.exists(), reason="needs the shared data")
@pytest.mark.parametrize("batch_key", [None, "sample_id"])
def test_kang_genes_are_scanpys(tmp_path: Path, batch_key: str | None) -> None:
    data = ad.read_h5ad(KANG)
    atlas = convert([KANG], out=tmp_path / "atlas.zarr")
    ours = highly_variable_genes(atlas, n_top_genes=300, genes=list(data.var_names), batch_key=batch_key)
    assert_same(ours, scanpys(data, 300, batch_key))


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


def test_a_batch_of_one_cell_takes_no_part_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_batches({"a": 200, "b": 150, "lonely": 1})
    with caplog.at_level(logging.WARNING):
        ours = highly_variable_genes(
            write(tmp_path, d=data), n_top_genes=50, genes=list(data.var_names), batch_key="batch"
        )
    assert "lonely (1 cells)" in caplog.text
    assert_same(ours, scanpys(data[data.obs["batch"] != "lonely"].copy(), 50, "batch"))


def test_no_usable_batch_is_an_error_that_says_so(tmp_path: Path) -> None:
    data = tiny_batches({"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"a \(1 cells\)"):
        highly_variable_genes(write(tmp_path, d=data), n_top_genes=50, genes=list(data.var_names), batch_key="batch")


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
