"""What MLflow learns of a job. Only the driver speaks to it, with explicit run ids; a job never fails because of it."""

from __future__ import annotations

import copy
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upath import UPath

from scviaduct.distributed.config import TrackingConfig
from scviaduct.distributed.journal import FOLDER, Journal
from scviaduct.distributed.outbox import Outbox
from scviaduct.distributed.registered import store_uri
from scviaduct.distributed.scratch import fetch_spool, keep_spool
from scviaduct.distributed.systemmetrics import PREFIX as SYSTEM
from scviaduct.distributed.systemmetrics import SystemMetrics
from scviaduct.errors import UnreadableFileError
from scviaduct.storage.places import Place, exists, place


@dataclass(frozen=True)
class Data:
    """A data set that a run was given."""

    name: str
    digest: str
    """sha256."""
    source: Mapping[str, str]
    """Where it lies."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    context: str = "training"
    """What it was used for."""
    type: str = "zarr"


class Tracker:
    """One MLflow run. What cannot be told now is kept and told later; the job goes on.

    `home` is the job's folder, which keeps what MLflow has not been told yet, so that it survives the job
    (`scviaduct sync`). Without it that is kept in memory, and lost when the job ends. `kept` is where it will lie when
    the job has ended, if that is elsewhere.
    """

    def __init__(self, config: TrackingConfig, home: Path | None = None, *, kept: Place | None = None) -> None:
        self.uri = store_uri(config)
        self._config = config
        self._outbox = Outbox(self.uri, config.experiment, home and home / FOLDER, kept) if self.uri else None
        self.key: str | None = None
        """Our own name of the run, known at once; MLflow has it as the tag scviaduct.key."""
        self._parent: str | None = None
        self._bundle: str | None = None
        self._system: SystemMetrics | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run; None until MLflow has been told of it."""
        return self._outbox.journal.ids.get(self.key) if self._outbox and self.key else None

    def child(self, key: str | None = None) -> Tracker:
        """A tracker for a run inside this one; it needs `start`, without a parent, or the `key` of one that was begun."""
        made = copy.copy(self)
        made.key, made._parent, made._bundle, made._system = key, self.key, None, None
        return made

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None) -> None:
        """Open the run, a child of `parent` (a run's id) when given."""
        if not self._outbox:
            return
        self._parent = parent or self._parent
        self.key = uuid.uuid4().hex
        where = {"uri": self.uri, "experiment": self._config.experiment}
        self._put("create", {"name": name, "tags": dict(tags), "parent": self._parent, "time": _now(), "store": where})
        self._put("params", {"values": {k: str(v) for k, v in params.items()}})
        self._measure()

    def resume(self, run_id: str | None) -> None:
        """Go on in a run that exists, or that MLflow has not been told of yet."""
        if not self._outbox:
            return
        self.key = self._outbox.journal.root
        if not self.key and not run_id:
            return
        self.key = self.key or uuid.uuid4().hex
        self._put("resume", {"id": run_id})
        self._measure()

    def _measure(self) -> None:
        if not self._config.system_metrics or self._parent or not self._outbox:
            return
        steps = [step for key, step, names in self._outbox.journal.told if names[0].startswith(SYSTEM)]
        self._system = SystemMetrics(self, first=1 + max(steps, default=-1))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One record of numbers. A step that these names have already is left as it is: an epoch may be repeated."""
        self.history([(step, values)])

    def history(self, records: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Several records of numbers, as (step, values), told at once."""
        if not self._outbox or not self.key:
            return
        told, key = self._outbox.journal.told, self.key
        new = [
            {"step": step, "values": {k: float(v) for k, v in values.items()}, "time": _now()}
            for step, values in records
            if (key, step, tuple(values)) not in told
        ]
        if new:
            self._put("metrics", {"records": new})

    def dataset(self, name: str, source: str, digest: str, facts: Mapping[str, Any]) -> None:
        """The data the run used, by content hash."""
        self.datasets([Data(name, digest, {"path": source}, facts)])

    def datasets(self, used: Iterable[Data]) -> None:
        """The data sets the run was given, by content hash."""
        if not self._outbox:  # then nobody looks into the atlas for them
            return
        entries = [vars(d) | {"source": dict(d.source), "facts": {"sha256": d.digest, **d.facts}} for d in used]
        self._put("datasets", {"datasets": entries})

    def artifacts(self, folder: Path, under: str) -> None:
        """Copy a file, or a folder's files, into the run."""
        if not self._outbox:
            return
        path = self._outbox.journal.noted(folder)
        if under == "bundle":
            self._bundle = path
        self._put("artifacts", {"path": path, "under": under})

    def register(self, name: str, tags: Mapping[str, str], alias: str = "current") -> str | None:
        """A registry version of the bundle that was copied into the run, loaded back before `alias` moves to it.

        Gives its number; None when MLflow is away, and it is made later.
        """
        return self._put("register", {"name": name, "tags": dict(tags), "alias": alias, "path": self._bundle})

    def end(self, status: str) -> None:
        """Close the run: FINISHED or FAILED."""
        if self._system:
            self._system.stop()
        self._put("end", {"status": status, "time": _now()})

    @contextmanager
    def closing(self) -> Iterator[Tracker]:
        """End the run as FINISHED, or as FAILED when the block raises; then a last attempt to tell what waits."""
        try:
            yield self
        except BaseException:
            self.end("FAILED")
            self._close(finished=False)
            raise
        self.end("FINISHED")
        self._close(finished=True)

    def _close(self, *, finished: bool) -> None:
        if self._outbox:
            self._outbox.close()
            if finished:
                self._outbox.journal.remove()

    def _put(self, kind: str, values: dict[str, Any]) -> Any:
        if self._outbox and self.key:
            return self._outbox.put({"kind": kind, "run": self.key, **values})
        return None


def sync(folder: str | Path, tracking_uri: str | None = None) -> tuple[int, int]:
    """Tell MLflow what a run, or a folder of mapped queries, could not tell it: (events sent, events that still wait).

    It goes where the job was told to send it, or to `tracking_uri`.

    Raises:
        UnreadableFileError: there is no such folder.
    """
    home = place(folder)
    if not (home.is_dir() if isinstance(home, Path) else exists(home / "run.json")):
        raise UnreadableFileError(f"{home} is not a folder that train or map wrote.")
    return _sync(home, tracking_uri) if isinstance(home, Path) else _sync_remote(home, tracking_uri)


def _sync_remote(out: UPath, tracking_uri: str | None) -> tuple[int, int]:
    """`sync` of a run in an object store, by way of a folder of this machine."""
    from scviaduct.distributed.bundle import Bundle  # torch, which a folder of this machine does not need

    with tempfile.TemporaryDirectory(prefix="scviaduct-") as temporary:
        here = Path(temporary)
        fetch_spool(out, here)
        if (out / "bundle" / "model.json").exists():
            (here / "bundle").symlink_to(Bundle.open(out).path)
        told = _sync(here, tracking_uri)
        keep_spool(here, out)
    return told


def _sync(home: Path, tracking_uri: str | None) -> tuple[int, int]:
    store = Journal(home / FOLDER).store
    if not store:
        return 0, 0
    outbox = Outbox(tracking_uri or store["uri"], store["experiment"], home / FOLDER)
    before = len(outbox.journal.waiting)
    outbox.close()
    left = len(outbox.journal.waiting)
    if outbox.journal.finished:
        outbox.journal.remove()
    return before - left, left


def _now() -> int:
    return int(time.time() * 1000)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level of dotted names."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
