"""The maths: torch and the schema, nothing else. MODELS is the only list of models; classes load when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from scviaduct.errors import ConfigError, nearest

if TYPE_CHECKING:
    from scviaduct.models.base import Model

MODELS = {
    "scvi": "scviaduct.models.scvi:SCVI",
    "scanvi": "scviaduct.models.scanvi:SCANVI",
    "totalvi": "scviaduct.models.totalvi:TotalVI",
    "trvae": "scviaduct.models.trvae:TRVAE",
    "peakvi": "scviaduct.models.peakvi:PeakVI",
    "poissonvi": "scviaduct.models.poissonvi:PoissonVI",
}


def model_class(name: str) -> type[Model]:
    """The class behind a model's name, e.g. "scvi".

    Raises:
        ConfigError: no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"There is no model {name!r}; {nearest(name, MODELS)}")
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
