#!/usr/bin/env python3
"""Injects each fault many times at random moments and says what it cost; nothing is simulated but the atlas.

    python benchmarks/faults.py [FAULT…] --work DIR [--times 10] [--seed 0] [--json results.jsonl]

A run of `--log-cells --deterministic` is disturbed and continued until it is done. Then the cell log must show every
training cell once an epoch, and the weights must have the bits of an undisturbed run of one process. Prints a table:
steps that were done twice, and seconds from the fault to the first step after it (for faults that end the run: from
the command that resumes it).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="scv-"),  # short, and no other Ray's; holds a few MB of logs
}

import numpy as np
import torch
from safetensors.torch import load_file

from scviaduct.distributed import train as training
from scviaduct.distributed.celllog import CellLog, read_cells
from scviaduct.distributed.config import FitConfig, TrackingConfig, TrainConfig
from scviaduct.errors import ScviaductError
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.sampler import Sampler, Split
from scviaduct.storage.simulate import Biology

CELLS, BATCH = 3000, 16
SMALL = ("n_hidden=32", "n_latent=5")
STEPS = Sampler(n_rows=CELLS, block_rows=64, batch_size=BATCH, split=Split(0.1, 0)).steps
HANG = 20.0
"""Less than a step or a start of the group may take; on a busy machine that is long."""
_work = training.work


# --------------------------------------------------------------------------------------------- what is trained


@dataclass
class Lab:
    """The atlas, the undisturbed weights, and the dice."""

    folder: Path
    times: int
    rng: np.random.Generator
    between: tuple[int, int]
    """Steps between two faults, at random."""
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def atlas(self) -> Path:
        return self.folder / "atlas.zarr"

    def prepare(self) -> None:
        if (self.atlas / "views").exists():
            return
        biology = Biology.make(n_types=3, n_genes=300, n_lineages=3, seed=3)
        files = [self.folder / f"study_{n}.h5ad" for n in range(3)]
        for number, file in enumerate(files):
            biology.study(number, CELLS // 3).write_h5ad(file)
        convert(files, out=self.atlas)
        prepare(self.atlas, genes="all", block_rows=64)

    @property
    def epochs(self) -> int:
        """Enough for all faults of a run."""
        return self.times * self.between[1] // STEPS + 2

    def config(self, name: str, **changes: Any) -> TrainConfig:
        out = self.folder / f"{name}-{int(time.time())}"
        fit = FitConfig(max_epochs=self.epochs, batch_size=BATCH, lr=3e-3, threads=1, deterministic=True, n_lanes=2)
        options: dict[str, Any] = {"batch_key": "study", "preset": "scarches", "set": SMALL, "log_cells": True}
        options |= {"checkpoint_every": "0.5s", "max_failures": 1000, "resize_seconds": 3.0}
        return TrainConfig(out=out, fit=fit, tracking=TrackingConfig(tracking_uri="none"), **options | changes)

    def undisturbed(self, config: TrainConfig) -> dict[str, torch.Tensor]:
        epochs = int(config.fit.max_epochs or 0)
        if epochs not in self.weights:
            alone = replace(config, out=self.folder / f"undisturbed-{epochs}", workers=1, address=None, resume=False)
            alone = replace(alone, resume=alone.out.exists())
            self.weights[epochs] = load_file(training.train(self.atlas, alone).path / "model.safetensors")
        return self.weights[epochs]

    def pause(self) -> int:
        return int(self.rng.integers(*self.between))


@dataclass
class Run:
    """One disturbed run, seen from outside by its cell log."""

    config: TrainConfig
    events: list[tuple[str, float]] = field(default_factory=list)
    """What ended each attempt and the seconds until the next one made its first step."""
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def out(self) -> Path:
        return self.config.out

    def attempt(self) -> int:
        return max((int(p.name[8:12]) for p in self.out.glob("cells/*") if p.stat().st_size), default=0)

    def steps(self) -> int:
        """Of the newest attempt, by its rank 0."""
        log = self.out / "cells" / f"attempt-{self.attempt():04d}.rank-0000.i64"
        if not log.exists():
            return 0
        rows = np.fromfile(log, np.int64)
        rows = rows[: len(rows) // 3 * 3].reshape(-1, 3)
        return int(_position(rows[-1]) - _position(rows[0])) + 1 if len(rows) else 0

    def wait(self, condition: Callable[[], bool], seconds: float = 900) -> bool:
        """Until it holds; False when the run is done before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.done.is_set():
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"{self.out}: waited {seconds} s in attempt {self.attempt()}")
            time.sleep(0.02)
        return True

    def recovered(self, name: str, attempt: int, begin: float) -> bool:
        """Wait for the first step of the attempt after `attempt`."""
        if not self.wait(lambda: self.attempt() > attempt):
            return False
        self.events.append((name, time.monotonic() - begin))
        return True

    def repeated(self) -> list[int]:
        """Steps done twice at each change of attempt."""
        ends = []
        for attempt in range(1, self.attempt() + 1):
            parts = [np.fromfile(p, np.int64) for p in self.out.glob(f"cells/attempt-{attempt:04d}.*")]
            rows = np.concatenate([p[: len(p) // 3 * 3].reshape(-1, 3) for p in parts])
            ends.append((_position(rows).min(), _position(rows).max()))
        return [max(0, int(last - first) + 1) for (_, last), (first, _) in pairwise(ends)]

    def wrong_cells(self) -> int:
        """Cells that an epoch saw twice or never."""
        expected = ~Split(self.config.fit.validation_size, self.config.fit.seed).validation(np.arange(CELLS))
        log, wrong = read_cells(self.out / "cells"), 0
        for epoch in range(int(self.config.fit.max_epochs or 0)):
            seen = np.bincount(log.loc[log["epoch"] == epoch, "row"], minlength=CELLS)
            wrong += int(np.abs(seen - expected).sum())
        return wrong


def _position(rows: np.ndarray) -> Any:
    return rows[..., 0] * STEPS + rows[..., 1]


def report(lab: Lab, run: Run, injected: int) -> Iterator[dict[str, Any]]:
    """One row for each kind of event of a finished run."""
    weights = load_file(run.out / "bundle" / "model.safetensors")
    alone = lab.undisturbed(run.config)
    equal = weights.keys() == alone.keys() and all(torch.equal(weights[k], alone[k]) for k in alone)
    wrong, repeated = run.wrong_cells(), run.repeated()
    if len(repeated) != len(run.events):
        print(f"  {len(run.events)} events, but {len(repeated)} changes of attempt", file=sys.stderr)
    for name in dict.fromkeys(name for name, _ in run.events):
        at = [k for k, (kind, _) in enumerate(run.events) if kind == name and k < len(repeated)]
        seconds = [run.events[k][1] for k in at]
        yield {
            "fault": name,
            "injected": max(injected, len(at)) if name == run.events[0][0] else len(at),
            "recovered": len(at),
            "repeated_mean": round(statistics.mean(repeated[k] for k in at), 1),
            "repeated_max": max(repeated[k] for k in at),
            "wrong_cells": wrong,
            "equal": equal,
            "seconds_median": round(statistics.median(seconds), 1),
            "seconds_max": round(max(seconds), 1),
        }


# ------------------------------------------------------------------------------------------ faults from outside


def worker_killed(lab: Lab) -> Iterator[dict[str, Any]]:
    """SIGKILL of one of two workers."""
    run = Run(lab.config("worker-killed", workers=2))

    def strike() -> None:
        attempt, pids = run.attempt(), processes("TrainWorker")
        begin = time.monotonic()
        os.kill(int(lab.rng.choice(pids)), signal.SIGKILL)
        run.recovered("worker SIGKILL", attempt, begin)

    with own_ray(2), strikes(lab, run, strike) as injected:
        training.train(lab.atlas, run.config)
    yield from report(lab, run, len(injected))


def node_lost(lab: Lab) -> Iterator[dict[str, Any]]:
    """One of two nodes is killed, the run goes on with one worker; another node comes, it grows again."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **MEMORY})
    node = [cluster.add_node(num_cpus=1, **MEMORY)]
    cluster.wait_for_nodes()
    cluster._shutdown_at_exit = False  # handlers of signals, which a thread that adds a node may not set
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    # Ray takes seconds to count new room: steps are slowed down, and there are enough of them
    steps = lab.times * (2 * lab.between[1] + 600)
    config = lab.config("node-lost", workers="1..2")
    run = Run(replace(config, fit=replace(config.fit, max_epochs=steps // STEPS + 2)))
    training.work = slow_work

    def strike() -> None:
        attempt, begin = run.attempt(), time.monotonic()
        cluster.remove_node(node.pop(), allow_graceful=False)
        if not run.recovered("node lost (2 → 1 workers)", attempt, begin):
            return
        steps = lab.pause()
        run.wait(lambda: run.steps() > steps)
        attempt, begin = run.attempt(), time.monotonic()
        node.append(cluster.add_node(num_cpus=1, **MEMORY))
        run.recovered("node added (1 → 2 workers)", attempt, begin)

    try:
        with strikes(lab, run, strike) as injected:
            training.train(lab.atlas, run.config)
    finally:
        training.work = _work
        ray.shutdown()
        cluster.shutdown()
    yield from report(lab, run, len(injected))


def driver_killed(lab: Lab) -> Iterator[dict[str, Any]]:
    """SIGKILL of the command in one process."""
    yield from _driver_killed(lab, 1)


def driver_killed_2(lab: Lab) -> Iterator[dict[str, Any]]:
    """SIGKILL of the command with two workers of a Ray of its own."""
    yield from _driver_killed(lab, 2)


def _driver_killed(lab: Lab, workers: int) -> Iterator[dict[str, Any]]:
    run, injected = Run(lab.config(f"driver-killed-{workers}", workers=workers)), 0
    while not (run.out / "bundle").exists():
        attempt, begin = run.attempt(), time.monotonic()
        process = subprocess.Popen(command(lab, run.config, resume=run.out.exists()))
        if attempt:
            run.recovered(f"driver SIGKILL, {workers} worker(s)", attempt, begin)
        steps = lab.pause()
        ready = lambda a=attempt, s=steps: run.attempt() > a and run.steps() > s  # noqa: E731
        if injected < lab.times and run.wait(lambda: ready() or process.poll() is not None) and process.poll() is None:  # noqa: B023
            process.send_signal(signal.SIGKILL)
            injected += 1
        process.wait()
    yield from report(lab, run, injected)


def head_restarted(lab: Lab) -> Iterator[dict[str, Any]]:
    """The head's processes are killed under a run; a new head comes up and the run is resumed."""
    from ray.cluster_utils import Cluster

    run, injected = Run(lab.config("head-restarted", workers=2, max_failures=2)), 0
    while not (run.out / "bundle").exists():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **MEMORY})
        attempt, begin = run.attempt(), time.monotonic()
        process = subprocess.Popen(command(lab, replace(run.config, address=cluster.address), resume=run.out.exists()))
        if attempt:
            run.recovered("head killed, new head, --resume", attempt, begin)
        steps = lab.pause()
        ready = lambda a=attempt, s=steps: run.attempt() > a and run.steps() > s  # noqa: E731
        if injected < lab.times and run.wait(lambda: ready() or process.poll() is not None) and process.poll() is None:  # noqa: B023
            died = time.monotonic()
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            injected += 1
            process.wait()
            print(
                f"  the driver ended with {process.returncode} after {time.monotonic() - died:.0f} s", file=sys.stderr
            )
        process.wait()
        cluster.shutdown()
    yield from report(lab, run, injected)


# ------------------------------------------------------------------------------------------ faults from inside


def disturbed_work(job: Any) -> None:
    """`work` of a worker in which the run's plan strikes: [[epoch, step, rank, kind], …], each once."""
    plan = json.loads(Path(f"{job.out}.plan").read_text())
    write = CellLog.write

    def strike(self: CellLog, epoch: int, step: int, rows: np.ndarray) -> None:
        write(self, epoch, step, rows)
        for number, (at_epoch, at_step, rank, kind) in enumerate(plan):
            fired = Path(f"{job.out}.fired-{number}")
            due = (epoch, step) >= (at_epoch, at_step) and f"rank-{rank:04d}" in self._path.name
            if due and not fired.exists():
                fired.write_text(str(time.time()))
                if kind == "hang":
                    time.sleep(3600)
                raise OSError(5, "Input/output error", "/mnt/atlas")

    CellLog.write = strike  # type: ignore[method-assign]
    try:
        _work(job)
    finally:
        CellLog.write = write  # type: ignore[method-assign]


def slow_work(job: Any) -> None:
    """`work` of a worker in which a step takes 30 ms more."""
    write = CellLog.write

    def slow(self: CellLog, epoch: int, step: int, rows: np.ndarray) -> None:
        write(self, epoch, step, rows)
        time.sleep(0.03)

    CellLog.write = slow  # type: ignore[method-assign]
    try:
        _work(job)
    finally:
        CellLog.write = write  # type: ignore[method-assign]


def transient_error(lab: Lab) -> Iterator[dict[str, Any]]:
    """An input/output error on one of two ranks."""
    yield from _planned(lab, "error", "rank raises OSError, 2 workers")


def rank_hangs(lab: Lab) -> Iterator[dict[str, Any]]:
    """One of two ranks does nothing any more; the limit is `HANG` seconds."""
    yield from _planned(lab, "hang", f"rank hangs (limit {HANG:g} s), 2 workers")


def _planned(lab: Lab, kind: str, name: str) -> Iterator[dict[str, Any]]:
    run = Run(lab.config(kind, workers=2, hang_seconds=HANG))
    at = np.cumsum([lab.pause() for _ in range(lab.times)]).tolist()
    plan = [[p // STEPS, p % STEPS, int(lab.rng.integers(2)), kind] for p in at]
    Path(f"{run.out}.plan").write_text(json.dumps(plan))

    def watch() -> None:
        for number in range(lab.times):
            fired = Path(f"{run.out}.fired-{number}")
            if not run.wait(fired.exists):
                return
            begin = time.monotonic()
            run.recovered(name, number + 1, begin)

    training.work = disturbed_work
    try:
        with own_ray(2), following(run, watch):
            training.train(lab.atlas, run.config)
    finally:
        training.work = _work
    yield from report(lab, run, len(list(run.out.parent.glob(f"{run.out.name}.fired-*"))))


def ends_and_resumes(
    lab: Lab, run: Run, name: str, fault: Callable[[Path], contextlib.AbstractContextManager[None]], says: str
) -> Iterator[dict[str, Any]]:
    """A run in this process that ends with a message at each fault, not tried again, and is resumed after repair."""
    injected = 0
    while not (run.out / "bundle").exists():
        attempt, begin = run.attempt(), time.monotonic()
        steps = lab.pause()
        before = len(json.loads((run.out / "attempts.json").read_text())) if attempt else 0
        with contextlib.ExitStack() as stack:

            def strike(attempt: int = attempt, begin: float = begin, steps: int = steps) -> None:
                if attempt and not run.recovered(name, attempt, begin):
                    return
                if injected < lab.times and run.wait(lambda: run.attempt() > attempt and run.steps() > steps):  # noqa: B023
                    stack.enter_context(fault(run.out))

            run.done.clear()
            try:
                with following(run, strike):
                    training.train(lab.atlas, replace(run.config, resume=bool(attempt)))
            except ScviaductError as error:
                injected += 1
                if says not in str(error):
                    raise
                print(f"  {error}", file=sys.stderr)
        starts = len(json.loads((run.out / "attempts.json").read_text()))
        if starts != before + 1:
            print(f"  tried {starts - before} times", file=sys.stderr)
    yield from report(lab, run, injected)


def nan_loss(lab: Lab) -> Iterator[dict[str, Any]]:
    """The loss is not a number."""
    from scviaduct.distributed import loop

    backward = loop.backward

    @contextlib.contextmanager
    def fault(out: Path) -> Iterator[None]:
        loop.backward = lambda net, batch, kl, *a, **k: backward(net, batch, float("nan"), *a, **k)
        yield
        loop.backward = backward

    yield from ends_and_resumes(lab, Run(lab.config("nan")), "NaN loss", fault, "The loss became nan")


def disk_full(lab: Lab) -> Iterator[dict[str, Any]]:
    """The run's disk, a tmpfs of 24 MB, is full."""
    mount = lab.folder / "small"
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], check=True)

    @contextlib.contextmanager
    def fault(out: Path) -> Iterator[None]:
        ballast = mount / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))
        yield
        ballast.unlink()

    try:
        run = Run(replace(lab.config("disk-full"), out=mount / "run"))
        yield from ends_and_resumes(lab, run, "disk full", fault, "is full")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def chunk_unreadable(lab: Lab) -> Iterator[dict[str, Any]]:
    """Bytes of the view's counts change on disk while it is read."""
    view = lab.atlas / "views" / "default"
    shards = [p for p in view.rglob("*") if p.is_file() and "/c/" in str(p) and "X" in str(p.relative_to(view))]
    shards = shards or [p for p in view.rglob("c/*") if p.is_file()]

    @contextlib.contextmanager
    def fault(out: Path) -> Iterator[None]:
        shard = max(shards, key=lambda p: p.stat().st_size)
        content = shard.read_bytes()
        start = int(lab.rng.integers(0, len(content) // 2))
        with shard.open("r+b") as file:
            file.seek(start)
            file.write(bytes(b ^ 0xFF for b in content[start : start + len(content) // 2]))
        yield
        with shard.open("r+b") as file:
            file.write(content)

    yield from ends_and_resumes(lab, Run(lab.config("chunk")), "chunk unreadable", fault, "")


# --------------------------------------------------------------------------------------------------- machinery


MEMORY = {"object_store_memory": 100 * 2**20}


@contextlib.contextmanager
def own_ray(cpus: int) -> Iterator[None]:
    """One Ray for a whole fault."""
    from scviaduct.distributed.cluster import ray_cluster

    with ray_cluster(None, cpus):
        yield


@contextlib.contextmanager
def following(run: Run, function: Callable[[], None]) -> Iterator[None]:
    """`function` in a thread, as long as the run lasts."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    try:
        yield
    finally:
        run.done.set()
        thread.join()


@contextlib.contextmanager
def strikes(lab: Lab, run: Run, strike: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `strike` `lab.times` times, at random steps of the run."""
    struck: list[int] = []

    def work() -> None:
        for number in range(lab.times):
            steps = lab.pause()
            if not run.wait(lambda: run.steps() > steps):  # noqa: B023
                return
            struck.append(number)
            strike()
            print(f"  {run.events[-1:]}", file=sys.stderr)

    with following(run, work):
        yield struck


def processes(name: str) -> list[int]:
    """Processes below this one."""
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]


def command(lab: Lab, config: TrainConfig, *, resume: bool) -> list[str]:
    words = ["train", str(lab.atlas), "--out", str(config.out), "--workers", str(config.workers), "--log-cells"]
    words += ["--checkpoint-every", config.checkpoint_every, "--tracking-uri", "none"]
    words += ["--address", config.address] if config.address else []
    words += ["--max-failures", str(config.max_failures)]
    if resume:
        words += ["--resume"]
    else:
        words += ["--batch-key", "study", "--preset", "scarches", "--deterministic", "--threads", "1", "--lr", "0.003"]
        words += ["--n-lanes", "2"]
        words += ["--batch-size", str(BATCH), "--max-epochs", str(config.fit.max_epochs)]
        words += [w for option in SMALL for w in ("--set", option)]
    return [sys.executable, "-m", "scviaduct.jobs", *words]


FAULTS: dict[str, Callable[[Lab], Iterator[dict[str, Any]]]] = {
    f.__name__: f
    for f in (
        *(nan_loss, disk_full, chunk_unreadable, driver_killed, worker_killed, transient_error, rank_hangs),
        *(node_lost, driver_killed_2, head_restarted),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--between", type=int, nargs=2, default=(40, 200), help="steps between two faults, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lab = Lab(options.work.absolute(), options.times, np.random.default_rng(options.seed), tuple(options.between))
    lab.prepare()
    for name in options.faults:
        for row in FAULTS[name](lab):
            print(json.dumps(row), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
