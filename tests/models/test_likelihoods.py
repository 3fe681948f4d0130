"""The hand-written gradients against plain autograd of scvi-tools' formulas in float64, at ordinary and extreme values."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from scviaduct.models.counts import Counts, Nonzeros
from scviaduct.models.likelihoods import KINDS, Decoded, negative_log_likelihood, reconstruction, squared_errors

EPS = 1e-8
CPU = torch.device("cpu")


def counts_of(x: np.ndarray) -> Counts:
    x = np.asarray(x, np.float32)
    indptr = np.concatenate([[0], np.cumsum((x > 0).sum(1))]).astype(np.int64)
    return Counts(Nonzeros(indptr, np.nonzero(x)[1].astype(np.int32), x[x > 0]), *x.shape, CPU)


def log_prob(kind, x, mu, px_r, zi):
    """scvi-tools' formulas, term by term."""
    if kind == "poisson":
        return torch.xlogy(x, mu) - mu - torch.lgamma(x + 1)
    if kind == "normal":
        return torch.distributions.Normal(mu, torch.exp(px_r)).log_prob(x)
    theta = torch.exp(px_r)
    total = torch.log(theta + mu + EPS)
    zero = theta * (torch.log(theta + EPS) - total)
    rest = x * (torch.log(mu + EPS) - total) + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    if kind == "nb":
        return zero + rest
    return torch.where(x > 0, -F.softplus(-zi) - zi + zero + rest, F.softplus(-zi + zero) - F.softplus(-zi))


