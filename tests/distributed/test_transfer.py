import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from scviaduct.distributed.transfer import Neighbours, kernel
from scviaduct.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


def codes(labels, categories):
    return np.searchsorted(categories, labels)


@pytest.mark.parametrize("k", [15, 50])
@pytest.mark.parametrize("level", ["Level_1", "Level_2", "Level_3"])
def test_equal_to_scarches(k, level):
    gold = np.load(GOLDEN / "knn_transfer.npz", allow_pickle=False)
    categories = gold[f"labels/{level}"]
    neighbours = Neighbours(gold["ref/latent"], codes(gold[f"ref/{level}"], categories), k)
    distances, rows = neighbours.search(gold["query/latent"])
    np.testing.assert_allclose(distances, gold[f"k{k}/distances"], rtol=1e-6)
    np.testing.assert_array_equal(rows, gold[f"k{k}/indices"])
    np.testing.assert_allclose(kernel(distances), gold[f"k{k}/weights"], atol=1e-7)
    np.testing.assert_allclose(neighbours.shares(gold["query/latent"]), gold[f"k{k}/prob/{level}"], atol=1e-7)
    got = neighbours.transfer(gold["query/latent"])
    np.testing.assert_array_equal(categories[got.codes], gold[f"k{k}/pred/{level}"])
    np.testing.assert_allclose(got.uncertainty, gold[f"k{k}/uncertainty/{level}"], atol=1e-6)


def test_the_threshold_cuts_the_uncertainty_as_its_name_says():
    gold = np.load(GOLDEN / "knn_transfer.npz", allow_pickle=False)
    categories = gold["labels/Level_2"]
    neighbours = Neighbours(gold["ref/latent"], codes(gold["ref/Level_2"], categories), 15)
    got = neighbours.transfer(gold["query/latent"])
    for limit in (0.0, 0.2, 0.5, 1.0):
        unknown = got.named(categories, limit) == "Unknown"
        np.testing.assert_array_equal(unknown, got.uncertainty > limit)
    assert (got.named(categories, 0.2) == "Unknown").sum() == json.loads((GOLDEN / "knn_transfer.json").read_text())[
        "n_unknown"
    ]["k15_threshold0.8"]["Level_2"]  # their threshold is on the probability: 0.8 = 1 - 0.2


@given(n=st.integers(1, 60), q=st.integers(0, 20), k=st.integers(1, 80), seed=st.integers(0, 9))
def test_neighbours_are_the_nearest_and_shares_sum_to_one(n, q, k, seed):
    rng = np.random.default_rng(seed)
    reference, query = rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(q, 4)).astype(np.float32)
    neighbours = Neighbours(reference, rng.integers(0, 3, n), k)
    distances, _ = neighbours.search(query) if q else (np.zeros((0, min(n, k))), None)
    want = np.sort(cdist(query, reference), axis=1)[:, : min(n, k)]
    np.testing.assert_allclose(distances, want, atol=1e-5)
    got = neighbours.transfer(query)
    assert len(got.codes) == q and ((got.uncertainty >= 0) & (got.uncertainty <= 1)).all()


def test_far_and_equal_points_give_numbers():
    reference = np.array([[0.0], [1e6], [2e6]], np.float32)
    shares = Neighbours(reference, np.array([0, 1, 1]), 3).shares(np.array([[0.0], [5e8]], np.float32))
    np.testing.assert_allclose(shares.sum(1), 1)
    same = Neighbours(np.zeros((4, 2), np.float32), np.array([0, 0, 0, 1]), 4).transfer(np.zeros((1, 2), np.float32))
    assert same.codes == [0] and same.uncertainty == pytest.approx(0.25)


def test_unlabelled_reference_cells_do_not_vote():
    latent = np.array([[0.0], [0.1], [5.0]], np.float32)
    got = Neighbours(latent, np.array([-1, -1, 0]), 50).transfer(np.zeros((1, 1), np.float32))
    assert got.codes == [0] and got.uncertainty == 0


def test_no_labels_at_all_is_said():
    with pytest.raises(ConfigError, match="No reference cell has a label"):
        Neighbours(np.zeros((2, 2), np.float32), np.array([-1, -1]))
