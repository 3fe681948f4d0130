"""Model options from the command line: --set name=value, checked against the model's own Config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from scviaduct.errors import ConfigError, nearest
from scviaduct.models.base import Model
from scviaduct.models.scvi import PRESETS


def model_config(
    kind: type[Model], preset: str, assignments: Sequence[str], start: Mapping[str, Any] | None = None
) -> Any:
    """The model's Config: options of the model it starts from, then the preset's, then each "name=value".

    Raises:
        ConfigError: no such option, or a value of another type.
    """
    options = {**(start or {}), **PRESETS[preset]}
    types = get_type_hints(kind.Config)
    known = {f.name for f in fields(kind.Config)}
    if foreign := sorted(PRESETS[preset].keys() - known):
        raise ConfigError(
            f"--preset {preset} is not for {kind.__name__}, which has no option {foreign[0]!r}; use --set."
        )
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set wants name=value, not {text!r}.")
        if name not in known:
            raise ConfigError(f"{kind.__name__} has no option {name!r}; {nearest(name, sorted(known))}")
        options[name] = _parsed(name, value, types[name])
    return kind.Config(**options)


def _parsed(name: str, text: str, hint: Any) -> Any:
    """The text as the option's type; literals are left to the Config, which names its choices."""
    if get_origin(hint) is tuple:
        return tuple(_parsed(name, part, get_args(hint)[0]) for part in text.split(","))
    kinds = [k for k in (get_args(hint) or (hint,)) if k in (bool, int, float)]
    if bool in kinds:
        if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        raise ConfigError(f"--set {name} wants true or false, not {text!r}.")
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    if kinds:
        raise ConfigError(f"--set {name} wants a number, not {text!r}.")
    return text
