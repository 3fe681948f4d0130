"""Counts in the types they are stored in mean the same as widened ones: what a GPU gets."""

import numpy as np
import pytest
import torch

from scviaduct.models.counts import Counts
from scviaduct.models.likelihood_kernels import Nonzeros


def counts(index, value, device="cpu"):
    rng = np.random.default_rng(0)
    x = rng.poisson(0.4, (20, 50))
    x[0, 0], x[3] = 200, 0
    cells, genes = np.nonzero(x)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=20))])
    nonzeros = Nonzeros(indptr, genes.astype(index), x[cells, genes].astype(value))
    return x, Counts(nonzeros, 20, 50, torch.device(device))


@pytest.mark.parametrize("index", [np.uint16, np.int32, np.uint32])
@pytest.mark.parametrize("value", [np.uint8, np.uint16, np.uint32, np.float32])
def test_dense_counts_are_the_same_from_any_stored_type(index, value):
    x, made = counts(index, value)
    assert made.dense.dtype == torch.float32
    np.testing.assert_array_equal(made.dense.numpy(), x)
