"""The prior of a modelled library size, from the data: mean and variance of log total counts of each batch."""

from __future__ import annotations

import numpy as np
import torch

from scviaduct.models.base import Model
from scviaduct.models.scvi import SCVI, library_prior
from scviaduct.storage.loader import BlockSource, stream


def set_library_prior(model: Model, source: BlockSource) -> None:
    """Give a model that infers the library its prior for all batches that have none; other models are left alone.

    Holds 16 bytes a cell for the time of the call.
    """
    if not isinstance(model, SCVI) or not model.models_library:
        return
    totals, codes = [], []
    with stream(source) as blocks:
        for batch in blocks:
            cumulated = np.concatenate([[0.0], np.cumsum(batch.data, dtype=np.float64)])
            totals.append(np.diff(cumulated[batch.indptr]))
            codes.append(batch.batch_index)
    means, variances = library_prior(np.concatenate(totals), np.concatenate(codes), len(model.schema.batch))
    unknown = torch.isnan(model.library_log_means)
    model.set_library_prior(means[unknown], variances[unknown])
