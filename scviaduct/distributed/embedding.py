"""The reference's latents and labels: each worker embeds its run of blocks into files of its own, which are then joined.

No two workers write to one file, so that a file system needs no locks, and an object store will do.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.distributed.files import download, put, remove_folder
from scviaduct.distributed.loop import embed
from scviaduct.distributed.workers import Workers
from scviaduct.models.base import Model
from scviaduct.storage.loader import BlockSource, stream
from scviaduct.storage.places import Place

PARTIAL = "reference.partial"
_TYPES: dict[str, Any] = {"latent": np.float32, "labels": np.int32}


def write_part(model: Model, source: BlockSource, folder: Place, scratch: Path, workers: Workers) -> None:
    """Embed this worker's blocks; the parts lie in `folder` when it returns, by way of `scratch` where that is another."""
    if workers.rank == 0:
        remove_folder(folder)  # of an attempt that had other workers
    workers.barrier()
    scratch.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.{workers.rank:04d}" for name in (_TYPES if model.schema.labels else ["latent"])]
    files = [(scratch / name).open("wb") for name in names]
    try:
        with stream(source, rank=workers.rank, world_size=workers.world_size) as blocks:
            for batch, latent in embed(model, iter(blocks)):
                for file, values in zip(files, (latent.cpu().numpy(), batch.labels.astype(np.int32)), strict=False):
                    file.write(values.tobytes())
    finally:
        for file in files:
            file.close()
    if not isinstance(folder, Path):
        put(scratch, folder, names)
    workers.barrier()


def joined(folder: Place, scratch: Path, n_latent: int) -> dict[str, NDArray[Any]]:
    """All workers' parts below each other, which is the order of the view's rows: "latent", and "labels" if there are any.

    The arrays are memory-mapped files of `scratch`.
    """
    names = sorted(part.name for part in folder.iterdir())
    if not isinstance(folder, Path):
        scratch.mkdir(parents=True, exist_ok=True)
        download(folder, scratch, names)
    found: dict[str, NDArray[Any]] = {}
    for name, dtype in _TYPES.items():
        parts = [scratch / part for part in names if part.startswith(f"{name}.")]
        if not parts:
            continue
        with (scratch / name).open("wb") as whole:
            for part in parts:
                with part.open("rb") as one:
                    shutil.copyfileobj(one, whole)
        values = np.memmap(scratch / name, dtype, "r")
        found[name] = values.reshape(-1, n_latent) if name == "latent" else values
    return found
