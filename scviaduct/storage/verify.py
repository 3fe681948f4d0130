"""verify: every file of an atlas against its manifest, and every number in the manifests against the arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scviaduct.errors import IncompleteError, UnreadableFileError
from scviaduct.storage.contents import affected, check_dataset, check_lineage, check_view, check_vocabulary
from scviaduct.storage.manifest import ATLAS_MARKER, DATASET_MARKER, FORMAT, VIEW_MARKER, file_digest, read_json
from scviaduct.storage.places import local
from scviaduct.storage.recount import Recount, recount
from scviaduct.storage.report import Finding, Kind, Part, Report
from scviaduct.storage.request import REQUEST
from scviaduct.storage.tasks import as_done, cores

Progress = Callable[[str, int, int], None]
GROUPS = ("zarr.json", "datasets/zarr.json")
"""Metadata of the groups above the data sets; views lie beside them and are groups of their own."""
MARKERS = {"datasets": DATASET_MARKER, "views": VIEW_MARKER}


def verify(
    path: str | Path, *, quick: bool = False, on_progress: Progress | None = None, executor: Executor | None = None
) -> Report:
    """Look for everything that can be wrong with an atlas on disk; nothing is changed.

    Every file is compared with the size and sha256 in its manifest, every number of a manifest (cells, non-zeros, sum,
    types) is computed again from the arrays, the vocabulary from obs, and views are compared with the data sets they
    were made from. Unfinished work and files that no manifest knows are told too. `quick` compares sizes and
    manifests only: it reads no arrays, so it does not see a changed byte. `on_progress` is called with (what, done,
    all), in files and shards; `executor` does the work (default: a thread per core).

    Raises:
        UnreadableFileError: there is no folder at `path`, or it is no atlas at all.
        IncompleteError: the atlas has another format than this version reads.
    """
    path = local(path, "The atlas to verify")
    record, findings = _record(path)
    parts, missing = _parts(path, record)
    findings += [*missing, *_groups(path), *_unfinished(path), *_unlisted(path, record), *_unknown(path, parts)]
    with _pool(executor) as pool:
        told = _Ticker(on_progress, sum(len(part.manifest["files"]) for part in parts))
        wrong = _wrong_files(parts, pool, told, quick=quick)
        counted = {} if quick else recount([part.matrix for part in parts], pool)
    for part in parts:
        findings += _of_part(part, path, record, wrong[part.name], counted.get(part.matrix))
    whole = not any(f.part.startswith("datasets/") and f.kind == "damaged" for f in findings)
    if record and whole and not quick:
        findings += check_vocabulary(path, record, parts)
    files = [facts for part in parts for facts in part.manifest["files"].values()]
    n_files = len(files) + len(parts) + 1 + len(GROUPS)
    return Report(path, tuple(findings), n_files, sum(facts["bytes"] for facts in files))


def _record(path: Path) -> tuple[dict[str, Any], list[Finding]]:
    """What atlas.json says; what can be told without it when it is gone or damaged."""
    if not path.is_dir():
        raise UnreadableFileError(f"{path} is no atlas: {'it is a file' if path.exists() else 'it does not exist'}")
    if not (path / ATLAS_MARKER).is_file() and not (path / "datasets").is_dir():
        raise UnreadableFileError(f"{path} is no atlas: it has neither {ATLAS_MARKER} nor data sets")
    again = f"scviaduct repair {path} writes it again"
    remedy: dict[Kind, str] = {"unfinished": "The same scviaduct convert again finishes it", "damaged": again}
    kind: Kind
    try:
        record = read_json(path / ATLAS_MARKER)
        lacking = {"format", "datasets", "manifests", "vocabulary", "identifiers"} - record.keys()
    except (IncompleteError, AttributeError) as error:
        if (path / REQUEST).is_file() and not (path / ATLAS_MARKER).is_file():
            what, kind = "missing: the atlas is unfinished", "unfinished"
        else:
            what, kind = f"missing or damaged ({error})", "damaged"
        affects = "every reader refuses the atlas"
        return {}, [Finding(ATLAS_MARKER, ATLAS_MARKER, what, affects, remedy[kind], kind)]
    if record.get("format") != FORMAT:
        raise IncompleteError(
            f"{path} has the atlas format {record.get('format')!r}, this version reads format {FORMAT}: convert the "
            "files again, or verify it with the version that wrote it"
        )
    if lacking:
        return {}, [Finding(ATLAS_MARKER, ATLAS_MARKER, f"damaged: it lacks {', '.join(sorted(lacking))}", "", again)]
    return record, []


def _repair(path: Path, part: str) -> str:
    source = " --source FILE.h5ad" if part.startswith("datasets/") else ""
    return f"scviaduct repair {path}{source} makes it again"


def _parts(path: Path, record: dict[str, Any]) -> tuple[list[Part], list[Finding]]:
    """Data sets and views with a manifest that can be read, and findings on those without."""
    listed = list(record.get("datasets", _folders(path / "datasets")))
    names = [f"datasets/{id_}" for id_ in listed] + [f"views/{name}" for name in _folders(path / "views")]
    parts, findings = [], []
    for name in names:
        folder, marker = path / name, MARKERS[name.partition("/")[0]]
        try:
            manifest = read_json(folder / marker)
            _ = {facts["bytes"]: facts["sha256"] for facts in manifest["files"].values()}
        except (IncompleteError, KeyError, TypeError, AttributeError) as error:
            what = "the data set is gone" if not folder.exists() else f"{marker} is missing: it is unfinished"
            what = f"{marker} is damaged ({error})" if (folder / marker).is_file() else what
            findings.append(Finding(name, name, what, "all of it", _repair(path, name)))
            continue
        parts.append(Part(name, folder, manifest, _repair(path, name)))
    for part in parts:
        wanted = record.get("manifests", {}).get(part.id)
        if not part.is_view and record and file_digest(part.folder / DATASET_MARKER) != wanted:
            what = "it is not the manifest that atlas.json was written with (other sha256): edited, or another data set"
            findings.append(part.finding(DATASET_MARKER, what, "all of it"))
    return parts, findings


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.glob("[!.]*") if p.is_dir())


def _groups(path: Path) -> Iterator[Finding]:
    for name in GROUPS:
        try:
            group = read_json(path / name)
            good = (group["zarr_format"], group["node_type"]) == (3, "group")
        except (IncompleteError, KeyError, TypeError):
            good = False
        if not good:
            what, remedy = "it is no Zarr group's metadata", f"scviaduct repair {path} writes it again"
            yield Finding(ATLAS_MARKER, name, what, "other programs such as anndata, not scviaduct", remedy)


def _unfinished(path: Path) -> Iterator[Finding]:
    """What was begun and not ended: a conversion, and hidden folders beside data sets and views."""
    if (path / REQUEST).is_file():
        what = "a conversion was stopped, or is running at this moment"
        remedy = "The same scviaduct convert again finishes it"
        yield Finding(REQUEST, REQUEST, f"unfinished: {what}", "data sets that are not in yet", remedy, "unfinished")
    for kind, again in {"datasets": "scviaduct convert", "views": "scviaduct prepare"}.items():
        for folder in sorted(p for p in (path / kind).glob(".*") if p.is_dir()):
            what = "left behind by a job that was killed, or a job is writing it at this moment"
            remedy = f"The same {again} again finishes it; remove the folder if it is not wanted"
            place = f"{kind}/{folder.name}"
            yield Finding(place, place, f"unfinished: {what}", "", remedy, "unfinished")


def _unlisted(path: Path, record: dict[str, Any]) -> Iterator[Finding]:
    """Whole data sets that atlas.json does not know: their conversion was killed before it was written."""
    for id_ in sorted(set(_folders(path / "datasets")) - set(record.get("datasets", _folders(path / "datasets")))):
        name, remedy = f"datasets/{id_}", "The same scviaduct convert again takes it in; remove it if it is not wanted"
        yield Finding(name, name, f"{ATLAS_MARKER} does not know it", "", remedy, "unfinished")


def _unknown(path: Path, parts: list[Part]) -> Iterator[Finding]:
    """Files that no manifest knows."""
    known = {ATLAS_MARKER, REQUEST, *GROUPS}
    for part in parts:
        known |= {f"{part.name}/{name}" for name in (*part.manifest["files"], MARKERS[part.name.partition("/")[0]])}
    told = {f"{kind}/{name}/" for kind in MARKERS for name in _folders(path / kind)} - {f"{p.name}/" for p in parts}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        hidden = any(name.startswith(f"{kind}/.") for kind in MARKERS)
        if name not in known and not hidden and not name.startswith(tuple(told)):
            owner = next((p.name for p in parts if name.startswith(f"{p.name}/")), ATLAS_MARKER)
            yield Finding(owner, name, "no manifest knows this file", "", "Remove it if it is not yours", "unknown")


class _Ticker:
    """Counts the files that were looked at."""

    def __init__(self, on_progress: Progress | None, files: int) -> None:
        self._report, self._done, self._all = on_progress, 0, files

    def __call__(self, what: str) -> None:
        self._done += 1
        if self._report:
            self._report(what, self._done, self._all)


@contextmanager
def _pool(executor: Executor | None) -> Iterator[Executor]:
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(cores(), thread_name_prefix="verify") as pool:
        yield pool


def digest_or_error(file: Path) -> str:
    """sha256 of a file, or the reason why it cannot be read."""
    try:
        return file_digest(file)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _wrong_files(parts: list[Part], pool: Executor, told: _Ticker, *, quick: bool) -> dict[str, dict[str, str]]:
    """By part: the files that are not what the manifest says, and what is wrong with them."""
    wrong: dict[str, dict[str, str]] = {part.name: {} for part in parts}
    rest: dict[Path, tuple[Part, str]] = {}
    for part in parts:
        for name, facts in part.manifest["files"].items():
            file = part.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size == facts["bytes"] and not quick:
                rest[file] = part, name
                continue
            told(part.name)
            if size != facts["bytes"]:
                found = "missing" if size is None else f"it has {size:,} bytes, the manifest says {facts['bytes']:,}"
                wrong[part.name][name] = found
    for file, digest in as_done(pool, digest_or_error, rest, ahead=4 * cores()):
        part, name = rest[file]
        told(part.name)
        if digest != part.manifest["files"][name]["sha256"]:
            damaged = "damaged: its bytes have another sha256"
            wrong[part.name][name] = digest if digest.startswith("cannot") else damaged
    return wrong


def _of_part(
    part: Part, path: Path, record: dict[str, Any], wrong: dict[str, str], counted: Recount | str | None
) -> Iterator[Finding]:
    """Wrong files with the cells they concern, then numbers that do not agree."""
    numbers = counted if isinstance(counted, Recount) else None
    for name in sorted(wrong):
        yield part.finding(name, wrong[name], affected(part, name, numbers))
    if isinstance(counted, str) and not wrong:
        yield part.finding("", counted, "all cells")
    try:
        if part.is_view:
            yield from check_lineage(part, path, record)
        if numbers is not None:
            yield from check_view(part, path, numbers) if part.is_view else check_dataset(part, numbers)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        marker = MARKERS[part.name.partition("/")[0]]
        yield part.finding(marker, f"it is damaged ({type(error).__name__}: {error})", "all of it")
