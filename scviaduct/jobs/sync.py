"""`scviaduct sync`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.jobs.display import output


def command(folder: Path, /, *, tracking_uri: str | None = None) -> int:
    """Tell MLflow what it could not be told while a job ran.

    Exit code 0: it has been told all; 1: it is still away.

    Args:
        folder: Folder that train or map wrote (its --out), or its address in an object store.
        tracking_uri: MLflow store. Default: the job's.
    """
    from scviaduct.distributed.tracking import sync
    from scviaduct.storage.places import place

    sent, left = sync(folder, tracking_uri)
    waits = f", {left} still wait" if left else ""
    where = place(folder)
    output.print(f"{where}: {sent} records sent{waits}." if sent or left else f"{where}: MLflow knows all of it.")
    return 1 if left else 0
