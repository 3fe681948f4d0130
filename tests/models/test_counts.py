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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "genes", "width"), [(5, 700, 1024), (70, 700, 1024), (600, 90, 1024), (40, 30, 3), (0, 9, 4)]
)
def test_sparse_product_and_its_gradient_tile_by_tile(n, genes, width, threads):
    """Tiles are 256 rows of a weight of this width; indices need not be sorted."""
    rng = np.random.default_rng(n)
    dense = rng.poisson(0.1, (n, genes)).astype(np.float32)
    cells, columns = np.nonzero(dense)
    order = np.lexsort((rng.random(len(cells)), cells))
    columns = columns[order].astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=n))]).astype(np.int64)
    made = Counts(Nonzeros(indptr, columns, dense[cells, columns]), n, genes, torch.device("cpu"))
    weight = torch.randn(genes, width, requires_grad=True)
    by = torch.randn(n, width)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        product = made.product(made.nonzeros.counts, weight)
        product.backward(by)
    finally:
        torch.set_num_threads(before)
    wide = torch.from_numpy(dense).double()
    torch.testing.assert_close(product.double(), wide @ weight.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), wide.T @ by.double(), rtol=1e-5, atol=1e-4)
