"""repair: what is damaged is made again from its source, and takes its place only when it is what was lost, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scviaduct.errors import IncompleteError, ScviaductError
from scviaduct.storage.arrays import make_group
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import memory_bytes, stored_vocabulary, write_record
from scviaduct.storage.dataset import DatasetPlan, write_dataset
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.manifest import (
    ATLAS_MARKER,
    DATASET_MARKER,
    FORMAT,
    VIEW_MARKER,
    file_digest,
    json_bytes,
    read_json,
    replace_folder,
    write_json_atomic,
)
from scviaduct.storage.places import local
from scviaduct.storage.prepare import prepare
from scviaduct.storage.qc import Filters
from scviaduct.storage.report import Finding, Report
from scviaduct.storage.request import alone
from scviaduct.storage.verify import Progress, verify


class _CannotError(Exception):
    """Why a part cannot be repaired, as a sentence."""


def repair(
    path: str | Path,
    *,
    sources: Sequence[str | Path] = (),
    memory: str = "2GB",
    on_progress: Progress | None = None,
) -> Report:
    """Make the damaged parts of an atlas again, and say what was done and what is still wrong.

    A data set is converted again from its source file: at the path it was converted from, or among `sources` (files,
    or folders that are searched), recognised by its sha256. A view is prepared again from its own list of genes.
    Either takes the place of the damaged one only when it has the digests that were recorded. The vocabulary and
    atlas.json are computed again from whole data sets. Nothing else is touched: files nobody knows, unfinished work
    and stale views are told, not removed. `memory` bounds the conversion.

    Raises UnreadableFileError, IncompleteError as `verify`; OutputExistsError when another process makes the atlas.
    """
    path, tell, budget = local(path, "The atlas to repair"), on_progress or (lambda *_: None), memory_bytes(memory)
    found = verify(path, on_progress=on_progress)
    damaged = [f for f in found.findings if f.kind == "damaged"]
    if not damaged:
        return found
    done: list[str] = []
    failed: dict[str, str] = {}
    with alone(path.absolute()), _scratch(path) as scratch:
        for part, mend in _work(path, damaged, scratch, [Path(s) for s in sources], budget, memory, tell):
            try:
                told = mend()
                done += [f"{part}: {told}"] if told else []
            except _CannotError as reason:
                failed[part] = f"It cannot be repaired: {reason}"
            except ScviaductError as error:
                failed[part] = f"It cannot be repaired: {error}"
    left = verify(path, on_progress=on_progress)
    findings = tuple(replace(f, remedy=failed.get(f.part, f.remedy)) for f in left.findings)
    return replace(left, findings=findings, done=tuple(done))


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Where things are made again, on the same file system; what a killed repair left there is removed."""
    folder = path.absolute().with_name(f".{path.absolute().name}.repair")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _work(
    path: Path,
    damaged: list[Finding],
    scratch: Path,
    sources: list[Path],
    budget: int,
    memory: str,
    tell: Progress,
) -> Iterator[tuple[str, Callable[[], str]]]:
    """(part, how to mend it) in the order in which one needs the other."""
    parts = list(dict.fromkeys(f.part for f in damaged))
    if any(f.part == ATLAS_MARKER and f.place.endswith("zarr.json") for f in damaged):
        yield "zarr.json", lambda: _mend_groups(path)
    lost = {part: _Lost.of(path, part.partition("/")[2]) for part in parts if part.startswith("datasets/")}
    for part, dataset in lost.items():
        yield part, lambda dataset=dataset: _mend_dataset(path, dataset, scratch, sources, budget, tell)  # type: ignore[misc]
    if any(f.part != "views" and not f.part.startswith("views/") for f in damaged):
        yield ATLAS_MARKER, lambda: _mend_record(path)  # beside damaged obs the vocabulary could not be looked at
    for part in (p for p in parts if p.startswith("views/")):
        yield part, lambda part=part: _mend_view(path, part.partition("/")[2], scratch, memory, tell)  # type: ignore[misc]


def _mend_groups(path: Path) -> str:
    make_group(path, {"scviaduct": {"format": FORMAT}})
    make_group(path / "datasets")
    return "the metadata of the Zarr groups were written again"


