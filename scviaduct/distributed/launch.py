"""Runs one function as one process or as many: in this process, or under Ray Train with a process group."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scviaduct.distributed.cluster import ray_cluster
from scviaduct.distributed.config import TrainConfig
from scviaduct.distributed.nodes import require_resources, require_shared_files
from scviaduct.errors import DataError, ScviaductError
from scviaduct.storage.manifest import ATLAS_MARKER, VIEW_MARKER, read_json, write_json_atomic

if TYPE_CHECKING:
    from scviaduct.distributed.train import Job

COLLECTIVE_TIMEOUT_S = 600


def run_on_workers(work: Callable[[Job], None], job: Job, config: TrainConfig) -> None:
    """Call `work(job)` on `config.workers` processes and return when all are done.

    A lost worker restarts the group, which goes on from the newest checkpoint, `config.max_failures` times. An error
    that would come again (bad data, bad options) is not tried again.

    Raises:
        ScviaductError: what `work` raised, or that workers were lost too often.
        ConfigError: the cluster has not what is asked for, or a node does not see the files.
    """
    if config.workers == 1 and not config.address:
        work(job)
        return
    (job.out / "refused.json").unlink(missing_ok=True)
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(COLLECTIVE_TIMEOUT_S))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    with ray_cluster(config.address, config.workers):
        _fit_on_ray(work, job, config)
    refused = job.out / "refused.json"
    if refused.exists():
        raise DataError(read_json(refused))


def _fit_on_ray(work: Callable[[Job], None], job: Job, config: TrainConfig) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    from scviaduct.distributed.network import NodeAddressConfig

    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) >= config.workers)
    require_resources(config.workers, gpus)
    if config.address:
        view = f"{job.atlas}/views/{config.view}/{VIEW_MARKER}"
        require_shared_files([f"{job.atlas}/{ATLAS_MARKER}", view], job.out)
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"work": work, "job": job},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {}),
        ),
        torch_config=NodeAddressConfig("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            # a new name each time: Ray takes a finished run's name as "nothing left to do"
            name=f"{job.out.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.out / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        causes = "; ".join(f"worker {rank}: {cause}" for rank, cause in error.worker_failures.items())
        raise ScviaductError(
            f"Training in {job.out} was given up after {config.max_failures} restarts ({causes}). The last checkpoint "
            "is intact; continue with --resume."
        ) from error


def _on_worker(parts: dict[str, Any]) -> None:
    """What each Ray Train worker runs. A refusal is written down instead of raised, as Ray retries whatever raises."""
    job, refused = parts["job"], Path(parts["job"].out) / "refused.json"
    if refused.exists():
        return
    try:
        parts["work"](job)
    except ScviaductError as error:
        write_json_atomic(refused, str(error))
        raise
