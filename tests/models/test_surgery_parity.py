"""Surgery against scvi-tools' own `load_query_data`: the same new columns, the same steps, the same latents.

With the settings under which scvi-tools leaves the reference alone: batch is the one covariate (else its new columns are in
the wrong places), the query's batches are new, weight decay is 0, dropout and the decoder's batch norms are frozen, and so
are those of SCANVI's classifier, which scvi-tools trains in spite of `freeze_classifier` ("classifier.0.fc_layers" has the
".0." by which it knows a linear map). What ours does where these do not hold is in test_surgery.
"""

import dataclasses
import importlib
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from scviaduct.models import model_class
from scviaduct.models.scvi import PRESETS
from scviaduct.models.surgery import extend, report
from scviaduct.models.upstream import load_totalvi, load_upstream
from scviaduct.models.upstream_peaks import load_peakvi
from scviaduct.schema import Batch, Covariate, Schema
from tests.models.test_parity import Given, close, draw_by_hand, randomise

CELLS, GENES, LABELS, PROTEINS = 102, 30, 3, 5
OLD, NEW, KL_WEIGHT = ("a", "b", "c"), ("x", "y"), 0.37
SCARCHES = {k: v for k, v in PRESETS["scarches"].items() if k != "dropout_rate"}
ENCODED = {"encode_covariates": True}
CASES = {
    "SCVI, scarches": ("SCVI", "scvi", SCARCHES),
    "SCVI, deep, batch norm": ("SCVI", "scvi", ENCODED | {"n_layers": 2, "gene_likelihood": "nb"}),
    "SCVI, defaults": ("SCVI", "scvi", {}),
    "SCANVI": ("SCANVI", "scanvi", SCARCHES),
    "SCANVI, batch norm": ("SCANVI", "scanvi", ENCODED),
    "totalVI": ("TOTALVI", "totalvi", {"n_hidden": 32}),
    "PeakVI": ("PEAKVI", "peakvi", ENCODED | {"n_hidden": 12, "n_latent": 4}),
    "PeakVI, deep": ("PEAKVI", "peakvi", ENCODED | {"n_hidden": 12, "n_latent": 4, "deeply_inject_covariates": True}),
    "PoissonVI": ("POISSONVI", "poissonvi", ENCODED | {"n_hidden": 12, "n_latent": 4}),
}
LOAD = {"totalvi": load_totalvi, "peakvi": load_peakvi}


@pytest.fixture(autouse=True)
def quiet():
    """scvi-tools warns of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cells_of(batches, seed):
    """An AnnData and what is beside its counts."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.5, 2.0, (CELLS, GENES))).astype(np.float32)
    x[:, 0] += 1
    types = np.array([f"t{k}" for k in range(LABELS)])[np.arange(CELLS) % LABELS]
    names = [f"cell{i}" for i in range(CELLS)]
    obs = pd.DataFrame({"batch": np.array(batches)[np.arange(CELLS) % len(batches)], "type": types}, index=names)
    data = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{k}" for k in range(GENES)]))
    data.obsm["adt"] = rng.poisson(20, (CELLS, PROTEINS)).astype(np.float32) + 1
    return data


def tensors_of(model, data):
    """scvi-tools' own minibatch of all cells."""
    return next(iter(model._make_data_loader(adata=data, batch_size=CELLS)))


def batch_of(data, tensors, kind):
    x = np.asarray(data.X)
    return Batch(
        n_genes=GENES,
        indptr=np.concatenate([[0], np.cumsum((x > 0).sum(1))]).astype(np.int64),
        indices=np.nonzero(x)[1].astype(np.int32),
        data=x[x > 0],
        batch_index=tensors["batch"].squeeze(1).numpy().astype(np.int64),
        labels=tensors["labels"].squeeze(1).numpy().astype(np.int64) if kind == "scanvi" else np.zeros(0, np.int64),
        proteins=data.obsm["adt"] if kind == "totalvi" else np.zeros((CELLS, 0), np.float32),
        rows=np.arange(CELLS),
        seeds=np.arange(CELLS, dtype=np.uint64),
    )


def schema_of(kind):
    with_proteins = kind == "totalvi"
    return Schema(
        genes=tuple(f"g{k}" for k in range(GENES)),
        batch=Covariate("batch", OLD),
        labels=Covariate("type", tuple(f"t{k}" for k in range(LABELS))) if kind == "scanvi" else None,
        proteins=tuple(f"p{k}" for k in range(PROTEINS)) if with_proteins else (),
        measured=((True,) * PROTEINS,) * len(OLD) if with_proteins else (),
    )


