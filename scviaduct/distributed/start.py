"""Training that begins with the weights of another model, as scvi-tools' SCANVI.from_scvi_model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from scviaduct.distributed.bundle import Bundle
from scviaduct.errors import ConfigError
from scviaduct.models.base import Model
from scviaduct.schema import Schema

_COMPARED = ("genes", "batch", "categorical", "continuous", "size_factor", "proteins")


def options_of(bundle: Bundle, kind: type[Model]) -> dict[str, Any]:
    """The bundle's model options that `kind` has too."""
    known = {f.name for f in fields(kind.Config)}
    return {name: value for name, value in bundle.facts["config"].items() if name in known}


def start_from(model: Model, bundle: Bundle) -> None:
    """Give `model` the weights of `bundle`; what only `model` has keeps its fresh values.

    Raises:
        ConfigError: genes or covariates differ, or a tensor of the bundle has no place or another shape in `model`.
    """
    _refuse_other_data(model.schema, bundle)
    own, given = model.state_dict(), bundle.weights()
    unfit = [name for name, t in given.items() if name not in own or own[name].shape != t.shape]
    if unfit:
        raise ConfigError(
            f"{len(unfit)} tensors of {bundle.path} have no place in this {type(model).__name__}, e.g. {unfit[0]!r} "
            f"{tuple(given[unfit[0]].shape)}. Options come from that model: leave out --set and --preset that change them."
        )
    model.load_state_dict(given, strict=False)


def _refuse_other_data(schema: Schema, bundle: Bundle) -> None:
    different = [name for name in _COMPARED if getattr(schema, name) != getattr(bundle.schema, name)]
    if different:
        raise ConfigError(
            f"{bundle.path} was trained with other {', '.join(different)}: use the same view, --batch-key and covariates."
        )
