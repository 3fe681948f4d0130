"""Quality metrics out of core are scanpy's, and filters keep exactly the cells that scanpy's metrics say."""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.errors import ConfigError, DataError, MissingColumnError
from scviaduct.storage import scan
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.qc import Filters, _sum_tops, kept_cells, qc_metrics

KANG = Path(__file__).parents[3] / "shared/data/rna/kang2018_pbmc_4samples_celltypes.h5ad"
SYMBOLS = ["MT-ND1", "MT-CO1", "mt-Nd2", "Mt-rnr1", "MTOR", *(f"G{i}" for i in range(595))]


def cells(n: int, symbols: list[str], seed: int, scale: float = 1) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    means = np.where([name.upper().startswith("MT-") for name in symbols], 5, rng.gamma(0.3, 3, len(symbols)))
    counts = rng.poisson(scale * means * rng.gamma(2, 1, (n, 1)))
    counts[0] = 0  # a cell without counts
    obs = pd.DataFrame({"is_primary_data": rng.random(n) < 0.8}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=symbols))


def write(folder: Path, **files: ad.AnnData) -> Atlas:
    for name, data in files.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    return convert([folder / f"{name}.h5ad" for name in files], out=folder / "atlas.zarr")


def scanpys(data: ad.AnnData, percent_top: tuple[int, ...] = (50, 100, 200, 500)) -> tuple[pd.DataFrame, pd.DataFrame]:
    data.var["mt"] = [name.upper().startswith("MT-") for name in data.var_names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.pp.calculate_qc_metrics(data, qc_vars=["mt"], percent_top=percent_top)


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False, check_names=False, rtol=2e-6)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Atlas, dict[str, ad.AnnData]]:
    # b lacks ten genes, has them in another order, and counts of more than one byte
    parts = {"a": cells(300, SYMBOLS, 1), "b": cells(200, SYMBOLS[::-1][10:], 2, scale=300)}
    assert parts["a"].X.max() < 256 < parts["b"].X.max()
    return write(tmp_path_factory.mktemp("qc"), **parts), parts


def test_metrics_are_scanpys(studies: tuple[Atlas, dict[str, ad.AnnData]]) -> None:
    atlas, parts = studies
    ours = qc_metrics(atlas)
    for name, data in parts.items():
        assert_same(ours.obs[name], scanpys(data)[0])
    both = ad.concat(parts, join="outer", fill_value=0, index_unique="-")[:, list(atlas.genes())].copy()
    assert_same(ours.var, scanpys(both)[1])


@pytest.mark.skipif(not KANG.exists(), reason="needs the shared data")
def test_real_metrics_are_scanpys(tmp_path: Path) -> None:
    ours = qc_metrics(convert([KANG], out=tmp_path / "atlas.zarr"), qc_vars={})
    obs, var = scanpys(ad.read_h5ad(KANG))
    assert_same(next(iter(ours.obs.values())), obs[[c for c in obs if "mt" not in c]])
    assert_same(ours.var, var)


def test_groups_of_genes_are_named_or_found_by_prefix(studies: tuple[Atlas, dict[str, ad.AnnData]]) -> None:
    atlas, parts = studies
    found = qc_metrics(atlas, qc_vars={"g": "g1", "named": ["MTOR", "G5", "MT-ND1"]}, percent_top=[]).obs
    for name, data in parts.items():
        frame = data.to_df()
        assert np.array_equal(found[name]["total_counts_named"], frame[["MTOR", "G5", "MT-ND1"]].sum(axis=1))
        assert np.array_equal(found[name]["total_counts_g"], frame.filter(regex="^G1").sum(axis=1))
        assert not [column for column in found[name] if "top" in column]


def test_percent_top_of_more_genes_than_there_are(studies: tuple[Atlas, dict[str, ad.AnnData]]) -> None:
    for wrong in ([50, 595], [0, 5]):
        with pytest.raises(ConfigError, match="between 1 and the 59. genes of '[ab]'" if wrong[0] else "between 1 and"):
            qc_metrics(studies[0], percent_top=wrong)


@given(st.lists(st.lists(st.integers(1, 2**24 - 1) | st.integers(1, 5), max_size=12), max_size=5), st.data())
def test_counts_of_the_largest(rows: list[list[int]], data: st.DataObject) -> None:
    tops = sorted(data.draw(st.sets(st.integers(1, 15))))
    sums = np.zeros((len(rows), len(tops)), np.int64)
    indptr = np.cumsum([0, *map(len, rows)])
    _sum_tops(indptr, np.array([x for row in rows for x in row], np.uint32), np.array(tops, np.int64), sums)
    assert sums.tolist() == [[sum(sorted(row)[::-1][:n]) for n in tops] for row in rows]


@pytest.mark.parametrize(
    "filters",
    [
        Filters(min_counts=900),
        Filters(min_genes=250),
        Filters(max_mito=3.55),
        Filters(max_mito=0),
        Filters(is_primary_data=True),
        Filters(min_counts=900, min_genes=250, max_mito=3.55, is_primary_data=True),
    ],
    ids=str,
)
def test_filters_keep_what_the_metrics_say(studies: tuple[Atlas, dict[str, ad.AnnData]], filters: Filters) -> None:
    atlas, parts = studies
    kept = kept_cells(atlas, filters)
    assert kept is not None
    for name, data in parts.items():
        obs = scanpys(data)[0]
        fails = {
            "min_counts": obs["total_counts"] < filters.min_counts,
            "min_genes": obs["n_genes_by_counts"] < filters.min_genes,
            "max_mito": obs["pct_counts_mt"] > (100 if filters.max_mito is None else filters.max_mito),
            "is_primary_data": ~data.obs["is_primary_data"] & filters.is_primary_data,
        }
        assert np.array_equal(kept.masks[name], ~np.logical_or.reduce(list(fails.values())))
        assert kept.removed[name] == {
            key: fail.sum() for key, fail in fails.items() if getattr(filters, key) != getattr(Filters(), key)
        }
    assert 0 < sum(mask.sum() for mask in kept.masks.values()) < atlas.n_obs


