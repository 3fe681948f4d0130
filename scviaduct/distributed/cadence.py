"""How often something happens: by the clock ("5min") or by the steps that were done ("500steps")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from scviaduct.errors import ConfigError

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h|steps?)")


@dataclass(frozen=True)
class Every:
    """An interval: one of the two is set."""

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "30s", "5min", "2h" or "500steps".

        Raises:
            ConfigError: it is none of these, or not above 0.
        """
        found = _WRITTEN.fullmatch(text.strip())
        if not found or not float(found[1]) or (found[2] not in _SECONDS and "." in found[1]):
            raise ConfigError(f"{text!r} is no interval; write 30s, 5min, 2h or 500steps.")
        number, unit = found.groups()
        return cls(seconds=float(number) * _SECONDS[unit]) if unit in _SECONDS else cls(steps=int(number))
