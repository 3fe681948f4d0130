"""What becomes of an error in a worker: tried again where it may pass, written down and told where it would come again."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from scviaduct import errors
from scviaduct.distributed.files import write_json
from scviaduct.distributed.watch import hanging
from scviaduct.errors import IncompleteError, ScviaductError
from scviaduct.storage.manifest import disk_is_full, read_json
from scviaduct.storage.places import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from scviaduct.distributed.train import Job

_LASTING = (
    *(ScviaductError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, NotImplementedError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError),
)
"""Errors that would come again: the same data and the same code give them the same way."""


class WorkerHangsError(RuntimeError):
    """A worker has begun no step for too long. It may pass, so it is tried again."""


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may go well."""
    if isinstance(error, IncompleteError) and isinstance(error.__cause__, OSError):
        return may_pass(error.__cause__)  # a read that failed says what it read
    return not isinstance(error, _LASTING) and not disk_is_full(error)


def attempt(work: Callable[[Job], None], job: Job) -> None:
    """Call `work(job)`, unless an earlier attempt met an error that would come again; write such an error down.

    Raises:
        WorkerHangsError: another worker keeps this one waiting; says which, and where it stands.
        ScviaductError: the disk is full.
        Exception: what `work` raised.
    """
    if _file(job.out).exists():  # Ray tries whatever raises again
        return
    try:
        work(job)
    except Exception as error:
        told = _told(error, job.out, job.scratch)
        if not may_pass(told):
            _write_down(told, job.out)
        if told is error:
            raise
        raise told from error


def refusal(out: Place) -> ScviaductError | None:
    """The error for which a run was given up, when there is one."""
    if not _file(out).exists():
        return None
    record = read_json(_file(out))
    return getattr(errors, record["error"], ScviaductError)(record["message"])


def clear(out: Place) -> None:
    """A run begins again: what it was refused for may be mended."""
    _file(out).unlink(missing_ok=True)


def _file(out: Place) -> Place:
    return out / "refused.json"


def _told(error: Exception, out: Place, scratch: Path) -> Exception:
    """The error itself, or one that says what it means."""
    if disk_is_full(error) and not isinstance(error, ScviaductError):
        return ScviaductError(
            f"The disk of {out} is full. The last checkpoint is intact: make room and continue with --resume."
        )
    counted = out / "attempts.json"
    if may_pass(error) and counted.exists():
        late = hanging(scratch / "stacks", len(read_json(counted)))
        if late:
            return WorkerHangsError("; ".join(late))
    return error


def _write_down(error: Exception, out: Place) -> None:
    """The reason for which it is not tried again; of an error that nobody foresaw the traceback, too."""
    message = str(error)
    if not isinstance(error, ScviaductError):
        file = out / "traceback.txt"
        file.write_text("".join(traceback.format_exception(error)))
        message = (
            f"{type(error).__name__}: {message}. It was not tried again, as it would come again; traceback: {file}"
        )
    try:
        write_json(_file(out), {"error": type(error).__name__, "message": message})
    except OSError as failed:
        if not disk_is_full(failed):
            raise
