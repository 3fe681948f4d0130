"""The command line. What a verb works with is imported when it is called, so `scviaduct --help` answers at once."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Toml
from rich.console import Console

from scviaduct import __version__
from scviaduct.errors import ConfigError, ScviaductError
from scviaduct.jobs import (
    convert,
    de,
    decode,
    demo,
    embed,
    evaluate,
    export,
    import_,
    inspect,
    map,
    prepare,
    repair,
    status,
    submit,
    sync,
    train,
    tune,
    verify,
)


def _shown(default: object) -> str | None:
    """A default in --help; that a flag is off and a list empty goes without saying."""
    return None if default in (None, ()) or default is False else str(default)


def _from_file(command: App, verbs: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Options that are not given as flags come from the file of --config, where a verb has it."""
    for argument in arguments:
        if argument.names == ("--config",) and argument.tokens:
            path = Path(argument.tokens[0].value)
            if not path.is_file():
                raise ConfigError(f"--config {path} does not exist.")
            file = Toml(path)
            if not isinstance(file.config.get(verbs[0]), dict):
                raise ConfigError(f"--config {path} has no table [{verbs[0]}].")
            file(command, verbs, arguments)


app = App(
    name="scviaduct",
    config=_from_file,
    version=__version__,
    help="Train reference models on single-cell atlases larger than memory, and map hundreds of queries onto them.",
    # a list is empty when it is not given: --empty-set and the like would say nothing more
    default_parameter=Parameter(negative_iterable=(), show_default=_shown),
)

_VERBS = (
    *(convert, prepare, train, tune, status, sync, map, embed, decode, evaluate, de),
    *(inspect, verify, repair, export, import_, submit, demo),
)
for _place, _verb in enumerate(_VERBS):
    app.command(_verb.command, name=_verb.__name__.rpartition(".")[2].rstrip("_"), sort_key=_place)

_SURROUNDINGS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}
"""What the machine may refuse whoever is right: permissions, space, a file where a folder should be."""


def main() -> None:
    """Run one verb. Exit code 0: done; 1: some queries failed; 2: wrong usage or input, told in one message."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = app(sys.argv[1:])
    except ScviaductError as error:
        code = _refused(str(error))
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        code = _refused(f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}.")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _refused(message: str) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(f"Error: {message}", markup=False)
    return 2


if __name__ == "__main__":
    main()
