"""PeakVI's likelihood against torch's BCELoss of scvi-tools' formula in float64, at ordinary and extreme logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from scviaduct.errors import DataError
from scviaduct.models import bernoulli as kernel
from scviaduct.models.bernoulli import Factors, bernoulli, negative_log_likelihood
from scviaduct.models.counts import Counts, Nonzeros
from tests.models.test_likelihoods import CPU, counts_of

NAMES = ("h", "weight", "bias", "depth", "region")


def reference(x, h, weight, bias, depth, region):
    """Loss per cell, and gradients of its mean, of BCELoss(p * d * f, x > 0)."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (h, weight, bias, depth, region)]
    h, weight, bias, depth, region = leaves
    q = torch.sigmoid(h @ weight.T + bias)
    q = q if depth is None else q * torch.sigmoid(depth).unsqueeze(1)
    q = q if region is None else q * torch.sigmoid(region)
    loss = torch.nn.BCELoss(reduction="none")(q, torch.from_numpy(np.asarray(x) > 0).double()).sum(1)
    loss.mean().backward()
    return loss.detach(), [None if t is None else t.grad for t in leaves]


def ours(x, *tensors, dtype=torch.float32, weight=1.0):
    leaves = [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in tensors]
    out = bernoulli(counts_of(x), *leaves[:3], Factors(*leaves[3:]))
    (out.mean * weight).backward()
    return out, [None if t is None else t.grad for t in leaves]


def assert_equal(x, *tensors, dtype=torch.float32, rtol=2e-5):
    expected, by = reference(x, *tensors)
    out, grads = ours(x, *tensors, dtype=dtype)
    np.testing.assert_allclose(float(out.total), float(expected.sum()), rtol=rtol, atol=1e-6 * np.size(x))
    np.testing.assert_allclose(float(out.mean.detach()), float(expected.mean()), rtol=rtol, atol=1e-6 * np.size(x))
    for name, a, b in zip(NAMES, grads, by, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            atol = 2e-6 * max(float(b.abs().max()), 1.0 / len(x))
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=10 * rtol, atol=atol, err_msg=name)


def inputs(n, regions, depth=True, region=True, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(spread * rng.normal(size=shape)).float()  # noqa: E731
    x = rng.poisson(0.2, (n, regions))
    return (
        x,
        draw(n, 7),
        draw(regions, 7) / 2,
        draw(regions),
        draw(n) if depth else None,
        draw(regions) if region else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "torch"])
@pytest.mark.parametrize(("depth", "region"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("n", "regions"), [(1, 5), (70, 300), (40, 5000)], ids=["one cell", "a tile", "two blocks"])
def test_ordinary_values(n, regions, depth, region, dtype):
    assert_equal(*inputs(n, regions, depth, region), dtype=dtype)


logits = st.sampled_from([-300.0, -90.0, -40.0, -27.0, -10.0, -1.0, 0.0, 2.0, 10.0, 25.0, 90.0, 300.0])


def one_region_each(x, logit, depth, region):
    """Logits that are exactly these: a hidden layer of zeros and the logits as bias."""
    n = 2
    x = np.array([x, [0] * len(x)])
    return x, torch.zeros(n, 1), torch.zeros(len(logit), 1), torch.tensor(logit), depth, region


@given(
    x=st.lists(st.booleans(), min_size=5, max_size=5),
    logit=st.lists(logits, min_size=5, max_size=5),
    depth=st.one_of(st.none(), logits),
    region=st.one_of(st.none(), logits),
)
@example(x=[True] * 5, logit=[-300.0] * 5, depth=-300.0, region=-300.0)
@example(x=[False] * 5, logit=[300.0] * 5, depth=300.0, region=300.0)
@example(x=[False] * 5, logit=[300.0] * 5, depth=None, region=None)
def test_extreme_values(x, logit, depth, region):
    """Where float64 keeps 1 - q, the same numbers; elsewhere finite, and the same as torch's other path."""
    depths = None if depth is None else torch.full((2,), depth)
    regions = None if region is None else torch.full((5,), region)
    given_ = one_region_each(x, logit, depths, regions)
    out, grads = ours(*given_)
    wide, wide_grads = ours(*given_, dtype=torch.float64)
    # float32 ends at exp(-87): a region that is surely seen and is not costs 87 there, and 100 in float64
    ends = [v >= 90 and not seen and min(depth or 90, region or 90) >= 90 for v, seen in zip(logit, x, strict=True)]
    never = [v >= 90 and min(depth or 90, region or 90) >= 90 for v in logit]  # the second cell has no fragments
    np.testing.assert_allclose(
        float(out.total), float(wide.total), rtol=1e-5, atol=1e-5 + 13.1 * (sum(ends) + sum(never))
    )
    for name, a, b in zip(NAMES[2:], grads[2:], wide_grads[2:], strict=True):
        if a is not None:
            assert torch.isfinite(a).all(), name
            # the floor of 1e-12 multiplies what float32 can only represent to 1e-7
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    if max(min(logit_, depth or 1e9, region or 1e9) for logit_ in logit) <= 10.0:
        expected, by = reference(*given_)
        np.testing.assert_allclose(float(wide.total), float(expected.sum()), rtol=1e-9, atol=1e-12)
        for a, b in zip(wide_grads[2:], by[2:], strict=True):
            if a is not None:
                np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6, atol=1e-9)


