"""`export_model`: a bundle becomes a folder that scvi-tools loads; scvi-tools need not be installed.

    scvi.model.SCVI.load(folder, adata)            and SCANVI, TOTALVI, PEAKVI; scvi.external.POISSONVI

`adata` holds raw counts of the model's genes in their order, and the obs columns of the model under their names.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.files import whole_folder
from scviaduct.distributed.registry import ONLY_BATCH
from scviaduct.distributed.saved import NEW, SUPPORTED, read_saved
from scviaduct.errors import DataError, IncompleteError
from scviaduct.models.base import Model
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.upstream_state import upstream_state
from scviaduct.schema import Schema
from scviaduct.storage.columns import DATASET
from scviaduct.storage.places import local

VERSION = "1.4.2"
"""The scvi-tools whose layout is written."""

_OURS_ALONE = {
    *("classification_ratio", "n_samples_per_label", "labelled_batches", "adversarial_classifier"),
    *("encoder_input", "background_std"),
}
"""Options that scvi-tools gives to its training, or has in one value only."""


def export_model(bundle: Bundle | str | Path, out: str | Path) -> Path:
    """Write the model of a bundle (or of the run that made it) to the folder `out`, as scvi-tools saves one.

    Raises:
        DataError: scvi-tools has no such model, or has not an option of it.
        UnreadableFileError, IncompleteError: `bundle` is no (whole) model.
        OutputExistsError: `out` exists.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    model = bundle.model()
    weights = upstream_state(model)
    numeric = set(bundle.facts.get("imported", {}).get("numeric_categories", []))
    attributes = {
        "is_trained_": True,
        "history_": None,
        "init_params_": {"non_kwargs": _options(bundle, model), "kwargs": {"kwargs": {}}},
        "registry_": _registry(bundle, model, numeric),
        **{f"{part}_indices_": np.zeros(0, np.int64) for part in ("train", "validation", "test")},
    }
    out = local(out, "The folder").absolute()
    with whole_folder(out) as folder:
        content = {
            "model_state_dict": OrderedDict(weights),
            "var_names": np.array(model.schema.genes, object),
            "attr_dict": attributes,
        }
        torch.save(content, folder / NEW[0])
        written = read_saved(folder).weights
        if weights.keys() != written.keys() or any(not torch.equal(t, written[n]) for n, t in weights.items()):
            raise IncompleteError(f"{out / NEW[0]} does not read back as it was written; is the disk full?")
    return out


def requirements(bundle: Bundle | str | Path) -> str:
    """How scvi-tools loads the exported model, and what the cells must have; one sentence each."""
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    schema, kind = bundle.schema, _kind(bundle)
    columns = [key for key in schema.keys if key != DATASET or _batch_key(schema)]
    needed = f"raw counts of the model's {len(schema.genes):,} genes in its order"
    if columns:
        needed += f", the obs columns {', '.join(columns)}"
    if schema.proteins:
        needed += f", the proteins in obsm[{schema.proteins_key or 'protein_expression'!r}]"
    return f"scvi-tools loads it with {kind}.load(folder, adata). adata has {needed}."


def _kind(bundle: Bundle) -> str:
    """scvi-tools' name of the class."""
    return next(theirs for theirs, ours in SUPPORTED.items() if ours == bundle.name)


def _options(bundle: Bundle, model: Model) -> dict[str, Any]:
    """The options under scvi-tools' names.

    Raises:
        DataError: one of them has a value that scvi-tools has not.
    """
    config = asdict(model.config)
    options = {name: value for name, value in config.items() if name not in _OURS_ALONE}
    if config.get("encoder_input", "counts") not in ("counts", "log1p_share"):
        raise DataError(
            f"{bundle.path}: scvi-tools has no encoder_input={config['encoder_input']!r}, so this {bundle.name} cannot be exported."
        )
    if config.get("background_std") == "exp":
        options["extra_decoder_kwargs"] = {"activation_function_bg": "exp"}
    return options


def _registry(bundle: Bundle, model: Model, numeric: set[str]) -> dict[str, Any]:
    kind, fields = _kind(bundle), _fields(model, numeric)
    return {
        "scvi_version": VERSION,
        "model_name": kind,
        "setup_method_name": "setup_anndata",
        "setup_args": _setup(model, kind),
        "field_registries": fields,
        "_scvi_uuid": str(uuid.uuid4()),
    }


