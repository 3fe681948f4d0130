"""What a killed writer had: numbers and arrays, saved in one step, together with what they were made from."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.storage.manifest import write_atomic

_HEADER = "header"


@dataclass(frozen=True)
class Checkpoint:
    """A file that is there after the first `save`, and whole at any moment."""

    path: Path
    origin: dict[str, Any]
    """JSON-ready facts of the source and the options; what was saved with others is of no use."""

    def save(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace what was saved before; `state` is JSON-ready."""
        header = json.dumps({"origin": json.dumps(self.origin), "state": state}).encode()
        content = io.BytesIO()
        np.savez(content, **{_HEADER: np.frombuffer(header, np.uint8)}, **arrays)  # type: ignore[arg-type]
        write_atomic(self.path, content.getbuffer())

    def load(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        """(state, arrays), or None when nothing was saved, or from another source or with other options."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = dict(file)
            header = json.loads(arrays.pop(_HEADER).tobytes())
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        return (header["state"], arrays) if header["origin"] == json.dumps(self.origin) else None

    def remove(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)
