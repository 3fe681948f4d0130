"""SCANVI: parity with the installed scvi-tools, and what its labels do."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scviaduct.errors import ConfigError
from scviaduct.models.scanvi import SCANVI, SCANVIConfig
from scviaduct.models.scvi import PRESETS
from scviaduct.models.upstream import load_upstream
from scviaduct.storage.loader import cut
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
    "scarches, covariates": (PRESETS["scarches"], {"categorical": (2, 4)}),
    "nb, 2 layers, shallow": ({"gene_likelihood": "nb", "n_layers": 2, "deeply_inject_covariates": False}, {}),
    "linear classifier": ({"linear_classifier": True}, {}),
    "latent library": ({"use_observed_lib_size": False}, {}),
    "logistic normal": ({"latent_distribution": "ln"}, {}),
    "one label": ({"use_batch_norm": "none"}, {"labels": 1}),
    "continuous": ({"encode_covariates": True, "gene_likelihood": "nb"}, {"continuous": 2}),
}
KL_WEIGHT = 0.37
OURS = {"classification_ratio", "n_samples_per_label", "labelled_batches"}
"""Options that are arguments of training there."""


@pytest.fixture(scope="module")
def scanvae():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        return pytest.importorskip("scvi.module").SCANVAE


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request, scanvae, make_schema, make_batch, dense, monkeypatch):
    options, data = CASES[request.param]
    schema = make_schema(**({"labels": 4} | data))
    config = SCANVIConfig(**({"dropout_rate": 0.0} | options))
    ours = SCANVI(schema, config)
    prior = (np.array([[3.0, 3.5, 4.0]]), np.array([[0.5, 0.7, 0.9]]))
    if ours.models_library:
        ours.set_library_prior(*(torch.zeros(len(schema.batch)) for _ in range(2)))
    fields = {f: getattr(config, f) for f in SCANVIConfig.__dataclass_fields__ if f not in OURS}
    theirs = scanvae(
        len(schema.genes),
        len(schema.batch),
        len(schema.labels),
        n_continuous_cov=len(schema.continuous),
        n_cats_per_cov=[len(c) for c in schema.categorical] or None,
        library_log_means=prior[0],
        library_log_vars=prior[1],
        **fields,
    )
    randomise(theirs)
    load_upstream(ours, theirs.state_dict())
    batch = make_batch(schema)
    return SimpleNamespace(
        ours=ours, theirs=theirs, batch=batch, tensors=tensors(batch, dense(batch)), patch=monkeypatch
    )


def both_losses(pair, step=0):
    """The same draws for both: theirs come label by label, ours cell by cell; theirs draws once more for the labelled."""
    generator = torch.Generator().manual_seed(step)
    n, latent, k = pair.batch.n_cells, pair.ours.config.n_latent, len(pair.ours.schema.labels)
    z, library, z2 = (torch.randn(n, w, generator=generator) for w in (latent, 1, k * latent))
    by_label = z2.reshape(n, k, latent).transpose(0, 1).reshape(k * n, latent)
    modelled = [library] if pair.ours.models_library else []
    queue = draw_by_hand(pair)
    # a VAE that observes the library draws it nowhere
    queue[:] = [z.clone(), *modelled, by_label, z.clone(), *modelled]
    _, _, theirs = pair.theirs(
        pair.tensors,
        loss_kwargs={"kl_weight": KL_WEIGHT, "labelled_tensors": pair.tensors, "classification_ratio": 50.0},
    )
    return pair.ours(pair.batch, kl_weight=KL_WEIGHT, noise=Given(z, *modelled, z2)), theirs


@pytest.mark.parity("loss")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_loss_and_its_parts(pair, training):
    pair.theirs.train(training), pair.ours.train(training)
    ours, theirs = both_losses(pair)
    close(ours.loss, theirs.loss)
    close(ours.reconstruction, theirs.reconstruction_loss["reconstruction_loss"].sum())
    close(ours.kl, sum(kl.sum() for kl in theirs.kl_local.values()))
    close(ours.extra["classification"] / (50.0 * pair.batch.n_cells), theirs.classification_loss)


@pytest.mark.parity("gradients")
def test_gradients(pair):
    assert_same_gradients(pair, load_upstream, both_losses)


@pytest.mark.parity("20 steps")
def test_twenty_steps_of_adam(pair):
    ours, theirs = take_twenty_steps(pair, both_losses)
    close(ours.loss, theirs.loss)
    # theirs sends the labelled cells through the encoder once more, so its running averages move twice a step
    assert_same_weights(
        pair, load_upstream, rtol=1e-3, atol=1e-4, skip=lambda name: "encoder.hidden" in name and "running" in name
    )


@pytest.mark.parity("outputs")
def test_prediction(pair):
    pair.theirs.eval()
    qz = pair.theirs.inference(**pair.theirs._get_inference_input(pair.tensors))["qz"]
    close(pair.ours.encode(pair.batch).mean, qz.loc)
    close(pair.ours.encode(pair.batch).std, qz.scale)
    theirs = pair.theirs.classify(
        pair.tensors["X"],
        batch_index=pair.tensors["batch"],
        cont_covs=pair.tensors.get("extra_continuous_covs"),
        cat_covs=pair.tensors.get("extra_categorical_covs"),
    )
    close(pair.ours.predict(pair.batch), torch.softmax(theirs, 1))


@pytest.fixture
def model(make_schema):
    return SCANVI(make_schema(labels=3), SCANVIConfig(**PRESETS["scarches"]))


def test_the_share_of_labelled_cells_makes_the_mean(model, make_batch):
    """With the batch's own share the sum is the mean over its labelled cells, scvi-tools' cross-entropy."""
    batch = make_batch(model.schema)
    known = np.arange(batch.n_cells) % 3 == 0
    partly = dataclasses.replace(batch, labels=np.where(known, batch.labels, -1))
    model.eval()
    model.set_labelled_share(float(known.mean()))
    codes = torch.from_numpy(batch.labels[known])
    mean = -torch.log(model.predict(batch)[known].gather(1, codes.unsqueeze(1))).mean()
    close(model(partly).extra["classification"] / batch.n_cells, 50.0 * mean, rtol=1e-4)


def test_unlabelled_cells_have_no_cross_entropy(model, make_batch):
    batch = make_batch(model.schema)
    nobody = dataclasses.replace(batch, labels=np.full(batch.n_cells, -1))
    losses = model(nobody)
    assert float(losses.extra["classification"]) == 0.0
    losses.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_labels_are_learnt(model, make_batch):
    batch = make_batch(model.schema, 96)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    assert (
        model.predict(batch).argmax(1).numpy() == batch.labels
    ).mean() > 0.85  # the labels are noise: by chance a third
    torch.testing.assert_close(model.predict(batch).sum(1), torch.ones(96))


def test_labels_are_needed(make_schema, model):
    with pytest.raises(ConfigError, match="labels_key"):
        SCANVI(make_schema())
    with pytest.raises(ConfigError, match="0% of the training cells have a label"):
        model.set_labelled_share(0.0)


@pytest.mark.parity("loss")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_labelled_batch_is_classified_as_scvi_tools_does(pair, make_batch, dense, training):
    """Other cells than those of the batch, a quarter as many, and its share of the loss is a mean over them."""
    pair.theirs.train(training), pair.ours.train(training)
    extra = make_batch(pair.ours.schema, pair.batch.n_cells // 4)
    generator = torch.Generator().manual_seed(0)
    n, latent, k = pair.batch.n_cells, pair.ours.config.n_latent, len(pair.ours.schema.labels)
    z, library, z2 = (torch.randn(n, w, generator=generator) for w in (latent, 1, k * latent))
    modelled = [library] if pair.ours.models_library else []
    queue = draw_by_hand(pair)
    unused = [torch.zeros(extra.n_cells, latent), *[library[: extra.n_cells]] * len(modelled)]
    queue[:] = [z, *modelled, z2.reshape(n, k, latent).transpose(0, 1).reshape(k * n, latent), *unused]
    labelled = tensors(extra, dense(extra))
    arguments = {"kl_weight": KL_WEIGHT, "labelled_tensors": labelled, "classification_ratio": 50.0}
    _, _, theirs = pair.theirs(pair.tensors, loss_kwargs=arguments)
    weighted = dataclasses.replace(extra, weight=pair.batch.n_cells / extra.n_cells)
    batch = dataclasses.replace(pair.batch, labelled=weighted)
    ours = pair.ours(batch, kl_weight=KL_WEIGHT, noise=Given(z, *modelled, z2))
    close(ours.loss, theirs.loss)
    close(ours.extra["classification"] / (50.0 * n), theirs.classification_loss)


@pytest.mark.parametrize(
    ("share", "options", "n_samples"),
    [
        (0.6, {}, "none"),
        (0.5, {}, "none"),
        (0.4, {}, None),
        (1.0, {"labelled_batches": True}, None),
        (0.1, {"labelled_batches": False}, "none"),
        (1.0, {"n_samples_per_label": 7}, 7),
    ],
)
def test_when_a_labelled_batch_is_wanted(make_schema, share, options, n_samples):
    model = SCANVI(make_schema(labels=3), SCANVIConfig(**options))
    model.set_labelled_share(share)
    wanted = model.labelled_stream()
    assert ("none" if wanted is None else wanted.n_samples_per_label) == n_samples


def test_options_of_the_labelled_batch_that_contradict_each_other():
    with pytest.raises(ConfigError, match="labelled_batches, which are off"):
        SCANVIConfig(labelled_batches=False, n_samples_per_label=3)
    with pytest.raises(ConfigError, match="n_samples_per_label=0"):
        SCANVIConfig(n_samples_per_label=0)


def test_an_empty_batch_with_labelled_cells_has_their_loss_alone(model, make_batch):
    model.eval()
    extra = dataclasses.replace(make_batch(model.schema), weight=0.5)
    nobody = cut(extra, 0, 0, extra.lanes)
    losses = model(dataclasses.replace(nobody, labelled=extra))
    whole = model(dataclasses.replace(extra, labelled=extra)).extra["classification"]
    close(losses.loss, whole)
    assert losses.n_cells == 0 and float(losses.reconstruction) == 0.0
