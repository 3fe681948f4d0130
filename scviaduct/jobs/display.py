"""What a person sees while a job runs: a bar in a terminal, plain lines in a log file. Always on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

if TYPE_CHECKING:
    from scviaduct.storage.places import Place

# names of files are shown as they are: [x] is no markup and :car: no picture
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
output = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

_LINE_SECONDS = 10.0


class Steps:
    """Counts towards `total` with a remark and the time left; in a log file a line every ten seconds, and the last.

    With a `unit`, say "cells", their number a second is told as well; what was done before the first call of `at` (by a
    run that was killed) does not count.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "") -> None:
        self._title, self._total, self._done, self._remark, self._unit = title, total, 0, "", unit
        self._printed, self._printed_at = time.monotonic(), 0
        self._began: tuple[float, int] | None = None
        # in a narrow terminal the remark's end gives way, not the numbers before it
        whole = [Column(no_wrap=True, min_width=width) for width in (len(title), 8, 7, 7)]
        self._bar = Progress(
            TextColumn("{task.description}", table_column=whole[0]),
            BarColumn(8, table_column=whole[1]),
            MofNCompleteColumn(table_column=whole[2]),
            TimeRemainingColumn(table_column=whole[3]),
            TextColumn("{task.fields[remark]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=total, remark="")

    def __enter__(self) -> Steps:
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if console.is_terminal:
            self._bar.stop()
        elif kind is None and self._done != self._printed_at:
            self._line()

    def at(self, done: int, remark: str = "", total: int | None = None) -> None:
        """Stand at `done`."""
        self._total = total or self._total
        self._began = self._began or (time.monotonic(), done)
        self._done, self._remark = done, " · ".join(filter(None, (remark, self._speed(done))))
        remark = self._remark
        self._bar.update(self._task, completed=done, total=self._total, remark=remark)
        if not console.is_terminal and time.monotonic() - self._printed > _LINE_SECONDS:
            self._line()

    def _speed(self, done: int) -> str:
        began, at = self._began or (0.0, 0)
        if done <= at:
            return ""
        rate = (done - at) / max(time.monotonic() - began, 1e-3)
        left = timedelta(seconds=round(((self._total or done) - done) / rate))
        told = [f"{rate:,.0f} {self._unit}/s"] if self._unit else []
        # in a terminal the bar has a column for it
        return " · ".join(told + ([f"{left} left"] if left and not console.is_terminal else []))

    def _line(self) -> None:
        self._printed, self._printed_at = time.monotonic(), self._done
        console.print(f"{self._title} {self._done}/{self._total or '?'} {self._remark}", soft_wrap=True)


@contextmanager
def going_on(begun: Place, command: str) -> Iterator[None]:
    """When the block is interrupted after the file `begun` was written, say by which command it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if begun.exists():
            console.print(f"Interrupted. To go on: scviaduct {command}", soft_wrap=True)
        raise


def epoch_remark(record: Mapping[str, float]) -> str:
    """One epoch in a line."""
    held_out = f" validation {record['elbo_validation']:.2f}" if "elbo_validation" in record else ""
    return (
        f"{record['cells_per_second']:,.0f} cells/s · {record['data_wait']:.0%} data wait · "
        f"elbo {record['elbo_train']:.2f}{held_out}"
    )