def test_a_term_is_at_most_a_hundred_as_in_bceloss():
    x, *tensors = one_region_each([1, 1], [-300.0, -300.0], None, None)
    assert float(ours(x, *tensors)[0].total) == pytest.approx(200.0)


def test_sure_regions_that_are_not_seen_cost_their_logit():
    """scvi-tools' float32 has 1 - q = 0 from 17 on and counts 100; the sum of positive terms does not round to 0."""
    x, *tensors = one_region_each([0, 0], [20.0, 25.0], None, None)
    assert float(ours(x, *tensors)[0].total) == pytest.approx(90.0, rel=1e-5)


def test_cells_without_fragments():
    _, *tensors = inputs(3, 20)
    assert_equal(np.zeros((3, 20)), *tensors)


def test_counts_beyond_one_change_nothing():
    x, *tensors = inputs(6, 30)
    assert float(ours(x, *tensors)[0].total) == float(ours((x > 0) * 7, *tensors)[0].total)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    """Tiles of regions are the unit of work, so the sums are the same whoever computes them."""
    x, *tensors = inputs(50, 9000)
    before, counts = torch.get_num_threads(), counts_of(x)
    slope = [t.clone().requires_grad_() for t in tensors]

    def result():
        for t in slope:
            t.grad = None
        out = bernoulli(counts, *slope[:3], Factors(*slope[3:]))
        out.mean.backward()
        return out.total, slope[2].grad.clone(), slope[3].grad.clone(), slope[4].grad.clone()

    try:
        torch.set_num_threads(1)
        one = result()
        torch.set_num_threads(threads)
        many = result()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the matrix product may differ in its last bit


def test_backward_scales():
    x, *tensors = inputs(5, 30)
    once, thrice = ours(x, *tensors)[1], ours(x, *tensors, weight=3.0)[1]
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_only_wanted_gradients_are_made():
    x, h, weight, bias, depth, region = inputs(5, 30)
    h.requires_grad_()
    bernoulli(counts_of(x), h, weight, bias, Factors(depth, region)).mean.backward()
    assert h.grad is not None and weight.grad is None


def test_wrong_shapes_never_reach_the_kernel():
    x, *tensors = inputs(3, 8)
    for k, shape in ((0, (4, 7)), (1, (9, 7)), (2, (3, 8)), (3, (3, 1)), (4, (7,))):
        wrong = [torch.zeros(shape) if k == i else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=NAMES[k] if k > 1 else "h|weight"):
            bernoulli(counts_of(x), *wrong[:3], Factors(*wrong[3:]))


def test_regions_out_of_order_are_refused():
    """Tiles find their regions by bisection; one that is missed would be a wrong loss."""
    _, *tensors = inputs(1, 5000)
    indices = np.array([4000, 10, 4500, 20], np.int32)
    counts = Counts(Nonzeros(np.array([0, 4]), indices, np.ones(4, np.float32)), 1, 5000, CPU)
    with pytest.raises(DataError, match="increasing order"):
        bernoulli(counts, *tensors[:3], Factors(*tensors[3:]))


def test_torch_operations_have_the_loss_of_bceloss():
    x, h, weight, bias, depth, region = (t if isinstance(t, np.ndarray) else t.double() for t in inputs(4, 20))
    loss = negative_log_likelihood(torch.from_numpy(x > 0), F.linear(h, weight, bias), Factors(depth, region)).sum(1)
    torch.testing.assert_close(loss, reference(x, h, weight, bias, depth, region)[0])


def test_no_array_of_cells_by_regions_is_made(monkeypatch):
    x, *tensors = inputs(20, 30_000)
    sizes = []

    def spy(f):
        def call(*args):
            out = f(*args)
            sizes.append(out.numel())
            return out

        return call

    for name in ("times_transposed", "empty"):
        monkeypatch.setattr(kernel, name, spy(getattr(kernel, name)))
    ours(x, *tensors)
    assert len(sizes) > 3
    assert max(sizes) <= max(tensors[1].numel(), 20 * kernel._BLOCK) < 20 * 30_000


def test_no_cells_cost_nothing():
    """A worker may hold none of a batch's cells; its gradients are zeros."""
    _, *tensors = inputs(3, 20)
    leaves = [t[:0] if k in (0, 3) else t for k, t in enumerate(tensors)]
    out, grads = ours(np.zeros((0, 20)), *leaves)
    assert float(out.mean.detach()) == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
