"""What the driver's machine is busy with, as MLflow measures it: CPU, memory, disk, network and GPUs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scviaduct.distributed.tracking import Tracker

PREFIX = "system/"
"""By which MLflow's pages know such numbers."""
SECONDS = 10.0
"""Between two measurements."""


class SystemMetrics:
    """Measures in a thread and tells the tracker, so that a server which is away misses nothing.

    MLflow's own monitor asks the server for the run before each measurement, and ends when it does not answer.
    """

    def __init__(self, tracker: Tracker, first: int) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id="", tracking_uri=tracker.uri)
        self._tracker, self._step = tracker, first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scviaduct-system-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(SECONDS):
            self._monitor.collect_metrics()
            values = self._monitor.aggregate_metrics()
            for part in self._monitor.monitors:
                part.clear_metrics()
            self._tracker.metrics(self._step, {PREFIX + name: value for name, value in values.items()})
            self._step += 1

    def stop(self) -> None:
        """No more measurements."""
        self._ended.set()
        self._thread.join()