def _record(path: Path) -> dict[str, Any]:
    """atlas.json, or nothing when it is gone, damaged, or lacks something."""
    try:
        record = read_json(path / ATLAS_MARKER)
        return record if {"datasets", "manifests", "vocabulary", "identifiers"} <= record.keys() else {}
    except (IncompleteError, AttributeError):
        return {}


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path)
    except IncompleteError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _mend_record(path: Path) -> str:
    """atlas.json from the data sets; of one that is there only the vocabulary. "" when nothing had to be done."""
    record = _record(path)
    if record:
        values, identifiers = stored_vocabulary(path, record["datasets"])
        if (values, identifiers) == (record["vocabulary"], record["identifiers"]):
            return ""
        write_json_atomic(path / ATLAS_MARKER, record | {"vocabulary": values, "identifiers": identifiers})
        return "the vocabulary was computed again from obs"
    if any(f.part.startswith("datasets/") and f.kind == "damaged" for f in verify(path).findings):
        raise _CannotError("data sets are damaged too, and without atlas.json nothing says what they were")
    ids = sorted(p.name for p in (path / "datasets").glob("[!.]*") if p.is_dir())
    views = [_manifest(marker).get("datasets", {}) for marker in path.glob(f"views/[!.]*/{VIEW_MARKER}")]
    order = next((list(of) for of in views if sorted(of) == ids), None)
    write_record(path, order or ids)
    return f"written again, with the data sets in the order of {'a view' if order else 'their names'}"


@dataclass(frozen=True)
class _Lost:
    """What is known of a damaged data set."""

    id: str
    wanted: str
    """sha256 of its manifest."""
    manifest: dict[str, Any]
    """As far as one can be read that is its own: elsewhere, when folders were swapped."""

    @classmethod
    def of(cls, path: Path, id_: str) -> _Lost:
        own = path / "datasets" / id_ / DATASET_MARKER
        wanted = _record(path).get("manifests", {}).get(id_) or (file_digest(own) if own.is_file() else "")
        for marker in (path / "datasets").glob(f"*/{DATASET_MARKER}"):
            if file_digest(marker) == wanted:
                return cls(id_, wanted, _manifest(marker))
        manifest = _manifest(own)
        return cls(id_, wanted, manifest if manifest.get("id") == id_ else {})


def _mend_dataset(path: Path, lost: _Lost, scratch: Path, sources: list[Path], budget: int, tell: Progress) -> str:
    id_, old, final = lost.id, lost.manifest, path / "datasets" / lost.id
    source = _source(path, id_, old, sources)
    (scratch / "sources").mkdir(exist_ok=True)
    (scratch / "datasets").mkdir(exist_ok=True)
    link = scratch / "sources" / (old.get("source") or source.name)
    link.symlink_to(source.absolute())
    n_obs = int(old.get("n_obs") or 0)
    new = write_dataset(
        _plan(link, id_, old, final),
        scratch / "datasets",
        memory=budget,
        report=lambda cells: tell(f"datasets/{id_}", cells, n_obs),
    )
    made = scratch / "datasets" / id_
    for given in (new["source_path"], str(source), str(source.absolute()), source.name):
        manifest = new | {"source_path": given}
        if hashlib.sha256(json_bytes(manifest)).hexdigest() == lost.wanted:
            write_json_atomic(made / DATASET_MARKER, manifest)
            replace_folder(made, final)
            return f"converted again from {source}; it has the digests that were recorded"
    raise _CannotError(
        f"{source}, converted again, does not give what was recorded: it is another file, or was converted with other "
        f"options or by another version of scviaduct. Convert the files into a new atlas"
    )


def _plan(link: Path, id_: str, old: dict[str, Any], final: Path) -> DatasetPlan:
    """What the manifest says of the conversion; where it says nothing, what is found of the data set."""

    def kept(kind: str) -> tuple[str, ...]:
        return tuple(old.get(kind) or sorted(p.name for p in final.glob(f"{kind}/*") if p.is_dir()))

    return DatasetPlan(
        link,
        str(old.get("source_path", link.name)),
        id_,
        counts=old.get("matrix"),
        obsm=kept("obsm"),
        layers=kept("layers"),
        sum_duplicates=bool(old.get("summed_features")),
    )


