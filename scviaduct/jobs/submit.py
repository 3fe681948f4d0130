"""`scviaduct submit`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import CycloptsError, Parameter

from scviaduct.distributed.submission import Request, SubmitConfig
from scviaduct.errors import ConfigError
from scviaduct.jobs.display import console, output


def command(
    *verb: Annotated[str, Parameter(allow_leading_hyphen=True)],
    config: Annotated[SubmitConfig, Parameter(name="*")] = SubmitConfig(),  # noqa: B008 - frozen
) -> int:
    """Run another verb on a Ray cluster: `scviaduct submit --address URL -- train …`.

    The log is shown here as it is written, and the exit code is the job's. Paths are those of the cluster's nodes.

    Args:
        verb: The verb and its arguments, after "--".
    """
    _check(verb, config)
    request = Request.of(verb, config)
    if config.dry_run:
        output.print(_shown(request, config), end="")
        return 0
    from scviaduct.distributed.submission import submit

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    return submit(request, config, say=say, log=lambda text: output.print(text, end=""))


def _check(verb: tuple[str, ...], config: SubmitConfig) -> None:
    """Refuse what the verb itself would refuse, before anything is sent."""
    from scviaduct.jobs.__main__ import app

    if not verb or verb[0] == "submit":
        raise ConfigError("Which verb? Put it after --, as in: scviaduct submit --address URL -- train ATLAS --out RUN")
    try:
        _, bound, _ = app.parse_args(list(verb), print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise ConfigError(f"scviaduct {' '.join(verb)}: {error}") from error
    relative = [path for path in _paths(list(bound.arguments.values())) if not path.is_absolute()]
    if relative and not config.working_dir and config.format != "slurm":
        raise ConfigError(
            f"{relative[0]} is relative, but the job starts in a folder of its own: write the path that the cluster's "
            "nodes have, from / on, or upload small files with --working-dir."
        )


def _paths(value: Any) -> Iterator[Path]:
    """All paths among the arguments; addresses of object stores are none."""
    if isinstance(value, Path):
        if ":/" not in str(value):
            yield value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _paths([getattr(value, f.name) for f in fields(value)])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _paths(part)


def _shown(request: Request, config: SubmitConfig) -> str:
    if config.format == "ray":
        record = {"entrypoint": request.entrypoint, "entrypoint_num_cpus": 0, "runtime_env": request.runtime_env}
        return json.dumps(record, indent=2) + "\n"
    from importlib.metadata import version

    from scviaduct.distributed.clusterfiles import kuberay, slurm

    return kuberay(request, config, version("ray")) if config.format == "kuberay" else slurm(request, config)
