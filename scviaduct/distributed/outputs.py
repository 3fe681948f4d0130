"""`embed` and `decode`: what a trained model says of cells, streamed into an h5ad or Zarr store.

Random draws are functions of (seed, cell, draw): they depend on neither blocks nor the other cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import Reading
from scviaduct.distributed.population import Population, open_model, open_population, seeds
from scviaduct.errors import ConfigError, DataError, nearest
from scviaduct.models.base import Model, Quantity
from scviaduct.models.counts import Cells
from scviaduct.models.noise import Noise
from scviaduct.models.scanvi import SCANVI
from scviaduct.schema import Batch
from scviaduct.storage.derived import Derived, Rows, derived, free_name
from scviaduct.storage.places import Place

OnProgress = Callable[[int, int], None]
"""Gets (cells done, all)."""
_EMBEDDED = 4096  # an encoder's cells are cut as if they had so many features


@dataclass(frozen=True)
class Written:
    """A store of results."""

    path: Path
    cells: int
    """Its rows."""
    features: int
    """Columns of its matrix."""
    without: int
    """Rows without a result: cells that have no count over the model's genes."""


def embed(
    model: str | Path,
    data: str | Place,
    *,
    out: str | Path,
    predict: bool = False,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    on_progress: OnProgress = lambda done, n: None,
) -> Written:
    """Write the latent representation of cells, the posterior means, to `obsm` of an h5ad or Zarr store.

    What the model says of each cell besides (PeakVI's depth) is in obs. With `predict`, SCANVI's label of each cell and
    its probability are in obs, and the probabilities of all labels in obsm["<key>_probabilities"].

    Raises:
        UnreadableFileError, IncompleteError: no (whole) model, atlas or file.
        DataError: the cells are not the model's kind, e.g. of a batch that it does not know.
        ConfigError, OutputExistsError: `out`, or `predict` without a classifier.
    """
    out = free_name(out)
    net, bundle = open_model(model, reading)
    if predict and not isinstance(net, SCANVI):
        raise ConfigError(f"{type(net).__name__} has no classifier to predict with; train scanvi, or transfer labels")
    population = open_population(data, net.schema, reading)
    width, columns = net.config.n_latent, Columns(population)
    with derived(out, population.n_obs) as store:
        latent = _Placed(store.matrix(f"obsm/{net.obsm_key}", width), width, population)
        labels = _Predictions(net, store, population) if predict and isinstance(net, SCANVI) else None
        for batch in population.blocks(_EMBEDDED):
            latent.append(batch, net.encode(batch).mean)
            for name, values in net.of_cells(batch).items():
                columns.put(name, batch, array(values))
            if labels:
                labels.append(batch, columns)
            on_progress(int(batch.rows[-1]) + 1, population.source.n_rows)
        latent.end()
        if labels:
            labels.end(columns)
        uns = record_of(bundle, population) | (labels.uns if labels else {})
        store.describe(columns.table(), pd.DataFrame(index=pd.Index([], dtype=object)), {"scviaduct": uns})
    return Written(out, population.n_obs, width, without(population))


def latents(model: Model, data: Path, reading: Reading) -> NDArray[np.float32]:
    """(cells, n_latent) what `embed` writes of a file's cells, in memory; raises as `embed` does."""
    population = open_population(data, model.schema, reading)
    whole = np.full((population.n_obs, model.config.n_latent), np.nan, np.float32)
    for batch in population.blocks(_EMBEDDED):
        whole[batch.rows if population.places is None else population.places[batch.rows]] = array(
            model.encode(batch).mean
        )
    return whole


def decode(
    model: str | Path,
    data: str | Place,
    *,
    out: str | Path,
    what: str | None = None,
    features: Sequence[str] | Path = (),
    transform_batch: Sequence[str] = (),
    library_size: float | Literal["latent"] = 1.0,
    normalize_cells: bool = False,
    normalize_regions: bool = False,
    include_background: bool = False,
    n_samples: int | None = None,
    seed: int = 0,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    on_progress: OnProgress = lambda done, n: None,
) -> Written:
    """Write what a model says of the genes, regions or proteins of cells as X of an h5ad or Zarr store.

    `what` is one of the model's `quantities` (default: the first): normalised "expression", "accessibility", denoised
    "proteins", "foreground" probability, or "counts" and "protein_counts" drawn from the posterior predictive
    distribution. `features` are names, or a text file with one per line. `transform_batch` are batches as whose cells all
    are decoded; values are averaged over several. `n_samples` draws from the posterior are averaged; by default the
    posterior's mean is decoded. Drawn counts are not averaged: several draws are layers "draw_0", "draw_1", …

    Raises as `embed`; ConfigError when the model has no such quantity or an option does not concern it.
    """
    out = free_name(out)
    net, bundle = open_model(model, reading)
    name = what or next(iter(net.quantities))
    size = None if library_size == "latent" else float(library_size)
    quantity = Quantity(
        name=name,
        library_size=size,
        normalize_cells=normalize_cells,
        normalize_regions=normalize_regions,
        include_background=include_background,
    )
    decoder = Decoder.of(net, quantity, features, transform_batch, seed)
    population = open_population(data, net.schema, reading)
    with derived(out, population.n_obs) as store:
        decoder.write(store, population, n_samples, on_progress)
        options = {"n_samples": n_samples, "transform_batch": list(transform_batch), "seed": seed}
        uns = (
            record_of(bundle, population)
            | _told(decoder.quantity)
            | {k: v for k, v in options.items() if v is not None}
        )
        store.describe(Columns(population).table(), decoder.var(), {"scviaduct": uns})
    return Written(out, population.n_obs, len(decoder.names), without(population))


