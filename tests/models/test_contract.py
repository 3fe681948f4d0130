"""What every model in MODELS must keep, whatever it is."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from scviaduct.errors import ConfigError
from scviaduct.models import MODELS, model_class
from scviaduct.models.surgery import extend


@pytest.fixture(params=MODELS)
def cls(request):
    return model_class(request.param)


@pytest.fixture
def model(cls, make_schema):
    return cls(make_schema(categorical=(2,), continuous=1, labels=3, proteins=5 * cls.uses_proteins), cls.Config())


@pytest.fixture
def batch(model, make_batch):
    return make_batch(model.schema, 64)


def test_loss_is_finite_and_falls(model, batch):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = model(batch)
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.95 * losses[0]  # PeakVI and PoissonVI have 6 hidden units for 40 regions


def test_gradients_reach_every_parameter(model, batch):
    """So DistributedDataParallel needs no find_unused_parameters."""
    model(batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_parts_add_up(model, batch):
    for weight in (0.0, 0.3, 1.0):
        out = model(batch, kl_weight=weight)
        assert out.n_cells == batch.n_cells
        assert not out.reconstruction.requires_grad and not out.kl.requires_grad
        expected = (out.reconstruction + weight * out.kl + sum(out.extra.values())) / out.n_cells
        torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-5, atol=1e-4)


def test_the_seeds_decide_the_noise(model, batch):
    first, again = (float(model(batch).loss.detach()) for _ in range(2))
    assert first == again
    other = dataclasses.replace(batch, seeds=batch.seeds + np.uint64(1))
    assert float(model(other).loss.detach()) != first


def test_saved_state_gives_the_same_model(model, cls, batch):
    model(batch)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    config = cls.Config(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    other = cls(model.schema, config)
    assert not torch.equal(other.encode(batch).mean, model.encode(batch).mean)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert config == model.config
    assert torch.equal(other.encode(batch).mean, model.encode(batch).mean)
    assert torch.equal(other(batch).loss, model(batch).loss)


def test_encode_is_deterministic_and_keeps_the_mode(model, batch, rows_of):
    qz = model.train().encode(batch)
    assert model.training
    assert not qz.mean.requires_grad
    assert (qz.std > 0).all()
    part = model.encode(rows_of(batch, slice(10, 20)))
    torch.testing.assert_close(part.mean, qz.mean[10:20], rtol=1e-5, atol=1e-6)


def test_halves_weighted_by_cells_are_the_whole(model, batch, rows_of):
    if model.couples_cells:
        model.eval()  # with batch norm only evaluation is separable
    parts = [rows_of(batch, slice(0, 20)), rows_of(batch, slice(20, None))]
    model(batch).loss.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss = model(batch).loss.detach()
    model.zero_grad()
    halves = sum(model(p).loss * (p.n_cells / batch.n_cells) for p in parts)
    halves.backward()
    torch.testing.assert_close(halves.detach(), loss, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-4 * float(whole[name].abs().max()))


def test_surgery_leaves_the_reference_embedding(model, batch, make_batch):
    known = model.encode(batch).mean
    measured = model.schema.measured + model.schema.measured[:1]
    schema = dataclasses.replace(model.schema, batch=model.schema.batch.extended(["new"]), measured=measured)
    query = extend(model, schema).train()
    optimizer = torch.optim.Adam(query.query_parameters(), lr=0.1, weight_decay=0.1)
    new = make_batch(schema, batches=range(3, 4))
    for _ in range(3):
        optimizer.zero_grad()
        query(new).loss.backward()
        optimizer.step()
    assert torch.equal(query.encode(batch).mean, known)


def test_every_option_is_documented_and_wrong_ones_are_refused(cls):
    import ast
    import inspect
    import textwrap

    classes = [c for c in cls.Config.__mro__ if dataclasses.is_dataclass(c)]
    body = [n for c in classes for n in ast.parse(textwrap.dedent(inspect.getsource(c))).body[0].body]
    for field in dataclasses.fields(cls.Config):
        at = next(i for i, n in enumerate(body) if isinstance(n, ast.AnnAssign) and n.target.id == field.name)
        assert isinstance(body[at + 1], ast.Expr) and body[at + 1].value.value.strip(), field.name
    for name, value in {"n_latent": 0, "dropout_rate": 1.5, "gene_likelihood": "nbb", "recon_loss": "nbb"}.items():
        if name in {f.name for f in dataclasses.fields(cls.Config)}:
            with pytest.raises(ConfigError, match=f"{name}={value!r}"):
                cls.Config(**{name: value})


def test_cells_without_counts_do_no_harm(model, make_schema):
    from scviaduct.schema import Batch

    empty = Batch(
        n_genes=len(model.schema.genes), indptr=np.zeros(4, np.int64), indices=np.zeros(0, np.int32),
        data=np.zeros(0, np.float32), batch_index=np.arange(3), categorical=np.zeros((3, 1), np.int64),
        continuous=np.zeros((3, 1), np.float32), seeds=np.arange(3, dtype=np.uint64),
        proteins=np.zeros((3, len(model.schema.proteins)), np.float32),
    )  # fmt: skip
    model(empty).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_cells_have_no_loss_and_no_gradient(model, batch, rows_of):
    """A worker may hold no cell of a batch; it takes part in the averaging all the same."""
    nothing = dataclasses.replace(rows_of(batch, slice(0, 0)), rows=np.zeros(0, np.int64))
    for module in model.modules():
        module.frozen = True  # batch norm of no cells is a matter of all workers together
    out = model(nothing)
    out.loss.backward()
    assert (float(out.loss.detach()), float(out.reconstruction), float(out.kl), out.n_cells) == (0.0, 0.0, 0.0, 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_only_matrix_products_are_in_bfloat16(model, batch):
    exact = model(batch)
    exact.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        short = model(batch)
    short.loss.backward()
    assert short.loss.dtype == torch.float32
    torch.testing.assert_close(short.loss, exact.loss, rtol=0.01, atol=0.0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    off = torch.cat([(p.grad - gradients[name]).flatten() for name, p in model.named_parameters()]).norm()
    assert 0 < off < 0.1 * torch.cat([g.flatten() for g in gradients.values()]).norm()


def test_unknown_models_are_named():
    with pytest.raises(ConfigError, match="'scvi'"):
        model_class("scvii")


def test_cells_without_a_label_have_a_dispersion_of_their_own(make_schema, make_batch):
    cls = model_class("scvi")
    model = cls(make_schema(labels=2), cls.Config(dispersion="gene-label"))
    batch = make_batch(model.schema)
    unlabelled = dataclasses.replace(batch, labels=np.full(batch.n_cells, -1))
    without = dataclasses.replace(batch, labels=np.zeros(0, np.int64))
    assert torch.equal(model(unlabelled).loss, model(without).loss)
    model(unlabelled).loss.backward()
    assert [bool(row.abs().max() > 0) for row in model.px_r.grad] == [False, False, True]
    with pytest.raises(ConfigError, match="labels_key"):
        cls(make_schema(), cls.Config(dispersion="gene-label"))
