"""Ours against the installed scvi-tools: same weights in, same numbers out, over the grid of options."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scviaduct.errors import DataError
from scviaduct.models.scvi import PRESETS, SCVI, SCVIConfig
from scviaduct.models.upstream import load_upstream
from scviaduct.schema import Batch

CASES = {
    "defaults": ({}, {}),
    "nb, 2 layers": ({"gene_likelihood": "nb", "n_layers": 2}, {}),
    "poisson": ({"gene_likelihood": "poisson"}, {}),
    "normal": ({"gene_likelihood": "normal"}, {}),
    "gene-batch": ({"dispersion": "gene-batch"}, {}),
    "gene-batch, nb, one batch": ({"dispersion": "gene-batch", "gene_likelihood": "nb"}, {"batches": 1}),
    "gene-label": ({"dispersion": "gene-label", "gene_likelihood": "nb"}, {"labels": 4}),
    "gene-cell": ({"dispersion": "gene-cell"}, {}),
    "gene-cell, normal": ({"dispersion": "gene-cell", "gene_likelihood": "normal"}, {}),
    "logistic normal": ({"latent_distribution": "ln"}, {}),
    "scarches": (PRESETS["scarches"], {"categorical": (2, 4)}),
    "deep covariates": ({"n_layers": 3, "encode_covariates": True}, {"categorical": (4, 1, 2), "continuous": 2}),
    "shallow covariates": ({"n_layers": 2, "deeply_inject_covariates": False}, {"categorical": (3,), "continuous": 1}),
    "one batch": ({"n_layers": 2, "encode_covariates": True}, {"batches": 1}),
    "norm in encoder": ({"use_batch_norm": "encoder", "use_layer_norm": "both"}, {}),
    "norm in decoder": ({"use_batch_norm": "decoder", "use_layer_norm": "encoder"}, {}),
    "no norm": ({"use_batch_norm": "none", "n_hidden": 32, "n_latent": 3}, {}),
    "latent library": ({"use_observed_lib_size": False}, {}),
    "latent library, covariates": (
        {"use_observed_lib_size": False, "encode_covariates": True, "gene_likelihood": "nb", "n_layers": 2},
        {"continuous": 2, "categorical": (3,)},
    ),
    "size factor": ({}, {"size_factor": True}),
    "size factor, poisson": ({"gene_likelihood": "poisson"}, {"size_factor": True}),
    "size factor, nb, unused library": (
        {"gene_likelihood": "nb", "use_observed_lib_size": False, "dispersion": "gene-batch"},
        {"size_factor": True},
    ),
}


@pytest.fixture(scope="module")
def vae():
    pytest.importorskip("anndata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        module = pytest.importorskip("scvi.module")
    return module.VAE


class Given:
    """Noise that was drawn elsewhere, one tensor per draw."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def normal(self, width):
        draw = self.draws.pop(0)
        assert draw.shape[1] == width
        return draw

    def dropout(self, h, p):
        assert p == 0
        return h


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request, vae, make_schema, make_batch, dense, monkeypatch):
    """The two models with the same weights, and the same cells for both."""
    options, data = CASES[request.param]
    schema = make_schema(**data)
    config = SCVIConfig(**({"dropout_rate": 0.0} | options))
    ours = SCVI(schema, config)
    prior = (np.array([[3.0, 3.5, 4.0]]), np.array([[0.5, 0.7, 0.9]]))
    if ours.models_library:
        ours.set_library_prior(*(torch.zeros(len(schema.batch)) for _ in range(2)))
    fields = {f: getattr(config, f) for f in SCVIConfig.__dataclass_fields__}
    theirs = vae(
        len(schema.genes),
        len(schema.batch),
        len(schema.labels) if schema.labels else 0,
        n_continuous_cov=len(schema.continuous),
        n_cats_per_cov=[len(c) for c in schema.categorical] or None,
        use_size_factor_key=schema.size_factor is not None,
        library_log_means=prior[0],
        library_log_vars=prior[1],
        **fields,
    )
    randomise(theirs)
    load_upstream(ours, theirs.state_dict())
    batch = make_batch(schema, largest=12 if config.gene_likelihood == "normal" else 500)  # a Normal squares it
    return SimpleNamespace(
        ours=ours, theirs=theirs, batch=batch, tensors=tensors(batch, dense(batch)), patch=monkeypatch
    )


