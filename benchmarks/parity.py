#!/usr/bin/env python3
"""How far our models are from the originals: the parity tests, with every comparison's largest difference written down.

    python benchmarks/parity.py [--tests tests/models]

Runs the tests that compare with scvi-tools' modules or with scArches' numbers, and prints for each model and test how
many arrays were compared and the largest difference, as a share of the largest value of the array it is found in. A
test that compares nothing, or fails, is not in the table; failures end with exit code 1.
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

FILES = ("test_parity", "test_scanvi", "test_totalvi", "test_peakvi", "test_trvae", "test_outputs")
MODELS = {"test_parity": "SCVI", "test_scanvi": "SCANVI", "test_totalvi": "totalVI", "test_trvae": "trVAE"}


class Recorder:
    """A pytest plugin that looks at what is compared."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float]] = []
        self.test = ("", "")

    def watched(self, compare: Callable[..., None]) -> Callable[..., None]:
        """`compare`, after writing down how far its first two arguments are apart."""

        def watching(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
            a, b = (np.asarray(torch.as_tensor(x).detach(), np.float64) for x in (actual, expected))
            compare(actual, expected, *args, **options)
            if a.size and b.size:
                largest = np.abs(b).max()
                if largest > 1e-6:  # what is zero but for rounding has no relative difference
                    self.rows.append((*self.test, float(np.abs(a - b).max() / largest)))

        return watching

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Know which test is running."""
        file = Path(item.fspath).stem
        # one file compares PeakVI and PoissonVI, one all models: their cases are named after them
        case = item.name.partition("[")[2].lower()
        named = next((m for m in ("PoissonVI", "PeakVI", "SCANVI", "totalVI", "trVAE") if m.lower() in case), None)
        self.test = (named or MODELS.get(file, "SCVI" if file == "test_outputs" else "PeakVI"), item.originalname)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, default=Path("tests/models"))
    folder = parser.parse_args().tests
    seen = Recorder()
    torch.testing.assert_close = seen.watched(torch.testing.assert_close)
    np.testing.assert_allclose = seen.watched(np.testing.assert_allclose)
    status = pytest.main(["-q", "--no-header", *(str(folder / f"{name}.py") for name in FILES)], plugins=[seen])
    frame = pd.DataFrame(seen.rows, columns=["model", "test", "difference"])
    table = frame.groupby(["model", "test"])["difference"].agg(arrays="count", largest="max")
    print(table.to_string(float_format="{:.1e}".format))
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
