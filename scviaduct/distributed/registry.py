"""What scvi-tools and scArches files say of the data, as a Schema: genes, covariates and their categories in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scviaduct.distributed.saved import Saved
from scviaduct.distributed.torchfile import as_text
from scviaduct.errors import DataError
from scviaduct.schema import Covariate, Schema
from scviaduct.storage.beside import PROTEIN_EXPRESSION
from scviaduct.storage.columns import DATASET

ONLY_BATCH = "reference"
"""Name of the batch of a model that was set up without batch_key."""

_OLD_NAMES = {"batch_indices": "batch", "labels": "labels", "protein_expression": "proteins"}


@dataclass(frozen=True)
class Registry:
    """scvi-tools' record of the data, the old and the new form alike."""

    where: str
    setup: dict[str, Any]
    """Arguments of setup_anndata."""
    fields: dict[str, dict[str, Any]]
    """State of each field that is not empty, e.g. fields["batch"]["categorical_mapping"]."""
    modality: str | None = None
    """Where the genes are, in a model of a MuData."""
    size_factor: str | None = None
    """obs column of the size factors."""
    proteins_key: str | None = None
    """obsm element of the proteins; of a MuData what storage calls their modality."""
    n_cells: int = 0
    unlabeled: str | None = None
    numeric: list[str] = field(default_factory=list)
    """Columns whose categories are numbers, not text."""

    def categories(self, mapping: Any, key: str) -> tuple[str, ...]:
        """A column's categories as text, in the order of their codes.

        Raises:
            DataError: there are none, or two that are the same as text.
        """
        names = tuple(as_text(mapping))
        if not names or len(set(names)) < len(names):
            raise DataError(f"{self.where}: the categories of {key!r} in its registry are missing or not different.")
        if isinstance(mapping, np.ndarray) and not any(isinstance(x, str) for x in mapping.tolist()):
            self.numeric.append(key)
        return names


def read_registry(saved: Saved) -> Registry:
    """The registry of a scvi-tools file of any age.

    Raises:
        DataError: the file has none, or one that lacks its fields.
    """
    old, new = saved.attributes.get("scvi_setup_dict_"), saved.attributes.get("registry_")
    where = str(saved.path)
    if isinstance(new, Mapping) and isinstance(new.get("field_registries"), Mapping):
        return _new(new, where)
    if isinstance(old, Mapping):
        return _old(old, saved.attributes, where)
    raise DataError(f"{where}: its registry has no field_registries; save the model again with a newer scvi-tools.")


def _new(record: Mapping[str, Any], where: str) -> Registry:
    registries = {str(k): v for k, v in record["field_registries"].items() if isinstance(v, Mapping)}
    fields = {k: v["state_registry"] for k, v in registries.items() if isinstance(v.get("state_registry"), Mapping)}
    at = {name: registries.get(name, {}).get("data_registry") or {} for name in ("X", "proteins", "size_factor")}
    setup = record.get("setup_args")
    cells = fields.get("X", {}).get("n_obs", fields.get("X", {}).get("n_cells", 0))
    return Registry(
        where=where,
        setup=dict(setup) if isinstance(setup, Mapping) else {},
        fields={name: dict(state) for name, state in fields.items() if state},
        modality=_word(at["X"].get("mod_key")),
        size_factor=_word(at["size_factor"].get("attr_key")),
        proteins_key=PROTEIN_EXPRESSION if at["proteins"].get("mod_key") else _word(at["proteins"].get("attr_key")),
        n_cells=int(cells) if isinstance(cells, int | np.integer) else 0,
        unlabeled=_word(fields.get("labels", {}).get("unlabeled_category")),
    )


def _old(record: Mapping[str, Any], attributes: Mapping[str, Any], where: str) -> Registry:
    """scvi_setup_dict_, of scvi-tools before 0.15."""
    fields: dict[str, dict[str, Any]] = {}
    mappings = record.get("categorical_mappings", {})
    for old, entry in record.get("data_registry", {}).items():
        mapped = mappings.get(entry.get("attr_key"))
        if old in _OLD_NAMES and mapped:
            fields[_OLD_NAMES[old]] = {
                "categorical_mapping": mapped["mapping"],
                "original_key": mapped["original_key"],
            }
    if "extra_categoricals" in record:
        extra = record["extra_categoricals"]
        fields["extra_categorical_covs"] = {"mappings": extra["mappings"], "field_keys": extra["keys"]}
    if "extra_continuous_keys" in record:
        fields["extra_continuous_covs"] = {"columns": record["extra_continuous_keys"]}
    if "protein_names" in record:
        fields["proteins"] = {"column_names": record["protein_names"]}
        if "totalvi_batch_mask" in record:
            fields["proteins"]["protein_batch_mask"] = record["totalvi_batch_mask"]
    cells = record.get("summary_stats", {}).get("n_cells", 0)
    x = record.get("data_registry", {}).get("X", {})
    return Registry(
        where=where,
        setup={"layer": x.get("attr_key")} if x.get("attr_name") == "layers" else {},
        fields=fields,
        proteins_key=_word(record.get("data_registry", {}).get("protein_expression", {}).get("attr_key")),
        n_cells=int(cells) if isinstance(cells, int | np.integer) else 0,
        unlabeled=_word(attributes.get("unlabeled_category_")),
    )


