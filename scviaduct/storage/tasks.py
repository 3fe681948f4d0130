"""Independent pieces of work on an Executor: this process's threads, this machine's processes, or a cluster's tasks.

Storage knows `concurrent.futures.Executor` and nothing else; distributed/tasks.py has one that runs on Ray.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import connection, parent_process
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(workers: int, *, preload: str) -> ProcessPoolExecutor:
    """Processes that are forked from a server which imported the module `preload` and has no threads.

    A plain fork of this process could copy a lock that one of its threads holds, which hangs the child. Unlike
    multiprocessing's own, they do not run the user's script again, so that it needs no `if __name__ == "__main__"`;
    and they end when this process is killed.
    """
    context = _Context()
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # nothing of it is needed: work functions are of modules
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def _end_with_parent() -> None:
    """End this process as soon as the one that asked for it is gone: it may be writing what somebody does again."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def in_order(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int
) -> Iterator[Result]:
    """Results in the order of the tasks; at most `ahead` tasks are begun and not yet handed out."""
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(function, task))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        _cancel(pending)


def as_done(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int
) -> Iterator[tuple[Task, Result]]:
    """(task, result) as they finish; at most `ahead` tasks are begun and not yet handed out.

    The first error is raised when it is seen; tasks that did not start are cancelled, running ones are waited for.
    """
    pending: dict[Future[Result], Task] = {}
    rest = iter(tasks)
    try:
        for task in rest:
            pending[executor.submit(function, task)] = task
            if len(pending) >= ahead:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)
    finally:
        _cancel(pending)


def _finished(pending: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), future.result()


def _cancel(futures: Iterable[Future[Result]]) -> None:
    futures = [future for future in futures if not future.cancel()]
    wait(futures)
