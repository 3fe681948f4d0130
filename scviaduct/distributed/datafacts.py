"""What a model must be told of its data before it trains: the library's prior, the share of labelled cells."""

from __future__ import annotations

import numpy as np
import torch

from scviaduct.models.base import Model
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import SCVI, library_prior
from scviaduct.schema import MISSING
from scviaduct.storage.loader import BlockSource, stream


def tell_data(model: Model, source: BlockSource) -> None:
    """One pass over the cells for a model that needs to know them; other models are left alone.

    A model that infers the library gets its prior for all batches that have none (16 bytes a cell for the time of the
    call). SCANVI gets the share of cells with a label; where no cell has one, as in most queries, nothing changes.

    Raises:
        ConfigError: SCANVI is to be trained, and no cell has a label.
    """
    library = isinstance(model, SCVI) and model.models_library
    if not library and not isinstance(model, SCANVI):
        return
    totals, codes, labelled = [np.zeros(0)], [np.zeros(0, np.int64)], 0
    with stream(source) as blocks:
        for batch in blocks:
            labelled += int((batch.labels != MISSING).sum())
            if library:
                cumulated = np.concatenate([[0.0], np.cumsum(batch.data, dtype=np.float64)])
                totals.append(np.diff(cumulated[batch.indptr]))
                codes.append(batch.batch_index)
    if isinstance(model, SCANVI) and (labelled or not model.query_parameters()):
        model.set_labelled_share(labelled / source.n_rows)
    if isinstance(model, SCVI) and library:
        means, variances = library_prior(np.concatenate(totals), np.concatenate(codes), len(model.schema.batch))
        unknown = torch.isnan(model.library_log_means)
        model.set_library_prior(means[unknown], variances[unknown])