def randomise(module):
    """No tensor at its initial value: a statistic of 0 or 1 that is not read would go unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if "running_mean" in name or name.endswith(".1.bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif "running_var" in name or name.endswith(".1.weight"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def tensors(batch: Batch, x: np.ndarray) -> dict[str, torch.Tensor]:
    def column(a):
        return torch.from_numpy(a).unsqueeze(1)

    out = {"X": torch.from_numpy(x), "batch": column(batch.batch_index)}
    out["labels"] = column(batch.labels) if batch.labels.size else torch.zeros_like(out["batch"])
    if batch.categorical.size:
        out["extra_categorical_covs"] = torch.from_numpy(batch.categorical)
    if batch.continuous.size:
        out["extra_continuous_covs"] = torch.from_numpy(batch.continuous)
    if batch.size_factor.size:
        out["size_factor"] = column(batch.size_factor)
    return out


def draw_by_hand(pair):
    """Make their rsample use given noise (needed under softmax, and for equal steps)."""
    queue: list[torch.Tensor] = []

    def rsample(dist, shape=()):
        return dist.loc + dist.scale * queue.pop(0)

    pair.patch.setattr(torch.distributions.Normal, "rsample", rsample)
    return queue


def noise_for(pair, step=0):
    generator = torch.Generator().manual_seed(step)
    n = pair.batch.n_cells
    widths = [pair.ours.config.n_latent, 1]
    return [torch.randn(n, w, generator=generator) for w in widths]


def both_losses(pair, kl_weight, step=0):
    draws, queue = noise_for(pair, step), draw_by_hand(pair)
    queue[:] = [d.clone() for d in draws]
    _, _, theirs = pair.theirs(pair.tensors, loss_kwargs={"kl_weight": kl_weight})
    used = draws if pair.ours.models_library else draws[:1]
    ours = pair.ours(pair.batch, kl_weight=kl_weight, noise=Given(*used))
    return ours, theirs


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=rtol, atol=atol)


@pytest.mark.parity("outputs")
def test_latent_and_rates(pair):
    pair.theirs.eval(), pair.ours.eval()
    queue = draw_by_hand(pair)
    draws = noise_for(pair)
    queue[:] = [d.clone() for d in draws]
    inference, generative = pair.theirs(pair.tensors, compute_loss=False)
    qz = pair.ours.encode(pair.batch)
    close(qz.mean, inference["qz"].loc)
    close(qz.std**2, inference["qz"].scale ** 2)
    queue[:] = [torch.zeros_like(d) for d in draws]  # expression() sits at the means
    _, generative = pair.theirs(pair.tensors, compute_loss=False)
    ours, px = pair.ours.expression(pair.batch), generative["px"]
    kind = pair.ours.config.gene_likelihood
    close(ours.rate, getattr(px, {"poisson": "rate", "normal": "loc"}.get(kind, "mu")))
    if kind != "poisson":
        theta = px.stddev if kind == "normal" else px.theta
        close(torch.broadcast_to(ours.theta, theta.shape), theta)
    if kind == "zinb":
        close(ours.zi_logits, px.zi_logits)
    if kind != "normal":
        close(ours.scale, px.scale)


@pytest.mark.parity("loss")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_loss_and_its_parts(pair, training):
    pair.theirs.train(training), pair.ours.train(training)
    ours, theirs = both_losses(pair, 0.37)
    close(ours.loss, theirs.loss)
    close(ours.reconstruction, theirs.reconstruction_loss["reconstruction_loss"].sum())
    close(ours.kl, sum(kl.sum() for kl in theirs.kl_local.values()))


@pytest.mark.parity("gradients")
def test_gradients(pair):
    assert_same_gradients(pair, load_upstream, lambda pair: both_losses(pair, 0.37))


def assert_same_gradients(pair, load, losses, off=1e-5):
    """Our gradients in training are theirs, as `load` brings them into our layout, within `off` of the largest.

    They are compared module by module: a bias under batch norm has gradient 0 but for rounding.
    """
    pair.theirs.train(), pair.ours.train()
    for each in losses(pair):
        each.loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in pair.theirs.named_parameters()}
    twin = type(pair.ours)(pair.ours.schema, pair.ours.config)
    for p in twin.parameters():
        torch.nn.init.zeros_(p)
    load(twin, {n: grads.get(n, t) for n, t in pair.theirs.state_dict().items()})
    theirs = of_modules(dict(twin.named_parameters()))
    for name, gradient in of_modules({n: p.grad for n, p in pair.ours.named_parameters()}).items():
        close(gradient, theirs[name], rtol=1e-4, atol=off * float(theirs[name].abs().max()) + 1e-7)


def of_modules(tensors):
    """The tensors of each module in one."""
    joined: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        joined.setdefault(name.rpartition(".")[0], []).append(tensor.detach().flatten())
    return {name: torch.cat(parts) for name, parts in joined.items()}


def take_twenty_steps(pair, losses):
    """Train both with scvi-tools' Adam on the losses of (pair, step); the last of each."""
    pair.theirs.train(), pair.ours.train()
    options = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6}
    trained = [p for p in pair.theirs.parameters() if p.requires_grad]
    mine, other = torch.optim.Adam(pair.ours.parameters(), **options), torch.optim.Adam(trained, **options)
    for step in range(20):
        ours, theirs = losses(pair, step)
        for optimizer, loss in ((mine, ours.loss), (other, theirs.loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return ours, theirs


def assert_same_weights(pair, load, *, rtol, atol, skip=lambda name: False):
    """Our tensors are theirs, as `load` brings them into our layout."""
    twin = type(pair.ours)(pair.ours.schema, pair.ours.config)
    twin.load_state_dict(pair.ours.state_dict())
    load(twin, pair.theirs.state_dict())
    for (name, a), b in zip(pair.ours.state_dict().items(), twin.state_dict().values(), strict=True):
        if not skip(name):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parity("20 steps")
def test_twenty_steps_of_adam(pair):
    ours, theirs = take_twenty_steps(pair, lambda pair, step: both_losses(pair, 0.37, step))
    close(ours.loss, theirs.loss)
    assert_same_weights(pair, load_upstream, rtol=1e-4, atol=1e-5)


def test_import_says_what_does_not_fit(pair):
    state = pair.theirs.state_dict()
    with pytest.raises(DataError, match=r"no tensor 'z_encoder\.mean_encoder"):
        load_upstream(pair.ours, {k: v for k, v in state.items() if "mean_encoder" not in k})
    state["decoder.px_scale_decoder.0.weight"] = torch.zeros(3, 3)
    with pytest.raises(DataError, match=r"px_scale_decoder.*\(3, 3\)"):
        load_upstream(pair.ours, state)
