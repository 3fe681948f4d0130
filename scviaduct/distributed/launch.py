"""Runs one function as one process or as many: in this process, or under Ray Train with a process group."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scviaduct.distributed.checkpoint import Checkpoints
from scviaduct.distributed.cluster import ray_cluster
from scviaduct.distributed.config import TrainConfig
from scviaduct.distributed.embedding import PARTIAL
from scviaduct.distributed.failures import attempt, clear, may_pass, refusal
from scviaduct.distributed.nodes import require_gpu, require_resources, require_shared_files
from scviaduct.distributed.scratch import remove_from_nodes
from scviaduct.distributed.waiting import told_of_waiting
from scviaduct.errors import ScviaductError
from scviaduct.storage.manifest import ATLAS_MARKER, VIEW_MARKER
from scviaduct.storage.places import is_remote

if TYPE_CHECKING:
    from scviaduct.distributed.train import Job

_log = logging.getLogger(__name__)
_OF_WORKERS = (PARTIAL, "ray", "stacks")
"""What lies on the disk of each node where a run's folder is in an object store."""
_PAUSE = 1.0
"""Seconds before the first retry in this process; each further one waits twice as long."""


def run_on_workers(work: Callable[[Job], None], job: Job, config: TrainConfig) -> None:
    """Call `work(job)` on `config.workers` processes and return when all are done.

    Lost workers and errors that may pass restart the group, which goes on from the newest checkpoint,
    `config.max_failures` times. An error that would come again (bad data, bad options) is not tried again.

    Raises:
        ScviaductError: what `work` raised, or that there were too many failures.
        ConfigError: the machine or the cluster has not what is asked for, or a node does not see the files.
    """
    clear(job.out)
    if config.most_workers == 1 and not config.address:
        require_gpu(config.gpus_per_worker)
        _in_this_process(work, job, config.max_failures)
        return
    with ray_cluster(config.address, config.most_workers):
        _fit_on_ray(work, job, config)


def _in_this_process(work: Callable[[Job], None], job: Job, max_failures: int) -> None:
    for failed in range(max_failures + 1):
        try:
            attempt(work, job)
            return
        except Exception as error:
            if not may_pass(error):
                raise
            if failed == max_failures:
                raise _given_up(job, max_failures, f"{type(error).__name__}: {error}") from error
            _log.warning("%s: %s; going on from the last checkpoint.", type(error).__name__, error)
        time.sleep(_PAUSE * 2**failed)


def _fit_on_ray(work: Callable[[Job], None], job: Job, config: TrainConfig) -> None:
    import ray
    from ray.exceptions import RayError
    from ray.train import WorkerGroupError

    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) >= config.fewest_workers)
    require_resources(config.fewest_workers, gpus)
    if config.address:
        view = f"{job.atlas}/views/{config.view}/{VIEW_MARKER}"
        require_shared_files([f"{job.atlas}/{ATLAS_MARKER}", view], job.out)
    failed: WorkerGroupError | None = None
    try:
        with told_of_waiting(job.out):
            _trainer(work, job, config, gpus).fit()
    except WorkerGroupError as error:
        failed = error
    except RayError as error:  # the controller is gone, and with it the head, or its node
        raise ScviaductError(
            f"The Ray cluster was lost ({type(error).__name__}). The last checkpoint in {job.out} is intact: start the "
            "cluster again and continue with --resume."
        ) from error
    if refused := refusal(job.out):
        raise refused
    if failed:
        causes = "; ".join(f"worker {rank}: {cause}" for rank, cause in failed.worker_failures.items())
        raise _given_up(job, config.max_failures, causes) from failed
    if config.address and is_remote(job.out):
        remove_from_nodes(job.scratch, _OF_WORKERS)


def _trainer(work: Callable[[Job], None], job: Job, config: TrainConfig, gpus: float) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from scviaduct.distributed.elastic import GrowAtCheckpoints, SayWaiting
    from scviaduct.distributed.network import NodeAddressConfig

    fewest, most = config.fewest_workers, config.most_workers
    # a worker that hangs writes down where, at hang_seconds; then those that wait for it may time out
    timeout = int(config.hang_seconds * 1.1) + 5
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(timeout))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if fewest < most:  # room that Ray counts is there at once, or went with a node: then it is to count again soon
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    return TorchTrainer(
        _on_worker,
        train_loop_config={"work": work, "job": job},
        # mypy knows the types of version 1 only
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {}),
            elastic_resize_monitor_interval_s=config.resize_seconds,
        ),
        torch_config=NodeAddressConfig("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=timeout),
        run_config=RunConfig(
            # a new name each time: Ray takes a finished run's name as "nothing left to do"
            name=f"{job.out.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.scratch / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[
                GrowAtCheckpoints(Checkpoints(job.out / "checkpoints")),  # type: ignore[list-item]
                SayWaiting(job.out, fewest, most, gpus),  # type: ignore[list-item]
            ],
        ),
    )


def _on_worker(parts: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    attempt(parts["work"], parts["job"])


def _given_up(job: Job, restarts: int, causes: str) -> ScviaductError:
    return ScviaductError(
        f"Training in {job.out} was given up after {restarts} restarts ({causes}). The last checkpoint is intact; "
        "continue with --resume."
    )
