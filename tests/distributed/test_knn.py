import pickle
from functools import partial

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from scviaduct.distributed import transfer
from scviaduct.distributed.knn import ALL, CellIndex, Probe
from scviaduct.distributed.transfer import Neighbours
from scviaduct.errors import DataError


def everyone(latent):
    return CellIndex(latent, np.arange(len(latent)))


def in_lists(latent):
    return CellIndex(latent, np.arange(len(latent)), all_pairs=0)


def by_force(reference, query, k):
    """Distances of all pairs in float64, and of equal ones the first rows first."""
    distances = np.sqrt(((query[:, None].astype(np.float64) - reference[None].astype(np.float64)) ** 2).sum(-1))
    rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, rows, 1), rows


def clustered(rng, n, d, spread=0.1, kinds=7):
    centers = rng.normal(size=(kinds, d))
    return (centers[rng.integers(0, kinds, n)] + spread * rng.normal(size=(n, d))).astype(np.float32)


@settings(deadline=None)
@given(
    n=st.integers(1, 700),
    q=st.integers(0, 150),
    d=st.integers(1, 34),
    k=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.05, 1.0]),
    grid=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equal_to_all_pairs(n, q, d, k, spread, grid, seed):
    rng = np.random.default_rng(seed)
    cells = clustered(rng, n + q, d, spread)
    if grid:  # few different values: many pairs are exactly as far apart as others
        cells = np.round(cells)
    reference, query, k = cells[:n], cells[n:], min(k, n)
    distances, rows = everyone(reference).search(query, k)
    want, want_rows = by_force(reference, query, k)
    np.testing.assert_allclose(distances, want, rtol=1e-12)
    if grid:
        np.testing.assert_array_equal(rows, want_rows)
    else:  # sums in another order: rows may change places where distances are equal up to rounding
        gaps = np.linalg.norm(query[:, None].astype(np.float64) - reference[rows], axis=-1)
        np.testing.assert_allclose(gaps, want, rtol=1e-12)
        assert all(len(set(row)) == k for row in rows)


def test_only_the_rows_that_are_given_are_found():
    rng = np.random.default_rng(0)
    latent, some = rng.normal(size=(2000, 5)).astype(np.float32), np.flatnonzero(rng.random(2000) < 0.3)
    latent[np.setdiff1d(np.arange(2000), some)] = np.nan
    query = rng.normal(size=(50, 5)).astype(np.float32)
    distances, rows = CellIndex(latent, some).search(query, 9)
    want, want_rows = by_force(latent[some], query, 9)
    np.testing.assert_array_equal(rows, some[want_rows])
    np.testing.assert_allclose(distances, want, rtol=1e-12)


def test_neighbours_do_not_depend_on_threads_company_or_order():
    rng = np.random.default_rng(1)
    cells = np.round(clustered(rng, 6000, 10, 0.5), 1)  # with ties
    reference, query = cells[:5000], cells[5000:]
    one = everyone(reference).search(query, 20)
    for threads in (2, 5):
        for a, b in zip(one, everyone(reference).search(query, 20, threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)
    alone = [everyone(reference).search(query[i : i + 1], 20) for i in (0, 17, 999)]
    for i, (distances, rows) in zip((0, 17, 999), alone, strict=True):
        np.testing.assert_array_equal(distances[0], one[0][i])
        np.testing.assert_array_equal(rows[0], one[1][i])
    turned = rng.permutation(1000)
    for a, b in zip(one, everyone(reference).search(query[turned], 20), strict=True):
        np.testing.assert_array_equal(a[turned], b)


def test_a_neighbour_that_float32_puts_beyond_the_last_is_found():
    # squared distances 1 + i * 1e-9: all the same in float32; the first in float64 comes last in the reference
    i = np.arange(8, dtype=np.float64)[::-1]
    small = np.sqrt((i + 1) * 1e-9).astype(np.float32)
    reference = np.stack([np.ones(8, np.float32), small], axis=1)
    assert len(set((reference**2).sum(1))) == 1
    _, rows = everyone(reference).search(np.zeros((1, 2), np.float32), 2)
    np.testing.assert_array_equal(rows, [[7, 6]])


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_cells_that_are_all_the_same(n):
    reference = np.full((n, 3), 0.25, np.float32)
    k = min(n, 40)
    distances, rows = everyone(reference).search(reference[:70], k)  # rounding could matter: no matrix products
    assert (distances == 0).all()
    np.testing.assert_array_equal(rows, np.tile(np.arange(k), (len(distances), 1)))


def test_far_off_queries_have_their_nearest_cells():
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(1000, 6)).astype(np.float32)
    query = rng.normal(size=(40, 6)).astype(np.float32) + np.float32(300)
    distances, rows = everyone(reference).search(query, 10)
    want, _ = by_force(reference, query, 10)
    np.testing.assert_allclose(distances, want, rtol=3e-7)  # 8 spare ones may be too few: float32 does not tell them
    np.testing.assert_allclose(np.take_along_axis(cdist(query, reference), rows, 1), distances, rtol=1e-12)


def test_cells_far_from_zero_have_their_nearest_cells():
    """|x|² + |y|² - 2xy is off by 0.5 here, more than the distances differ by."""
    cells = np.random.default_rng(10).normal(size=(3040, 6)).astype(np.float32) + np.float32(1000)
    reference, query = cells[:3000], cells[3000:]
    distances, _ = everyone(reference).search(query, 10)
    want, _ = by_force(reference, query, 10)
    np.testing.assert_allclose(distances, want, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e16])
