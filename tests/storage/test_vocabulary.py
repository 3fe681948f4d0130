"""Values of obs columns over all data sets, and columns that name cells."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr

from scviaduct.storage import vocabulary as module
from scviaduct.storage.vocabulary import vocabulary


def stored(path: Path, frame: pd.DataFrame) -> zarr.Group:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    frame.index = frame.index.astype(str)
    with ad.settings.override(allow_write_nullable_strings=True):
        ad.io.write_elem(group, "obs", frame, dataset_kwargs={"shards": None})
    return group["obs"]


def test_kinds_of_columns(tmp_path: Path) -> None:
    one = pd.DataFrame(
        {
            "number": [0.5, 1, 2],
            "nullable": pd.array([1, None, 2], dtype="Int64"),
            "flag": [True, False, True],
            "maybe": pd.array([True, None, False], dtype="boolean"),
            "mixed": [1, 2, 2],
            "text": ["b", "a", "b"],
            "kind": pd.Categorical(["x", None, "x"], ["unused", "x"]),
        }
    )
    two = pd.DataFrame({"mixed": ["2", "z"], "kind": ["y", "x"], "number": [1, 2]})
    frames = [stored(tmp_path / "1", one), stored(tmp_path / "2", two)]
    found, identifiers = vocabulary(frames, 5)
    assert found == {
        "flag": ["False", "True"],
        "maybe": ["False", "True"],
        "mixed": ["1", "2", "z"],
        "text": ["a", "b"],
        "kind": ["x", "y"],
    }
    assert identifiers == []


@pytest.mark.parametrize("held", [2**20, 10])
@pytest.mark.parametrize(
    ("n_obs", "n_values", "names_cells"),
    [(100, 100, False), (101, 101, True), (300, 150, False), (300, 151, True), (5000, 151, False)],
)
def test_columns_that_name_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, n_obs: int, n_values: int, names_cells: bool
) -> None:
    """More than 100 values, and more than half as many as there are cells; counted over all data sets."""
    monkeypatch.setattr(module, "_HELD", held)
    values = np.array([f"v{i}" for i in range(n_values)])
    shared, first = values[:10], values[: n_values // 2]
    frames = [
        stored(tmp_path / "1", pd.DataFrame({"c": first})),
        stored(tmp_path / "2", pd.DataFrame({"c": np.concatenate([shared, values[n_values // 2 :]])})),
    ]
    found, identifiers = vocabulary(frames, n_obs)
    assert (found, identifiers) == (({}, ["c"]) if names_cells else ({"c": sorted(values)}, []))
