"""What a trained model gives: decoded quantities, drawn counts and scores, against scvi-tools and against the formulas."""

import dataclasses
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scviaduct.errors import ConfigError
from scviaduct.models import MODELS, model_class
from scviaduct.models.base import Quantity
from scviaduct.models.counts import Cells
from scviaduct.models.draws import draw_counts
from scviaduct.models.likelihoods import Decoded, reconstruction
from scviaduct.models.nets import Gaussian
from scviaduct.models.noise import Noise
from scviaduct.models.scanvi import SCANVI, SCANVIConfig
from scviaduct.models.scvi import SCVI, SCVIConfig
from scviaduct.models.totalvi import TotalVI, TotalVIConfig
from scviaduct.models.trvae import TRVAE, TRVAEConfig
from scviaduct.models.upstream import load_upstream
from tests.models.test_parity import Given, close, draw_by_hand, randomise, tensors
from tests.models.test_totalvi import N_PROTEINS, add_proteins, paired, with_proteins

CASES = {
    "zinb": ({}, {}),
    "nb, gene-batch, covariates": ({"gene_likelihood": "nb", "dispersion": "gene-batch"}, {"categorical": (2,)}),
    "poisson, size factor": ({"gene_likelihood": "poisson"}, {"size_factor": True}),
    "latent library": ({"use_observed_lib_size": False, "gene_likelihood": "nb"}, {}),
}


@pytest.fixture(scope="module")
def modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        return pytest.importorskip("scvi.module")


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request, modules, make_schema, make_batch, dense, monkeypatch):
    options, data = CASES[request.param]
    schema = make_schema(**data)
    ours = SCVI(schema, SCVIConfig(**options)).eval()
    if ours.models_library:
        ours.set_library_prior(torch.zeros(3), torch.zeros(3))
    prior = {"library_log_means": np.array([[3.0, 3.5, 4.0]]), "library_log_vars": np.array([[0.5, 0.7, 0.9]])}
    theirs = modules.VAE(
        len(schema.genes),
        len(schema.batch),
        n_cats_per_cov=[len(c) for c in schema.categorical] or None,
        use_size_factor_key=schema.size_factor is not None,
        **prior | {f: getattr(ours.config, f) for f in SCVIConfig.__dataclass_fields__},
    ).eval()
    randomise(theirs)
    load_upstream(ours, theirs.state_dict())
    batch = make_batch(schema, largest=50)
    given = tensors(batch, dense(batch))
    return SimpleNamespace(ours=ours, theirs=theirs, batch=batch, tensors=given, patch=monkeypatch)


def widths(pair):
    return [pair.ours.config.n_latent, 1] if pair.ours.models_library else [pair.ours.config.n_latent]


@pytest.mark.parity("outputs")
@pytest.mark.parametrize("at_mean", [True, False])
def test_normalised_expression_in_any_batch(pair, at_mean):
    """get_normalized_expression is px.scale, or px.mu for the latent library size, with another batch's code."""
    draws = [torch.randn(24, w) * (not at_mean) for w in widths(pair)]
    draw_by_hand(pair)[:] = [d.clone() for d in draws]
    _, generative = pair.theirs(pair.tensors, generative_kwargs={"transform_batch": 2}, compute_loss=False)
    px, noise = generative["px"], None if at_mean else Given(*draws)
    mu = px.rate if pair.ours.config.gene_likelihood == "poisson" else px.mu
    per_10k = Quantity(name="expression", library_size=1e4)
    close(pair.ours.decoded(pair.batch, per_10k, noise, transform_batch=2), 1e4 * px.scale)
    latent = Quantity(name="expression", library_size=None, features=(3, 0))
    noise = None if at_mean else Given(*draws)
    close(pair.ours.decoded(pair.batch, latent, noise, transform_batch=2), mu[:, [3, 0]])


