"""The recipe of a search: a TOML file whose table [search] says which options are tried with which values.

[search]
n_latent = {int = [10, 50]}            # whole numbers from 10 to 50
lr = {log = [1e-4, 1e-2]}              # evenly on a logarithmic scale; {float = […]}: on a linear one
gene_likelihood = ["nb", "zinb"]       # one of these
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.options import model_config
from scviaduct.distributed.tuneconfig import TuneConfig
from scviaduct.errors import ConfigError, UnreadableFileError, nearest
from scviaduct.models.base import Model

Kind = Literal["int", "float", "log"]
NOT_SEARCHED = {
    **dict.fromkeys(("seed", "validation_size", "validation_stratify_by"), "it decides which cells are held out"),
    "early_stopping_monitor": "it decides what is compared",
    **dict.fromkeys(("n_lanes", "deterministic", "threads"), "it changes no result"),
}
"""Options of the fit whose trials could not be compared, or need not be."""


@dataclass(frozen=True)
class Option:
    """One option that is searched: choices, or a range from `low` to `high`."""

    name: str
    line: int
    """Where the recipe names it."""
    choices: tuple[Any, ...] = ()
    kind: Kind = "float"
    low: float = 0
    high: float = 0

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that show whether all fit: each choice, or both ends."""
        return self.choices or (self.low, self.high)


@dataclass(frozen=True)
class Recipe:
    """What is searched."""

    path: Path
    options: tuple[Option, ...]

    def error(self, option: Option, problem: str) -> ConfigError:
        """An error that says where."""
        return ConfigError(f"{self.path}, line {option.line}: {option.name}: {problem}")

    def first(self) -> dict[str, Any]:
        """Some values of all options."""
        return {option.name: option.extremes[0] for option in self.options}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        UnreadableFileError: there is none, or it is no TOML; the message gives the line.
        ConfigError: an entry is neither a list of choices nor a range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise UnreadableFileError(f"{path}: {error.strerror}; --search wants a recipe, a TOML file.") from error
    except ValueError as error:
        raise UnreadableFileError(f"{path} is not TOML: {error}.") from error
    searched = table.pop("search", None)
    if table or not isinstance(searched, dict) or not searched:
        found = f"; it has {', '.join(map(repr, table))}" if table else ""
        raise ConfigError(f"{path} must hold one table, [search], with at least one option{found}.")
    return Recipe(path, tuple(_option(path, name, entry, _line(text, name)) for name, entry in searched.items()))


def _line(text: str, name: str) -> int:
    """The number of the line that names an option; TOML's parser does not tell it."""
    named = re.compile(rf"\s*(\[\s*)?(search\s*\.\s*)?[\"']?{re.escape(name)}[\"']?\s*[=.\]]")
    lines = text.splitlines()
    begin = next((n for n, line in enumerate(lines) if re.match(r"\s*\[?\s*search\b", line)), 0)
    return 1 + next((n for n, line in enumerate(lines) if n >= begin and named.match(line)), begin)


def _option(path: Path, name: str, entry: Any, line: int) -> Option:
    where = f"{path}, line {line}: {name}"
    if isinstance(entry, list):
        kinds = {type(value) for value in entry}
        if not kinds or not (kinds <= {int, float} or (len(kinds) == 1 and kinds <= {bool, str})):
            raise ConfigError(f"{where}: choices are numbers, words, or true and false; not {entry}.")
        if len(set(entry)) < len(entry):
            raise ConfigError(f"{where}: a choice is named twice in {entry}.")
        return Option(name, line, choices=tuple(entry))
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(
            f"{where}: write choices as [1, 2, 3] or a range as {{int = [1, 9]}}, {{float = [0, 1]}} or "
            f"{{log = [1e-4, 1e-2]}}, not {entry!r}."
        )
    ((kind, bounds),) = entry.items()
    if kind not in get_args(Kind):
        raise ConfigError(f"{where}: a range is int, float or log, not {kind!r}.")
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(b) in (int, float) for b in bounds)
    if not numbers or not bounds[0] < bounds[1] or (kind == "int" and not all(type(b) is int for b in bounds)):
        what = "whole numbers" if kind == "int" else "numbers"
        raise ConfigError(f"{where}: {kind} wants two {what}, the smaller first, not {bounds!r}.")
    if kind == "log" and bounds[0] <= 0:
        raise ConfigError(f"{where}: a logarithmic scale begins above 0, not at {bounds[0]}.")
    return Option(name, line, kind=kind, low=bounds[0], high=bounds[1])


def require_options(recipe: Recipe, config: TuneConfig, model: type[Model], n_cells: int) -> None:
    """Refuse a recipe that names what the model and its fit do not have, or values that they do not take.

    Raises:
        ConfigError: which line, which option, the nearest names.
    """
    of_fit, of_model = get_type_hints(FitConfig), get_type_hints(model.Config)
    known = of_fit | {f.name: of_model[f.name] for f in fields(model.Config)}
    for option in recipe.options:
        name = option.name
        if name not in known:
            names = sorted(known.keys() - NOT_SEARCHED.keys())
            raise recipe.error(option, f"{model.__name__} and its fit have no such option; {nearest(name, names)}")
        if name in NOT_SEARCHED:
            raise recipe.error(option, f"it cannot be searched: {NOT_SEARCHED[name]}.")
        given = getattr(config.fit, name, None) != getattr(FitConfig(), name, None)
        if given or any(text.partition("=")[0] == name for text in config.set):
            raise recipe.error(option, "it is given as a fixed option, too; leave one of the two out.")
        _require_type(recipe, option, known[name])
        for value in option.extremes:
            try:
                trial = config.fixed({name: value})
                model_config(model, trial.preset, trial.set)
                trial.fit.plan(model.plan, n_cells)
            except ConfigError as error:
                raise recipe.error(option, str(error)) from error


def _require_type(recipe: Recipe, option: Option, hint: Any) -> None:
    kinds = [k for k in (get_args(hint) or (hint,)) if k in (bool, int, float)]
    if get_origin(hint) is tuple or not kinds:
        if not all(isinstance(value, str) for value in option.extremes):
            raise recipe.error(option, 'its values are words: write choices, as in ["a", "b"].')
    elif bool in kinds:
        if not all(isinstance(value, bool) for value in option.extremes):
            raise recipe.error(option, "it is a switch: write [true, false].")
    elif float not in kinds and (option.choices or option.kind != "int"):
        if not option.choices or not all(type(value) is int for value in option.choices):
            raise recipe.error(option, "it is a whole number: write {int = [low, high]} or whole choices.")
    elif not all(type(value) in (int, float) for value in option.extremes):
        raise recipe.error(option, "it is a number: write {log = [low, high]}, {float = [low, high]} or choices.")
