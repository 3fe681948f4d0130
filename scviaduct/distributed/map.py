"""`map`: N queries onto one reference, each by surgery of its own, at the same time when asked; one failure stops none.

Per query: align genes by name and audit the counts (storage/query.py), add its batches as new categories, train only
their columns, embed, transfer labels, write a copy of the query's file with the results (storage/results.py).
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from scviaduct.distributed.bundle import Bundle, build
from scviaduct.distributed.cluster import ray_cluster
from scviaduct.distributed.config import MapConfig
from scviaduct.distributed.datafacts import tell_data
from scviaduct.distributed.lineage import record_of_result, tags_of_mapping
from scviaduct.distributed.loop import embedded, fit
from scviaduct.distributed.nodes import require_gpu, require_resources, require_shared_files
from scviaduct.distributed.registered import find_model
from scviaduct.distributed.tracking import Data, Tracker, flat
from scviaduct.distributed.transfer import Neighbours, Transferred
from scviaduct.distributed.workers import device
from scviaduct.errors import ConfigError, DataError, ScviaductError
from scviaduct.models.base import Model
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.surgery import extend
from scviaduct.schema import MISSING
from scviaduct.storage.loader import MemorySource, stream
from scviaduct.storage.manifest import file_digest, refuse_existing
from scviaduct.storage.places import local
from scviaduct.storage.query import Query, read_query
from scviaduct.storage.query_labels import with_labels
from scviaduct.storage.results import write_result
from scviaduct.storage.tasks import cores

log = logging.getLogger(__name__)

NOT_MAPPED = "not mapped"
"""Label of cells without a single count on the reference's genes."""


@dataclass(frozen=True)
class Mapped:
    """What became of one query: a row of summary.csv."""

    query: str
    status: str = "failed"
    """"mapped" or "failed"."""
    cells: int = 0
    mapped: int = 0
    """Cells with at least one count on the reference's genes."""
    genes_matched: int = 0
    genes: int = 0
    """Genes of the reference."""
    proteins_matched: int = 0
    """Proteins of the reference that the query's panel has."""
    proteins: int = 0
    """Proteins of the reference."""
    proteins_ignored: int = 0
    """Proteins of the query that the reference does not have."""
    labelled: int = 0
    """Cells whose own label was learnt from."""
    uncertainty: float = float("nan")
    """Mean uncertainty of the transferred labels."""
    neighbor_recall: float = float("nan")
    """Share of the true nearest reference cells that was found for a sample; 1 when all were compared."""
    nprobe: int = 0
    """Lists of reference cells that were looked at for each cell; 0 when all reference cells were compared."""
    epochs: int = 0
    seconds: float = 0.0
    message: str = ""
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    wrong_input: bool = False
    """The failure lies in the file, not in the program."""
    query_sha256: str = ""
    result_sha256: str = ""

    def row(self) -> dict[str, Any]:
        """The columns of summary.csv."""
        hidden = {"history", "wrong_input", "query_sha256", "result_sha256"}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in hidden}


@dataclass(frozen=True)
class Reference:
    """A bundle's content as plain arrays, which Ray shares between tasks without copies."""

    facts: dict[str, Any]
    weights: dict[str, NDArray[Any]]
    neighbours: Neighbours | None
    """Its labelled cells; None without labels, or without cells."""
    made_of: Mapping[str, str] = field(default_factory=dict)
    """What every result says of its model and run."""

    @classmethod
    def of(cls, bundle: Bundle, made_of: Mapping[str, str], config: MapConfig) -> Reference:
        """Read a bundle."""
        weights = {name: tensor.numpy() for name, tensor in bundle.weights().items()}
        latent, labels = bundle.latent(), bundle.labels()
        if bundle.schema.labels is None or latent is None or labels is None:
            return cls(bundle.facts, weights, None, made_of)
        neighbours = Neighbours(latent, labels, config.n_neighbors, exact=config.exact_neighbors)
        return cls(bundle.facts, weights, neighbours, made_of)

    def model(self) -> Model:
        """A model of its own."""
        return build(self.facts, {name: torch.tensor(array) for name, array in self.weights.items()})


def map(
    model: str | Path,
    queries: Sequence[str | Path],
    config: MapConfig,
    *,
    on_result: Callable[[Mapped], None] = lambda result: None,
) -> pd.DataFrame:
    """Map query files onto a model (a run, a bundle, or models:/name@alias) and return the summary, one row a query.

    Writes `config.out`/<query>.h5ad for every query that succeeds, and summary.csv.

    Raises:
        UnreadableFileError, IncompleteError: `model` is no (whole) model.
        OutputExistsError: `config.out` exists.
        ConfigError: no query, or two with the same name.
        DataError: not one query could be mapped; nothing is left at `config.out`.
    """
    config = dataclasses.replace(config, out=refuse_existing(local(config.out, "The results").absolute()))
    paths = _named_once(queries)
    found = find_model(model, config.tracking)
    tracker, tags = Tracker(config.tracking, config.out), tags_of_mapping(found)
    made = _make(config.out)
    try:
        options = {k: v for k, v in asdict(config).items() if k != "out"}
        tracker.start(f"map {config.out.name}", flat(options) | {"queries": len(paths)}, tags)
        with tracker.closing():
            results = []
            reference = Reference.of(found.bundle, record_of_result(tags, tracker), config)
            for result in _results(reference, paths, config):
                results.append(result)
                _track(result, paths, tracker)
                on_result(result)
            summary = _summary(results, paths)
            if not (summary["status"] == "mapped").any():
                raise _nothing_mapped(results)
            summary.to_csv(config.out / "summary.csv", index=False)
            tracker.artifacts(config.out / "summary.csv", "")
    except BaseException:
        if not list(config.out.glob("*.h5ad")):
            shutil.rmtree(made)
        raise
    return summary