@pytest.mark.parity("outputs")
def test_scores(pair):
    """ELBO and reconstruction error of each cell, and the weight whose mean is the marginal likelihood."""
    draws = [torch.randn(24, w) for w in widths(pair)]
    queue = draw_by_hand(pair)
    queue[:] = [d.clone() for d in draws]
    inference, _, losses = pair.theirs(pair.tensors, loss_kwargs={"kl_weight": 1.0})
    found = scored(pair.ours, pair.batch, Given(*draws))
    close(-found.log_likelihood, losses.reconstruction_loss["reconstruction_loss"])
    close(found.kl, sum(losses.kl_local.values()))
    # scvi.module.VAE.marginal_ll with one draw
    qz, z = inference["qz"], inference["z"]
    weight = torch.distributions.Normal(0, 1).log_prob(z).sum(1) - qz.log_prob(z).sum(1)
    weight = weight - losses.reconstruction_loss["reconstruction_loss"]
    if pair.ours.models_library:
        ql, library = inference["ql"], inference["library"]
        mean, var = (
            t[0][pair.batch.batch_index] for t in (pair.theirs.library_log_means, pair.theirs.library_log_vars)
        )
        p_l = torch.distributions.Normal(mean, var.sqrt()).log_prob(library.squeeze(1))
        weight = weight + p_l - ql.log_prob(library).squeeze(1)
    close(found.log_weight, weight)


def scored(model, batch, noise):
    with model.evaluating():
        cells = Cells.of(batch, model.schema, model.device)
        return model.score(model.inference(cells, None), cells, noise)


@pytest.fixture(params=[False, True], ids=["one panel", "a panel lacks proteins"])
def total(request, modules, make_schema, make_batch, dense, monkeypatch):
    schema = with_proteins(make_schema(), request.param)
    ours = TotalVI(schema, TotalVIConfig(n_hidden=32)).eval()
    theirs = modules.TOTALVAE(
        len(schema.genes),
        N_PROTEINS,
        len(schema.batch),
        n_hidden=32,
        n_panel=len(schema.batch),
        protein_batch_mask={str(b): np.array(row) for b, row in enumerate(schema.measured)},
    ).eval()
    return paired(ours, theirs, add_proteins(make_batch(schema), schema), dense, monkeypatch)


@pytest.mark.parity("outputs")
def test_denoised_proteins_and_their_foreground(total):
    z, library, background = (torch.randn(24, w) for w in (20, 1, N_PROTEINS))
    draw_by_hand(total)[:] = [z.clone(), library, background.clone()]
    _, made = total.theirs(total.tensors, generative_kwargs={"transform_batch": 1}, compute_loss=False)
    px, py = made["px_"], made["py_"]
    mixing = torch.sigmoid(py["mixing"])

    def ours(name, **options):
        return total.ours.decoded(total.batch, Quantity(name=name, **options), Given(z, background), transform_batch=1)

    close(ours("expression"), px["scale"])
    close(ours("expression", library_size=None), px["rate"])
    close(ours("foreground"), 1 - mixing)
    close(ours("proteins"), py["rate_fore"] * (1 - mixing))
    both = py["rate_fore"] * (1 - mixing) + py["rate_back"] * mixing
    close(ours("proteins", include_background=True, features=(4, 1)), both[:, [4, 1]])


@pytest.mark.parity("outputs")
def test_totalvi_scores(total):
    z, library, background = (torch.randn(24, w) for w in (20, 1, N_PROTEINS))
    draw_by_hand(total)[:] = [z.clone(), library, background.clone()]
    inference, made, losses = total.theirs(total.tensors, loss_kwargs={"kl_weight": 1.0})
    found = scored(total.ours, total.batch, Given(z, background))
    close(-found.log_likelihood, sum(losses.reconstruction_loss.values()))
    close(found.kl, sum(losses.kl_local.values()))
    # the weight of TOTALVAE.marginal_ll, over the proteins of the panel
    seen = torch.tensor(total.ours.schema.measured)[total.batch.batch_index]
    mean, log_std = (
        t.T[total.batch.batch_index] for t in (total.theirs.background_pro_alpha, total.theirs.background_pro_log_beta)
    )
    log_b, normal = made["log_pro_back_mean"], torch.distributions.Normal
    posterior = normal(made["py_"]["back_alpha"], made["py_"]["back_beta"])
    ratio = normal(mean, log_std.exp()).log_prob(log_b) - posterior.log_prob(log_b)
    weight = found.log_likelihood + (
        normal(0, 1).log_prob(inference["z"]) - inference["qz"].log_prob(inference["z"])
    ).sum(1)
    close(found.log_weight, weight + (ratio * seen).sum(1))


