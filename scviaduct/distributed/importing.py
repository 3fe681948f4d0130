"""`import_model`: a model that scvi-tools or scArches saved becomes a bundle; nothing in its files is executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.loop import embedded
from scviaduct.distributed.proof import prove
from scviaduct.distributed.registry import Registry
from scviaduct.distributed.saved import read_saved
from scviaduct.distributed.translate import translate
from scviaduct.errors import DataError
from scviaduct.models.base import Model
from scviaduct.schema import MISSING, Batch, Covariate, Schema
from scviaduct.storage.columns import DATASET, as_text
from scviaduct.storage.loader import MemorySource
from scviaduct.storage.manifest import refuse_existing
from scviaduct.storage.places import local
from scviaduct.storage.query import Query, read_query

BESIDE = ("adata.h5ad", "mdata.h5mu")
"""Where scvi-tools puts the cells, when it is told to."""


def import_model(
    path: str | Path,
    *,
    out: str | Path,
    prefix: str = "",
    adata: Sequence[str | Path] = (),
    unlabeled_category: str = "Unknown",
    verify: bool = False,
) -> Bundle:
    """Make a bundle at `out` of the model that scvi-tools (SCVI, SCANVI, TOTALVI, PEAKVI, POISSONVI) or scArches (trVAE) saved.

    Without the reference's cells, queries can be mapped onto the bundle, but no labels transferred.

    Args:
        path: the folder the model was saved to, or its model.pt.
        out: the bundle to make.
        prefix: what the files' names begin with.
        adata: files with the reference's cells, embedded one at a time. Default: adata.h5ad or mdata.h5mu beside the model.
        unlabeled_category: the label that means none, for models that do not say.
        verify: compare with the installed scvi-tools, on the cells or on random counts.

    Raises:
        UnreadableFileError: files are missing, damaged, or ask for more than a saved model needs.
        DataError: the class or an option of it is none of ours, the cells are not those of the model, or it is not proven.
        ConfigError: it is to be verified, and scvi-tools is not installed.
        OutputExistsError: `out` exists.
    """
    out = refuse_existing(local(out, "The bundle").absolute())
    saved = read_saved(path, prefix)
    model, registry = translate(saved, unlabeled_category)
    beside = [saved.path / f"{prefix}{name}" for name in BESIDE]
    files = [Path(file) for file in adata] or [file for file in beside if file.is_file()][:1]
    reference, cells, why_not = _reference(model, registry, files, must=bool(adata))
    facts = {
        "model": saved.model,
        "name": out.name,
        "training": {
            "cells": registry.n_cells,
            "epochs": 0,
            "best_epoch": 0,
            "history": [],
            "config": None,
            "view_digest": "",
            "mlflow_run": "",
        },
        "imported": {
            "from": f"{saved.kind} of {'scvi-tools ' + saved.version if saved.version else 'scArches'}",
            "files": saved.files,
            "reference": [file.name for file in files] if reference else [],
            "without_reference": why_not,
            "numeric_categories": registry.numeric,
            "largest_difference": prove(saved, registry, model, cells) if verify else None,
        },
    }
    return Bundle.save(out, model, facts, reference)


Reference = dict[str, NDArray[Any]]


def _reference(
    model: Model, registry: Registry, files: Sequence[Path], *, must: bool
) -> tuple[Reference, Batch | None, str]:
    """Latents and labels of the cells in `files`, some of the cells, and why there are none."""
    if not files:
        return {}, None, "no file with the reference's cells was given"
    layer = registry.setup.get("rna_layer", registry.setup.get("layer"))
    parts: list[Reference] = []
    try:
        for file in files:
            query = _read(model.schema, file, layer if isinstance(layer, str) else "X")
            parts.append(_embedded(model, query))
    except DataError as error:
        if must:
            raise
        return {}, None, str(error)  # a file that lies there by chance: without counts, or of other cells
    reference = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return reference, MemorySource(query.batch, 512).read(0), ""


def _read(schema: Schema, file: Path, counts: str) -> Query:
    """The cells of a file in the model's genes and codes.

    Raises:
        DataError: a gene, or a category of a covariate, is not the model's.
    """
    unnamed = schema.batch.key == DATASET and len(schema.batch) == 1
    known = replace(schema, batch=Covariate(DATASET, (file.stem,))) if unnamed else schema
    # what each batch measured is the model's business; here the cells are asked for all proteins
    query = read_query(file, replace(known, measured=()), reuse_batches=True, counts=counts, floor=1.0)
    for ours, new in query.schema.added(known):
        raise DataError(
            f"{file}: {ours.key!r} has {len(new)} values that the model does not know, e.g. {new[-1]!r}; give the "
            "cells it was trained on."
        )
    found = query.proteins.matched if query.proteins else 0
    if found < len(schema.proteins):
        raise DataError(
            f"{file}: obsm[{schema.proteins_key!r}] has {found} of the model's {len(schema.proteins)} proteins, e.g. not "
            f"all of {', '.join(schema.proteins[:3])}; give the cells it was trained on."
        )
    return query


def _embedded(model: Model, query: Query) -> Reference:
    latent = embedded(model, MemorySource(query.batch))
    labels = model.schema.labels
    if labels is None or labels.key not in query.obs:
        return {"latent": latent} | ({} if labels is None else {"labels": np.full(len(latent), MISSING, np.int32)})
    text = as_text(query.obs[labels.key])
    place = {name: code for code, name in enumerate(labels.categories)}
    lookup = np.array([*(place.get(name, MISSING) for name in text.categories), MISSING], np.int32)
    return {"latent": latent, "labels": lookup[text.codes][query.kept]}