def _word(value: Any) -> str | None:
    return as_text([value])[0] if as_text([value]) and value is not None else None


def schema_of(saved: Saved, registry: Registry, n_labels: int | None, unlabeled: str) -> Schema:
    """The Schema of a scvi-tools file.

    Args:
        saved: the file's content.
        registry: of it.
        n_labels: how many labels the classifier tells apart; None for models without one.
        unlabeled: the label that means none, for models that do not say.

    Raises:
        DataError: the registry lacks what a Schema needs, or has what we have not.
    """
    genes = saved.genes.get(registry.modality, []) if isinstance(saved.genes, dict) else saved.genes
    if not genes or len(set(genes)) < len(genes):
        raise DataError(f"{registry.where}: var_names are missing, or {len(genes) - len(set(genes))} of them repeat.")
    labels, unlabeled = _labels(registry, n_labels, registry.unlabeled or unlabeled)
    batch = _batch(registry)
    proteins, measured = _proteins(saved, registry, len(batch)) if saved.kind == "TOTALVI" else ((), ())
    return Schema(
        genes=tuple(genes),
        batch=batch,
        labels=labels,
        unlabeled_category=unlabeled,
        categorical=_categorical(registry),
        continuous=tuple(as_text(registry.fields.get("extra_continuous_covs", {}).get("columns", []))),
        size_factor=registry.size_factor,
        proteins_key=registry.proteins_key if proteins else None,
        proteins=proteins,
        measured=measured,
    )


def _batch(registry: Registry) -> Covariate:
    state = registry.fields.get("batch", {})
    key = _word(state.get("original_key")) or "_scvi_batch"
    if key.startswith("_scvi_"):
        return Covariate(DATASET, (ONLY_BATCH,))
    return Covariate(key, registry.categories(state.get("categorical_mapping"), key))


def _labels(registry: Registry, n_labels: int | None, unlabeled: str) -> tuple[Covariate | None, str]:
    """Labels without the unlabelled category, in the order of the classifier's outputs."""
    state = registry.fields.get("labels", {})
    key = _word(state.get("original_key")) or "_scvi_labels"
    if key.startswith("_scvi_"):
        return None, unlabeled
    names = list(registry.categories(state.get("categorical_mapping"), key))
    if unlabeled in names and n_labels is not None:  # scvi-tools gives the unlabelled category the last place
        at = names.index(unlabeled)
        names[at], names[-1] = names[-1], names[at]
    known = [name for name in names if name != unlabeled]
    if n_labels is not None and len(known) != n_labels:
        raise DataError(
            f"{registry.where}: the classifier has {n_labels} outputs, the registry {len(known)} labels besides "
            f"{unlabeled!r}. Such files come of queries without an unlabelled cell; import the reference instead."
        )
    return (Covariate(key, tuple(known)) if known else None), unlabeled


def _categorical(registry: Registry) -> tuple[Covariate, ...]:
    state = registry.fields.get("extra_categorical_covs", {})
    mappings = state.get("mappings", {})
    return tuple(
        Covariate(key, registry.categories(mappings.get(key), key)) for key in as_text(state.get("field_keys", []))
    )


def _proteins(saved: Saved, registry: Registry, n_batches: int) -> tuple[tuple[str, ...], tuple[tuple[bool, ...], ...]]:
    """Names of the proteins, and which each batch measures: those scvi-tools found a count of in it."""
    if registry.setup.get("panel_key") is not None:
        raise DataError(
            f"{registry.where}: it was set up with panel_key, which cannot be imported; its batches must be the panels."
        )
    state = registry.fields.get("proteins", {})
    names = as_text(state.get("column_names", saved.genes.get("protein") if isinstance(saved.genes, dict) else []))
    mask = state.get("protein_batch_mask")
    everything = np.ones(len(names), bool)
    if isinstance(mask, Mapping):  # after load_query_data it has the query's batches only
        mask = [mask.get(str(b), everything) for b in range(n_batches)]
    if mask is None or options_of(saved).get("override_missing_proteins"):
        mask = [everything] * n_batches
    rows = [np.asarray(row, bool) for row in mask if isinstance(row, np.ndarray | list)]
    if not names or len(rows) != n_batches or any(row.shape != (len(names),) for row in rows):
        raise DataError(f"{registry.where}: its registry lacks the proteins' names, or which batch measures which.")
    return tuple(names), tuple(tuple(map(bool, row)) for row in rows)


def options_of(saved: Saved) -> dict[str, Any]:
    """The options the model was made with, the old and the new form alike."""
    made_with = saved.attributes.get("init_params_")
    if not isinstance(made_with, Mapping):
        raise DataError(f"{saved.path}: it lacks init_params_, the options the model was made with.")
    if "non_kwargs" in made_with:
        own, further = made_with["non_kwargs"], made_with.get("kwargs", {})
    else:
        own = {k: v for k, v in made_with.items() if not isinstance(v, Mapping)}
        further = {k: v for k, v in made_with.items() if isinstance(v, Mapping)}
    return dict(own) | {name: value for group in further.values() for name, value in group.items()}
