"""Whether an imported model computes what scvi-tools computes, shown with the module of the installed scvi-tools.

The file is not loaded by scvi-tools, which would run what is in it. Its module is made with the file's options, gets the
weights that were read, all of them, and sees the same cells as ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scviaduct.distributed.registry import Registry, options_of
from scviaduct.distributed.saved import Saved
from scviaduct.errors import ConfigError, DataError
from scviaduct.models.base import Model
from scviaduct.models.totalvi import TotalVI
from scviaduct.schema import Batch, Schema

TOLERANCE = 1e-4
"""Largest difference of a latent mean, over the largest one, between equal models in float32."""

_MODULES = {"SCVI": "VAE", "SCANVI": "SCANVAE", "TOTALVI": "TOTALVAE", "PEAKVI": "PEAKVAE", "POISSONVI": "VAE"}
_OF_THE_MODEL = {
    *("use_cuda", "use_gpu", "unlabeled_category", "pretrained_model", "datamodule", "registry"),
    *("empirical_protein_background_prior", "override_missing_proteins"),
}
"""Options that scvi-tools' model classes keep from their modules."""


def prove(saved: Saved, registry: Registry, model: Model, cells: Batch | None = None) -> float:
    """Largest difference of the latent means, over the largest mean, between ours and scvi-tools' module.

    Args:
        saved: the file.
        registry: of it.
        model: what was made of it.
        cells: cells to compare on; random counts when None.

    Raises:
        ConfigError: scvi-tools is not installed, or has no such model.
        DataError: the two differ, or scvi-tools does not take the weights.
    """
    if saved.kind not in _MODULES:
        raise ConfigError(f"A {saved.kind} of scArches cannot be verified: scvi-tools has no such model.")
    try:
        modules = importlib.import_module("scvi.module")
    except ImportError as error:
        raise ConfigError("To verify an import, scvi-tools is needed: pip install scvi-tools.") from error
    theirs = _module(getattr(modules, _MODULES[saved.kind]), saved, registry, model.schema)
    cells = cells if cells is not None else random_cells(model.schema)
    mean = model.encode(cells).mean.detach()
    with torch.no_grad():
        other = _latent(theirs, model, cells)
    difference = float((mean - other).abs().max() / other.abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCE:
        raise DataError(
            f"{saved.path}: the imported model's latent means differ from scvi-tools' by {difference:.2g} of the largest. "
            "Nothing was written. Please report this, with the class and its scvi-tools version "
            f"({saved.kind}, {saved.version})."
        )
    return difference


def _module(kind: Any, saved: Saved, registry: Registry, schema: Schema) -> Any:
    """The module of scvi-tools in eval mode with the file's options and weights."""
    options = {k: v for k, v in options_of(saved).items() if k not in _OF_THE_MODEL}
    sizes = _sizes(saved, registry, schema)
    if saved.kind == "POISSONVI":
        activation = {"activation_fn": torch.nn.LeakyReLU}
        sizes |= {"gene_likelihood": "poisson", "use_batch_norm": "none", "use_layer_norm": "both"}
        sizes |= {"extra_encoder_kwargs": activation, "extra_decoder_kwargs": activation}
        n_hidden = options.get("n_hidden") or int(np.sqrt(len(schema.genes)))
        options |= {"n_hidden": n_hidden, "n_latent": options.get("n_latent") or int(np.sqrt(n_hidden))}
    weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in saved.weights.items()}
    if saved.kind == "TOTALVI":
        weights.setdefault("log_per_batch_efficiency", torch.zeros(len(schema.proteins), len(schema.batch)))
    try:
        module = kind(**options | sizes)
        module.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{saved.path}: the installed scvi-tools does not take this file: {error!s:.300}") from error
    return module.eval()