def test_latents_that_are_no_numbers_are_refused(bad):
    good = np.zeros((200, 2), np.float32)
    wrong = good.copy()
    wrong[150, 1] = bad
    with pytest.raises(DataError, match="cell 150 of the reference"):
        everyone(wrong)
    with pytest.raises(DataError, match="cell 150 of the query"):
        everyone(good).search(wrong, 1)
    Neighbours(wrong, np.where(np.arange(200) == 150, -1, 0)).transfer(good)  # unlabelled cells are nobody's neighbours


@pytest.mark.parametrize("all_pairs", [200_000, 0])
def test_another_process_finds_the_same(all_pairs, monkeypatch):
    monkeypatch.setattr(transfer, "CellIndex", partial(CellIndex, all_pairs=all_pairs))
    rng = np.random.default_rng(3)
    cells = clustered(rng, 5000, 4)
    here = Neighbours(cells, rng.integers(0, 5, 5000).astype(np.int32), 15)
    arrays = []
    rest = pickle.dumps(here, protocol=5, buffer_callback=arrays.append)
    copies = [bytes(array.raw()) for array in arrays]
    there = pickle.loads(rest, buffers=copies)  # noqa: S301 - as Ray sends it: arrays apart, read where they lie
    assert len(rest) < 10_000 and not there._cells._cells.flags.writeable
    a, b = here.transfer(cells[:999]), there.transfer(cells[:999], threads=2)
    assert a.probe == b.probe and (a.probe.nprobe == 0) == bool(all_pairs)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.uncertainty, b.uncertainty)


def test_lists_find_nearly_all_where_cells_form_groups_and_say_how_many():
    cells = clustered(np.random.default_rng(5), 23_000, 6, 0.3, kinds=30)
    reference, query = cells[:20_000], cells[20_000:]
    index, exact = in_lists(reference), everyone(reference)
    probe = index.probe(query, 15)
    assert 0 < probe.nprobe <= index.n_lists // 8 and 0.999 <= probe.recall < 1
    found, truth = index.search(query, 15, probe), exact.search(query, 15)
    shared = [len(np.intersect1d(a, b)) / 15 for a, b in zip(found[1], truth[1], strict=True)]
    assert np.mean(shared) == pytest.approx(probe.recall, abs=0.001)
    assert exact.probe(query, 15) == ALL
    assert CellIndex(reference, np.arange(20_000), exact=True, all_pairs=0).probe(query, 15) == ALL


def test_more_lists_are_looked_at_where_few_find_too_little():
    cells = clustered(np.random.default_rng(5), 23_000, 6, 0.4, kinds=30)
    assert in_lists(cells[:20_000]).probe(cells[20_000:], 15).nprobe == 32


def test_a_cloud_without_groups_is_searched_exactly():
    cells = np.random.default_rng(6).normal(size=(21_000, 30)).astype(np.float32)
    reference, query = cells[:20_000], cells[20_000:]
    index = in_lists(reference)
    with_few = index.search(query, 15, Probe(16, 0.0))
    distances, _ = everyone(reference).search(query, 15)
    assert (with_few[0] <= distances[:, -1:]).mean() < 0.9  # what the recall protects from
    assert index.probe(query, 15) == ALL
    voters = Neighbours(reference, np.zeros(20_000, np.int32), 15)
    voters._cells = index
    assert voters.transfer(query).probe == ALL
    np.testing.assert_array_equal(voters.search(query)[0], distances)


def test_a_small_query_is_searched_exactly():
    cells = clustered(np.random.default_rng(7), 5000, 4)
    assert in_lists(cells).probe(cells[:256], 15) == ALL and in_lists(cells).probe(cells, 15) != ALL


def test_lists_and_what_they_find_do_not_depend_on_threads_or_company():
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    cells = clustered(np.random.default_rng(8), 12_000, 10, kinds=30) + np.float32(1000)  # where products are rounded
    reference, query = cells[:10_000], cells[10_000:]
    one = in_lists(reference)
    faiss.omp_set_num_threads(4)
    other = in_lists(reference)
    assert faiss.omp_get_max_threads() == 4
    faiss.omp_set_num_threads(before[0])
    np.testing.assert_array_equal(one._lists, other._lists)
    want = one.search(query, 5, Probe(1, 0.0))
    for threads in (2, 5):
        assert one.probe(query, 5, threads) == one.probe(query, 5)
        for a, b in zip(want, one.search(query, 5, Probe(1, 0.0), threads), strict=True):
            np.testing.assert_array_equal(a, b)
    for i in range(50):
        for a, b in zip(want, one.search(query[i : i + 1], 5, Probe(1, 0.0)), strict=True):
            np.testing.assert_array_equal(a[i : i + 1], b)
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before


def test_lists_with_too_few_cells_are_no_answer():
    """FAISS then says row -1; such cells are compared with all."""
    cells = clustered(np.random.default_rng(9), 3000, 4, kinds=100)
    index, probe = in_lists(cells), Probe(1, 0.0)
    want, rows = everyone(cells).search(cells[:500], 400)
    found, found_rows = index.search(cells[:500], 400, probe)
    np.testing.assert_array_equal(found, want)  # a list of 109 has fewer than 400
    np.testing.assert_array_equal(found_rows, rows)
    voters = Neighbours(cells, np.where(np.arange(3000) == 2999, 1, 0).astype(np.int32), 400)
    voters._cells = index  # row -1 would be the last cell, the only one with label 1
    assert (voters.transfer(cells[:500]).codes == 0).all()