def of_kind(kind, make_schema):
    if kind == "totalvi":
        return TotalVI(with_proteins(make_schema()), TotalVIConfig(n_hidden=16)).eval()
    cls = model_class(kind)
    return cls(make_schema(labels=3), cls.Config()).eval()


KINDS = sorted({*MODELS, "totalvi"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_keeps_the_protocol(kind, make_schema, make_batch, rows_of):
    model = of_kind(kind, make_schema)
    batch = make_batch(model.schema)
    batch = add_proteins(batch, model.schema) if kind == "totalvi" else batch
    for name, offer in model.quantities.items():
        features = len(getattr(model.schema, offer.axis))
        noise = lambda seeds: Noise(seeds)  # noqa: E731
        whole = model.decoded(batch, Quantity(name=name), noise(batch.seeds))
        assert whole.shape == (24, features) and bool(torch.isfinite(whole).all()) and bool((whole >= 0).all())
        chosen = model.decoded(batch, Quantity(name=name, features=(2, 0)), noise(batch.seeds))
        close(chosen, whole[:, [2, 0]])
        if kind != "totalvi":  # rows_of knows no proteins
            part = rows_of(batch, slice(5, 17))
            close(model.decoded(part, Quantity(name=name), noise(part.seeds)), whole[5:17])
        if offer.drawn:
            assert torch.equal(whole, whole.round())
            with pytest.raises(ConfigError, match="give the noise"):
                model.decoded(batch, Quantity(name=name))
        for option in ("normalize_cells", "include_background"):
            if option not in offer.options:
                with pytest.raises(ConfigError, match=f"{option} does not concern"):
                    model.offer(Quantity(name=name, **{option: True}))
    with pytest.raises(ConfigError, match="does not give 'expresion'"):
        model.offer(Quantity(name="expresion"))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_add_up_to_the_loss(kind, make_schema, make_batch):
    """The same draws give the ELBO that training sees."""
    model = of_kind(kind, make_schema)
    batch = make_batch(model.schema)
    batch = add_proteins(batch, model.schema) if kind == "totalvi" else batch
    draws = torch.randn(3, 24, 60)

    class Draws:
        def __init__(self):
            self.n = 0

        def normal(self, width):
            self.n += 1
            return draws[self.n - 1, :, :width]

        def dropout(self, h, p):
            assert p == 0
            return h

    losses, found = model(batch, noise=Draws()), scored(model, batch, Draws())
    close(-found.log_likelihood.sum(), losses.reconstruction)
    close(found.kl.sum(), losses.kl)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_counts_follow_their_distribution(kind, make_schema, make_batch):
    """At one point of the latent space: the sample mean is the expectation, within five standard errors."""
    model = of_kind(kind, make_schema)
    n = 3000
    one = make_batch(model.schema, cells=1)
    one = add_proteins(one, model.schema) if kind == "totalvi" else one
    many = repeated(one, n)

    class AtMean(Noise):
        def normal(self, width):
            return super().normal(width) * (width == N_PROTEINS)  # the latent state stays; the background is drawn

    def drawn(name):
        return model.decoded(many, Quantity(name=name), AtMean(np.arange(n, dtype=np.uint64)))

    def agree(mean, values):
        assert ((values.mean(0) - mean).abs() <= 5 * values.std(0) / math.sqrt(n) + 1e-3).all()

    if kind in ("peakvi", "poissonvi"):
        options = (
            {"normalize_cells": True, "normalize_regions": True} if kind == "peakvi" else {"normalize_regions": True}
        )
        expected = Quantity(name="accessibility", **options | ({} if kind == "peakvi" else {"library_size": None}))
    else:
        expected = Quantity(name="expression", library_size=None)
    mean, counts = model.decoded(one, expected)[0], drawn("counts")
    if getattr(model.config, "gene_likelihood", "nb") == "zinb":
        mean = mean * torch.sigmoid(-model.expression(one).zi_logits[0])
    agree(mean, counts)
    if kind == "totalvi":
        agree(model.decoded(one, Quantity(name="proteins"))[0], drawn("proteins"))
        with model.evaluating():
            cells = Cells.of(one, model.schema, model.device)
            q = model.inference(cells, None)
            _, py = model.generative(q.mean, cells, None)
            back = torch.exp(py.background.mean + 0.5 * py.background.std**2 + py.log_efficiency)
            pi = torch.sigmoid(py.mixing)
        agree((back * (pi + (1 - pi) * py.foreground))[0], drawn("protein_counts"))


def repeated(one, n):
    """A cell n times."""
    per_cell = ("batch_index", "labels", "categorical", "continuous", "proteins")
    whole = {f: np.repeat(getattr(one, f), n, 0) for f in per_cell}
    return dataclasses.replace(
        one,
        indptr=np.arange(n + 1) * len(one.data),
        indices=np.tile(one.indices, n),
        data=np.tile(one.data, n),
        **whole,
    )


def test_scanvi_s_marginal_likelihood_is_its_own(make_schema, make_batch):
    """With one latent dimension log p(x) is an integral over a grid, with z2 and the label summed out."""
    schema, n = make_schema(labels=2, genes=6), 401
    model = SCANVI(schema, SCANVIConfig(n_latent=1, n_hidden=4, use_batch_norm="none")).eval()
    one = make_batch(schema, cells=1, largest=5)
    grid, step = torch.linspace(-8, 8, n), 16 / (n - 1)
    with model.evaluating():
        many = Cells.of(repeated(one, 20_000), schema, model.device)
        noise = Noise(np.arange(20_000, dtype=np.uint64))
        weights = model.score(model.inference(many, None), many, noise).log_weight.double()
        mean, log_var = model.decoder_z1_z2(grid[:, None, None].expand(n, 2, 1), None).chunk(2, dim=2)
        p = Gaussian(mean, torch.exp(0.5 * log_var))
        log_p = p.log_prob(grid[:, None, None, None].expand(n, n, 2, 1)) - 0.5 * grid[None, :, None] ** 2
        log_pz1 = torch.logsumexp(log_p.flatten(1).double(), 1) + math.log(step / 2 / math.sqrt(2 * math.pi))
        cells = Cells.of(repeated(one, n), schema, model.device)
        px = model.generative(grid[:, None], torch.log(cells.counts.total), cells)
        log_px = -reconstruction("zinb", cells.counts, px).per_cell.double()
    exact = torch.logsumexp(log_px + log_pz1, 0) + math.log(step)
    assert abs(float(exact - (torch.logsumexp(weights, 0) - math.log(20_000)))) < 0.02


def test_squared_errors_are_no_likelihood(make_schema, make_batch):
    schema = make_schema()
    model = TRVAE(schema, TRVAEConfig(recon_loss="mse")).eval()
    batch = make_batch(schema)
    assert torch.isnan(scored(model, batch, Noise(batch.seeds)).log_weight).all()
    with pytest.raises(ConfigError, match="no distribution of counts"):
        model.decoded(batch, Quantity(name="counts"), Noise(batch.seeds))
    assert (model.decoded(batch, Quantity(name="expression")) >= 0).all()


@pytest.mark.parametrize("kind", ["nb", "zinb", "poisson", "normal"])
def test_draws_have_the_variance_of_the_likelihood(kind):
    n, scale, theta = 20_000, torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0.5, 2.0, 50.0])
    zi = torch.tensor([[0.3, -1.0, -9.0]]) if kind == "zinb" else None
    wide = [t if t is None else t.expand(n, 3) for t in (torch.log(scale), zi)]
    px = Decoded(wide[0], torch.full((n,), math.log(30.0)), None if kind == "poisson" else torch.log(theta), wide[1])
    x = draw_counts(kind, px, Noise(np.arange(n, dtype=np.uint64))).double()
    mean = 30.0 * scale[0]
    kept = torch.sigmoid(-zi[0]) if kind == "zinb" else 1.0
    var = {"poisson": mean, "normal": theta**2}.get(kind, mean + mean**2 / theta)
    expected = kept * var + kept * (1 - kept) * mean**2
    assert ((x.mean(0).float() - kept * mean).abs() <= 5 * torch.sqrt(expected / n)).all()
    torch.testing.assert_close(x.var(0).float(), expected, rtol=0.1, atol=0.01)
    two = px._replace(logits=px.logits[7:9], library=px.library[7:9], zi_logits=zi if zi is None else px.zi_logits[7:9])
    assert torch.equal(x[7:9].float(), draw_counts(kind, two, Noise(np.arange(7, 9, dtype=np.uint64))))