@dataclass(frozen=True, eq=False)
class Decoder:
    """A quantity of a model, decoded for certain features and batches."""

    model: Model
    quantity: Quantity
    names: tuple[str, ...]
    """Of the features."""
    codes: tuple[int | None, ...]
    """Batches to decode as; None for the cells' own."""
    seed: int

    @classmethod
    def of(
        cls,
        model: Model,
        quantity: Quantity,
        features: Sequence[str] | Path = (),
        batches: Sequence[str] = (),
        seed: int = 0,
    ) -> Decoder:
        """Look names up; raises ConfigError, DataError."""
        offer = model.offer(quantity)
        names = getattr(model.schema, offer.axis)
        if chosen := _listed(features):
            positions = _positions(chosen, names, f"The model's {offer.axis}")
            quantity, names = replace(quantity, features=positions), tuple(names[p] for p in positions)
        if offer.drawn and len(batches) > 1:
            raise ConfigError(f"{quantity.name!r} is drawn for one batch; {len(batches)} were named")
        known = model.schema.batch
        codes = _positions(batches, known.categories, f"The model's batches ({known.key})") if batches else (None,)
        return cls(model, quantity, names, tuple(codes), seed)

    @property
    def n_decoded(self) -> int:
        """Values that are decoded for a cell, before features are chosen."""
        return len(getattr(self.model.schema, self.model.offer(self.quantity).axis))

    def var(self) -> pd.DataFrame:
        """One row a feature, with what the model says of it in general."""
        var = pd.DataFrame(index=pd.Index(self.names, dtype=object))
        if self.model.offer(self.quantity).axis == "genes":
            for name, values in self.model.of_genes().items():
                var[name] = array(values)[self.quantity.chosen]
        return var

    def mean(self, batch: Batch, n_samples: int | None) -> Tensor:
        """(cells, features) averaged over draws and batches; None decodes the posterior's mean."""
        parts = [self.draw(batch, k) for k in range(n_samples)] if n_samples else [self.draw(batch, None)]
        return sum(parts[1:], start=parts[0]) / len(parts)

    def draw(self, batch: Batch, number: int | None) -> Tensor:
        """(cells, features) of the posterior's draw of this number, or of its mean, averaged over batches."""
        net = self.model
        with net.evaluating():
            cells = Cells.of(batch, net.schema, net.device)
            q, total = net.inference(cells, None), None
            for code in self.codes:
                noise = None if number is None else Noise(seeds(batch, self.seed, number), net.device)
                part = net.decode(self.quantity, q, cells.in_batch(code), noise)
                total = part if total is None else total + part
        assert total is not None
        return total / len(self.codes)

    def write(self, store: Derived, population: Population, n_samples: int | None, on_progress: OnProgress) -> None:
        """X, or a layer for each of several draws, of all cells.

        Raises ConfigError: `n_samples` is below 1.
        """
        if n_samples is not None and n_samples < 1:
            raise ConfigError(f"n_samples must be at least 1, not {n_samples}; leave it out to decode the mean")
        drawn, width = self.model.offer(self.quantity).drawn, len(self.names)
        draws = n_samples if drawn and n_samples else 1
        places = [f"layers/draw_{k}" for k in range(draws)] if draws > 1 else ["X"]
        fill = 0.0 if drawn else np.nan
        matrices = [_Placed(store.matrix(p, width, sparse=drawn), width, population, fill) for p in places]
        for batch in population.blocks(self.n_decoded):
            for number, matrix in enumerate(matrices):
                matrix.append(batch, self.draw(batch, number) if drawn else self.mean(batch, n_samples))
            on_progress(int(batch.rows[-1]) + 1, population.source.n_rows)
        for matrix in matrices:
            matrix.end()


