"""totalVI: parity with the installed scvi-tools, panels, surgery."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scviaduct.errors import ConfigError
from scviaduct.models.adversary import Adversary
from scviaduct.models.surgery import extend, report
from scviaduct.models.totalvi import TotalVI, TotalVIConfig
from scviaduct.models.upstream import load_totalvi
from scviaduct.schema import Batch
from tests.models.test_parity import (
    Given,
    assert_same_gradients,
    assert_same_weights,
    close,
    draw_by_hand,
    randomise,
    take_twenty_steps,
    tensors,
)

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
NOT_THE_MODULE_S = {"empirical_protein_background_prior", "adversarial_classifier", "encoder_input", "background_std"}


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


def paired(ours, theirs, batch, dense, monkeypatch):
    """Ours with the weights of scvi-tools' module, which are made random, and a batch for both."""
    randomise(theirs)
    for name in ("background_pro_alpha", "background_pro_log_beta", "log_per_batch_efficiency"):
        torch.nn.init.normal_(getattr(theirs, name), std=0.5)
    load_totalvi(ours, theirs.state_dict())
    given = tensors(batch, dense(batch)) | {"proteins": torch.from_numpy(batch.proteins)}
    return SimpleNamespace(ours=ours, theirs=theirs, batch=batch, tensors=given, patch=monkeypatch)


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
    small = {"dropout_rate_encoder": 0.0, "dropout_rate_decoder": 0.0, "n_hidden": 32, "adversarial_classifier": False}
    config = TotalVIConfig(**(small | options))
    ours = TotalVI(schema, config)
    fields = {f: getattr(config, f) for f in TotalVIConfig.__dataclass_fields__.keys() - NOT_THE_MODULE_S}
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
    return paired(ours, theirs, add_proteins(make_batch(schema), schema), dense, monkeypatch)


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


@pytest.mark.parity("loss")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_loss_and_its_parts(pair, training):
    pair.theirs.train(training), pair.ours.train(training)
    ours, theirs = both_losses(pair)
    close(ours.loss, theirs.loss)
    close(ours.reconstruction, sum(r.sum() for r in theirs.reconstruction_loss.values()))
    close(ours.kl, sum(kl.sum() for kl in theirs.kl_local.values()))


@pytest.mark.parity("outputs")
def test_latent(pair):
    pair.theirs.eval()
    draw_by_hand(pair)[:] = [torch.zeros(pair.batch.n_cells, w) for w in (pair.ours.config.n_latent, 1)]
    inference = pair.theirs.inference(**pair.theirs._get_inference_input(pair.tensors))
    close(pair.ours.encode(pair.batch).mean, inference["qz"].loc)
    close(pair.ours.encode(pair.batch).std, inference["qz"].scale)


@pytest.mark.parity("gradients")
def test_gradients(pair):
    assert_same_gradients(pair, load_totalvi, both_losses, off=3e-5)  # proteins are float32 there, float64 here


@pytest.mark.parity("20 steps")
def test_twenty_steps_of_adam(pair):
    ours, theirs = take_twenty_steps(pair, both_losses)
    close(ours.loss, theirs.loss)
    assert_same_weights(pair, load_totalvi, rtol=1e-3, atol=1e-4)


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


def adversarial_plan(module):
    """scvi-tools' own plan around a module, its classifier in eval mode."""
    from scvi.train import AdversarialTrainingPlan

    plan = AdversarialTrainingPlan(module, adversarial_classifier=True)
    plan.adversarial_classifier.eval()
    return plan


