"""`scviaduct verify`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.jobs.display import Steps, output


def command(path: Path, /, *, quick: bool = False) -> int:
    """Look for damage in an atlas, a run or a bundle; nothing is changed.

    Exit code 0: nothing is wrong; 2: one line for each thing that is, with what it concerns and what to do.

    Args:
        path: atlas.zarr, a run or a bundle.
        quick: Compare sizes and manifests only; a changed byte is not seen.
    """
    if any((path / name).is_file() for name in ("model.json", "bundle/model.json")):
        from scviaduct.distributed.bundle import Bundle

        output.print(f"{Bundle.open(path).path}: every file is the one it was saved with.")
        return 0
    from scviaduct.storage.verify import verify

    with Steps("verify") as steps:
        report = verify(path, quick=quick, on_progress=lambda what, done, n: steps.at(done, what, n))
    for line in report.lines():
        output.print(line)
    how = "sizes and manifests agree" if quick else "all is as it was written"
    said = f"{len(report.findings)} found wrong" if report.findings else how
    output.print(f"{path}: {report.files:,} files, {report.bytes / 1e9:.2f} GB: {said}.")
    return 0 if report.ok else 2
