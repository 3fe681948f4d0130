"""scviaduct: reference models on single-cell atlases larger than memory, and hundreds of queries mapped onto them.

The verbs of the command line are functions here, imported when first used: importing the package loads neither
torch nor ray nor mlflow.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "convert": "scviaduct.storage.convert",
    "prepare": "scviaduct.storage.prepare",
    "inspect": "scviaduct.distributed.inspect",
    "verify": "scviaduct.storage.verify",
    "repair": "scviaduct.storage.repair",
    "export": "scviaduct.storage.export",
    "train": "scviaduct.distributed.train",
    "tune": "scviaduct.distributed.tune",
    "map": "scviaduct.distributed.map",
    "embed": "scviaduct.distributed.outputs",
    "decode": "scviaduct.distributed.outputs",
    "evaluate": "scviaduct.distributed.evaluate",
    "de": "scviaduct.distributed.differential",
    "import_model": "scviaduct.distributed.importing",
    "export_model": "scviaduct.distributed.exporting",
    "demo": "scviaduct.distributed.demo",
    "Atlas": "scviaduct.storage.atlas",
    "Bundle": "scviaduct.distributed.bundle",
    "Reading": "scviaduct.distributed.config",
}

__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'scviaduct' has no attribute {name!r}")
    return getattr(importlib.import_module(_VERBS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
