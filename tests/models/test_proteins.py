"""totalVI's losses of proteins over extreme values."""

import torch

from scviaduct.models.proteins import Proteins, losses


def test_extreme_dispersions_and_counts():
    """theta 1e-4 to 1e6, counts 0 to 1e6, rates near the counts: float32 in, the losses and gradients of float64 out."""
    log_phi = torch.log(torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6]))
    counts = torch.tensor([0.0, 1.0, 3.0, 1e3, 1e6])
    cells, proteins = len(counts), len(log_phi)
    said = [torch.randn(cells, proteins) for _ in range(8)]
    said[0], said[5] = said[0] + torch.log1p(counts)[:, None], log_phi.expand(cells, -1).clone()
    said[1] -= 3.0  # a narrow background
    said[4] *= 0.1
    y, noise, seen = counts[:, None].expand(-1, proteins), torch.randn(cells, proteins), torch.ones(cells, proteins) > 0
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in said]
        out = losses(Proteins(*inputs, False), y.to(dtype), seen, noise.to(dtype))
        results.append([out.likelihood, *torch.autograd.grad(out.mean, inputs)])
    for ours, expected in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        # the log background is drawn in float32, whose last digit moves a rate of 1e6 by 0.1
        torch.testing.assert_close(ours.double(), expected, rtol=3e-3, atol=2e-5)
