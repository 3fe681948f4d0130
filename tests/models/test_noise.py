import numpy as np
import pytest
import torch
from scipy import stats

from scviaduct.models.noise import Noise, _uniform_tensor

KNOWN = [[0.6524484753608704, 0.301170289516449], [0.3681895136833191, 0.4540005326271057]]
SEEDS = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
IN_A_ROW = np.arange(4000, dtype=np.uint64)


@pytest.mark.parametrize("seeds", [SEEDS, IN_A_ROW], ids=["random", "consecutive"])
def test_normal_is_standard_normal(seeds):
    x = Noise(seeds).normal(10).numpy().astype(np.float64)
    assert abs(x.mean()) < 0.02
    assert abs(x.var() - 1) < 0.03
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("seeds", [SEEDS, IN_A_ROW], ids=["random", "consecutive"])
def test_units_draws_and_cells_are_independent(seeds):
    noise = Noise(seeds)
    first, second = noise.normal(7).numpy(), noise.normal(7).numpy()
    together = np.concatenate([first, second], 1)
    correlation = np.corrcoef(together.T) - np.eye(14)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(seeds))
    neighbours = np.corrcoef(first[:-1].ravel(), first[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(first.size)
    squares = np.corrcoef(first[:, 0] ** 2, first[:, 1] ** 2)[0, 1]  # the two halves of a Box-Muller pair
    assert abs(squares) < 5 / np.sqrt(len(seeds))


def test_the_same_seeds_give_the_same_numbers_and_each_draw_others():
    a, b = Noise(SEEDS), Noise(SEEDS)
    assert torch.equal(a.normal(5), b.normal(5))
    assert torch.equal(a.dropout(torch.ones(4000, 5), 0.3), b.dropout(torch.ones(4000, 5), 0.3))
    assert not torch.equal(a.normal(5), Noise(SEEDS).normal(5))


def test_noise_belongs_to_the_cell():
    picked = np.random.default_rng(1).permutation(4000)[:100]
    whole, part = Noise(SEEDS), Noise(SEEDS[picked])
    for _ in range(3):
        assert torch.equal(whole.normal(6)[picked], part.normal(6))
    assert torch.equal(Noise(SEEDS).normal(9)[:, :6], Noise(SEEDS).normal(6))


@pytest.mark.parametrize("width", [1, 2, 7, 128])
@pytest.mark.parametrize("draw", [0, 1, 9])
def test_torch_integers_give_the_same_numbers(width, draw):
    noise = Noise(SEEDS)
    noise._draw = draw
    seeds = torch.from_numpy(SEEDS.view(np.int64).copy())
    assert torch.equal(noise.uniform(width), _uniform_tensor(seeds, draw, width + width % 2)[:, :width])


def test_uniform_never_touches_0_or_1_and_known_values_stay():
    u = Noise(SEEDS).uniform(500)
    assert 0 < float(u.min()) < 1e-5
    assert 1 - 1e-5 < float(u.max()) < 1
    # A change of the generator would change every model trained with it.
    np.testing.assert_allclose(Noise(np.arange(2, dtype=np.uint64)).uniform(2), KNOWN, rtol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_lets_gradients_through(p):
    h = torch.ones(4000, 20, requires_grad=True)
    out = Noise(SEEDS).dropout(h, p)
    values = np.unique(out.detach().numpy())
    np.testing.assert_allclose(values, [0, 1 / (1 - p)], rtol=1e-6)
    assert abs(float(out.detach().mean()) - 1) < 5 * np.sqrt(p / (1 - p) / h.numel())
    out.sum().backward()
    assert torch.equal(h.grad, out.detach())


def test_dropout_of_0_returns_its_input_but_is_a_draw():
    h = torch.ones(4000, 3)
    noise, other = Noise(SEEDS), Noise(SEEDS)
    assert noise.dropout(h, 0.0) is h
    other.dropout(h, 0.5)
    assert torch.equal(noise.normal(3), other.normal(3))
