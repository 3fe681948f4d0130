"""Scores of scib-metrics: does a latent space keep cell types apart and batches together?"""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.tuneconfig import TuneConfig
from scviaduct.errors import DataError
from scviaduct.schema import MISSING
from scviaduct.storage.view import View

_SPACE = "X"


def integration_scores(bundle: Bundle, atlas: str, config: TuneConfig) -> dict[str, float]:
    """scib-metrics' raw scores "total", "bio" and "batch" in [0, 1], of labelled cells that seed and view decide.

    With one batch there is nothing to correct, and the total is that of the cell types. Scores are not scaled by those
    of other models, which would change with every trial. PCR comparison is left out: it needs the cells as they were.

    Raises:
        DataError: less than two types are labelled.
    """
    latent, labels, schema = bundle.latent(), bundle.labels(), bundle.schema
    assert latent is not None and labels is not None
    batches = View.open(atlas, config.view).source(schema).strata(config.batch_key)
    rows = np.flatnonzero(labels != MISSING)
    if len(rows) > config.scib_cells:
        rows = np.sort(np.random.default_rng(config.fit.seed).choice(rows, config.scib_cells, replace=False))
    obs = pd.DataFrame({"batch": batches[rows], "label": labels[rows]}, index=rows.astype(str)).astype("category")
    if obs["label"].nunique() < 2:
        raise DataError(f"Column {config.labels_key!r} labels {len(rows)} cells of less than two types.")
    return _benchmarked(ad.AnnData(np.zeros((len(rows), 1), np.float32), obs=obs, obsm={_SPACE: latent[rows]}))


def _benchmarked(cells: ad.AnnData) -> dict[str, float]:
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    several = cells.obs["batch"].nunique() > 1
    cells.obsm["before"] = cells.obsm[_SPACE]  # asked for, and used by the PCR comparison alone
    bench = Benchmarker(
        cells,
        "batch",
        "label",
        [_SPACE],
        bio_conservation_metrics=BioConservation(isolated_labels=several),
        batch_correction_metrics=BatchCorrection(pcr_comparison=False) if several else None,
        pre_integrated_embedding_obsm_key="before",
        n_jobs=1,
        progress_bar=False,
    )
    bench.benchmark()
    found: Any = bench.get_results(min_max_scale=False).loc[_SPACE]
    bio = float(found["Bio conservation"])
    if not several:
        return {"total": bio, "bio": bio}
    return {"total": float(found["Total"]), "bio": bio, "batch": float(found["Batch correction"])}
