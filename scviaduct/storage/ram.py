"""How much memory is free, and refusing what does not fit."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from dask.utils import format_bytes, parse_bytes

from scviaduct.errors import ConfigError, NotEnoughMemoryError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes this process can still take: what the machine, its container and its own limit (ulimit -v) leave."""
    return max(0, min([_of_machine(), *_of_container(), *_of_process()]))


def _of_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        facts = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_container() -> list[int]:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, KeyError):
        return []
    return [] if limit == "max" else [int(limit) - int(used) + int(cache)]


def _of_process() -> list[int]:
    limit, statm = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.is_file():
        return []
    return [limit - int(statm.read_text().split()[0]) * resource.getpagesize()]


def refuse_beyond(estimate: int, memory: str | None, what: str, instead: str) -> None:
    """Raise NotEnoughMemoryError when `what` takes more than `memory`, or than is free when that is None."""
    try:
        limit = available() if memory is None else int(parse_bytes(memory))
    except ValueError:
        raise ConfigError(f"memory={memory!r} is not an amount of memory; write it like 40GB or 800MB") from None
    if estimate > limit:
        there = "free here" if memory is None else f"allowed (memory={memory!r})"
        more = f'memory="{estimate * 1.2 / 1e9:.1f}GB"'
        raise NotEnoughMemoryError(
            f"{what} would take about {format_bytes(estimate)} of memory, and {format_bytes(limit)} are {there}. "
            f"{instead}; or pass {more} to try it all the same."
        )
