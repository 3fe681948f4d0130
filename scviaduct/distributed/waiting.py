"""A run that waits for workers: who started it, and who looks at its folder, is told for what and since when.

Ray waits for as long as it takes, and says so only in the log of an actor on some node. So the controller keeps
OUT/waiting.json while no group runs and there is no room for one; it is written again and again, so that one that a
killed run left behind is known by its age.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from scviaduct.distributed.files import write_json
from scviaduct.storage.manifest import read_json
from scviaduct.storage.places import Place

log = logging.getLogger(__name__)

EVERY = 15.0
"""Seconds between two writings; a record three times as old is of a run that has ended."""
_LOOK = 5.0


@dataclass(frozen=True)
class Waiting:
    """What a run waits for."""

    fewest: int
    """Workers without which it does not run."""
    most: int
    since: float
    """Seconds since the epoch, as all times."""
    at: float
    """When this was written."""
    needed: dict[str, float]
    """{CPU or GPU: how many the fewest workers take}."""
    there: dict[str, float]
    """Of these, what the cluster has."""
    free: dict[str, float]
    """Of these, what nobody has taken."""

    @property
    def lacks(self) -> bool:
        """The cluster is too small."""
        return any(self.there.get(name, 0) < n for name, n in self.needed.items())

    @property
    def lacks_now(self) -> bool:
        """It is, or others use what there is."""
        return any(self.free.get(name, 0) < n for name, n in self.needed.items())

    def write(self, out: Place) -> None:
        """Say so in the run's folder."""
        write_json(out / "waiting.json", asdict(self))

    def told(self, out: Place, now: float) -> str:
        """What is lacking, and what can be done, in sentences."""
        asked = f"{self.fewest} workers" if self.fewest > 1 else "a worker"
        has = [f"{self.there.get(name, 0):g} {name} ({self.free.get(name, 0):g} free)" for name in self.needed]
        needs = [f"{n:g} {name}" for name, n in self.needed.items()]
        taken = "" if self.lacks else ": others have taken the rest, or its workers are about to begin"
        fewer = f"--workers 1..{self.most} --resume"
        way = f", or stop it and go on with fewer: train {fewer} --out {out}" if self.fewest > 1 else ""
        return (
            f"The run has waited {timedelta(seconds=round(now - self.since))} for {asked} with {' and '.join(needs)}; the "
            f"cluster has {' and '.join(has)}{taken}. It goes on by itself when there is room: start a node{way}."
        )


def waits_for(out: Place, now: float) -> Waiting | None:
    """What the run in this folder waits for; None when it does not, or is no more."""
    file = out / "waiting.json"
    try:
        found = Waiting(**read_json(file)) if file.exists() else None
    except FileNotFoundError:  # it has just been removed
        return None
    return found if found and now - found.at < 3 * EVERY else None


@contextmanager
def told_of_waiting(out: Place) -> Iterator[None]:
    """While the block runs, log when the run begins to wait for workers, and that it goes on."""
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(out, ended), name="scviaduct-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # one that stays is known by its age
            (out / "waiting.json").unlink(missing_ok=True)


def _follow(out: Place, ended: threading.Event) -> None:
    since = None
    while not ended.wait(_LOOK if isinstance(out, Path) else 3 * _LOOK):
        try:
            found = waits_for(out, time.time())
        except Exception:  # noqa: BLE001 - a store that does not answer now; what the run does with it is told elsewhere
            continue
        if found and since is None:
            log.warning("%s", found.told(out, time.time()))
        elif since is not None and not found:
            log.warning("The run goes on after %s.", timedelta(seconds=round(time.time() - since)))
        since = found.since if found else None
