import dataclasses

import pytest
import torch

from scviaduct.errors import ConfigError, DataError
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import PRESETS, SCVI, SCVIConfig, library_prior
from scviaduct.models.surgery import adapter, attach, extend, report

CASES = {
    "default": ({}, {}),
    "scarches": (PRESETS["scarches"], {"categorical": (2, 4)}),
    "deep, gene-batch": ({"n_layers": 2, "encode_covariates": True, "dispersion": "gene-batch"}, {"categorical": (3,)}),
    "one batch": ({"encode_covariates": True, "dispersion": "gene-batch", "gene_likelihood": "nb"}, {"batches": 1}),
    "latent library": (
        {"use_observed_lib_size": False, "encode_covariates": True},
        {"categorical": (1,), "continuous": 1},
    ),
}
OPTIMIZERS = {
    "Adam, decay": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def reference(request, make_schema, make_batch) -> SCVI:
    """A model that has been trained a little, so that nothing sits at its initial value."""
    options, data = CASES[request.param]
    schema = make_schema(**data)
    model = SCVI(schema, SCVIConfig(**options))
    batch = make_batch(schema)
    if model.models_library:
        model.set_library_prior(torch.full((3,), 3.0), torch.full((3,), 0.5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    return model


def extended_schema(model, new_batches=("q0", "q1"), new_categories=("new",)):
    schema = model.schema
    return dataclasses.replace(
        schema,
        batch=schema.batch.extended(new_batches),
        categorical=tuple(c.extended(new_categories) for c in schema.categorical),
    )


def extended(model):
    query = extend(model, extended_schema(model))
    if query.models_library:
        query.set_library_prior(torch.full((2,), 2.5), torch.full((2,), 0.4))
    return query


def train(query, batch, optimizer, steps=20):
    optimizer = optimizer(query.query_parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(query(batch).loss)
        losses[-1].backward()
        optimizer.step()
    return [float(x.detach()) for x in losses]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_training_a_query_leaves_every_reference_tensor_bitwise(reference, make_batch, optimizer):
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    query = extended(reference).train()
    start = {name: p.detach().clone() for name, p in query.named_parameters()}
    losses = train(
        query, make_batch(query.schema, batches=range(len(reference.schema.batch), len(query.schema.batch))), optimizer
    )
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in query.named_parameters())
    assert set(report(reference, query).values()) == {0.0}
    assert set(report(reference, query)) == set(before)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_reference_cells_encode_and_decode_the_same_bitwise(reference, make_batch):
    batch = make_batch(reference.schema)
    query = extended(reference).train()
    mine = make_batch(query.schema, batches=range(len(reference.schema.batch), len(query.schema.batch)))
    train(query, mine, OPTIMIZERS["Adam, decay"], 3)
    for a, b in zip(reference.encode(batch), query.encode(batch), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(reference.expression(batch)[:4], query.expression(batch)[:4], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_parameters_are_exactly_the_new_rows(reference):
    query = extended(reference)
    assert {id(p) for p in query.parameters()} == {id(p) for p in query.query_parameters()}
    assert all(name.endswith(".new") for name, _ in query.named_parameters())
    assert all(len(p) in (1, 2) for p in query.parameters())
    assert not reference.query_parameters()
    assert not query.couples_cells


def test_report_sees_a_change(reference):
    query = extended(reference)
    name = next(n for n, b in query.named_buffers() if n.endswith("linear.weight"))
    query.get_buffer(name)[0, 0] += 0.5
    changed = report(reference, query)
    assert changed[name] == pytest.approx(0.5)
    assert sum(changed.values()) == pytest.approx(0.5)


def test_new_rows_start_at_the_mean_of_the_reference(reference):
    query = extended(reference)
    for name, p in query.named_parameters():
        known = query.get_buffer(name.replace(".new", ".weight"))
        assert torch.equal(p, known.mean(0, keepdim=True).expand_as(p))


def test_one_category_gets_a_row_of_zeros_and_new_ones_start_there(make_schema):
    model = SCVI(make_schema(batches=1))
    columns = extended(model).decoder.hidden.layers[0].linear.columns[0]
    assert columns.weight.shape == (1, 128)
    assert float(columns.weight.abs().max()) == float(columns.new.detach().abs().max()) == 0.0
    assert columns.new.shape == (2, 128)


def test_new_categories_join_their_own_covariate(make_schema, make_batch):
    """scvi-tools appends columns at the end: there a new batch takes over the columns of the next covariate."""
    model = SCVI(make_schema(categorical=(2,)), SCVIConfig(**PRESETS["scarches"]))
    query = extended(model)
    batch, categorical = query.z_encoder.hidden.layers[0].linear.columns
    old_batch, old_categorical = model.z_encoder.hidden.layers[0].linear.columns
    assert torch.equal(batch.table()[:3], old_batch.weight)
    assert torch.equal(categorical.table()[:2], old_categorical.weight)
    assert (batch.table().shape[0], categorical.table().shape[0]) == (5, 3)


def test_dropout_and_batch_statistics_are_off_in_a_query(make_schema, make_batch):
    model = SCVI(make_schema())
    batch = make_batch(model.schema)
    query = extended(model).train()
    buffers = {k: v.clone() for k, v in query.named_buffers()}
    losses = {float(query(batch).loss.detach()) for _ in range(2)}
    query.eval()
    assert losses == {float(query(batch).loss.detach())}
    assert all(torch.equal(v, buffers[k]) for k, v in query.named_buffers())
    noisy = extend(model, extended_schema(model), dropout=True).train()
    assert float(noisy(batch).loss.detach()) not in losses


def test_adapter_is_small_and_makes_the_same_query(reference, make_batch):
    query = extended(reference).train()
    batch = make_batch(query.schema, batches=range(len(reference.schema.batch), len(query.schema.batch)))
    train(query, batch, OPTIMIZERS["Adam, decay"], 3)
    tensors = adapter(query)
    assert set(tensors) - {"library_log_means", "library_log_vars"} == {n for n, _ in query.named_parameters()}
    again = extend(reference, query.schema)
    attach(again, tensors)
    for name, tensor in query.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(query.encode(batch).mean, again.encode(batch).mean)


def test_attach_names_what_does_not_fit(make_schema):
    model = SCVI(make_schema())
    query = extended(model)
    other = extend(model, extended_schema(model, ("a", "b", "c")))
    with pytest.raises(DataError, match=r"1 tensors .*\(2, 128\), the adapter \(3, 128\)"):
        attach(query, adapter(other))
    with pytest.raises(DataError, match="the adapter None"):
        attach(query, {})


def test_a_query_of_a_query_keeps_the_first_one(make_schema, make_batch):
    model = SCVI(make_schema(), SCVIConfig(**PRESETS["scarches"]))
    first = extended(model).train()
    batch = make_batch(first.schema, batches=range(3, 5))
    train(first, batch, OPTIMIZERS["Adam, decay"], 3)
    second = extend(first, extended_schema(first, ("later",)))
    assert torch.equal(first.encode(batch).mean, second.encode(batch).mean)
    assert all(p.shape[0] == 1 for p in second.query_parameters())


def test_nothing_new_means_nothing_to_train(make_schema, make_batch):
    for batches in (1, 3):
        model = SCVI(make_schema(batches=batches))
        query = extend(model, model.schema)
        assert not list(query.parameters())
        batch = make_batch(model.schema)
        assert torch.equal(query.encode(batch).mean, model.encode(batch).mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, genes=s.genes[::-1]), "genes differ"),
        (lambda s: dataclasses.replace(s, categorical=()), "covariates are"),
        (
            lambda s: dataclasses.replace(s, batch=dataclasses.replace(s.batch, categories=("s1", "s0", "s2"))),
            "must begin with",
        ),
        (lambda s: dataclasses.replace(s, continuous=("age",)), "continuous differ"),
    ],
)
def test_other_schemas_are_refused(make_schema, change, message):
    model = SCVI(make_schema(categorical=(2,)))
    with pytest.raises(DataError, match=message):
        extend(model, change(model.schema))


def test_a_query_without_a_library_prior_is_refused(make_schema, make_batch):
    model = SCVI(make_schema(), SCVIConfig(use_observed_lib_size=False))
    with pytest.raises(ConfigError, match="set_library_prior"):
        model(make_batch(model.schema))
    model.set_library_prior(torch.zeros(3), torch.ones(3))
    query = extend(model, extended_schema(model))
    with pytest.raises(ConfigError, match="2 batches lack"):
        query.set_library_prior(torch.zeros(3), torch.ones(3))


def test_library_prior_is_the_population_mean_and_variance():
    means, variances = library_prior([1.0, torch.e**2, 0.0, 5.0], [0, 0, 2, 3], 4)
    torch.testing.assert_close(means, torch.tensor([1.0, 0.0, 0.0, 1.6094379]))
    torch.testing.assert_close(variances, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_a_classifier_may_be_trained_and_nothing_else_of_the_reference(make_schema):
    reference = SCANVI(make_schema(labels=3), SCANVI.Config(**PRESETS["scarches"]))
    schema = dataclasses.replace(reference.schema, batch=reference.schema.batch.extended(["new"]))
    frozen, trained = extend(reference, schema), extend(reference, schema, trained=("classifier",))
    new = {name for name, _ in frozen.named_parameters()}
    assert all(name.endswith(".new") for name in new)
    own = {f"classifier.{name}" for name, _ in reference.classifier.named_parameters()}
    assert {name for name, _ in trained.named_parameters()} == new | own and own
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