def _make(folder: Path) -> Path:
    """Make a folder and those above it that are missing; gives the topmost that was made."""
    topmost = next(p for p in reversed([folder, *folder.parents]) if not p.exists())
    folder.mkdir(parents=True)
    return topmost


def _named_once(queries: Sequence[str | Path]) -> list[Path]:
    paths = [local(q, "A query").absolute() for q in queries]
    stems = [p.stem for p in paths]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if not paths:
        raise ConfigError("Give at least one query file.")
    if twice:
        raise ConfigError(
            f"Results are named after the queries, but {twice[0]!r} occurs {stems.count(twice[0])} times; rename."
        )
    return paths


def _results(reference: Reference, paths: list[Path], config: MapConfig) -> Iterator[Mapped]:
    """Each query's result as it is ready."""
    if config.workers == 1 and not config.address:
        require_gpu(config.gpus_per_worker)
        for path in paths:
            yield map_one(reference, path, config)
        return
    with ray_cluster(config.address, config.workers):
        yield from _on_ray(reference, paths, config)


def _on_ray(reference: Reference, paths: list[Path], config: MapConfig) -> Iterator[Mapped]:
    """At most `workers` queries at a time as Ray tasks; the reference travels once, through the object store."""
    import ray

    require_resources(1, config.gpus_per_worker)
    if config.address:
        require_shared_files([str(path) for path in paths], config.out)
    task = ray.remote(num_cpus=1, num_gpus=config.gpus_per_worker, max_retries=1)(map_one)
    shared, todo = ray.put(reference), list(reversed(paths))
    running: dict[Any, Path] = {}
    while todo or running:
        while todo and len(running) < config.workers:
            path = todo.pop()
            running[task.remote(shared, path, config)] = path
        done, _ = ray.wait(list(running), num_returns=1)
        path = running.pop(done[0])
        try:
            yield ray.get(done[0])
        except ray.exceptions.RayError as error:  # the process died; its neighbours go on
            yield Mapped(path.stem, message=f"The worker was lost: {type(error).__name__}. Map this query again.")


def map_one(reference: Reference, path: Path, config: MapConfig) -> Mapped:
    """Map one query file; what goes wrong is told in the result, never raised."""
    begin = time.perf_counter()
    try:
        result = _map_one(reference, path, config)
    except ScviaductError as error:
        result = Mapped(path.stem, message=str(error), wrong_input=isinstance(error, DataError))
    except Exception as error:  # noqa: BLE001 - one query's failure must not end the others
        log.error("Mapping %s failed:\n%s", path, traceback.format_exc())
        result = Mapped(path.stem, message=f"{type(error).__name__}: {error} (please report this)")
    return dataclasses.replace(result, seconds=round(time.perf_counter() - begin, 2))