class _Placed:
    """Puts rows of the source to their places among the results; cells without a result get `fill`."""

    def __init__(self, rows: Rows, width: int, population: Population, fill: float = np.nan) -> None:
        self._rows, self._width, self._population, self._fill = rows, width, population, fill
        self._at = 0

    def append(self, batch: Batch, values: Tensor) -> None:
        """The next rows of the source."""
        places = self._population.places
        if places is None:
            self._rows.append(array(values))
            return
        there = places[batch.rows]
        self._pad(int(there[-1]) + 1, there, array(values))

    def end(self) -> None:
        """The rows after the last cell with a result."""
        if self._population.places is not None and self._at < self._population.n_obs:
            none = np.zeros(0, np.int64)
            self._pad(self._population.n_obs, none, np.zeros((0, self._width), np.float32))

    def _pad(self, stop: int, places: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        whole = np.full((stop - self._at, self._width), self._fill, np.float32)
        whole[places - self._at] = values
        self._rows.append(whole)
        self._at = stop


class Columns:
    """obs of the results, and what is added to it."""

    def __init__(self, population: Population) -> None:
        self._population = population
        self._added: dict[str, Any] = {}

    def put(self, name: str, batch: Batch, values: NDArray[Any], fill: Any = np.nan) -> None:
        """Values of some cells; those that never get any keep `fill`."""
        if name not in self._added:
            self._added[name] = np.full(self._population.n_obs, fill, values.dtype)
        places = self._population.places
        self._added[name][batch.rows if places is None else places[batch.rows]] = values

    def name(self, name: str, categories: Sequence[str]) -> None:
        """Turn a column of codes into the categories they stand for."""
        self._added[name] = pd.Categorical.from_codes(self._added[name], list(categories))

    def table(self) -> pd.DataFrame:
        """obs; raises DataError when the file has a column of a name that is added."""
        obs = self._population.obs()
        taken = [name for name in self._added if name in obs]
        if taken:
            raise DataError(
                f"The cells have an obs column {taken[0]!r} already, which a result is named; rename it there"
            )
        return obs.assign(**self._added)


class _Predictions:
    """SCANVI's labels and their probabilities."""

    def __init__(self, model: SCANVI, store: Derived, population: Population) -> None:
        assert model.schema.labels
        self._model, labels = model, model.schema.labels
        self._key, self._labels = labels.key, labels.categories
        name = f"{labels.key}_probabilities"
        self._all = _Placed(store.matrix(f"obsm/{name}", len(labels)), len(labels), population)
        self.uns = {f"{name}_names": np.array(labels.categories, object)}
        """Which column of the probabilities is which label."""

    def append(self, batch: Batch, columns: Columns) -> None:
        """The next cells."""
        soft = self._model.predict(batch)
        best = soft.max(1)
        self._all.append(batch, soft)
        columns.put(f"{self._key}_classified", batch, best.indices.cpu().numpy(), fill=-1)
        columns.put(f"{self._key}_probability", batch, array(best.values))

    def end(self, columns: Columns) -> None:
        """After the last cell."""
        self._all.end()
        columns.name(f"{self._key}_classified", self._labels)


def array(tensor: Tensor) -> NDArray[Any]:
    """A tensor in numpy's memory."""
    return tensor.detach().cpu().numpy()


def _listed(features: Sequence[str] | Path) -> list[str]:
    """Names, or those in a text file with one per line."""
    if isinstance(features, str | Path):
        features = [str(features)]
    names = [str(f) for f in features]
    if len(names) == 1 and Path(names[0]).is_file():
        names = [line.strip() for line in Path(names[0]).read_text().splitlines() if line.strip()]
    return list(dict.fromkeys(names))


def _positions(wanted: Sequence[str], known: Sequence[str], what: str) -> tuple[int, ...]:
    place = {name: i for i, name in enumerate(known)}
    missing = [name for name in wanted if name not in place]
    if missing:
        raise ConfigError(
            f"{what} lack {len(missing)} of those named, e.g. {missing[0]!r}; {nearest(missing[0], known)}"
        )
    return tuple(place[name] for name in wanted)


def record_of(bundle: Bundle, population: Population) -> dict[str, Any]:
    """What a result was made of."""
    return {"model": bundle.name, "model_path": str(bundle.path), "cells_from": population.identity}


def _told(quantity: Quantity) -> dict[str, Any]:
    """A quantity's options for the record."""
    options = {f.name: getattr(quantity, f.name) for f in fields(quantity) if f.name not in ("name", "features")}
    size = "latent" if quantity.library_size is None else quantity.library_size
    return {"quantity": quantity.name, **options, "library_size": size}


def without(population: Population) -> int:
    """Cells that have no result."""
    return population.n_obs - population.source.n_rows
