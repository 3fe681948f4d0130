"""Which cells each training step saw: the evidence that every cell of an epoch was visited exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

_FIELDS = ("epoch", "step", "row")


class CellLog:
    """Appends (epoch, step, row) to a file of this attempt and rank; a step's record is handed over before the next step."""

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"attempt-{attempt:04d}.rank-{rank:04d}.i64"

    def write(self, epoch: int, step: int, rows: NDArray[np.int64]) -> None:
        """One step's rows of the training view."""
        record = np.empty((len(rows), 3), np.int64)
        record[:, 0], record[:, 1], record[:, 2] = epoch, step, rows
        with self._path.open("ab") as stream:
            stream.write(record.tobytes())


def read_cells(folder: Path) -> pd.DataFrame:
    """The rows that made the model: columns epoch, step, row, attempt, rank.

    An attempt that was killed did steps after its last checkpoint which the next attempt did again; those of the
    earlier attempt went with its weights and are left out.
    """
    import pandas as pd

    parts = []
    for path in sorted(folder.glob("attempt-*.rank-*.i64")):
        raw = np.fromfile(path, np.int64)
        part = pd.DataFrame(raw[: len(raw) // 3 * 3].reshape(-1, 3), columns=list(_FIELDS))
        names = path.name.split(".")
        parts.append(part.assign(attempt=int(names[0][8:]), rank=int(names[1][5:])))
    if not parts:
        return pd.DataFrame(columns=[*_FIELDS, "attempt", "rank"])
    cells = pd.concat(parts, ignore_index=True)
    position = cells["epoch"] * (cells["step"].max() + 1) + cells["step"]
    last = cells["attempt"].max()
    kept = np.ones(len(cells), bool)
    for attempt in range(int(cells["attempt"].min()), int(last)):
        later = position[cells["attempt"] > attempt]
        if len(later):
            kept &= ~((cells["attempt"] == attempt) & (position >= later.min())).to_numpy()
    return cells[kept].reset_index(drop=True)