def _map_one(reference: Reference, path: Path, config: MapConfig) -> Mapped:
    model = reference.model()
    batch_size = config.fit.batch_size or model.plan.batch_size
    torch.set_num_threads(config.fit.threads_for(batch_size, config.workers, torch.multiprocessing.cpu_count()))
    query = read_query(
        path,
        model.schema,
        counts=config.counts,
        sum_duplicates=config.sum_duplicates,
        batch_key=config.batch_key,
        one_batch=config.one_batch,
        reuse_batches=config.reuse_batches,
        floor=config.min_genes,
        proteins=config.proteins,
    )
    query, remark = _labelled(query, model, config)
    torch.manual_seed(config.fit.seed)
    trained = ("classifier",) if config.train_classifier else ()
    adapted = extend(model, query.schema, trained=trained).to(device())
    source = MemorySource(query.batch)
    tell_data(adapted, source)
    history = fit(adapted, source, config.fit).history if adapted.query_parameters() else []
    latent = embedded(adapted, source)
    threads = config.fit.threads or max(1, cores() // config.workers)
    labelled = reference.neighbours.transfer(latent, threads) if reference.neighbours else None
    columns = _columns(model, query, latent, labelled, config)
    if isinstance(adapted, SCANVI):
        columns["obs"] |= _classified(adapted, query, source)
    made_of = {**reference.made_of, "query_sha256": query.sha256} | _search_of(labelled)
    written = write_result(path, config.out / f"{path.stem}.h5ad", **columns, made_of=made_of)
    return Mapped(
        query=path.stem,
        status="mapped",
        cells=query.n_obs,
        mapped=len(query.kept),
        genes_matched=query.match.n_matched,
        genes=len(model.schema.genes),
        proteins_matched=query.proteins.matched if query.proteins else 0,
        proteins=len(model.schema.proteins),
        proteins_ignored=query.proteins.ignored if query.proteins else 0,
        uncertainty=round(float(labelled.uncertainty.mean()), 4) if labelled else float("nan"),
        neighbor_recall=round(labelled.probe.recall, 6) if labelled else float("nan"),
        nprobe=labelled.probe.nprobe if labelled else 0,
        labelled=int((query.batch.labels != MISSING).sum()),
        epochs=len(history),
        message=remark,
        history=history,
        query_sha256=query.sha256,
        result_sha256=file_digest(written),
    )


def _search_of(labelled: Transferred | None) -> dict[str, str]:
    """What a result says of the search for its neighbours."""
    if labelled is None:
        return {}
    return {"neighbor_recall": f"{labelled.probe.recall:.6f}", "nprobe": str(labelled.probe.nprobe)}


def _labelled(query: Query, model: Model, config: MapConfig) -> tuple[Query, str]:
    """The query with its own labels, where these are asked for, and a remark on them."""
    if config.labels_key is None and not config.train_classifier:
        return query, ""
    if not isinstance(model, SCANVI) or model.schema.labels is None:
        raise ConfigError(
            f"labels_key and train_classifier are for models with a classifier (scanvi), not {type(model).__name__}."
        )
    if config.labels_key is None:
        return query, ""
    return with_labels(query, model.schema.labels, config.labels_key, model.schema.unlabeled_category)


def _columns(
    model: Model, query: Query, latent: NDArray[np.float32], labelled: Transferred | None, config: MapConfig
) -> dict[str, dict[str, Any]]:
    """The obsm and obs entries of the result, over all cells of the file in its own order."""
    whole = np.full((query.n_obs, latent.shape[1]), np.nan, np.float32)
    whole[query.kept] = latent
    obs: dict[str, Any] = {"ref_or_query": pd.Categorical(["query"] * query.n_obs)}
    if labelled and model.schema.labels:
        labels = model.schema.labels
        names = np.full(query.n_obs, NOT_MAPPED, object)
        names[query.kept] = labelled.named(labels.categories, config.max_uncertainty)
        uncertainty = np.ones(query.n_obs, np.float32)
        uncertainty[query.kept] = labelled.uncertainty
        obs |= {f"{labels.key}_pred": pd.Categorical(names), f"{labels.key}_uncertainty": uncertainty}
    return {"obsm": {model.obsm_key: whole}, "obs": obs}


def _classified(model: SCANVI, query: Query, source: MemorySource) -> dict[str, Any]:
    """The classifier's own label of each cell and its probability, beside the neighbours' label."""
    assert model.schema.labels
    with stream(source) as blocks:
        best = [model.predict(block).max(1) for block in blocks]
    codes = np.concatenate([b.indices.cpu().numpy() for b in best])
    names, probability = np.full(query.n_obs, NOT_MAPPED, object), np.zeros(query.n_obs, np.float32)
    names[query.kept] = np.array(model.schema.labels.categories, object)[codes]
    probability[query.kept] = np.concatenate([b.values.cpu().numpy() for b in best])
    key = model.schema.labels.key
    return {f"{key}_classified": pd.Categorical(names), f"{key}_probability": probability}


def _track(result: Mapped, paths: Sequence[Path], tracker: Tracker) -> None:
    """One child run a query."""
    child, name = tracker.child(), result.query
    path = next(p for p in paths if p.stem == name)
    digests = {"query_sha256": result.query_sha256, "result_sha256": result.result_sha256}
    tags = {"message": result.message} | {k: v for k, v in digests.items() if v}
    child.start(f"query {name}", {"query": name}, tags)
    if result.query_sha256:
        child.datasets([Data(name, result.query_sha256, {"path": str(path)}, context="query", type="file")])
    child.history((int(record["epoch"]), record) for record in result.history)
    numbers = {k: v for k, v in result.row().items() if isinstance(v, (int, float)) and v == v}
    child.metrics(0, numbers | {"seconds_in_all": numbers.pop("seconds")})  # an epoch has seconds, too
    child.end("FINISHED" if result.status == "mapped" else "FAILED")


def _summary(results: list[Mapped], paths: list[Path]) -> pd.DataFrame:
    """One row a query, in the order they were given."""
    by_name = {r.query: r.row() for r in results}
    return pd.DataFrame([by_name[p.stem] for p in paths])


def _nothing_mapped(results: list[Mapped]) -> ScviaductError:
    kind = DataError if all(r.wrong_input for r in results) else ScviaductError
    lines = "\n".join(f"  {r.query}: {r.message}" for r in results)
    return kind(
        results[0].message if len(results) == 1 else f"Not one of {len(results)} queries could be mapped:\n{lines}"
    )
