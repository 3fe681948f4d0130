"""A file of scvi-tools or scArches as one of our models: its options, its Schema, its weights.

What changed between scvi-tools' versions, and how a file tells:

* totalVI's encoder saw log1p(x) until 1.3.0, log1p(x / (1 + mean)) since 1.3.1, when `log_per_batch_efficiency` came: a file
  of before 1.3 or without that tensor saw log1p(x). (convert_legacy_save adds the tensor, and scvi-tools then gives such a
  model the other input.)
* totalVI's background had exp for softplus until 1.1, by the version.
* SCANVI's classifier gave probabilities until 1.0, logits since: the weights mean the same.
* Columns of the weights are in the order of the categories in the file's registry, also after `load_query_data`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scviaduct.distributed.registry import ONLY_BATCH, Registry, options_of, read_registry, schema_of
from scviaduct.distributed.saved import Saved
from scviaduct.distributed.torchfile import as_text
from scviaduct.errors import ConfigError, DataError
from scviaduct.models import model_class
from scviaduct.models.base import Model
from scviaduct.schema import Covariate, Schema
from scviaduct.storage.columns import DATASET

_NO_MATTER = {
    *("use_cuda", "use_gpu", "unlabeled_category", "pretrained_model", "datamodule", "registry", "labels_key"),
    *(
        "extra_payload_autotune",
        "empirical_protein_background_prior",
        "override_missing_proteins",
        "batch_embedding_kwargs",
    ),
}
"""Options that say nothing of what the trained model computes."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "log_variational": (True,),
    "latent_distribution": ("normal",),
    "use_observed_lib_size": (True,),
    "batch_representation": ("one-hot",),
    "use_labels_groups": (False,),
    "labels_groups": (None,),
    "y_prior": (None,),
    "var_activation": (None,),
    "extra_encoder_kwargs": (None, {}),
    "extra_decoder_kwargs": (None, {}),
    "classifier_parameters": (None, {}, {"logits": True}),
}
"""Options of scvi-tools that all or some of ours have in one value only."""

_TRVAE = {
    "hidden_layer_sizes_": "hidden_layer_sizes",
    "latent_dim_": "n_latent",
    "dr_rate_": "dropout_rate",
    "recon_loss_": "recon_loss",
    "use_mmd_": "use_mmd",
    "mmd_on_": "mmd_on",
    "mmd_boundary_": "mmd_boundary",
    "beta_": "beta",
}
"""Attributes of scArches' trVAE, and our names of these options."""


def translate(saved: Saved, unlabeled: str) -> tuple[Model, Registry]:
    """The model in eval mode, and the registry it was made of.

    Raises:
        DataError: the class, an option or a covariate of it is none of ours, or the file contradicts itself.
    """
    kind = model_class(saved.model)
    if saved.kind == "trVAE":
        schema, options = _trvae_schema(saved), _trvae_options(saved)
        registry = Registry(str(saved.path), {}, {})
    else:
        _refuse_ancient(saved)
        registry, schema = _data_of(saved, unlabeled)
        options = _options(saved, {f.name for f in fields(kind.Config)}, schema)
    weights = _weights(saved, registry, schema, options)
    config = _config(kind, options, saved)
    _refuse_larger(kind, schema, config, saved)
    model = kind(schema, config)
    _load(model, weights, saved)
    return model.eval(), registry


def _data_of(saved: Saved, unlabeled: str) -> tuple[Registry, Schema]:
    """The registry and the Schema; DataError when it is not built like one of scvi-tools."""
    y_prior = saved.weights.get("y_prior")
    try:
        registry = read_registry(saved)
        return registry, schema_of(saved, registry, None if y_prior is None else y_prior.shape[-1], unlabeled)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{saved.path}: its registry is not built as scvi-tools builds them ({type(error).__name__}: {error!s:.100})."
        ) from error


