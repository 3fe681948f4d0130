"""The MMD in one pass against its definition, pair of conditions by pair of conditions."""

import pytest
import torch

from scviaduct.models import mmd as module
from scviaduct.models.mmd import mmd


def by_definition(x: torch.Tensor, conditions: torch.Tensor, boundary: int | None = None) -> torch.Tensor:
    """As scArches: V-statistics with the diagonal, summed over the pairs of conditions."""
    last = int(conditions.max()) + 1
    parts = [x[conditions == i] for i in range(last)]
    pairs = [(i, j) for i in range(last) for j in range(i)]
    least = 1
    if boundary is not None:
        pairs, least = [(i, j) for i in range(min(boundary, last)) for j in range(boundary, last)], 2
    total = x.sum() * 0.0
    for i, j in pairs:
        a, b = parts[i], parts[j]
        if min(len(a), len(b)) >= least:
            total = total + kernel(a, a).mean() + kernel(b, b).mean() - 2.0 * kernel(a, b).mean()
    return total


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squares = ((a[:, None] - b[None]) ** 2).sum(2)
    alphas = [10.0**k for k in range(-6, 0)] + [1, 5, 10, 15, 20, 25, 30, 35] + [10.0**k for k in range(2, 7)]
    return sum(torch.exp(-squares / (2.0 * alpha)) for alpha in alphas)


def with_gradient(function, x, *rest):
    x = x.clone().requires_grad_()
    value = function(x, *rest)
    (2.5 * value).backward()
    return value.detach().double(), x.grad.double()


CELLS = {
    "few": lambda: (torch.randn(9, 3) * 0.5, torch.tensor([0, 1, 0, 4, 4, 1, 0, 4, 7])),
    "one condition": lambda: (torch.randn(6, 3), torch.full((6,), 2)),
    "one cell": lambda: (torch.randn(1, 3), torch.tensor([0])),
    "each its own": lambda: (torch.randn(5, 2), torch.arange(5)),
    "equal cells": lambda: (torch.randn(1, 4).expand(8, 4).contiguous(), torch.arange(8) % 2),
    "nearly equal": lambda: (torch.ones(40, 4) + 1e-3 * torch.randn(40, 4), torch.arange(40) % 3),
    "far apart": lambda: (torch.randn(40, 4) * 1e4, torch.arange(40) % 3),
    "many, threads": lambda: (torch.randn(130, 10), torch.randint(0, 6, (130,))),
    "wide": lambda: (torch.relu(torch.randn(70, 65)), torch.randint(0, 3, (70,))),
}


@pytest.mark.parametrize("boundary", [None, 1, 2, 50])
@pytest.mark.parametrize("cells", CELLS.values(), ids=list(CELLS))
def test_value_and_gradient_are_the_definition_s(cells, boundary):
    x, conditions = cells()
    expected, gradient = with_gradient(by_definition, x.double(), conditions, boundary)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-6)):
        value, own = with_gradient(mmd, x.to(dtype), conditions, boundary)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=10 * tolerance)
        size = float(gradient.abs().max())
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=10 * tolerance * (size + 1))


def test_threads_and_pieces_do_not_change_it(monkeypatch):
    x, conditions = CELLS["many, threads"]()
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(with_gradient(mmd, x, conditions))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    whole = with_gradient(mmd, x.double(), conditions)
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 130 * 29 * 7)
    for a, b in zip(with_gradient(mmd, x.double(), conditions), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_is_computed_in_single():
    x, conditions = CELLS["few"]()
    x = x.bfloat16()
    value = mmd(x.requires_grad_(), conditions)
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value, mmd(x.detach().float(), conditions).bfloat16())
