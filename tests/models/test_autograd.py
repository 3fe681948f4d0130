"""The hand-written autograd functions keep autograd's rules: used again, in parts, and not differentiated twice."""

import numpy as np
import pytest
import torch

from scviaduct.models.bernoulli import Factors, bernoulli
from scviaduct.models.fused import Values, normalised_and_rectified
from scviaduct.models.gaussians import draw_and_kl, log_density
from scviaduct.models.likelihoods import KINDS, Decoded, reconstruction
from scviaduct.models.mmd import mmd
from scviaduct.models.nets import BatchNorm
from scviaduct.models.noise import Noise
from scviaduct.models.products import large_linear, wide_linear
from scviaduct.models.proteins import PerBatch, Proteins, losses
from scviaduct.models.rows import added
from scviaduct.models.statistics import normalised_over_processes
from tests.models.test_likelihoods import counts_of

CELLS, GENES, UNITS = 6, 20, 4


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) * sum(shape)))


def counts():
    rng = np.random.default_rng(0)
    return counts_of(rng.poisson(1.0, (CELLS, GENES)))


def likelihood(kind):
    def loss(logits, library, px_r, zi):
        return reconstruction(kind, counts(), Decoded(logits, library, px_r, zi)).mean

    px_r = None if kind == "poisson" else draw(GENES)
    return loss, [draw(CELLS, GENES), draw(CELLS), px_r, draw(CELLS, GENES) if kind == "zinb" else None]


def accessibility():
    def loss(h, weight, bias, depth, region):
        return bernoulli(counts(), h, weight, bias, Factors(depth, region)).mean

    return loss, [draw(CELLS, UNITS), draw(GENES, UNITS), draw(GENES), draw(CELLS), draw(GENES)]


def hidden_layer(batch_norm):
    codes = torch.arange(CELLS) % 2
    norm = BatchNorm(UNITS).train()

    def loss(h, added, weight, bias):
        if batch_norm:
            norm.weight, norm.bias = weight, bias
        kept = Noise(np.arange(CELLS, dtype=np.uint64)).chosen(0.3)
        values = Values(h, added, codes)
        out = normalised_and_rectified(
            values, norm if batch_norm else None, layer_norm=not batch_norm, negative_slope=0.01, kept=kept
        )
        return (out * draw(*out.shape)).sum()

    if batch_norm:
        norm.__delattr__("weight"), norm.__delattr__("bias")
    return loss, [draw(CELLS, UNITS), draw(2, UNITS), *([draw(UNITS), draw(UNITS)] if batch_norm else [None, None])]


def protein_losses():
    def loss(*parts):
        py = Proteins(*parts[:4], PerBatch(torch.arange(CELLS) % 2, *parts[4:]), exp_std=False)
        y, measured = 20 * draw(CELLS, UNITS).abs().round(), draw(2, UNITS) > -1
        return losses(py, y, measured, draw(CELLS, UNITS)).mean

    return loss, [*draw(4, CELLS, UNITS), *draw(3, 2, UNITS), draw(UNITS)]  # the last is the dispersion


FUNCTIONS = {
    **{kind: lambda kind=kind: likelihood(kind) for kind in KINDS},
    "bernoulli": accessibility,
    "sparse product": lambda: (lambda w: (counts().product(counts().log1p_values, w) ** 2).sum(), [draw(GENES, UNITS)]),
    **{
        layer.__name__: lambda layer=layer: (
            lambda x, w, b: (layer(x, w, b) ** 2).sum(),
            [draw(CELLS, UNITS), draw(GENES, UNITS), draw(GENES)],
        )
        for layer in (wide_linear, large_linear)
    },
    "rows": lambda: (
        lambda h, table: (added(Values(h * 1.0, table, torch.arange(CELLS) % 2)) * draw(CELLS, UNITS)).sum(),
        [draw(CELLS, UNITS), draw(2, UNITS)],
    ),
    "layer, batch norm": lambda: hidden_layer(True),
    "layer, layer norm": lambda: hidden_layer(False),
    "draw": lambda: (lambda p: sum((t**2).sum() for t in draw_and_kl(p, draw(CELLS, 3, UNITS), 1e-4)), [draw(CELLS, 3, 8)]),
    "density": lambda: (lambda p, z: (log_density(p, z, 1e-4) ** 2).sum(), [draw(CELLS, 3, 8), draw(CELLS, UNITS)]),
    "mmd": lambda: (lambda x: mmd(x, torch.arange(CELLS) % 2), [draw(CELLS, UNITS)]),
    "batch norm of all processes": lambda: (
        lambda x, w, b: (normalised_over_processes(x, w, b, 1e-3)[0] ** 3).sum(),
        [draw(CELLS, UNITS), draw(UNITS), 1 + draw(UNITS)],
    ),
    "proteins": protein_losses,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One process that speaks to itself."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=FUNCTIONS, ids=list(FUNCTIONS))
def function(request):
    """A function's name, its loss with a graph, and the leaves it came from."""
    loss, inputs = FUNCTIONS[request.param]()
    leaves = [None if t is None else torch.nn.Parameter(t) for t in inputs]
    return request.param, loss(*leaves), [t for t in leaves if t is not None]


def test_a_graph_that_is_kept_gives_the_same_gradients_again(function):
    _, loss, leaves = function
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    wanted = [g.clone() for g in first]
    for g in first:
        g.zero_()  # whoever has a gradient may write to it
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, g in zip(leaves, wanted, strict=True):
        assert g.abs().max() > 0
        assert torch.equal(leaf.grad, 2 * g)


def test_each_gradient_may_be_wanted_alone(function):
    _, loss, leaves = function
    together = torch.autograd.grad(loss, leaves, retain_graph=True)
    for leaf, wanted in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(loss, [leaf], retain_graph=True)
        assert torch.equal(alone, wanted)


def test_a_graph_that_is_gone_says_so(function):
    _, loss, leaves = function
    loss.backward()
    gradients = [t.grad.clone() for t in leaves]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, gradients, strict=True))


def test_derivatives_of_derivatives_are_refused(function):
    """torch's own decorator would give a wrong one where the incoming gradient is a constant."""
    _, loss, leaves = function
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)
