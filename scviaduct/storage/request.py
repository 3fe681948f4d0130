"""What a conversion was asked for, kept in the unfinished atlas: the same command goes on, another one is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scviaduct.errors import DataError, OutputExistsError
from scviaduct.storage.arrays import make_group
from scviaduct.storage.dataset import DatasetPlan, forget, source_facts
from scviaduct.storage.locks import locked
from scviaduct.storage.manifest import (
    ATLAS_MARKER,
    DATASET_MARKER,
    FORMAT,
    read_json,
    sync_directory,
    write_json_atomic,
)

REQUEST = "converting.json"
"""In an atlas that is being made or added to."""


@dataclass(frozen=True)
class Request:
    """Files and options of a conversion."""

    plans: tuple[DatasetPlan, ...]
    append: bool

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        first = self.plans[0]
        return {
            "files": {str(p.path): source_facts(p.path) if p.path.exists() else None for p in self.plans},
            "options": {
                "append": self.append,
                "counts": first.counts,
                "obsm": list(first.obsm),
                "layers": list(first.layers),
                "sum_duplicates": first.sum_duplicates,
            },
        }

    def without(self, ids: Sequence[str]) -> Request:
        """The same for the other data sets."""
        return replace(self, plans=tuple(p for p in self.plans if p.id not in ids))


def check_ids(paths: list[Path], taken: tuple[str, ...] = ()) -> None:
    """Stems become names of directories: they must differ, also where case is ignored, and be valid in Zarr.

    `taken` are ids of an atlas: the same id is the same data set, one that differs in case only is refused.
    """
    if not paths:
        raise DataError("no files to convert: name one h5ad or more")
    seen: dict[str, Path] = {}
    known = {name.lower(): name for name in taken}
    for path in paths:
        other = seen.setdefault(path.stem.lower(), path)
        if other is not path:
            raise DataError(
                f"{other} and {path} would both become the data set {path.stem!r}: data sets are named by their "
                "files; rename one of them (or link it under another name)"
            )
        if known.get(path.stem.lower(), path.stem) != path.stem:
            raise DataError(f"{path}: the atlas has a data set {known[path.stem.lower()]!r} already; rename the file")
        if path.stem.startswith(("__", ".")) or not path.stem.strip("."):
            raise DataError(f"{path}: {path.stem!r} cannot name a data set; rename the file")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else builds `out` meanwhile; folders above it are made, and removed again where nothing came into them."""
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process is making {out} at this moment; wait for it"
    try:
        with locked(out.with_name(f".{out.name}.lock"), busy=busy):
            yield
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def unfinished(out: Path, request: Request) -> bool:
    """Whether `out` is what this request left unfinished; False when there is nothing there, or a finished atlas.

    Raises OutputExistsError when there is something else; what differs is told.
    """
    if not (out / REQUEST).is_file():
        empty = out.is_dir() and not any(out.iterdir())
        if request.append or not (out.exists() or out.is_symlink()) or empty:
            return False
        more = ", or add to it with --append" if (out / ATLAS_MARKER).is_file() else ", or remove it first"
        raise OutputExistsError(f"{out} exists; name another --out{more}")
    found, wanted = read_json(out / REQUEST), request.record()
    files = [*(set(found["files"]) - set(wanted["files"])), *(set(wanted["files"]) - set(found["files"]))]
    differs = [
        f"{name} was {found['options'].get(name)!r} and is {value!r} now"
        for name, value in wanted["options"].items()
        if found["options"].get(name) != value
    ]
    if files:
        differs.append(f"{len(files)} files are not in both, e.g. {files[0]}")
    elif list(found["files"]) != list(wanted["files"]):
        differs.append("the files come in another order")
    if differs:
        raise OutputExistsError(
            f"{out} holds an unfinished conversion by another command: {'; '.join(differs)}. Run that command again, "
            "which goes on where it was, or name another --out"
        )
    return True


def begin(out: Path, request: Request) -> None:
    """Make the atlas's folder, or note in a finished atlas what is added to it."""
    if request.append:
        write_json_atomic(out / REQUEST, request.record())
        return
    staging = out.with_name(f".{out.name}.partial")
    if staging.exists():
        shutil.rmtree(staging)
    make_group(staging, {"scviaduct": {"format": FORMAT}})
    make_group(staging / "datasets")
    write_json_atomic(staging / REQUEST, request.record())
    staging.rename(out)
    sync_directory(out.parent)


def go_on(out: Path, request: Request) -> None:
    """Take an unfinished conversion over: data sets of files that changed since are made again."""
    found, now = read_json(out / REQUEST)["files"], request.record()
    listed = read_json(out / ATLAS_MARKER)["datasets"] if (out / ATLAS_MARKER).is_file() else []
    for plan in request.plans:
        before, facts = found[str(plan.path)], now["files"][str(plan.path)]
        if facts is not None and facts != before and plan.id not in listed:
            drop(out, plan.id)
    write_json_atomic(out / REQUEST, now | {"files": {k: v or found[k] for k, v in now["files"].items()}})


def drop(out: Path, dataset_id: str) -> None:
    """Remove a data set, its manifest first."""
    folder = out / "datasets"
    forget(folder, dataset_id)
    if (folder / dataset_id).exists():
        (folder / dataset_id / DATASET_MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder / dataset_id)


def is_done(out: Path, dataset_id: str) -> bool:
    """Whether a data set is complete."""
    return (out / "datasets" / dataset_id / DATASET_MARKER).is_file()


def finish(out: Path) -> None:
    """Remove what was there for the conversion only; the atlas is complete."""
    _tidy(out)
    (out / REQUEST).unlink(missing_ok=True)


def abandon(out: Path, request: Request) -> None:
    """Put `out` back as it was, if no data set is complete."""
    if any(is_done(out, plan.id) for plan in request.plans):
        return
    if request.append:
        finish(out)
    elif out.exists():
        shutil.rmtree(out)


def _tidy(out: Path) -> None:
    for entry in (out / "datasets").glob(".*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for temporary in out.glob(".*.tmp"):
        temporary.unlink()