@pytest.fixture(params=CASES, ids=list(CASES))
def query(request, monkeypatch):
    """A query of ours and of theirs, of references with the same weights, with their start of the new columns."""
    name, kind, options = CASES[request.param]
    scvi = pytest.importorskip("scvi")
    theirs = getattr(importlib.import_module("scvi.external" if name == "POISSONVI" else "scvi.model"), name)
    scvi.settings.seed = 0
    keys = {"scanvi": {"labels_key": "type", "unlabeled_category": "none"}}
    keys |= {"totalvi": {"protein_expression_obsm_key": "adt"}}
    reference_cells, query_cells = cells_of(OLD, 0), cells_of(NEW, 1)
    theirs.setup_anndata(reference_cells, batch_key="batch", **keys.get(kind, {}))
    rates = ("dropout_rate_encoder", "dropout_rate_decoder") if kind == "totalvi" else ("dropout_rate",)
    their_reference = theirs(reference_cells, **dict.fromkeys(rates, 0.0), **options)
    randomise(their_reference.module)
    their_query = theirs.load_query_data(
        query_cells, their_reference, freeze_dropout=True, freeze_batchnorm_decoder=True
    )
    for key, parameter in their_query.module.named_parameters():
        parameter.requires_grad &= not (key.startswith("classifier.") and ".1." in key)
    load, cls = LOAD.get(kind, load_upstream), model_class(kind)
    config = cls.Config(**dict.fromkeys(rates, 0.0), **options)
    reference = cls(schema_of(kind), config)
    load(reference, their_reference.module.state_dict())
    measured = {"measured": ((True,) * PROTEINS,) * 5} if kind == "totalvi" else {}
    schema = dataclasses.replace(reference.schema, batch=reference.schema.batch.extended(NEW), **measured)
    ours = extend(reference, schema).train()
    pair = SimpleNamespace(ours=ours, theirs=their_query.module, kind=kind, load=load, patch=monkeypatch)
    with torch.no_grad():
        for name, start in new_rows(pair, their_query.module.state_dict()).items():
            ours.get_parameter(name).copy_(start)
    pair.tensors = tensors_of(their_query, query_cells)
    pair.batch = batch_of(query_cells, pair.tensors, kind)
    pair.reference, pair.reference_batch = (
        reference,
        batch_of(reference_cells, tensors_of(their_reference, reference_cells), kind),
    )
    return pair


def new_rows(pair, state):
    """What a state of theirs has for our parameters, brought into our layout by the importer itself."""
    whole = type(pair.ours)(pair.ours.schema, pair.ours.config)
    pair.load(whole, state)
    rows = whole.state_dict()
    return {name: rows[name.removesuffix("new") + "weight"][len(OLD) :] for name, _ in pair.ours.named_parameters()}


def both_losses(pair, step):
    """The same draws for both, in each model's own order (see the models' parity tests)."""
    generator = torch.Generator().manual_seed(step)
    latent, n = pair.ours.config.n_latent, pair.batch.n_cells
    z, z2 = (torch.randn(n, w, generator=generator) for w in (latent, LABELS * latent))
    background = torch.randn(n, PROTEINS, generator=generator)
    by_label = z2.reshape(n, LABELS, latent).transpose(0, 1).reshape(LABELS * n, latent)
    theirs = {"scanvi": [z, by_label, z], "totalvi": [z, torch.zeros(n, 1), background]}.get(pair.kind, [z])
    ours = {"scanvi": [z, z2], "totalvi": [z, background]}.get(pair.kind, [z])
    draw_by_hand(pair)[:] = [t.clone() for t in theirs]
    labelled = {"labelled_tensors": pair.tensors, "classification_ratio": 50.0} if pair.kind == "scanvi" else {}
    loss = pair.theirs(pair.tensors, loss_kwargs={"kl_weight": KL_WEIGHT} | labelled)[2].loss
    scale = n if pair.kind == "peakvi" else 1  # scvi-tools' PEAKVAE sums where ours takes the mean
    return scale**2 * pair.ours(pair.batch, kl_weight=KL_WEIGHT / scale, noise=Given(*ours)).loss, loss


@pytest.mark.parity("surgery")
def test_a_query_takes_the_same_twenty_steps(query):
    pair = query
    ours_only = [p for n, p in pair.ours.named_parameters() if n.startswith(("log_efficiency", "px_r", "py_r"))]
    for p in ours_only:
        p.requires_grad_(False)  # theirs leaves them at their random start
    options = {"lr": 1e-2, "eps": 0.01, "weight_decay": 0.0}
    mine = torch.optim.Adam([p for p in pair.ours.parameters() if p.requires_grad], **options)
    other = torch.optim.Adam([p for p in pair.theirs.parameters() if p.requires_grad], **options)
    start = {name: p.detach().clone() for name, p in pair.ours.named_parameters()}
    for step in range(20):
        for optimizer, loss in zip((mine, other), both_losses(pair, step), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    close(*both_losses(pair, 20), rtol=1e-4)
    for name, rows in new_rows(pair, pair.theirs.state_dict()).items():
        close(pair.ours.get_parameter(name), rows, rtol=1e-3, atol=1e-4)
        assert torch.equal(rows, start[name]) == (not pair.ours.get_parameter(name).requires_grad), name
    draw_by_hand(pair)[:] = [torch.zeros(CELLS, w) for w in (pair.ours.config.n_latent, 1)]
    inference = pair.theirs.inference(**pair.theirs._get_inference_input(pair.tensors))
    close(pair.ours.encode(pair.batch).mean, inference["qz"].loc, rtol=1e-4, atol=1e-4)
    assert set(report(pair.reference, pair.ours).values()) == {0.0}
    same = pair.reference.encode(pair.reference_batch).mean
    assert torch.equal(pair.ours.encode(pair.reference_batch).mean, same)
