"""What a run in an object store needs a disk for: a folder on each of its machines, which goes when the run has ended well.

What MLflow has not been told by then goes to the run's own folder, where `scviaduct sync` finds it.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upath import UPath

from scviaduct.distributed.files import download, put, remove_folder
from scviaduct.distributed.journal import FOLDER
from scviaduct.storage.places import Place

log = logging.getLogger(__name__)

_SPOOL = (f"{FOLDER}/events.jsonl", f"{FOLDER}/sent.json", "plots/losses.png")
"""What MLflow may still have to be told of, beside the bundle."""


def scratch_of(out: Place) -> Path:
    """Where a run's files lie that need a disk: its own folder, or one of this machine that all processes find."""
    if isinstance(out, Path):
        return out
    return Path(tempfile.gettempdir(), f"scviaduct-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}")


@contextmanager
def kept_while_it_runs(out: Place) -> Iterator[None]:
    """Around the whole of a run, in its driver: this machine's folder of a run in an object store is gone afterwards.

    Where the block raises, it stays, and the log says where it is.
    """
    if isinstance(out, Path):
        yield
        return
    scratch = scratch_of(out)
    fetch_spool(out, scratch)
    try:
        yield
    except BaseException:
        if not (out / "run.json").exists():
            shutil.rmtree(scratch, ignore_errors=True)
        elif scratch.exists():
            keep_spool(scratch, out)
            log.warning("What this machine holds of the run is kept in %s.", scratch)
        raise
    keep_spool(scratch, out)
    shutil.rmtree(scratch, ignore_errors=True)


def fetch_spool(out: UPath, to: Path) -> None:
    """Copy to this machine what MLflow has not been told of a run, unless it is here."""
    if (to / FOLDER).exists() or not (out / FOLDER).exists():
        return
    download(out, to, [name for name in _SPOOL if (out / name).exists()])


def keep_spool(scratch: Path, out: UPath) -> None:
    """Let the run's folder have what MLflow has not been told, as it is here; when it has been told all, nothing."""
    if (scratch / FOLDER).exists():
        put(scratch, out, [name for name in _SPOOL if (scratch / name).exists()])
    else:
        remove_folder(out / FOLDER)
        remove_folder(out / "plots")


def remove_from_nodes(scratch: Path, names: tuple[str, ...]) -> None:
    """Take away what workers left in this folder on any node of the cluster, and the folder where nothing else is in it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(remove_from)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            scratch, names
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(asked, num_returns=len(asked), timeout=30)  # whatever a node that is lost meanwhile still holds


def remove_from(scratch: Path, names: tuple[str, ...]) -> None:
    """Take some of a folder away, and the folder itself where nothing is left in it."""
    for name in names:
        shutil.rmtree(scratch / name, ignore_errors=True)
    with suppress(OSError):
        scratch.rmdir()
