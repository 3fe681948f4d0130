"""The shuffle on disk mixes the data sets in every batch, and a view trains as the same cells in memory do."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

from scviaduct.schema import Batch
from scviaduct.storage.arrays import open_array
from scviaduct.storage.convert import convert
from scviaduct.storage.genes import pick
from scviaduct.storage.loader import Loader, MemorySource
from scviaduct.storage.prepare import prepare
from scviaduct.storage.sampler import Sampler
from scviaduct.storage.shuffle import RANGES, gather, key_ranges, sort_genes
from scviaduct.storage.view import View

SIZES = (4000, 2500, 1200, 300)
"""Cells of the data sets, which lie one after the other in an atlas."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[View, list[Path]]:
    folder, rng = tmp_path_factory.mktemp("shuffle"), np.random.default_rng(0)
    files = [folder / f"d{number}.h5ad" for number in range(len(SIZES))]
    for file, n in zip(files, SIZES, strict=True):
        obs = pd.DataFrame({"donor": rng.choice(["x", "y"], n), "age": np.arange(n)}, index=np.arange(n).astype(str))
        counts = sp.csr_matrix((rng.poisson(1.0, (n, 12)) + (np.arange(12) == 3)).astype(np.float32))
        ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(12)])).write_h5ad(file)
    return prepare(convert(files, out=folder / "atlas.zarr"), genes="all", block_rows=64), files


def p_values(groups: Iterator[np.ndarray]) -> np.ndarray:
    """For each group of cells, of the chi-square test of its data sets against those of the atlas."""
    counted = np.array([np.bincount(group, minlength=len(SIZES)) for group in groups])
    expected = counted.sum(1, keepdims=True) * np.array(SIZES) / sum(SIZES)
    return chi2.sf(((counted - expected) ** 2 / expected).sum(1), len(SIZES) - 1)


def batches(view: View, size: int, epochs: int, first: int | None) -> Iterator[np.ndarray]:
    """The data sets of the cells of the `first` batches of each epoch."""
    source = view.source(view.schema(batch_key="dataset"))
    sampler = Sampler(n_rows=view.n_rows, block_rows=view.block_rows, batch_size=size)
    for epoch in range(epochs):
        with Loader(source, sampler).epoch(epoch) as found:
            yield from (batch.batch_index for batch in islice(found, first))


@pytest.mark.parametrize(("size", "epochs", "first"), [(128, 2, None), (128, 30, 4), (512, 8, None)])
def test_batches_are_random_draws_of_all_data_sets(
    place: tuple[View, list[Path]], size: int, epochs: int, first: int | None
) -> None:
    found = p_values(batches(place[0], size, epochs, first))
    # Of true random draws the p-values are uniform: then this p-value is below 0.001 for one seed in a thousand.
    assert kstest(found, "uniform").pvalue > 1e-3
    assert found.min() > 1e-6


def test_blocks_on_disk_are_random_draws_and_the_order_in_the_atlas_is_not(place: tuple[View, list[Path]]) -> None:
    stored = np.asarray(open_array(place[0].path / "source/dataset")[:])
    assert kstest(p_values(iter(np.array_split(stored, 60))), "uniform").pvalue > 1e-3
    assert kstest(p_values(iter(np.array_split(np.sort(stored), 60))), "uniform").pvalue < 1e-20


def test_batches_from_disk_equal_those_of_the_same_cells_in_memory(place: tuple[View, list[Path]]) -> None:
    view, files = place
    data = [ad.read_h5ad(file) for file in files]
    begins = np.concatenate([[0], np.cumsum(SIZES)])
    dataset, row = (np.asarray(open_array(view.path / f"source/{name}")[:]) for name in ("dataset", "row"))
    order = begins[dataset] + row
    assert sorted(order) == list(range(sum(SIZES)))
    counts, obs = sp.vstack([d.X for d in data], format="csr")[order], pd.concat([d.obs for d in data]).iloc[order]
    schema = view.schema(batch_key="dataset", labels_key="donor", continuous_covariate_keys=["age"])
    memory = Batch(
        n_genes=12,
        indptr=counts.indptr.astype(np.int64),
        indices=counts.indices,
        data=counts.data,
        batch_index=dataset.astype(np.int64),
        labels=(obs["donor"] == "y").to_numpy(np.int64),
        categorical=np.zeros((len(order), 0), np.int64),
        continuous=obs[["age"]].to_numpy(np.float32),
        rows=np.arange(len(order)),
    )
    sampler = Sampler(n_rows=view.n_rows, block_rows=view.block_rows, batch_size=100, seed=3)
    sources = view.source(schema), MemorySource(memory, view.block_rows)
    for epoch in (0, 1):
        with Loader(sources[0], sampler).epoch(epoch) as disk, Loader(sources[1], sampler).epoch(epoch) as here:
            for one, other in zip(disk, here, strict=True):
                for name in Batch.__dataclass_fields__:
                    np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@given(seed=st.integers(0, 10**6), n=st.integers(0, 30), dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]))
def test_the_compiled_loops_do_what_scipy_does(seed: int, n: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix((rng.poisson(1, (n, 9)) * (rng.random((n, 9)) < 0.5)).astype(dtype))
    chosen = rng.permutation(9)[: rng.integers(1, 10)]
    columns = np.full(9, -1, np.int32)
    columns[chosen] = np.arange(len(chosen))
    arrays = counts.indptr.astype(np.int64), counts.indices.astype(np.uint16), counts.data
    indptr, indices, data = np.zeros_like(arrays[0]), np.empty_like(arrays[1]), np.empty_like(arrays[2])
    pick(*arrays, columns, indptr[1:], indices, data)
    indices, data = indices[: indptr[-1]], data[: indptr[-1]]
    sort_genes(indptr, indices, data)
    expected = counts.tocsc()[:, chosen].tocsr()
    expected.sort_indices()
    for found, wanted in zip((indptr, indices, data), (expected.indptr, expected.indices, expected.data), strict=True):
        np.testing.assert_array_equal(found, wanted)
    cells = rng.permutation(n)[: rng.integers(0, n + 1)]
    wanted = expected[cells]
    out = np.empty(wanted.nnz, np.uint16), np.empty(wanted.nnz, dtype)
    gather(cells, indptr, indices, data, *out)
    np.testing.assert_array_equal(out[0], wanted.indices)
    np.testing.assert_array_equal(out[1], wanted.data)


def test_key_ranges_keep_the_order_and_cover_all_keys() -> None:
    keys = np.sort(np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64))
    keys[0], keys[-1] = 0, 2**64 - 1
    ranges = key_ranges(keys)
    assert (np.diff(ranges) >= 0).all()
    assert (ranges[0], ranges[-1]) == (0, RANGES - 1)
