"""Which cells the rows of a view are: their names and columns as in the data sets they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from numpy.typing import NDArray

from scviaduct.schema import MISSING
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.columns import DATASET
from scviaduct.storage.shards import Arrays, Slice
from scviaduct.storage.view import View, array_name


def view_obs(view: View, keys: Sequence[str] = ()) -> pd.DataFrame:
    """One row a cell in the view's order: its name, its data set, and these obs columns.

    Names get the prefix "<data set>:" when they collide, as in `Atlas.lazy`. About 100 bytes a cell.

    Raises MissingColumnError when the view has no such column.
    """
    wanted = list(dict.fromkeys([DATASET, *keys]))
    records = [view.column(key) for key in wanted]
    names = ("source/dataset", "source/row", *map(array_name, wanted))
    datasets, rows, *columns = Arrays(view.path).read(*(Slice(name, 0, view.n_rows) for name in names))
    index = _names(view, datasets, rows)
    return pd.DataFrame({k: _values(r, v) for k, r, v in zip(wanted, records, columns, strict=True)}, index=index)


def _values(record: dict[str, Any], stored: NDArray[Any]) -> Any:
    if "categories" not in record:
        return stored
    return pd.Categorical.from_codes(np.where(stored < 0, MISSING, stored), record["categories"])


def _names(view: View, datasets: NDArray[Any], rows: NDArray[Any]) -> pd.Index:
    atlas, ids = Atlas.open(view.atlas_path), view.manifest["columns"][DATASET]["categories"]
    names = np.empty(view.n_rows, object)
    for number in np.unique(datasets):
        here = np.flatnonzero(datasets == number)
        names[here] = atlas.obs(ids[number], []).index.to_numpy(object)[rows[here]]
    index = pd.Index(names).astype(str)
    if index.is_unique:
        return index
    return make_index_unique(pd.Index([f"{ids[number]}:{name}" for number, name in zip(datasets, names, strict=True)]))