def _sizes(saved: Saved, registry: Registry, schema: Schema) -> dict[str, Any]:
    """What scvi-tools' models tell their modules of the data."""
    genes = {"PEAKVI": "n_input_regions", "TOTALVI": "n_input_genes"}.get(saved.kind, "n_input")
    further: dict[str, Any] = {}
    if saved.kind == "TOTALVI":
        further = {"n_input_proteins": len(schema.proteins), "n_panel": len(schema.batch)}
    if saved.kind in ("SCVI", "SCANVI", "POISSONVI"):
        n_labels = len(registry.fields.get("labels", {}).get("categorical_mapping", [0]))
        further["n_labels"] = n_labels if saved.kind != "SCANVI" else saved.weights["y_prior"].shape[-1]
        further["use_size_factor_key"] = schema.size_factor is not None
        if "library_log_means" in saved.weights:
            further |= {n: saved.weights[n].numpy() for n in ("library_log_means", "library_log_vars")}
    return {
        genes: len(schema.genes),
        "n_batch": len(schema.batch),
        "n_continuous_cov": len(schema.continuous),
        "n_cats_per_cov": [len(c) for c in schema.categorical],
    } | further


def random_cells(schema: Schema, n_cells: int = 64, seed: int = 0) -> Batch:
    """Cells with random counts of the schema's genes, in random batches and covariates."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.3, 3.0, (n_cells, len(schema.genes)))).astype(np.float32)
    x[:, 0] += 1  # no cell without a count
    codes = [rng.integers(0, len(c), n_cells) for c in schema.categorical]
    return Batch(
        n_genes=len(schema.genes),
        indptr=np.concatenate([[0], np.cumsum((x > 0).sum(1))]).astype(np.int64),
        indices=np.nonzero(x)[1].astype(np.int32),
        data=x[x > 0],
        batch_index=rng.integers(0, len(schema.batch), n_cells),
        labels=np.full(n_cells, -1) if schema.labels else np.zeros(0, np.int64),
        categorical=np.stack(codes, 1) if codes else np.zeros((n_cells, 0), np.int64),
        continuous=rng.normal(size=(n_cells, len(schema.continuous))).astype(np.float32),
        size_factor=rng.uniform(1, 9, n_cells).astype(np.float32) if schema.size_factor else np.zeros(0, np.float32),
        proteins=rng.poisson(20.0, (n_cells, len(schema.proteins))).astype(np.float32),
        rows=np.arange(n_cells),
    )


def dense(batch: Batch) -> Tensor:
    """(cells, genes) counts."""
    x = torch.zeros(batch.n_cells, batch.n_genes)
    rows = np.repeat(np.arange(batch.n_cells), np.diff(batch.indptr))
    x[torch.from_numpy(rows), torch.from_numpy(batch.indices.astype(np.int64))] = torch.from_numpy(batch.data).float()
    return x


def _latent(module: Any, model: Model, cells: Batch) -> Tensor:
    """Means of q(z | x) by scvi-tools' module."""
    x, batch = dense(cells), torch.from_numpy(cells.batch_index).unsqueeze(1)
    given: Mapping[str, Any] = {
        "cont_covs": torch.from_numpy(cells.continuous) if model.schema.continuous else None,
        "cat_covs": torch.from_numpy(cells.categorical) if model.schema.categorical else None,
    }
    if not isinstance(model, TotalVI):
        found = module.inference(x, batch, **given)
        q = found.get("qz", found.get("qz_m"))
        return q if isinstance(q, Tensor) else q.mean
    y = torch.from_numpy(cells.proteins)
    if model.config.encoder_input == "log1p_share":
        x, y = (v / (1 + v.mean(1, keepdim=True)) for v in (x, y))
    covariates = [given["cont_covs"]] if given["cont_covs"] is not None and model.config.encode_covariates else []
    categories = list(given["cat_covs"].split(1, dim=1)) if given["cat_covs"] is not None else []
    # the encoder alone: how the module prepares its input depends on the version that is installed, not on the file
    q, _, _, _ = module.encoder(torch.cat([torch.log1p(x), torch.log1p(y), *covariates], 1), batch, *categories)
    return q.mean