@pytest.mark.parity("loss")
@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_adversary_is_scvi_tools(totalvae, batch_norm):
    plan = adversarial_plan(totalvae(5, 4, n_batch=3, n_latent=6, n_hidden=8, n_panel=3))
    randomise(plan.adversarial_classifier)
    ours = Adversary(6, 3, batch_norm=batch_norm)
    layers = plan.adversarial_classifier.classifier[0].fc_layers
    with torch.no_grad():
        for layer, theirs in zip(ours.hidden.layers, layers, strict=True):
            layer.linear.weight.copy_(theirs[0].weight), layer.linear.bias.copy_(theirs[0].bias)
            if not batch_norm:
                theirs[1] = torch.nn.Identity()
            else:
                layer.batch_norm.load_state_dict(theirs[1].state_dict(), strict=False)
        ours.logits.load_state_dict(plan.adversarial_classifier.classifier[1].state_dict())
    batches = torch.tensor([0, 2, 1, 2, 0])
    z = torch.randn(5, 6, requires_grad=True)
    losses = ours.eval().losses(z, batches, None)
    close(losses.fooled.mean(), plan.loss_adversarial_classifier(z, batches[:, None], predict_true_class=False))
    close(losses.told.mean(), plan.loss_adversarial_classifier(z, batches[:, None], predict_true_class=True))

    def gradients(loss, wanted):
        return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)

    parameters = list(ours.parameters())
    assert gradients(losses.fooled.mean(), parameters) == (None,) * len(parameters)
    assert gradients(losses.told.mean(), [z]) == (None,)
    theirs = plan.loss_adversarial_classifier(z, batches[:, None], predict_true_class=False)
    close(gradients(losses.fooled.mean(), [z])[0], gradients(theirs, [z])[0])
    theirs = plan.loss_adversarial_classifier(z.detach(), batches[:, None], predict_true_class=True)
    last = plan.adversarial_classifier.classifier[1].weight
    close(gradients(losses.told.mean(), [ours.logits.weight])[0], gradients(theirs, [last])[0])


def test_the_adversary_is_there_when_a_panel_lacks_proteins(make_schema, make_batch, rows_of):
    whole, part = with_proteins(make_schema()), with_proteins(make_schema(), missing=True)
    assert TotalVI(whole).adversary is None
    assert TotalVI(whole, TotalVIConfig(adversarial_classifier=True)).adversary is not None
    assert TotalVI(part, TotalVIConfig(adversarial_classifier=False)).adversary is None
    assert TotalVI(with_proteins(make_schema(batches=1)), TotalVIConfig(adversarial_classifier=True)).adversary is None
    model = TotalVI(part, TotalVIConfig(use_batch_norm="none", use_layer_norm="both"))
    assert not model.couples_cells
    batch = add_proteins(make_batch(part), part)
    for weight in (0.3, 1.0):
        model.zero_grad()
        losses = model(batch, kl_weight=weight)
        losses.loss.backward()
        # at full weight the gradients of the adversary are there and 0: DistributedDataParallel waits for them
        assert all((p.grad != 0).any() == (weight < 1) for p in model.adversary.parameters())
        parts = losses.reconstruction + weight * losses.kl + sum(losses.extra.values())
        close(losses.loss, parts / batch.n_cells)
    halves = [rows_of(batch, slice(0, 10)), rows_of(batch, slice(10, None))]
    apart = sum(model(h, kl_weight=0.3).loss * h.n_cells for h in halves) / batch.n_cells
    close(apart, model(batch, kl_weight=0.3).loss)
    assert "adversary" not in model.eval()(batch, kl_weight=0.3).extra


def test_a_query_has_no_adversary(make_schema):
    schema = with_proteins(make_schema(), missing=True)
    model = TotalVI(schema)
    extended = dataclasses.replace(
        schema, batch=schema.batch.extended(["new"]), measured=(*schema.measured, (True,) * N_PROTEINS)
    )
    query = extend(model, extended)
    assert query.opponent is None and model.opponent is not None
    assert set(report(model, query).values()) == {0.0}
    assert "adversary.logits.weight" in model.state_dict()


def test_the_background_s_prior_is_set_where_something_is_known(make_schema):
    schema = with_proteins(make_schema())
    model = TotalVI(schema)
    model.set_background_prior(np.array([1.0, np.nan, 2.0]), np.array([0.5, np.nan, 0.25]))
    close(model.background_mean.weight[:, 0], torch.tensor([1.0, 3.0, 2.0]))
    close(model.background_log_std.weight[:, 1], torch.tensor([0.5, 1.0, 0.25]).log())
    extended = dataclasses.replace(
        schema, batch=schema.batch.extended(["new"]), measured=(*schema.measured, (True,) * N_PROTEINS)
    )
    query = extend(model, extended)
    query.set_background_prior(np.array([9.0, 9.0, 9.0, 4.0]), np.array([9.0, 9.0, 9.0, 0.1]))
    close(query.background_mean.new, torch.full((1, N_PROTEINS), 4.0))
    close(query.background_mean.weight[:, 0], torch.tensor([1.0, 3.0, 2.0]))
    assert not TotalVI(schema).wants_background  # six proteins
    assert TotalVI(schema, TotalVIConfig(empirical_protein_background_prior=True)).wants_background
