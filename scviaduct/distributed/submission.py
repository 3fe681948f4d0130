"""`submit`: any other verb as a job of a Ray cluster, or as the file that Kubernetes or Slurm wants.

The job's driver runs on the cluster; this machine uploads the package's code and follows the log. Data are never
uploaded: paths are those of the cluster. Importing this module does not load Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from scviaduct import __version__
from scviaduct.errors import ConfigError, ScviaductError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDED = (
    *("*.h5ad", "*.h5", "*.h5mu", "*.loom", "*.zarr", "*.mtx", "*.mtx.gz", "*.npz", "*.safetensors"),
    *(".git", ".venv", "__pycache__", "mlflow.db", "mlruns"),
)
"""What of a working folder stays here: data, environments, histories."""
MOST_BYTES = 100 * 2**20
"""More is refused before anything is sent: every node would unpack it. Ray's own limit is 500 MiB."""
WITH_ADDRESS = ("convert", "prepare", "train", "tune", "map")
"""Verbs that spread over a cluster when they are told its address."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Where a job goes and what goes with it."""

    address: str | None = None
    """The cluster's dashboard, http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS."""
    token_file: Path | None = None
    """File with the cluster's token. Default: $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    no_token: bool = False
    """The cluster asks for no token; whoever reaches its port can run anything on it."""
    working_dir: Path | None = None
    """Folder to upload and to start in, without data files. Default: none; paths must then be absolute."""
    installed: bool = False
    """Use the scviaduct that the cluster has. Default: the code of this one is uploaded, without what it depends on."""
    env: tuple[str, ...] = ()
    """Environment of the job as NAME=VALUE; may be repeated."""
    detach: bool = False
    """Do not wait for the end: print the job's name and return."""
    dry_run: bool = False
    """Send nothing: print the request, or the file that `format` says."""
    format: Literal["ray", "kuberay", "slurm"] = "ray"
    """What --dry-run prints: a request of Ray's Job API, a RayJob for KubeRay, or a script for sbatch."""
    image: str = "scviaduct:latest"
    """Container image of a RayJob; it needs this package."""
    nodes: int = 1
    """Nodes that do the work, in a RayJob beside the head."""
    cpus: int = 4
    """Cores of each node."""
    gpus: int = 0
    """GPUs of each node."""
    memory: str = "16Gi"
    """Memory of each node, as Kubernetes and Slurm write it (Gi or G)."""
    time: str = "24:00:00"
    """Slurm's limit of time."""
    mount: tuple[str, ...] = ()
    """CLAIM:/PATH, a persistent volume claim to mount in all pods; may be repeated."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.gpus < 0:
            raise ConfigError(f"gpus must not be negative, not {self.gpus}.")
        if wrong := [entry for entry in self.env if not entry.partition("=")[1]]:
            raise ConfigError(f"--env wants NAME=VALUE, not {wrong[0]!r}.")
        if wrong := [entry for entry in self.mount if not entry.partition(":/")[1]]:
            raise ConfigError(f"--mount wants CLAIM:/PATH, not {wrong[0]!r}.")
        if self.format != "ray" and not self.dry_run:
            how = {"kuberay": "kubectl create -f -", "slurm": "sbatch"}[self.format]
            raise ConfigError(f"A {self.format} file is printed, not sent: add --dry-run, and pipe it to `{how}`.")


@dataclass(frozen=True)
class Request:
    """What the cluster is asked to do."""

    command: tuple[str, ...]
    """The verb and its arguments."""
    env: dict[str, str] = field(default_factory=dict)
    working_dir: Path | None = None
    package: Path | None = None
    """Folder of the package to upload; None: the cluster has it."""

    @classmethod
    def of(cls, command: Sequence[str], config: SubmitConfig) -> Request:
        """The request, refused when something in it is too large to be sent.

        Raises:
            ConfigError: too many bytes in the working folder; the message names the largest files.
        """
        env = dict(entry.split("=", 1) for entry in config.env)
        package = None if config.installed else Path(__file__).parents[1]
        if config.working_dir:
            _refuse_large(config.working_dir)
        return cls(spread(command), env, config.working_dir and config.working_dir.absolute(), package)

    @property
    def entrypoint(self) -> str:
        """The shell command of the job's driver."""
        return shlex.join(["python", "-m", "scviaduct.jobs", *self.command])

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment."""
        made: dict[str, Any] = {"env_vars": self.env} if self.env else {}
        if self.working_dir:
            made["working_dir"] = str(self.working_dir)
        if self.package:
            made["py_modules"] = [str(self.package)]
        return made | ({"excludes": list(EXCLUDED)} if self.working_dir or self.package else {})


def spread(command: Sequence[str]) -> tuple[str, ...]:
    """The command, told to use the cluster it runs on where its verb can."""
    if command[0] in WITH_ADDRESS and not any(token.partition("=")[0] == "--address" for token in command):
        return (*command, "--address", "auto")
    return tuple(command)


def _refuse_large(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder} is not a folder.")
    sizes = {path: path.stat().st_size for path in _kept(folder)}
    if sum(sizes.values()) > MOST_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 2**20:,.0f} MB)" for path in largest)
        raise ConfigError(
            f"{folder} has {sum(sizes.values()) / 2**20:,.0f} MB to upload, more than {MOST_BYTES // 2**20}: {named}. "
            "Put data on the file system that the cluster's nodes share, and name them there."
        )


def _kept(folder: Path) -> Iterator[Path]:
    """Files that would be uploaded."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _excluded(name)]
        yield from (Path(root, name) for name in files if not _excluded(name) and Path(root, name).is_file())


