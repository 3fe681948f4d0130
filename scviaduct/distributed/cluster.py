"""Ray, when more than one process is asked for: a cluster by address, or one on this machine for the time of a job."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scviaduct.errors import ConfigError


@contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Have Ray initialised inside the block; what was started here is stopped at its end.

    Raises:
        ConfigError: no cluster answers at `address`.
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

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"No Ray cluster answers at {address}: {error}") from error


def _start(folder: Path, cpus: int) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=400 * 2**20,
        _temp_dir=str(folder),
    )
