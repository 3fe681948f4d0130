"""Ray behind `concurrent.futures.Executor`, which is all that storage knows: the same work runs on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def executor_at(address: str | None, workers: int | None) -> Iterator[Executor | None]:
    """An executor on the Ray cluster at `address`; None without one: the work is done on this machine."""
    if address is None:
        yield None
        return
    from scviaduct.distributed.cluster import ray_cluster

    with ray_cluster(address, workers or 1), RayExecutor() as executor:
        yield executor


class RayExecutor(Executor):
    """Every submission is a Ray task; Ray is to be initialised (`cluster.ray_cluster`).

    Functions are those of modules which the workers can import. Tasks whose process died, with its machine perhaps,
    are run again up to `retries` times.
    """

    def __init__(self, *, num_cpus: float = 1, retries: int = 3) -> None:
        self._num_cpus, self._retries = num_cpus, retries
        self._open: set[_RayFuture] = set()

    def submit(self, fn: Callable[..., Result], /, *args: Any) -> Future[Result]:  # type: ignore[override]
        """The future result of `fn(*args)`; an error of it is raised as it was, without Ray's wrapping."""
        import ray

        reference = ray.remote(num_cpus=self._num_cpus, max_retries=self._retries)(fn).remote(*args)
        future = _RayFuture(reference)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        reference.future().add_done_callback(future.copy)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001
        """Wait for what runs, or give it up; Ray itself goes on."""
        open_ones = list(self._open)
        if cancel_futures:
            for future in open_ones:
                future.cancel()
        if wait:
            for future in open_ones:
                future.exception()


class _RayFuture(Future[Any]):
    def __init__(self, reference: Any) -> None:
        super().__init__()
        self._reference = reference

    def cancel(self) -> bool:
        """Ask Ray to end the task; False, because it is over only when Ray says so."""
        import ray

        if not self.done():
            ray.cancel(self._reference)
        return False

    def copy(self, found: Future[Any]) -> None:
        """Take over what Ray's own future holds."""
        error = found.exception()
        if error is None:
            self.set_result(found.result())
        else:
            self.set_exception(getattr(error, "cause", None) or error)
