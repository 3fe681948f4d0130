#!/usr/bin/env python3
"""How far our models are from the originals: the parity tests, with every comparison's largest difference written down.

    python benchmarks/parity.py [--tests tests/models]

Runs the tests marked `parity`, which compare with scvi-tools' modules or with scArches' numbers at equal weights and equal
noise, and prints for each model and quantity the largest difference, as a share of the largest value of the array it is
found in, and how many arrays were compared. Gradients are compared module by module. trVAE's original is not installed:
its steps are the 5 (in surgery 3) whose numbers are kept in tests/golden. Failures end with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

MODELS = ("SCVI", "SCANVI", "totalVI", "trVAE", "PeakVI", "PoissonVI")
QUANTITIES = ("outputs", "loss", "gradients", "20 steps", "surgery")
BY_FILE = {"test_scanvi": "SCANVI", "test_totalvi": "totalVI", "test_trvae": "trVAE"}


class Recorder:
    """A pytest plugin that runs the parity tests alone and looks at what they compare."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float]] = []
        self.test: tuple[str, str] | None = None

    def watched(self, compare: Callable[..., None]) -> Callable[..., None]:
        """`compare`, after writing down how far its first two arguments are apart."""

        def watching(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
            a, b = (np.asarray(torch.as_tensor(x).detach(), np.float64) for x in (actual, expected))
            compare(actual, expected, *args, **options)
            if a.size and b.size and self.test:
                largest = np.abs(b).max()
                if largest > 1e-6:  # what is zero but for rounding has no relative difference
                    self.rows.append((*self.test, float(np.abs(a - b).max() / largest)))

        return watching

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what compares with nobody."""
        items[:] = [item for item in items if item.get_closest_marker("parity")]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Know which model and quantity are compared: cases of a file for several models are named after them."""
        case = item.name.partition("[")[2].lower() + item.originalname
        named = next((m for m in reversed(MODELS) if m.lower() in case), "SCVI")
        marker = item.get_closest_marker("parity")
        assert marker
        self.test = (BY_FILE.get(Path(item.fspath).stem, named), marker.args[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, default=Path("tests/models"))
    folder = parser.parse_args().tests
    seen = Recorder()
    torch.testing.assert_close = seen.watched(torch.testing.assert_close)
    np.testing.assert_allclose = seen.watched(np.testing.assert_allclose)
    status = pytest.main(["-q", "--no-header", str(folder)], plugins=[seen])
    groups = pd.DataFrame(seen.rows, columns=["model", "quantity", "difference"]).groupby(["model", "quantity"])
    cells = groups["difference"].agg(lambda d: f"{d.max():.1e} ({len(d)})")
    print(cells.unstack().reindex(index=MODELS, columns=QUANTITIES, fill_value="-").to_string())
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