def _refuse_ancient(saved: Saved) -> None:
    version = version_of(saved)
    if (0, 0) < version < (0, 8):
        raise DataError(
            f"{saved.path} was saved by scvi-tools {saved.version}, whose models were others; from 0.8 on they can be imported."
        )


def version_of(saved: Saved) -> tuple[int, int]:
    """Major and minor version of scvi-tools; (0, 0) when the file does not say."""
    found = re.match(r"(\d+)\.(\d+)", saved.version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _options(saved: Saved, known: set[str], schema: Schema) -> dict[str, Any]:
    """The options of our Config.

    Raises:
        DataError: the file has an option, or a value of it, that changes the model and is none of ours.
    """
    given, options = options_of(saved), dict[str, Any]()
    decoder = given.get("extra_decoder_kwargs") if saved.kind == "TOTALVI" else None
    if isinstance(decoder, Mapping) and set(decoder) == {"activation_function_bg"}:
        options["background_std"] = decoder["activation_function_bg"]
        given = given | {"extra_decoder_kwargs": None}
    for name, value in given.items():
        if name in known and name not in _NO_MATTER:
            options[name] = _scalar(saved, name, value)
        elif name not in _NO_MATTER and not any(_same(value, fixed) for fixed in _FIXED.get(name, ())):
            shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
            raise DataError(
                f"{saved.path}: this {saved.kind} was made with {name}={shown:.60}, which {saved.model} has not; "
                "it cannot be imported."
            )
    if saved.kind == "TOTALVI":
        options |= _age_of_totalvi(saved, options)
    if options.get("dispersion") == "gene-label" and schema.labels is None:
        options["dispersion"] = "gene"  # with one label for all cells
    if options.get("dispersion") == "gene-label" and saved.kind == "SCANVI":
        raise DataError(
            f"{saved.path}: a SCANVI with dispersion='gene-label' has no dispersions: scvi-tools makes none for it."
        )
    return options


def _config(kind: type[Model], options: dict[str, Any], saved: Saved) -> Any:
    """DataError for a value that the Config refuses."""
    try:
        return kind.Config(**options)
    except (ConfigError, TypeError) as error:
        raise DataError(f"{saved.path}: this {saved.kind} cannot be imported: {error}") from error


def _scalar(saved: Saved, name: str, value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, str | int | float | None):
        raise DataError(f"{saved.path}: the option {name} is a {type(value).__name__}, not a number or text.")
    return value


def _same(value: Any, fixed: Any) -> bool:
    """Equality of scalars and of dicts of scalars, whatever else the file has there."""
    if isinstance(value, Mapping) and isinstance(fixed, Mapping):
        return value.keys() == fixed.keys() and all(_same(value[k], fixed[k]) for k in fixed)
    return type(value) is type(fixed) and value == fixed


def _age_of_totalvi(saved: Saved, options: Mapping[str, Any]) -> dict[str, Any]:
    version, default = version_of(saved), "exp" if version_of(saved) < (1, 2) else "softplus"
    shares = version >= (1, 3) and "log_per_batch_efficiency" in saved.weights
    return {
        "encoder_input": "log1p_share" if shares else "log1p",
        "background_std": options.get("background_std", default),
        "adversarial_classifier": False,  # the file has none: it belongs to the training
    }


def _trvae_schema(saved: Saved) -> Schema:
    conditions = tuple(as_text(saved.attributes.get("conditions_", [])))
    key = as_text(
        [saved.attributes.get("condition_key_")] if saved.attributes.get("condition_key_") is not None else []
    )
    if not saved.genes or len(set(saved.genes)) < len(saved.genes):
        raise DataError(f"{saved.path}: var_names are missing or repeat.")
    batch = Covariate(key[0], conditions) if key and conditions else Covariate(DATASET, (ONLY_BATCH,))
    return Schema(genes=tuple(saved.genes), batch=batch)


def _trvae_options(saved: Saved) -> dict[str, Any]:
    there = saved.attributes
    missing = sorted(name for name in _TRVAE if name not in there)
    if missing:
        raise DataError(f"{saved.path}: this trVAE lacks its option {missing[0]}.")
    widths = there["hidden_layer_sizes_"]
    if not isinstance(widths, list | tuple) or not all(type(w) is int for w in widths):
        raise DataError(f"{saved.path}: hidden_layer_sizes_ is no list of numbers.")
    options = {
        ours: _scalar(saved, name, there[name]) for name, ours in _TRVAE.items() if name != "hidden_layer_sizes_"
    }
    # scArches' use_bn goes before its use_ln
    batch_norm, layer_norm = bool(there.get("use_bn_", False)), bool(there.get("use_ln_", True))
    return options | {
        "hidden_layer_sizes": tuple(widths),
        "target_sum": 0.0,
        "use_batch_norm": "both" if batch_norm else "none",
        "use_layer_norm": "both" if layer_norm and not batch_norm else "none",
    }


def _weights(saved: Saved, registry: Registry, schema: Schema, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict with what later versions added, and labels in the order of the Schema."""
    weights = dict(saved.weights)
    if saved.kind == "TOTALVI" and "background_pro_alpha" in weights:
        weights.setdefault("log_per_batch_efficiency", torch.zeros(len(schema.proteins), len(schema.batch)))
    latent_library = options.get("use_observed_lib_size") is False and schema.size_factor is None
    if latent_library and "library_log_means" not in weights:
        raise DataError(
            f"{saved.path}: it infers the library size (use_observed_lib_size=False) and lacks the prior of it, which "
            "scvi-tools before 0.14 did not save; it cannot be imported."
        )
    y_prior = weights.get("y_prior")
    if y_prior is not None and not torch.allclose(y_prior, torch.full_like(y_prior, 1.0 / y_prior.numel())):
        raise DataError(f"{saved.path}: a SCANVI with a y_prior that is not uniform cannot be imported.")
    px_r = weights.get("px_r")
    if px_r is not None and px_r.dim() == 2 and options.get("dispersion") == "gene" and px_r.shape[1] == 1:
        weights["px_r"] = px_r[:, 0]
    elif px_r is not None and options.get("dispersion") == "gene-label" and saved.kind == "SCVI" and schema.labels:
        names = registry.categories(registry.fields["labels"]["categorical_mapping"], schema.labels.key)
        last = [schema.unlabeled_category] if schema.unlabeled_category in names else []
        weights["px_r"] = px_r[:, [names.index(name) for name in (*schema.labels.categories, *last)]]
    return weights


def _refuse_larger(kind: type[Model], schema: Schema, config: Any, saved: Saved) -> None:
    """DataError for options that ask for more memory than the file has numbers."""
    with torch.device("meta"):
        wanted = sum(t.numel() for t in kind(schema, config).state_dict().values())
    held = sum(t.numel() for t in saved.weights.values())
    if wanted > 2 * held + 1000:
        raise DataError(
            f"{saved.path}: its options describe a model of {wanted:,} numbers, its weights hold {held:,}; "
            "they are not of one model."
        )


def _load(model: Model, weights: dict[str, Tensor], saved: Saved) -> None:
    try:
        _loader(saved.model)(model, weights)
    except DataError as error:
        raise DataError(f"{saved.path}: {error}") from error


def _loader(name: str) -> Callable[[Any, Mapping[str, Tensor]], None]:
    from scviaduct.models.upstream import load_totalvi, load_upstream
    from scviaduct.models.upstream_peaks import load_peakvi
    from scviaduct.models.upstream_scarches import load_trvae

    loaders: dict[str, Callable[[Any, Mapping[str, Tensor]], None]]
    loaders = {"totalvi": load_totalvi, "peakvi": load_peakvi, "trvae": load_trvae}
    return loaders.get(name, load_upstream)
