"""Ray, when more than one process is asked for: a cluster by address, or one on this machine for the time of a job."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scviaduct.errors import ConfigError

_LISTENS = 10.0
"""Seconds in which a head must take a connection."""
_OBJECT_STORE = 400 * 2**20
"""Bytes of a Ray of our own; it takes them when they are needed, from /dev/shm or else from its folder."""


@contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Have Ray initialised inside the block; what was started here is stopped at its end.

    Raises:
        ConfigError: no cluster answers at `address`, or it does not take this process; or Ray does not come up here.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="scv-"))  # short: unix socket paths end at 107 characters
    _environment(None if address else folder)
    import ray  # only now: Ray reads its environment when it is imported

    try:
        if address:
            _connect(address)
        else:
            _start(folder, cpus)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _environment(own: Path | None) -> None:
    """Ray's settings by environment variable; a user's own win. `own` is the folder of a Ray of our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own is None:
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's switch for listening on 127.0.0.1 only
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN" not in os.environ:
        token = own / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _connect(address: str) -> None:
    import ray
    from ray.exceptions import RayError

    _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(refusal_of(address, error)) from error


def _require_listener(address: str) -> None:
    """Refuse an address at which nobody listens: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return  # auto, or what Ray itself refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENS).close()
    except OSError as error:
        raise ConfigError(
            f"Nobody listens at {address} ({error}): is this the head's address, with the port of its `ray start` "
            "(--port, 6379 by default), is the head up, and does a firewall lie between?"
        ) from error


def refusal_of(address: str, error: Exception) -> str:
    """One sentence on why the cluster at `address` was not joined, and what to do."""
    said = " ".join(str(error).split())
    if address.startswith(("http://", "https://")):
        return (
            f"--address {address} is a dashboard, which `scviaduct submit --address {address} -- …` takes; on a machine "
            "of the cluster give auto, or the head's HOST:6379."
        )
    if "Version mismatch" in said:
        versions = re.findall(r"Ray: (\S+) Python: (\S+)", said)
        of = [f"Ray {ray} on Python {python}" for ray, python in versions] + ["another"] * 2
        return f"The cluster at {address} runs {of[0]}, this process {of[1]}: both must have the same versions."
    if isinstance(error, ValueError):
        return f"--address {address} is no address ({said[:200]}): give auto on a machine of the cluster, or HOST:6379."
    if "Could not find any running Ray instance" in said:
        return "No Ray runs on this machine: give the head's address as HOST:6379, or start Ray here with `ray start`."
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    given = "is set" if os.environ.get("RAY_AUTH_TOKEN") else f"is looked for in {token}"
    return (
        f"The cluster at {address} did not let this process in ({said.partition(' Ensure that')[0][:200]}). If it asks for a "
        f"token, set RAY_AUTH_MODE=token (now {os.environ.get('RAY_AUTH_MODE', 'not set')}) and RAY_AUTH_TOKEN_PATH as on "
        f"its nodes (the token {given})."
    )


def _start(folder: Path, cpus: int) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises even bare Exceptions when a process of its own does not come up
        raise ConfigError(_not_up(folder, error)) from error


def _not_up(folder: Path, error: Exception) -> str:
    """One sentence on a Ray that did not come up here, and what it lacks, as far as one can see."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    free = {at: shutil.disk_usage(at).free / 1e6 for at in (Path("/dev/shm"), folder) if at.is_dir()}
    short = [f"{place} has {mb:,.0f} MB free" for place, mb in free.items() if mb * 1e6 < _OBJECT_STORE]
    why = f"{' and '.join(short)}, and Ray wants {_OBJECT_STORE / 1e6:,.0f}: make room" if short else "try again"
    return f"Ray did not come up on this machine ({said}): {why}. TMPDIR moves its folder; --workers 1 of train needs no Ray."
