"""`scviaduct repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scviaduct.jobs.display import Steps, output


def command(
    atlas: Path, /, *, source: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (), memory: str = "2GB"
) -> int:
    """Make damaged data sets and views of an atlas again, byte for byte as they were.

    Exit code 0: nothing is wrong any more; 2: what is, one line each.

    Args:
        atlas: An atlas made by convert.
        source: The files it was made of, or folders to look for them in; those at their old paths are found.
        memory: Memory to stay below, e.g. 2GB.
    """
    from scviaduct.storage.repair import repair

    with Steps("repair") as steps:
        report = repair(atlas, sources=source, memory=memory, on_progress=lambda what, done, n: steps.at(done, what, n))
    for line in report.lines():
        output.print(line)
    left = len(report.findings)
    output.print(f"{atlas}: {len(report.done)} repaired, {f'{left} still wrong' if left else 'nothing is wrong'}.")
    return 0 if report.ok else 2
