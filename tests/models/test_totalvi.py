"""totalVI: parity with the installed scvi-tools, panels, surgery."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scviaduct.errors import ConfigError
from scviaduct.models.surgery import extend
from scviaduct.models.totalvi import TotalVI, TotalVIConfig
from scviaduct.models.upstream import load_totalvi
from scviaduct.schema import Batch
from tests.models.test_parity import Given, close, draw_by_hand, randomise, tensors

CASES = {
    "defaults": ({}, {}),
    "zinb, deep": ({"gene_likelihood": "zinb", "n_layers_encoder": 1, "n_layers_decoder": 2}, {}),
    "per batch": ({"gene_dispersion": "gene-batch", "protein_dispersion": "protein-batch"}, {}),
    "layer norm, covariates": (
        {"use_batch_norm": "none", "use_layer_norm": "both"},
        {"categorical": (2, 4), "continuous": 2},
    ),
    "blind encoder": ({"encode_covariates": False}, {"categorical": (3,), "continuous": 1}),
    "one batch": ({}, {"batches": 1}),
    "size factor": ({}, {"size_factor": True}),
}
KL_WEIGHT, N_PROTEINS = 0.37, 6


def with_proteins(schema, missing=False):
    """Six proteins; the panel of the second batch lacks two of them."""
    measured = np.ones((len(schema.batch), N_PROTEINS), bool)
    if missing:
        measured[1, :2] = False
    proteins = tuple(f"p{k}" for k in range(N_PROTEINS))
    return dataclasses.replace(schema, proteins=proteins, measured=tuple(tuple(map(bool, row)) for row in measured))


def add_proteins(batch: Batch, schema, seed=3) -> Batch:
    rng = np.random.default_rng(seed)
    y = rng.poisson(rng.gamma(1.0, 30.0, (batch.n_cells, N_PROTEINS))).astype(np.float32)
    measured = np.array(schema.measured)[np.minimum(batch.batch_index, len(schema.measured) - 1)]
    return dataclasses.replace(batch, proteins=y * measured)


@pytest.fixture(scope="module")
def totalvae():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        return pytest.importorskip("scvi.module").TOTALVAE


@pytest.fixture(params=[(case, missing) for case in CASES for missing in (False, True)], ids=str)
def pair(request, totalvae, make_schema, make_batch, dense, monkeypatch):
    case, missing = request.param
    options, data = CASES[case]
    if missing and data.get("batches") == 1:
        pytest.skip("a single batch cannot lack what another has")
    schema = with_proteins(make_schema(**data), missing)
    config = TotalVIConfig(**({"dropout_rate_encoder": 0.0, "dropout_rate_decoder": 0.0, "n_hidden": 32} | options))
    ours = TotalVI(schema, config)
    fields = {f: getattr(config, f) for f in TotalVIConfig.__dataclass_fields__}
    theirs = totalvae(
        len(schema.genes),
        N_PROTEINS,
        len(schema.batch),
        n_continuous_cov=len(schema.continuous),
        n_cats_per_cov=[len(c) for c in schema.categorical] or None,
        use_size_factor_key=schema.size_factor is not None,
        n_panel=len(schema.batch),
        protein_batch_mask={str(b): np.array(row) for b, row in enumerate(schema.measured)},
        **fields,
    )
    randomise(theirs)
    for name in ("background_pro_alpha", "background_pro_log_beta", "log_per_batch_efficiency"):
        torch.nn.init.normal_(getattr(theirs, name), std=0.5)
    load_totalvi(ours, theirs.state_dict())
    batch = add_proteins(make_batch(schema), schema)
    given = tensors(batch, dense(batch)) | {"proteins": torch.from_numpy(batch.proteins)}
    return SimpleNamespace(ours=ours, theirs=theirs, batch=batch, tensors=given, patch=monkeypatch)


def both_losses(pair, step=0):
    """They draw z, a library that is not used, and the background."""
    generator = torch.Generator().manual_seed(step)
    n = pair.batch.n_cells
    z, library, background = (
        torch.randn(n, w, generator=generator) for w in (pair.ours.config.n_latent, 1, N_PROTEINS)
    )
    queue = draw_by_hand(pair)
    queue[:] = [z.clone(), library, background.clone()]
    _, _, theirs = pair.theirs(pair.tensors, loss_kwargs={"kl_weight": KL_WEIGHT})
    assert not queue
    return pair.ours(pair.batch, kl_weight=KL_WEIGHT, noise=Given(z, background)), theirs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_latent_and_loss(pair, training):
    pair.theirs.train(training), pair.ours.train(training)
    ours, theirs = both_losses(pair)
    close(ours.loss, theirs.loss)
    close(ours.reconstruction, sum(r.sum() for r in theirs.reconstruction_loss.values()))
    close(ours.kl, sum(kl.sum() for kl in theirs.kl_local.values()))
    pair.theirs.eval()
    draw_by_hand(pair)[:] = [torch.zeros(pair.batch.n_cells, w) for w in (pair.ours.config.n_latent, 1)]
    inference = pair.theirs.inference(**pair.theirs._get_inference_input(pair.tensors))
    if not training:
        close(pair.ours.encode(pair.batch).mean, inference["qz"].loc)
        close(pair.ours.encode(pair.batch).std, inference["qz"].scale)


def test_gradients_and_twenty_steps_of_adam(pair):
    pair.theirs.train(), pair.ours.train()
    options = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6}
    mine, other = (torch.optim.Adam(m.parameters(), **options) for m in (pair.ours, pair.theirs))
    for step in range(20):
        ours, theirs = both_losses(pair, step)
        for optimizer, loss in ((mine, ours.loss), (other, theirs.loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    close(ours.loss, theirs.loss)
    twin = TotalVI(pair.ours.schema, pair.ours.config)
    twin.load_state_dict(pair.ours.state_dict())
    load_totalvi(twin, pair.theirs.state_dict())
    for (name, a), b in zip(pair.ours.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_protein_that_a_panel_lacks_has_no_influence(make_schema, make_batch):
    schema = with_proteins(make_schema(), missing=True)
    model = TotalVI(schema, TotalVIConfig(use_batch_norm="none")).eval()
    batch = add_proteins(make_batch(schema, batches=range(1, 2)), schema)
    loss = model(batch, kl_weight=1.0)
    loss.loss.backward()
    # of what is fitted per batch, the two missing proteins of batch 1 only feel the priors of their own
    assert (model.background_mean.weight.grad[1, :2] == 0).all()
    assert (model.background_mean.weight.grad[1, 2:] != 0).all()


def test_a_query_may_have_another_panel(make_schema, make_batch):
    schema = with_proteins(make_schema())
    model = TotalVI(schema, TotalVIConfig(use_batch_norm="none", use_layer_norm="both"))
    measured = (*schema.measured, (True, False, True, True, False, True))
    extended = dataclasses.replace(schema, batch=schema.batch.extended(["new"]), measured=measured)
    query = extend(model, extended).train()
    batch = add_proteins(make_batch(extended, batches=range(3, 4)), extended)
    before = {name: t.clone() for name, t in query.state_dict().items()}
    optimizer = torch.optim.Adam(query.query_parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = query(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {n for n, t in query.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all(name.endswith("new") for name in moved)
    assert query.measured.shape == (4, N_PROTEINS) and not query.measured[3, 1]


def test_proteins_are_needed(make_schema):
    with pytest.raises(ConfigError, match="--proteins"):
        TotalVI(make_schema())