def _source(path: Path, id_: str, old: dict[str, Any], sources: list[Path]) -> Path:
    """The file a data set was made of."""
    recorded = Path(old["source_path"]) if old.get("source_path") else None
    places = [recorded, path.parent / recorded, *sources] if recorded else sources
    size, digest = old.get("source_bytes"), old.get("source_sha256")
    for candidate in _files(places, old.get("source"), size, id_):
        if (digest is None and candidate.stem == id_) or (digest is not None and _digest(candidate) == digest):
            return candidate
    looked = ", ".join(map(str, dict.fromkeys(places))) or "nowhere: give it with --source"
    what = f"{old.get('source', f'{id_}.h5ad')}" + (f" (sha256 {digest[:12]}…)" if digest else "")
    raise _CannotError(f"its source {what} was not found; looked at {looked}. Give it, or its folder, with --source")


def _files(places: Sequence[Path], name: str | None, size: int | None, id_: str) -> Iterator[Path]:
    """Files and Zarr stores at some places, and in folders those that may be the one that is looked for."""
    for place in places:
        if place.is_file() or any((place / marker).is_file() for marker in ("zarr.json", ".zgroup")):
            yield place
        elif place.is_dir():
            for entry in sorted(place.rglob("*")):
                of_size = entry.is_file() and (entry.stat().st_size == size or (size is None and entry.stem == id_))
                if of_size or (entry.is_dir() and entry.name == name):
                    yield entry


def _digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    try:
        with open_counts(path) as store:
            return store.digest()
    except ScviaductError:
        return ""


def _mend_view(path: Path, name: str, scratch: Path, memory: str, tell: Progress) -> str:
    final = path / "views" / name
    old = _manifest(final / VIEW_MARKER)
    anew = f"scviaduct prepare {path} --name {name} --overwrite makes it anew"
    if not {"recipe", "genes", "datasets", "digest"} <= old.keys():
        raise _CannotError(f"{VIEW_MARKER} is gone or damaged, so its genes and options are not known; {anew}")
    stand_in = scratch / "atlas"
    if not stand_in.exists():
        stand_in.mkdir()
        for entry in (ATLAS_MARKER, "datasets"):
            (stand_in / entry).symlink_to((path / entry).absolute())
    atlas = Atlas.open(stand_in)
    for id_, made_of in old["datasets"].items():
        if file_digest(path / "datasets" / id_ / DATASET_MARKER) != made_of:
            raise _CannotError(f"data set {id_!r} has changed since the view was made; {anew}")
    made_from = tuple(d for d in atlas.datasets if d.id in old["datasets"])
    try:
        new = _prepared(replace(atlas, datasets=made_from, _open={}), name, old, memory, tell)
    except (KeyError, TypeError) as error:
        raise _CannotError(f"{VIEW_MARKER} does not say how it was made ({error}); {anew}") from error
    if new["digest"] != old["digest"]:
        raise _CannotError(
            f"made again from what {VIEW_MARKER} says it is not what was lost: {VIEW_MARKER} was changed, or data sets "
            f"were appended since; {anew}"
        )
    write_json_atomic(stand_in / "views" / name / VIEW_MARKER, new)
    replace_folder(stand_in / "views" / name, final)
    return f"prepared again with its {len(old['genes']):,} genes; it has the digests that were recorded"


def _prepared(atlas: Atlas, name: str, old: dict[str, Any], memory: str, tell: Progress) -> dict[str, Any]:
    """The view made again; its record says what the old one did of how the genes were chosen."""
    recipe = old["recipe"]
    view = prepare(
        atlas,
        genes=old["genes"],
        flavor=recipe["flavor"],
        batch_key=recipe["batch_key"],
        name=name,
        seed=recipe["seed"],
        block_rows=recipe["block_rows"],
        memory=memory,
        join=recipe["join"],
        filters=Filters(**recipe["filters"]),
        proteins=recipe.get("proteins"),
        codec=recipe["codec"],
        overwrite=True,
        on_progress=tell,
    )
    said = {"recipe": recipe, "genes_chosen_from": old["genes_chosen_from"]}
    plain = {key: value for key, value in (view.manifest | said).items() if key not in ("digest", "files")}
    return view.manifest | said | {"digest": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}
