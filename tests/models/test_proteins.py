"""totalVI's losses of proteins by the kernel against torch's operations in float64."""

import pytest
import torch

from scviaduct.models.proteins import Proteins, losses


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    """Both kernels are compiled, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_said(cells, proteins, *, per_cell, scale) -> list[torch.Tensor]:
    shapes = [(cells, proteins)] * 8
    if not per_cell:
        shapes[5] = (proteins,)
    return [scale * torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize(("cells", "proteins"), [(1, 1), (40, 7), (0, 3)])
@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("exp_std", [False, True])
@pytest.mark.parametrize(("scale", "largest"), [(1.0, 50), (2.0, 20_000)])
def test_losses_and_gradients_are_torch_s(cells, proteins, per_cell, exp_std, scale, largest):
    said = make_said(cells, proteins, per_cell=per_cell, scale=scale)
    y, noise = torch.randint(0, largest, (cells, proteins)), torch.randn(cells, proteins)
    y[:, ::3] = 0
    seen, results = torch.rand(cells, proteins) < 0.7, []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in said]
        out = losses(Proteins(*inputs, exp_std), y.to(dtype), seen, noise.to(dtype))
        if cells:
            results.append([*out, *torch.autograd.grad(0.37 * out.mean, inputs)])
        else:
            results.append([out.likelihood, out.kl])
    for ours, expected in zip(*results, strict=True):
        largest_value = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6 * (1.0 + largest_value))


def test_extreme_dispersions_and_counts():
    """theta 1e-4 to 1e6 against float64: in float32 the lgammas of a large theta lose their difference."""
    log_phi = torch.log(torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6]))
    counts = torch.tensor([0.0, 1.0, 3.0, 1e3, 1e6])
    cells, proteins = len(counts), len(log_phi)
    said = make_said(cells, proteins, per_cell=True, scale=1.0)
    said[0], said[5] = said[0] + torch.log1p(counts)[:, None], log_phi.expand(cells, -1).clone()
    said[1] -= 3.0  # a narrow background, so that rates lie near the counts
    said[4] *= 0.1
    y, noise, seen = counts[:, None].expand(-1, proteins), torch.randn(cells, proteins), torch.ones(cells, proteins) > 0
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in said]
        out = losses(Proteins(*inputs, False), y.to(dtype), seen, noise.to(dtype))
        results.append([out.likelihood, *torch.autograd.grad(out.mean, inputs)])
    for ours, expected in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        # each value by its own size, so that a small one beside a million counts; float32 inputs cost a rate of 1e6 its
        # seventh digit, and with it the fourth of what is left when two terms of its gradient cancel
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-5)
