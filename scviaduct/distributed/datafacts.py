"""What a model must be told of its data before it trains: the library's prior, the share of labelled cells."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scviaduct.models.base import Model
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import SCVI, library_prior
from scviaduct.models.totalvi import TotalVI
from scviaduct.schema import MISSING
from scviaduct.storage.loader import BlockSource, stream


def tell_data(model: Model, source: BlockSource) -> None:
    """What a model needs to know of the cells; models that need nothing are left alone.

    SCANVI gets the share of cells with a label; where no cell has one, as in most queries, nothing changes. A model that
    infers the library gets its prior for all batches that have none, from one pass over the cells; so does totalVI
    the prior of its background.

    Raises:
        ConfigError: SCANVI is to be trained, and no cell has a label.
    """
    if isinstance(model, SCANVI):
        labelled = int((source.labels() != MISSING).sum())
        if labelled or not model.query_parameters():
            model.set_labelled_share(labelled / source.n_rows)
    if isinstance(model, SCVI) and model.models_library:
        means, variances = _library_prior(model, source)
        unknown = torch.isnan(model.library_log_means)
        model.set_library_prior(means[unknown], variances[unknown])
    if isinstance(model, TotalVI):
        from scviaduct.distributed.background import tell_background  # scikit-learn takes a second to load

        tell_background(model, source)


def _library_prior(model: SCVI, source: BlockSource) -> tuple[Tensor, Tensor]:
    """The prior of every batch; holds 16 bytes a cell for the time of the call."""
    totals, codes = [np.zeros(0)], [np.zeros(0, np.int64)]
    with stream(source) as blocks:
        for batch in blocks:
            cumulated = np.concatenate([[0.0], np.cumsum(batch.data, dtype=np.float64)])
            totals.append(np.diff(cumulated[batch.indptr]))
            codes.append(batch.batch_index)
    return library_prior(np.concatenate(totals), np.concatenate(codes), len(model.schema.batch))