def reference(kind, x, px: Decoded):
    """Loss per cell and gradients of its mean in float64."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_()
        for t in (px.logits, px.library, px.px_r, px.zi_logits)
    ]
    logits, library, px_r, zi = leaves
    scale = F.softplus(logits) if px.softplus else torch.softmax(logits, 1)
    loss = -log_prob(kind, torch.from_numpy(x).double(), torch.exp(library)[:, None] * scale, px_r, zi).sum(1)
    loss.mean().backward()
    return loss.detach(), [None if t is None else t.grad for t in leaves]


def fused(kind, x, px: Decoded, weight=1.0):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in px[:4]]
    out = reconstruction(kind, counts_of(x), Decoded(*leaves, softplus=px.softplus))
    (out.mean * weight).backward()
    return out, [None if t is None else t.grad for t in leaves]


def assert_equal(kind, x, px, rtol=2e-5):
    loss, grads = reference(kind, x, px)
    out, ours = fused(kind, x, px)
    assert torch.isfinite(out.mean)
    n, largest = len(x), max(1.0, float(x.max()))
    np.testing.assert_allclose(float(out.total), float(loss.sum()), rtol=rtol, atol=1e-5 * n)
    np.testing.assert_allclose(float(out.mean.detach()), float(loss.mean()), rtol=rtol, atol=1e-5)
    for name, a, b in zip(("logits", "library", "px_r", "zi"), ours, grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.isfinite(a).all(), name
            # Relative to the entry, or to the size of the terms that cancel in it.
            atol = 2e-6 * max(largest / n, float(b.abs().max()))
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=atol, err_msg=name)


def decoded(kind, rng, n, g, dispersion, softplus, theta=0.0, spread=1.0, library=None):
    draw = lambda *shape: torch.from_numpy(rng.normal(size=shape) * spread).float()  # noqa: E731
    px_r = None if kind == "poisson" else draw(*((g,) if dispersion == "gene" else (n, g))) + theta
    lib = draw(n) + (5.0 if not softplus else 0.0) if library is None else library
    return Decoded(draw(n, g), lib, px_r, draw(n, g) if kind == "zinb" else None, softplus)


@pytest.mark.parametrize("softplus", [False, True], ids=["softmax", "softplus"])
@pytest.mark.parametrize("dispersion", ["gene", "cell"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 70], ids=["one cell", "70 cells in threads"])
def test_ordinary_values(kind, dispersion, softplus, n):
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.4, 3.0, (n, 50))).astype(np.float32)
    assert_equal(kind, x, decoded(kind, rng, n, 50, dispersion, softplus))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads):
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (101, 30)).astype(np.float32)
    px = decoded("zinb", rng, 101, 30, "gene", False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal("zinb", x, px)
    finally:
        torch.set_num_threads(before)


thetas = st.sampled_from([1e-4, 1e-2, 1.0, 30.0, 1e3, 1e6])
sizes = st.sampled_from([0.0, 1, 2, 3, 15, 16, 17, 18, 100, 255, 256, 1e4, 1e6])


@pytest.mark.parametrize("kind", ["nb", "zinb"])
@given(
    x=st.lists(sizes, min_size=6, max_size=6),
    theta=st.lists(thetas, min_size=6, max_size=6),
    logits=st.lists(st.sampled_from([-60.0, -20.0, -3.0, 0.0, 2.0]), min_size=6, max_size=6),
    zi=st.sampled_from([-60.0, -5.0, 0.0, 5.0, 60.0]),
    softplus=st.booleans(),
)
@example(x=[0] * 6, theta=[1e6] * 6, logits=[0.0] * 6, zi=0.0, softplus=False)
@example(x=[1e6] * 6, theta=[1e-4] * 6, logits=[-60.0] * 5 + [2.0], zi=60.0, softplus=False)
def test_extreme_values(kind, x, theta, logits, zi, softplus):
    counts = np.array([x, x[::-1]], np.float32)
    library = torch.log(torch.from_numpy(counts.sum(1)).clamp(min=1.0))
    px = Decoded(
        torch.tensor([logits, logits]),
        library,
        torch.log(torch.tensor(theta)),
        torch.full((2, 6), zi) if kind == "zinb" else None,
        softplus,
    )
    loss, grads = reference(kind, counts, px)
    out, ours = fused(kind, counts, px)
    # float64's own lgamma(x + theta) - lgamma(theta) loses theta * log(theta) * 1e-16; far below these bounds.
    np.testing.assert_allclose(float(out.total), float(loss.sum()), rtol=1e-5, atol=1e-4)
    scale = max(1.0, float(counts.max()))
    for a, b in zip(ours, grads, strict=True):
        if a is not None:
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=3e-6 * scale)


@given(
    x=st.lists(sizes, min_size=4, max_size=4),
    logits=st.lists(st.sampled_from([-30.0, -3.0, 0.0, 2.0]), min_size=4, max_size=4),
    softplus=st.booleans(),
)
def test_extreme_poisson(x, logits, softplus):
    counts = np.array([x], np.float32)
    px = Decoded(torch.tensor([logits]), torch.tensor([math.log(max(1.0, sum(x)))]), None, None, softplus)
    loss, grads = reference("poisson", counts, px)
    out, ours = fused("poisson", counts, px)
    # x log(mu) and lgamma(x + 1) cancel: what is left carries float32's error of terms of this size
    terms = sum(x) * math.log(1.0 + sum(x))
    np.testing.assert_allclose(float(out.total), float(loss.sum()), rtol=1e-5, atol=1e-4 + 1e-7 * terms)
    np.testing.assert_allclose(ours[0].numpy(), grads[0].numpy(), rtol=1e-4, atol=3e-6 * max(1.0, max(x)))


@given(
    x=st.lists(sizes, min_size=4, max_size=4),
    px_r=st.lists(st.sampled_from([-6.0, -1.0, 0.0, 3.0, 20.0]), min_size=4, max_size=4),
    logits=st.lists(st.sampled_from([-30.0, -3.0, 0.0, 2.0]), min_size=4, max_size=4),
    softplus=st.booleans(),
)
def test_extreme_normal(x, px_r, logits, softplus):
    counts = np.array([x], np.float32)
    px = Decoded(torch.tensor([logits]), torch.tensor([math.log(max(1.0, sum(x)))]), torch.tensor(px_r), None, softplus)
    loss, grads = reference("normal", counts, px)
    out, ours = fused("normal", counts, px)
    # x - mu carries float32's error of numbers of this size, in units of the smallest standard deviation, squared
    units = max(1.0, sum(x)) * math.exp(-min(px_r))
    np.testing.assert_allclose(float(out.total), float(loss.sum()), rtol=1e-4, atol=1e-4 + 1e-6 * units**2)
    for a, b in zip(ours, grads, strict=True):
        if a is not None:
            assert torch.isfinite(a).all()
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-4 + 3e-6 * units**2)


@given(
    x=st.lists(sizes, min_size=6, max_size=6),
    logits=st.lists(st.sampled_from([-1e6, -60.0, 0.0, 1e-6, 3.0, 1e4, 1e6]), min_size=6, max_size=6),
)
@example(x=[0] * 6, logits=[-60.0] * 6)
@example(x=[1e6] * 6, logits=[-1e6] * 6)
@example(x=[1e6] * 6, logits=[1e6] * 6)
def test_extreme_squared_errors(x, logits):
    """Logits at 0 are on the kink of ReLU, where autograd has 0; ours must agree with it."""
    values, logits = torch.tensor([x, x[::-1], [0.0] * 6]), torch.tensor([logits] * 3)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = squared_errors(leaf, values)
    expected = ((torch.relu(wide) - values.double()) ** 2).sum(1)
    out.mean.backward(), expected.mean().backward()
    np.testing.assert_allclose(out.per_cell.numpy(), expected.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(float(out.mean.detach()), float(expected.detach().mean()), rtol=1e-6)
    np.testing.assert_allclose(leaf.grad.numpy(), wide.grad.numpy(), rtol=1e-6)


def test_a_normal_of_a_cell_without_counts():
    """Its library is -inf: the mean is 0, and nothing is NaN."""
    x = np.zeros((2, 5), np.float32)
    px = decoded("normal", np.random.default_rng(0), 2, 5, "gene", False, library=torch.full((2,), -torch.inf))
    out, grads = fused("normal", x, px)
    expected = (px.px_r.double() + 0.5 * math.log(2 * math.pi)).sum()
    assert float(out.mean.detach()) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(grads[2].numpy(), np.ones(5), rtol=1e-6)
    assert float(grads[0].abs().max()) == float(grads[1].abs().max()) == 0.0


@pytest.mark.parametrize("px_r", [-300.0, -100.0, 90.0, 300.0])
@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_dispersions_outside_float32_stay_finite(kind, px_r):
    x = np.array([[0, 1, 20, 300.0]], np.float32)
    logits = torch.tensor([[0.0, -200.0, 3.0, 200.0]])
    px = Decoded(
        logits, torch.tensor([math.log(321.0)]), torch.full((4,), px_r), torch.zeros(1, 4) if kind == "zinb" else None
    )
    out, grads = fused(kind, x, px)
    assert torch.isfinite(out.mean)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)


@pytest.mark.parametrize("kind", ["nb", "zinb", "poisson"])
def test_a_cell_without_counts_costs_nothing(kind):
    x = np.zeros((2, 5), np.float32)
    px = decoded(kind, np.random.default_rng(0), 2, 5, "gene", False, library=torch.full((2,), -torch.inf))
    out, grads = fused(kind, x, px)
    assert float(out.total) == pytest.approx(0.0, abs=1e-5)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)
    assert float(grads[0].abs().max()) == 0.0


def test_wrong_shapes_never_reach_the_kernel():
    px = decoded("nb", np.random.default_rng(0), 3, 4, "gene", False)
    for name, shape in (("logits", (3, 5)), ("library", (3, 1)), ("px_r", (2, 4)), ("px_r", (0, 4))):
        with pytest.raises(ValueError, match=name):
            reconstruction("nb", counts_of(np.ones((3, 4))), px._replace(**{name: torch.zeros(shape)}))


def test_backward_scales():
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (5, 8)).astype(np.float32)
    px = decoded("zinb", rng, 5, 8, "gene", False)
    once, thrice = fused("zinb", x, px)[1], fused("zinb", x, px, weight=3.0)[1]
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_operations_for_other_devices_agree(kind, softplus):
    rng = np.random.default_rng(1)
    x = rng.poisson(rng.gamma(0.4, 3.0, (6, 20))).astype(np.float32)
    px = decoded(kind, rng, 6, 20, "gene", softplus)
    leaves = [None if t is None else t.clone().requires_grad_() for t in px[:4]]
    loss = negative_log_likelihood(kind, counts_of(x).dense, Decoded(*leaves, softplus=softplus)).sum(1)
    expected, grads = reference(kind, x, px)
    np.testing.assert_allclose(loss.detach().numpy(), expected.numpy(), rtol=1e-5)
    loss.mean().backward()
    for a, b in zip(leaves, grads, strict=True):
        if a is not None:
            np.testing.assert_allclose(a.grad.numpy(), b.numpy(), rtol=2e-4, atol=2e-5)


def test_torch_operations_stay_finite_without_counts():
    for kind in ("nb", "zinb", "poisson"):
        px = decoded(kind, np.random.default_rng(0), 2, 5, "gene", False, library=torch.full((2,), -torch.inf))
        logits = px.logits.requires_grad_()
        loss = negative_log_likelihood(kind, torch.zeros(2, 5), px).sum()
        loss.backward()
        assert abs(float(loss.detach())) < 1e-5
        assert torch.isfinite(logits.grad).all()


def test_float64_takes_the_torch_path():
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (3, 4)).astype(np.float32)
    px = decoded("nb", rng, 3, 4, "gene", False)
    wide = Decoded(*(None if t is None else t.double() for t in px[:4]))
    out = reconstruction("nb", counts_of(x), wide)
    assert out.mean.dtype == torch.float64
    np.testing.assert_allclose(float(out.total), float(reference("nb", x, px)[0].sum()), rtol=1e-12)
