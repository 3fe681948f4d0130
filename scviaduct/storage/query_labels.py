"""Labels that a query has for some of its cells, as codes of the reference's labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from scviaduct.errors import DataError, MissingColumnError, nearest
from scviaduct.schema import MISSING, Covariate
from scviaduct.storage.columns import as_text
from scviaduct.storage.query import Query


def with_labels(query: Query, labels: Covariate, key: str, unlabeled_category: str) -> tuple[Query, str]:
    """The query with the labels of its obs column `key`, and a remark on labels that the reference does not know.

    Cells without a value, with `unlabeled_category`, or with a label that is not the reference's stay unlabelled.

    Raises:
        MissingColumnError: the query has no such column.
        DataError: no cell has a label of the reference.
    """
    if key not in query.obs.columns:
        raise MissingColumnError(f"{query.id}: obs has no column {key!r}: {nearest(key, query.obs.columns)}")
    values = as_text(query.obs[key])
    lookup = np.append(pd.Index(labels.categories).get_indexer(values.categories), MISSING)  # a missing value: the last
    codes = lookup[values.codes][query.kept].astype(np.int64)
    names = values.astype(object)[query.kept]
    strange = (codes == MISSING) & ~pd.isna(names) & (names != unlabeled_category)
    example = f"e.g. {names[strange][0]!r}" if strange.any() else ""
    if not (codes != MISSING).any():
        raise DataError(
            f"{query.id}: no cell has a label of the reference in {key!r} ({example or 'all are empty'}); "
            f"it knows {', '.join(labels.categories[:5])}, …. Rename them, or leave --labels-key out."
        )
    remark = f"{strange.sum()} cells with labels that the reference does not know ({example}) count as unlabelled."
    return replace(query, batch=replace(query.batch, labels=codes)), remark if strange.any() else ""
