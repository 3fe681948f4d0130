"""What is checked of a cluster before work is given to it: that it has what is asked for, and that all nodes see the files.

Ray waits without a word for a GPU that does not exist, and finds out at the first checkpoint that a node does not have
the run's folder.
"""

from __future__ import annotations

import uuid

import torch

from scviaduct.errors import ConfigError
from scviaduct.storage.places import Place, exists, place


def require_resources(workers: int, gpus_per_worker: float) -> None:
    """Refuse to wait for processors that the cluster does not have.

    Raises:
        ConfigError: fewer cores or GPUs than `workers` need.
    """
    import ray

    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    if cpus < workers:
        raise ConfigError(
            f"{workers} workers need a core each, but the cluster has {cpus:g}: use --workers {int(cpus)}."
        )
    if gpus_per_worker * workers > gpus:
        most = int(gpus / gpus_per_worker)
        fix = f"use --workers {most}" if most else "use --gpus-per-worker 0"
        raise ConfigError(
            f"{workers} workers with {gpus_per_worker:g} GPUs each need {workers * gpus_per_worker:g}, but the cluster "
            f"has {gpus:g}: {fix}, or start nodes that have them."
        )


def require_gpu(gpus_per_worker: float | None) -> None:
    """Refuse GPUs that were asked for in a process of its own on a machine without.

    Raises:
        ConfigError: there is none.
    """
    if gpus_per_worker and not torch.cuda.is_available():
        raise ConfigError(
            f"--gpus-per-worker {gpus_per_worker:g}, but this machine has no GPU that torch can use: leave it out, or "
            "give the --address of a cluster that has some."
        )


def require_shared_files(reads: list[str], writes: Place | None, *, timeout: float = 60.0) -> None:
    """Have every node read what is to be read, and write to a folder that all are to write to.

    `reads` are files; `writes` is a folder that exists on this machine.

    Raises:
        ConfigError: a node does not see a file, or what it wrote is not seen here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    word = uuid.uuid4().hex
    asked = {
        id_: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(id_, soft=False)).remote(
            reads, str(writes) if writes else None, f"{word}-{id_[:8]}"
        )
        for id_ in nodes
    }
    try:
        for id_, answer in asked.items():
            problem = ray.get(answer, timeout=timeout)
            mark = writes and writes / f".{word}-{id_[:8]}"
            if not problem and mark and not mark.exists():
                problem = f"wrote to {writes}, which is not the folder of this name on the machine that drives"
            if problem:
                raise ConfigError(
                    f"Node {nodes[id_]} {problem}: all nodes need the same file system under the same path, or an "
                    "object store for the atlas."
                )
    finally:
        for mark in writes.glob(f".{word}-*") if writes else ():
            mark.unlink(missing_ok=True)


def _look(reads: list[str], writes: str | None, word: str) -> str:
    """What is wrong on this node; "" when nothing is."""
    for path in reads:
        if not exists(place(path)):
            return f"does not see {path}"
    if writes:
        try:
            (place(writes) / f".{word}").write_bytes(b"")
        except OSError as error:
            return f"cannot write to {writes} ({error.strerror or error})"
        except Exception as error:  # noqa: BLE001 - each object store's driver has errors of its own
            return f"cannot write to {writes} ({type(error).__name__}: {error})"
    return ""