def _excluded(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in EXCLUDED)


def submit(request: Request, config: SubmitConfig, *, say: Callable[[str], None], log: Callable[[str], None]) -> int:
    """Send the request, pass the job's log on, and return the exit code of its driver (0 at once when detached).

    Raises:
        ConfigError: no cluster answers, or it does not take the token.
        ScviaductError: the job was stopped, or ended without an exit code.
    """
    with _authenticated(config), _quiet():
        client = _client(config)
        job = _sent(client, request)
        address = client.get_address()
        say(f"{job} on {address}: {request.entrypoint}")
        if config.detach:
            say(f"Follow it with: ray job logs {job} --follow --address {address}")
            return 0
        try:
            asyncio.run(_follow(client, job, log))
        except KeyboardInterrupt:
            say(f"The job goes on. Stop it with: ray job stop {job} --address {address}")
            raise
        return _exit_code(client, job)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's client tells of every upload and every closed connection, whatever the level of its parent logger."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _authenticated(config: SubmitConfig) -> Iterator[None]:
    """Ray reads its token from the environment, which is as before afterwards."""
    before = dict(os.environ)
    try:
        os.environ["RAY_AUTH_MODE"] = "disabled" if config.no_token else "token"
        if config.token_file:
            os.environ.pop("RAY_AUTH_TOKEN", None)
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(config.token_file)
        if not config.no_token:
            _require_token(config)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _require_token(config: SubmitConfig) -> None:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file() or not path.read_text().strip():
        raise ConfigError(
            f"There is no token in {path}. Copy the cluster's (on its head: ~/.ray/auth_token, or what "
            "RAY_AUTH_TOKEN_PATH names) and give it with --token-file; --no-token is for clusters that ask for none."
        )


def _client(config: SubmitConfig) -> JobSubmissionClient:
    address = config.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ConfigError(
            "Which cluster? Give --address http://HOST:8265, its dashboard, or set RAY_API_SERVER_ADDRESS."
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address} is not the address of a dashboard; write http://HOST:8265.")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # requests, aiohttp and Ray have a class each for what is all the same here
        raise _refused(address, error) from error


def _refused(address: str, error: Exception) -> ConfigError:
    said = " ".join(str(error).split())[:300]
    if type(error).__name__ == "AuthenticationError" or "401" in said or "403" in said:
        said = said.partition(" Token authentication is enabled")[0]
        return ConfigError(f"{address} wants its token ({said}): give it with --token-file.")
    return ConfigError(f"No Ray cluster answers at {address}: {said}. Is it the dashboard's port (8265), and is it up?")


def _sent(client: JobSubmissionClient, request: Request, *, patience: float = 180.0) -> str:
    """The job's name. A cluster that has just come up takes jobs only after a while, up to a minute on a busy machine."""
    until = time.monotonic() + patience
    while True:
        try:
            return client.submit_job(
                entrypoint=request.entrypoint,
                runtime_env=request.runtime_env,
                metadata={"scviaduct": __version__},
                entrypoint_num_cpus=0,
            )
        except (RuntimeError, ValueError, OSError) as error:
            if "No available agent" not in str(error):
                raise _refused(client.get_address(), error) from error
            if time.monotonic() > until:
                raise ConfigError(
                    f"{client.get_address()} has no dashboard agent that takes jobs. Another Ray on its head may have the "
                    "agent's port: start the head with a --dashboard-agent-listen-port of its own."
                ) from error
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job: str, log: Callable[[str], None]) -> None:
    """Pass the log on until the job has ended; a connection that breaks is made again, nothing is shown twice."""
    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                seen += len(text)
                if seen > shown:
                    log(text[len(text) - (seen - shown) :])
                    shown = seen
        except (RuntimeError, OSError):
            await asyncio.sleep(1)
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(0.5)


def _exit_code(client: JobSubmissionClient, job: str) -> int:
    info = client.get_job_info(job)
    if info.driver_exit_code is not None and info.driver_exit_code >= 0:
        return int(info.driver_exit_code)
    raise ScviaductError(f"{job} ended as {info.status.value.lower()}: {info.message or 'no reason is given'}")
