"""The command line. Each verb's module is imported when that verb is called, so `scviaduct --help` answers at once."""

from __future__ import annotations

import logging
import sys

from cyclopts import App
from rich.console import Console

from scviaduct import __version__
from scviaduct.errors import ScviaductError

app = App(
    name="scviaduct",
    version=__version__,
    help="Train reference models on single-cell atlases larger than memory, and map hundreds of queries onto them.",
)

VERBS = {
    "convert": "h5ad files become one verified, chunked Zarr atlas.",
    "prepare": "Choose genes and write the shuffled view that training reads.",
    "train": "Train a model on a view; the result is a bundle and an MLflow version.",
    "map": "Map query files onto a trained model: embedding, labels, uncertainty.",
    "inspect": "Say what a file, an atlas or a run holds, and whether it can be used.",
    "demo": "Simulate studies and run the whole line on them.",
}
for _verb, _sentence in VERBS.items():
    app.command(f"scviaduct.jobs.{_verb}:command", name=_verb, help=_sentence)


def main() -> None:
    """Run one verb. Exit code 0: done; 1: some queries failed; 2: wrong usage or input, told in one message."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = app()
    except ScviaductError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"Error: {error}", markup=False)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