def test_limits_are_inclusive(tmp_path: Path) -> None:
    counts = np.array([[1, 9, 0], [1, 8, 0], [2, 8, 0], [1, 8, 1]], np.float32)
    data = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=["MT-X", "A", "B"]))
    atlas = write(tmp_path, d=data)
    assert kept_cells(atlas, Filters(min_counts=10)).masks["d"].tolist() == [True, False, True, True]
    assert kept_cells(atlas, Filters(min_genes=3)).masks["d"].tolist() == [False, False, False, True]
    assert kept_cells(atlas, Filters(max_mito=10)).masks["d"].tolist() == [True, False, False, True]


def test_no_filter_reads_nothing(studies: tuple[Atlas, dict[str, ad.AnnData]]) -> None:
    assert kept_cells(studies[0], Filters()) is None


@pytest.mark.parametrize("wrong", [{"min_counts": -1}, {"min_genes": -5}, {"max_mito": -0.1}, {"max_mito": 101}])
def test_filters_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} .*{next(iter(wrong.values()))}"):
        Filters(**wrong)


def test_filters_that_nothing_passes(studies: tuple[Atlas, dict[str, ad.AnnData]]) -> None:
    with pytest.raises(DataError, match=r"No cell .* passes .*'min_counts': 300"):
        kept_cells(studies[0], Filters(min_counts=10**9))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([True, False, True], [True, False, True]),
        (["True", "False", "true"], [True, False, True]),
        (pd.Categorical(["FALSE", "True", "FALSE"]), [False, True, False]),
        (pd.array([True, False, True], "boolean"), [True, False, True]),
    ],
)
def test_primary_data_as_bool_or_text(tmp_path: Path, values: object, kept: list[bool]) -> None:
    data = cells(3, ["A", "B"], 0)
    data.obs["is_primary_data"] = values
    found = kept_cells(write(tmp_path, d=data), Filters(is_primary_data=True))
    assert found is not None
    assert found.masks["d"].tolist() == kept


def test_primary_data_that_is_missing_or_something_else(tmp_path: Path) -> None:
    data = cells(4, ["A", "B"], 0)
    data.obs["is_primary_data"] = pd.Categorical(["True", "perhaps", None, "False"])
    with pytest.raises(DataError, match=r"2 cells are neither True nor False \(e\.g\. 'perhaps' of cell c1\)"):
        kept_cells(write(tmp_path, d=data), Filters(is_primary_data=True))
    del data.obs["is_primary_data"]
    (tmp_path / "2").mkdir()
    with pytest.raises(MissingColumnError, match="no column 'is_primary_data'"):
        kept_cells(write(tmp_path / "2", d=data), Filters(is_primary_data=True))


def test_mitochondrial_genes_by_a_column_of_symbols(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = [f"ENSG{i:011d}" for i in range(600)]
    named, nameless = cells(50, ids, 1), cells(50, ids, 2)
    named.var = pd.DataFrame({"chromosome": ["MT-"] * 600, "feature_name": SYMBOLS}, index=ids)
    without = cells(50, [*(f"G{i}" for i in range(599)), "MTOR"], 3)
    atlas = write(tmp_path, named=named, without=without)
    with caplog.at_level(logging.WARNING):
        found = qc_metrics(atlas, percent_top=[]).obs
    assert np.array_equal(found["named"]["total_counts_mt"], named.X[:, :4].sum(axis=1).A1)
    assert not found["without"]["total_counts_mt"].any()
    assert "data set 'without' has no gene that starts with 'MT-'" in caplog.text
    (tmp_path / "2").mkdir()
    lacking = write(tmp_path / "2", named=named, nameless=nameless)
    with pytest.raises(ConfigError, match=r"data set 'nameless' has none: its var has ENSG0.*Add a column of symbols"):
        kept_cells(lacking, Filters(max_mito=10))
    (tmp_path / "3").mkdir()
    with pytest.raises(ConfigError, match=r"No gene of .* starts with 'MT-': leave out max_mito"):
        kept_cells(write(tmp_path / "3", without=without), Filters(max_mito=10))


def test_the_same_for_any_chunks_and_threads(
    studies: tuple[Atlas, dict[str, ad.AnnData]], monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas, _ = studies
    filters = Filters(min_counts=900, max_mito=3.55)
    wanted, kept = qc_metrics(atlas), kept_cells(atlas, filters)
    monkeypatch.setattr(scan, "_ROWS", 37)
    monkeypatch.setattr(scan, "_VALUES", 5_000)
    with ThreadPoolExecutor(3) as threads:
        for executor in (None, threads):
            found, masks = qc_metrics(atlas, executor=executor), kept_cells(atlas, filters, executor=executor)
            pd.testing.assert_frame_equal(found.var, wanted.var, check_exact=True)
            for name in found.obs:
                pd.testing.assert_frame_equal(found.obs[name], wanted.obs[name], check_exact=True)
                assert np.array_equal(masks.masks[name], kept.masks[name])
            assert masks.removed == kept.removed