def _setup(model: Model, kind: str) -> dict[str, Any]:
    """Arguments of the class's setup_anndata."""
    schema = model.schema
    setup: dict[str, Any] = {
        "layer": None,
        "batch_key": _batch_key(schema),
        "categorical_covariate_keys": [c.key for c in schema.categorical] or None,
        "continuous_covariate_keys": list(schema.continuous) or None,
    }
    if kind != "PEAKVI":
        setup["size_factor_key"] = schema.size_factor
    if kind == "TOTALVI":
        return setup | {"protein_expression_obsm_key": schema.proteins_key or "protein_expression"}
    setup["labels_key"] = schema.labels.key if schema.labels else None
    return setup | ({"unlabeled_category": schema.unlabeled_category} if kind == "SCANVI" else {})


def _batch_key(schema: Schema) -> str | None:
    """None for a model that was set up without batches."""
    only = (schema.batch.key, schema.batch.categories) == (DATASET, (ONLY_BATCH,))
    return None if only else schema.batch.key


def _fields(model: Model, numeric: set[str]) -> dict[str, Any]:
    """A record of each part of the data, with its categories in the order of the weights' columns."""
    schema = model.schema
    n, batch_key = len(schema.genes), _batch_key(schema)
    batches = _mapping(schema.batch.categories, numeric=schema.batch.key in numeric) if batch_key else np.zeros(1, int)
    joint = {c.key: _mapping(c.categories, numeric=c.key in numeric) for c in schema.categorical}
    fields = {
        "X": _field(
            "X", None, {"n_obs": 0, "n_vars": n, "column_names": np.array(schema.genes, object)}, {"n_vars": n}
        ),
        "batch": _categorical("batch", batch_key, batches),
        "labels": _labels(model, numeric),
        "size_factor": _field("obs", schema.size_factor, {}, {}),
        "extra_categorical_covs": _field(
            "obsm",
            "_scvi_extra_categorical_covs" if joint else None,
            {"mappings": joint, "field_keys": list(joint), "n_cats_per_key": [len(m) for m in joint.values()]}
            if joint
            else {},
            {"n_extra_categorical_covs": len(joint)},
        ),
        "extra_continuous_covs": _field(
            "obsm",
            "_scvi_extra_continuous_covs" if schema.continuous else None,
            {"columns": np.array(schema.continuous, object)} if schema.continuous else {},
            {"n_extra_continuous_covs": len(schema.continuous)},
        ),
    }
    if schema.proteins:
        fields["proteins"] = _proteins(schema)
    return fields


def _field(attribute: str, key: str | None, state: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    """One field; an empty one has no place in the data."""
    there = {} if key is None and attribute != "X" else {"attr_name": attribute, "attr_key": key}
    return {"data_registry": there, "state_registry": state, "summary_stats": stats}


def _categorical(name: str, key: str | None, mapping: NDArray[Any]) -> dict[str, Any]:
    state = {"categorical_mapping": mapping, "original_key": key or f"_scvi_{name}"}
    return _field("obs", f"_scvi_{name}", state, {f"n_{name}": len(mapping)})


def _labels(model: Model, numeric: set[str]) -> dict[str, Any]:
    """The unlabelled category comes last, as scvi-tools' SCANVI has it."""
    schema = model.schema
    if schema.labels is None or schema.proteins:
        return _categorical("labels", None, np.zeros(1, int))
    names = (*schema.labels.categories, schema.unlabeled_category)
    field = _categorical("labels", schema.labels.key, _mapping(names, numeric=schema.labels.key in numeric))
    if isinstance(model, SCANVI):
        field["state_registry"]["unlabeled_category"] = schema.unlabeled_category
    return field


def _mapping(names: tuple[str, ...], *, numeric: bool) -> NDArray[Any]:
    """Categories as the obs column has them: text, or the numbers they were in an imported file."""
    if not numeric:
        return np.array(names, object)
    try:
        numbers = np.array([float(name) for name in names])
    except ValueError:
        return np.array(names, object)
    return numbers.astype(np.int64) if bool((numbers == np.floor(numbers)).all()) else numbers


def _proteins(schema: Schema) -> dict[str, Any]:
    measured = np.array(schema.measured, bool)
    state: dict[str, Any] = {"column_names": list(schema.proteins)}
    if not measured.all():
        state["protein_batch_mask"] = {str(b): row for b, row in enumerate(measured)}
    return _field("obsm", schema.proteins_key or "protein_expression", state, {"n_proteins": len(schema.proteins)})
