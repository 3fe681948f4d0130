"""totalVI's losses of proteins: the kernel, in float32, against torch's operations in float64, and over extreme values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from scviaduct.models import protein_kernels
from scviaduct.models.proteins import PerBatch, Proteins, losses

BATCHES = 3


def made(cells, proteins, *, per_batch=False, seed=0):
    """What a model may say of some cells, their batches, counts, panels and noise; a row per batch for what they share."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    said = [normal(cells, proteins) for _ in range(4)]
    said[0] += 2.0
    shared = [0.5 * normal(BATCHES, proteins) for _ in range(3)]
    shared.append(normal(BATCHES, proteins) if per_batch else normal(proteins))
    codes = torch.randint(0, BATCHES, (cells,), generator=draw)
    y = torch.poisson(torch.exp(2.0 + normal(cells, proteins)), generator=draw)
    measured = torch.rand(BATCHES, proteins, generator=draw) > 0.2
    return said, shared, codes, y, measured, normal(cells, proteins)


def both_ways(said, shared, codes, y, measured, noise, exp_std=False):
    """Losses and gradients by the kernel in float32, and by torch's operations in float64 of the same numbers."""
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).clone().requires_grad_() for t in (*said, *shared)]
        py = Proteins(*inputs[:4], PerBatch(codes, *inputs[4:]), exp_std)
        out = losses(py, y.to(dtype), measured, noise.to(dtype))
        assert ("_Losses" in out.mean.grad_fn.name()) == (dtype == torch.float32)
        results.append([out.mean.detach(), *out[1:], *torch.autograd.grad(out.mean, inputs)])
    return results


def assert_equal(ours, expected, rtol=1e-5):
    for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.isfinite(a).all()
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-6 * (scale + 1e-3), msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("exp_std", [False, True], ids=["softplus", "exp"])
@pytest.mark.parametrize("per_batch", [False, True], ids=["protein", "protein-batch"])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 30), (130, 13), (70, 600)], ids=str)
def test_losses_and_gradients_are_torch_s(shape, per_batch, exp_std):
    assert_equal(*both_ways(*made(*shape, per_batch=per_batch), exp_std))


def test_one_batch():
    said, shared, codes, y, measured, noise = made(9, 5)
    shared = [t[:1] if t.dim() > 1 else t for t in shared]
    assert_equal(*both_ways(said, shared, torch.zeros_like(codes), y, measured[:1], noise))


counts = st.sampled_from([0.0, 1.0, 2.0, 7.0, 8.0, 100.0, 1e4, 1e6])
logits = st.sampled_from([-50.0, -5.0, 0.0, 5.0, 50.0])


@given(
    y=st.lists(counts, min_size=4, max_size=4),
    theta=st.sampled_from([1e-4, 1e-2, 1.0, 30.0, 1e3, 1e6]),
    log_rate=st.sampled_from([-30.0, -10.0, 0.0, 5.0, 13.8]),
    log_beta=logits,
    excess=logits,
    mixing=logits,
    exp_std=st.booleans(),
)
def test_extreme_values(y, theta, log_rate, log_beta, excess, mixing, exp_std):
    said, shared, codes, _, measured, noise = made(4, 4)
    log_beta = min(log_beta, 5.0) if exp_std else log_beta  # with a deviation of exp(50) rates leave float64's range
    said = [torch.full((4, 4), v) for v in (log_rate, log_beta, excess, mixing)]
    shared[3] = torch.full((4,), float(np.log(theta)))
    y = torch.tensor(y).expand(4, 4)
    assert_equal(*both_ways(said, shared, codes, y, measured, noise, exp_std), rtol=2e-5)


@pytest.mark.parametrize("cells", [20, 300])
def test_threads_do_not_change_the_bits(cells):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both_ways(*made(cells, 30))[0])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_was_not_measured_may_be_anything():
    said, shared, codes, y, measured, noise = made(6, 4)
    expected = both_ways(said, shared, codes, y, measured, noise)[0]
    y = torch.where(measured[codes], y, torch.nan)
    ours = both_ways(said, shared, codes, y, measured, noise)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_log_gamma_and_digamma():
    x = np.concatenate([np.geomspace(1e-6, 1e12, 2000), np.linspace(7.9, 8.1, 21)])
    value, slope = np.array([protein_kernels._gammas(v) for v in x]).T
    np.testing.assert_allclose(value, special.gammaln(x), rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(slope, special.digamma(x), rtol=1e-14, atol=1e-13)


def test_codes_and_shapes_that_do_not_fit_are_refused():
    said, shared, codes, y, measured, noise = made(3, 4)
    with pytest.raises(IndexError, match="codes up to 3, but 3 batches"):
        both_ways(said, shared, torch.tensor([0, 1, 3]), y, measured, noise)
    with pytest.raises(ValueError, match="other shapes"):
        both_ways(said, shared, codes, y, measured, noise[:2])
    with pytest.raises(ValueError, match="other shapes"):
        both_ways(said, [shared[0][:2], *shared[1:]], codes, y, measured, noise)
