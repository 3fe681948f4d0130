"""`scviaduct inspect`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.jobs.display import output


def command(path: Path, /, *, counts: str | None = None, sum_duplicates: bool = False) -> int:
    """Say what a file, an atlas or a run holds, and whether it can be used.

    Of a file every count is looked at; the answer is the one that convert would give with the same options.

    Exit code 0: it can; 2: it cannot, and why.

    Args:
        path: An h5ad, an AnnData Zarr store or a 10x Genomics h5; an atlas, a run or a bundle.
        counts: Matrix of the file with the raw counts: "X", "raw" or a layer. Default: found by looking.
        sum_duplicates: Take genes that are named twice for one and add up their counts. Default: a file that names
            genes twice is refused.
    """
    from scviaduct.distributed.inspect import inspect

    for line in inspect(path, counts=counts, sum_duplicates=sum_duplicates).lines():
        output.print(line)
    return 0
