"""What a verification found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["damaged", "unfinished", "stale", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    part: str
    """What has to be made again: "datasets/<id>", "views/<name>", or "atlas.json"."""
    place: str
    """The file or folder, relative to the atlas."""
    what: str
    """What is wrong with it."""
    affected: str = ""
    """The cells, genes or columns it concerns, where that can be said."""
    remedy: str = ""
    """What to do, as a sentence."""
    kind: Kind = "damaged"
    """Damage can be repaired; what is unfinished or stale is for the verb that makes it, what is unknown for people."""

    def __str__(self) -> str:
        concerns = f" (concerns {self.affected})" if self.affected else ""
        return f"{self.place}: {self.what}{concerns}" + (f". {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Report:
    """All that was found, and how much was looked at."""

    path: Path
    findings: tuple[Finding, ...]
    files: int
    """Files that were looked at."""
    bytes: int
    """Their size."""
    done: tuple[str, ...] = ()
    """What a repair did, one sentence each."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.findings

    def lines(self) -> Iterator[str]:
        """What was done and found, one line each."""
        yield from self.done
        yield from map(str, self.findings)


@dataclass(frozen=True)
class Part:
    """A data set or a view with its manifest."""

    name: str
    """ "datasets/<id>" or "views/<name>"."""
    folder: Path
    manifest: dict[str, Any]
    remedy: str

    @property
    def id(self) -> str:
        """The data set's id, or the view's name."""
        return self.folder.name

    @property
    def is_view(self) -> bool:
        """A view, not a data set."""
        return self.name.startswith("views/")

    @property
    def matrix(self) -> Path:
        """The folder with data, indices and indptr."""
        return self.folder if self.is_view else self.folder / "X"

    def finding(self, place: str, what: str, affected: str = "") -> Finding:
        """Damage to `place` (relative to the part's folder, "" for all of it)."""
        return Finding(self.name, f"{self.name}/{place}".rstrip("/"), what, affected, self.remedy)
