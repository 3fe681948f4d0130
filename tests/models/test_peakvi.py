"""PeakVI and PoissonVI: parity with the installed scvi-tools, surgery, and what the trained models give."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scviaduct.errors import ConfigError, DataError
from scviaduct.models.base import Quantity
from scviaduct.models.counts import Cells
from scviaduct.models.peakvi import PeakVI, PeakVIConfig
from scviaduct.models.poissonvi import PoissonVI, PoissonVIConfig
from scviaduct.models.surgery import extend, report
from scviaduct.models.upstream import load_upstream
from scviaduct.models.upstream_peaks import load_peakvi
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

COVARIATES = {"categorical": (2, 4), "continuous": 2}
PEAKVI = {
    "defaults": ({}, {}),
    "covariates": ({}, COVARIATES),
    "encoded covariates": ({"encode_covariates": True}, COVARIATES),
    "deep covariates": (
        {"encode_covariates": True, "deeply_inject_covariates": True, "n_layers_encoder": 3, "n_layers_decoder": 3},
        {"categorical": (3, 1, 2)},
    ),
    "no depth": ({"model_depth": False}, {}),
    "no region factors": ({"region_factors": False, "encode_covariates": True}, {"continuous": 1}),
    "neither": ({"model_depth": False, "region_factors": False}, {}),
    "own widths": ({"n_hidden": 17, "n_latent": 5, "n_layers_encoder": 1, "n_layers_decoder": 1}, {}),
    "batch norm": ({"use_batch_norm": "both", "use_layer_norm": "none"}, {}),
    "norm in encoder": ({"use_batch_norm": "encoder", "use_layer_norm": "encoder"}, {}),
    "norm in decoder": ({"use_batch_norm": "decoder", "use_layer_norm": "decoder"}, {}),
    "logistic normal": ({"latent_distribution": "ln", "n_latent": 4}, {}),
    "one batch": ({"encode_covariates": True}, {"batches": 1}),
}
POISSONVI = {
    "defaults": ({}, {}),
    "covariates": ({"encode_covariates": True, "n_layers": 3}, COVARIATES),
    "shallow": ({"deeply_inject_covariates": False, "n_hidden": 12, "n_latent": 3}, {"categorical": (3,)}),
    "logistic normal": ({"latent_distribution": "ln", "n_latent": 4}, {}),
    "size factor": ({}, {"size_factor": True}),
}
CASES = [("peakvi", name) for name in PEAKVI] + [("poissonvi", name) for name in POISSONVI]
KL_WEIGHT = 0.37
ACCESSIBILITY = Quantity(name="accessibility")


@pytest.fixture(scope="module")
def modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        return pytest.importorskip("scvi.module")


def peakvi(modules, schema, options):
    config = PeakVIConfig(**({"dropout_rate": 0.0} | options))
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "encoder_input"}
    theirs = modules.PEAKVAE(
        len(schema.genes),
        len(schema.batch),
        n_continuous_cov=len(schema.continuous),
        n_cats_per_cov=[len(c) for c in schema.categorical],
        **fields,
    )
    if theirs.region_factors is not None:
        torch.nn.init.normal_(theirs.region_factors)
    return PeakVI(schema, config), theirs


def poissonvi(modules, schema, options):
    """The module that scvi.external.POISSONVI makes."""
    ours = PoissonVI(schema, PoissonVIConfig(**({"dropout_rate": 0.0} | options)))
    leaky = {"activation_fn": torch.nn.LeakyReLU}
    return ours, modules.VAE(
        len(schema.genes),
        len(schema.batch),
        n_continuous_cov=len(schema.continuous),
        n_cats_per_cov=[len(c) for c in schema.categorical] or None,
        gene_likelihood="poisson",
        use_size_factor_key=schema.size_factor is not None,
        use_batch_norm="none",
        use_layer_norm="both",
        extra_encoder_kwargs=leaky,
        extra_decoder_kwargs=leaky,
        **dataclasses.asdict(ours.config),
    )


@pytest.fixture(params=CASES, ids=" ".join)
def pair(request, modules, make_schema, make_batch, dense, monkeypatch):
    model, case = request.param
    options, data = (PEAKVI if model == "peakvi" else POISSONVI)[case]
    schema = make_schema(genes=200, **data)
    ours, theirs = (peakvi if model == "peakvi" else poissonvi)(modules, schema, options)
    randomise(theirs)
    load = load_peakvi if model == "peakvi" else load_upstream
    load(ours, theirs.state_dict())
    batch = make_batch(schema, largest=12)
    # scvi-tools' PEAKVAE sums where ours takes the mean: its loss is n**2 of ours at kl_weight / n
    n = batch.n_cells if model == "peakvi" else 1
    return SimpleNamespace(
        ours=ours, theirs=theirs, batch=batch, tensors=tensors(batch, dense(batch)), patch=monkeypatch, load=load, n=n
    )


def both_losses(pair, step=0):
    noise = torch.randn(pair.batch.n_cells, pair.ours.config.n_latent, generator=torch.Generator().manual_seed(step))
    draw_by_hand(pair)[:] = [noise.clone()]
    _, _, theirs = pair.theirs(pair.tensors, loss_kwargs={"kl_weight": KL_WEIGHT})
    ours = pair.ours(pair.batch, kl_weight=KL_WEIGHT / pair.n, noise=Given(noise))
    return dataclasses.replace(ours, loss=ours.loss * pair.n**2), theirs


def test_widths_follow_the_regions(pair):
    assert pair.ours.config.n_latent == pair.theirs.n_latent
    assert type(pair.ours)(pair.ours.schema).config.n_hidden == int(np.sqrt(200))
    assert type(pair.ours)(pair.ours.schema).config.n_latent == int(np.sqrt(14))


@pytest.mark.parity("outputs")
def test_latent(pair):
    pair.theirs.eval(), pair.ours.eval()
    inputs = pair.theirs._get_inference_input(pair.tensors)
    theirs, ours = pair.theirs.inference(**inputs)["qz"], pair.ours.encode(pair.batch)
    close(ours.mean, theirs.loc)
    close(ours.std, theirs.scale)


@pytest.mark.parity("loss")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_loss_and_its_parts(pair, training):
    pair.theirs.train(training), pair.ours.train(training)
    ours, theirs = both_losses(pair)
    close(ours.loss, theirs.loss)
    reconstruction = theirs.reconstruction_loss["reconstruction_loss"]
    close(ours.reconstruction, reconstruction.sum())
    close(ours.kl, sum(kl.sum() for kl in theirs.kl_local.values()))


@pytest.mark.parity("gradients")
def test_gradients(pair):
    assert_same_gradients(pair, pair.load, both_losses)


@pytest.mark.parity("20 steps")
def test_twenty_steps_of_adam(pair):
    ours, theirs = take_twenty_steps(pair, both_losses)
    close(ours.loss, theirs.loss)
    # under batch norm a bias has gradient 0 but for rounding; what it adds, the norm takes off again
    free = getattr(pair.ours.config, "use_batch_norm", "none") != "none"
    skip = lambda name: free and name.endswith("linear.bias")  # noqa: E731
    assert_same_weights(pair, pair.load, rtol=1e-3, atol=1e-4, skip=skip)


@pytest.mark.parity("20 steps")
def test_twenty_steps_of_adamw(pair):
    """PEAKVI.train's optimiser, with a tenfold rate."""
    pair.theirs.train(), pair.ours.train()
    # under batch norm a bias has gradient 0 but for rounding, which a tiny eps would make a full step
    batch_norm = getattr(pair.ours.config, "use_batch_norm", "none") != "none"
    options = {"lr": 1e-3, "eps": 10.0 if batch_norm else 1e-8, "weight_decay": 1e-3}
    mine, other = (torch.optim.AdamW(m.parameters(), **options) for m in (pair.ours, pair.theirs))
    for step in range(20):
        ours, theirs = both_losses(pair, step)
        for optimizer, loss in ((mine, ours.loss), (other, theirs.loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    close(ours.loss, theirs.loss, rtol=1e-4)
    twin = type(pair.ours)(pair.ours.schema, pair.ours.config)
    twin.load_state_dict(pair.ours.state_dict())
    pair.load(twin, pair.theirs.state_dict())
    expected = twin.state_dict()
    for name, a in pair.ours.state_dict().items():
        # Adam divides by the gradient's own size, so one that happens to be near 0 moves by its rounding
        off = (a - expected[name]).abs() > 1e-4 + 1e-4 * expected[name].abs()
        assert off.float().mean() < 0.002, f"{name}: {int(off.sum())} of {off.numel()} differ"


@pytest.mark.parity("outputs")
def test_accessibility(pair):
    pair.theirs.eval()
    n, config = pair.batch.n_cells, pair.ours.config
    draw_by_hand(pair)[:] = [torch.zeros(n, config.n_latent)]  # at the mean
    inference, generative = pair.theirs(pair.tensors, compute_loss=False)
    if isinstance(pair.ours, PoissonVI):
        close(accessibility(pair, normalize_regions=True), generative["px"].scale)
        close(accessibility(pair, library_size=None, normalize_regions=True), generative["px"].rate)
        bias = pair.theirs.decoder.px_scale_decoder[0].bias
        close(pair.ours.of_genes()["region_factor"], bias)
        torch.nn.init.zeros_(bias)
        draw_by_hand(pair)[:] = [torch.zeros(n, config.n_latent)]
        _, generative = pair.theirs(pair.tensors, compute_loss=False)
        close(accessibility(pair, library_size=1e4), 1e4 * generative["px"].scale)
        return
    p = generative["px"]
    close(accessibility(pair), p)
    close(accessibility(pair, features=(5, 0)), p[:, [5, 0]])
    if config.model_depth:
        close(pair.ours.of_cells(pair.batch)["depth"], inference["d"].squeeze(1))
        close(accessibility(pair, normalize_cells=True), p * inference["d"])
    if config.region_factors:
        factors = torch.sigmoid(pair.theirs.region_factors)
        close(pair.ours.of_genes()["region_factor"], factors)
        close(accessibility(pair, normalize_regions=True), p * factors)
        close(accessibility(pair, normalize_regions=True, features=(5, 0)), (p * factors)[:, [5, 0]])


def accessibility(pair, **options):
    return pair.ours.decoded(pair.batch, Quantity(name="accessibility", **options))


@pytest.mark.parity("outputs")
@pytest.mark.parametrize("pair", CASES[:1], indirect=True, ids=" ".join)
def test_peakvi_scores(pair):
    """What get_elbo and get_reconstruction_error average."""
    pair.theirs.eval(), pair.ours.eval()
    noise = torch.randn(pair.batch.n_cells, pair.ours.config.n_latent)
    draw_by_hand(pair)[:] = [noise.clone()]
    inference, _, losses = pair.theirs(pair.tensors)
    with pair.ours.evaluating():
        cells = Cells.of(pair.batch, pair.ours.schema, pair.ours.device)
        found = pair.ours.score(pair.ours.inference(cells, None), cells, Given(noise))
    close(-found.log_likelihood, losses.reconstruction_loss["reconstruction_loss"])
    close(found.kl, sum(losses.kl_local.values()))
    prior = torch.distributions.Normal(0, 1).log_prob(inference["z"]) - inference["qz"].log_prob(inference["z"])
    close(found.log_weight, found.log_likelihood + prior.sum(1))


def test_import_says_what_does_not_fit(pair):
    state = pair.theirs.state_dict()
    with pytest.raises(DataError, match=r"no tensor 'z_encoder\.mean_encoder"):
        pair.load(pair.ours, {k: v for k, v in state.items() if "mean_encoder" not in k})
    state["z_encoder.encoder.fc_layers.Layer 0.0.weight"] = torch.zeros(3, 3)
    with pytest.raises((DataError, RuntimeError)):
        pair.load(pair.ours, state)


def test_binary_input_is_that_of_binary_counts(make_schema, make_batch):
    schema = make_schema(genes=100)
    batch = make_batch(schema)
    ones = dataclasses.replace(batch, data=np.ones_like(batch.data))
    raw, binary = PeakVI(schema), PeakVI(schema, PeakVIConfig(encoder_input="binary"))
    binary.load_state_dict(raw.state_dict())
    assert torch.equal(binary.encode(batch).mean, raw.encode(ones).mean)
    assert not torch.equal(raw.encode(batch).mean, raw.encode(ones).mean)


def test_another_batch_changes_the_decoder_only(make_schema, make_batch):
    for cls in (PeakVI, PoissonVI):
        schema = make_schema(genes=100)
        model = cls(schema, cls.Config(encode_covariates=True))
        batch = make_batch(schema)
        as_one = dataclasses.replace(batch, batch_index=np.ones(batch.n_cells, np.int64))
        with model.evaluating():
            q, cells = (
                model.inference(Cells.of(batch, schema, model.device), None),
                Cells.of(as_one, schema, model.device),
            )
            expected = model.decode(ACCESSIBILITY, q, cells, None)
        close(model.decoded(batch, ACCESSIBILITY, transform_batch=1), expected)
        assert not torch.equal(model.decoded(batch, ACCESSIBILITY), expected)


def test_missing_factors_are_refused(make_schema, make_batch):
    schema = make_schema()
    model = PeakVI(schema, PeakVIConfig(model_depth=False, region_factors=False))
    with pytest.raises(ConfigError, match="model_depth=True"):
        model.depths(make_batch(schema))
    with pytest.raises(ConfigError, match="region_factors=True"):
        model.region_factors()


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("cls", [PeakVI, PoissonVI])
def test_surgery_trains_new_rows_only(cls, encode, make_schema, make_batch):
    schema = make_schema(genes=100, categorical=(2,))
    model = cls(schema, cls.Config(encode_covariates=encode))
    batch = make_batch(schema)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    query = extend(model, dataclasses.replace(schema, batch=schema.batch.extended(["q0", "q1"]))).train()
    new = make_batch(query.schema, batches=range(3, 5))
    optimizer = torch.optim.Adam(query.query_parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(query(new).loss)
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < float(losses[0].detach())
    assert {id(p) for p in query.parameters()} == {id(p) for p in query.query_parameters()}
    assert {name.rsplit(".", 1)[1] for name, _ in query.named_parameters()} == {"new"}
    assert set(report(model, query).values()) == {0.0}
    assert torch.equal(model.encode(batch).mean, query.encode(batch).mean)
    close(query.decoded(batch, ACCESSIBILITY), model.decoded(batch, ACCESSIBILITY))


def test_no_array_of_cells_by_regions_but_the_decoder_s(make_schema, make_batch, monkeypatch):
    """The dense target, of which scvi-tools needs one for the encoder and one for the loss, is never made."""
    from scviaduct.models.counts import Counts

    monkeypatch.setattr(Counts, "scattered", lambda *_: pytest.fail("a dense matrix was made"))
    schema = make_schema(genes=300)
    for cls in (PeakVI, PoissonVI):
        model = cls(schema)
        batch = make_batch(schema)
        model(batch).loss.backward()
        model.encode(batch)
