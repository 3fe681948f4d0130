"""What a user shares: a folder with weights, genes, categories and reference latents. No pickle; opening runs nothing.

model.safetensors      weights
model.json             format, model, config, schema, training facts, hashes; written last
reference/             latent.npy (cells x n_latent, float32), labels.npy (codes) for label transfer; not in every import
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from upath import UPath

import scviaduct
from scviaduct.distributed.files import download, whole_folder
from scviaduct.errors import IncompleteError, UnreadableFileError
from scviaduct.models import model_class
from scviaduct.models.base import Model
from scviaduct.schema import Schema
from scviaduct.storage.manifest import file_digest, read_json, write_json_atomic
from scviaduct.storage.places import Place, exists, place

FORMAT = 1
_WEIGHTS, _FACTS = "model.safetensors", "model.json"
_LATENT, _LABELS = "reference/latent.npy", "reference/labels.npy"


@dataclass(frozen=True)
class Bundle:
    """A trained model as it lies on disk; tensors are read when asked for."""

    path: Path
    facts: dict[str, Any]
    """The content of model.json."""

    @classmethod
    def open(cls, path: str | Place) -> Bundle:
        """Open a bundle, or the run that made it; one in an object store is copied to the user's cache.

        Raises:
            UnreadableFileError: the path is no model.
            IncompleteError: a run that has not finished, a file that is missing, or one that was changed afterwards.
        """
        root = place(path)
        found = next((f for f in (root, root / "bundle") if exists(f / _FACTS)), None)
        if found is None:
            raise _no_model(root)
        folder = found if isinstance(found, Path) else _fetched(found)
        facts = read_json(folder / _FACTS)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise UnreadableFileError(f"{folder / _FACTS} is not a scviaduct model of format {FORMAT}.")
        bundle = cls(folder, facts)
        bundle._verify()
        return bundle

    @classmethod
    def save(cls, path: Place, model: Model, facts: dict[str, Any], reference: dict[str, NDArray[Any]]) -> Bundle:
        """Write a model and its reference cells ("latent", and "labels" when there are any), whole or not at all."""
        with whole_folder(path, marker=_FACTS) as folder:
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
            save_file(tensors, folder / _WEIGHTS)
            if reference:
                (folder / "reference").mkdir()
            for name, values in reference.items():
                np.save(folder / "reference" / f"{name}.npy", values, allow_pickle=False)
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            record = facts | {
                "format": FORMAT,
                "scviaduct": scviaduct.__version__,
                "config": asdict(model.config),
                "schema": model.schema.to_dict(),
                "files": {str(f.relative_to(folder)): file_digest(f) for f in files},
            }
            write_json_atomic(folder / _FACTS, record)
        return cls.open(path)

    def _verify(self) -> None:
        for name, digest in self.facts["files"].items():
            file = self.path / name
            if not file.is_file():
                raise IncompleteError(f"{self.path} lacks {name}; copy the whole folder again.")
            if file_digest(file) != digest:
                raise IncompleteError(f"{file} is not the file the model was saved with (other sha256); copy it again.")

    @property
    def schema(self) -> Schema:
        """Genes, covariates and labels of the reference."""
        return Schema.from_dict(self.facts["schema"])

    @property
    def name(self) -> str:
        """The model's name, e.g. "scvi"."""
        return str(self.facts["model"])

    @property
    def digest(self) -> str:
        """sha256 of model.json, which has those of the other files: equal digests mean the same model."""
        return file_digest(self.path / _FACTS)

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors by name."""
        return load_file(self.path / _WEIGHTS)

    def model(self, weights: dict[str, torch.Tensor] | None = None) -> Model:
        """The model in eval mode, with the bundle's weights or those given."""
        return build(self.facts, weights if weights is not None else self.weights())

    def latent(self) -> NDArray[np.float32] | None:
        """(cells, n_latent) posterior means of the reference; None in a model that was imported without its cells."""
        file = self.path / _LATENT
        return np.load(file, mmap_mode="r", allow_pickle=False) if file.exists() else None

    def labels(self) -> NDArray[np.int32] | None:
        """(cells,) codes in schema.labels, -1 where unlabelled; None without labels."""
        file = self.path / _LABELS
        return np.load(file, allow_pickle=False) if file.exists() else None


def build(facts: dict[str, Any], weights: dict[str, torch.Tensor]) -> Model:
    """The model that model.json describes, holding `weights`, in eval mode."""
    kind = model_class(facts["model"])
    model = kind(Schema.from_dict(facts["schema"]), kind.Config(**facts["config"]))
    model.load_state_dict(weights)
    return model.eval()


def _fetched(address: UPath) -> Path:
    """The local copy of a bundle in an object store, kept under the hash of its model.json."""
    content = (address / _FACTS).read_bytes()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    copy = home / "scviaduct" / "bundles" / hashlib.sha256(content).hexdigest()
    if copy.exists():
        return copy
    names = list(json.loads(content)["files"])
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise UnreadableFileError(f"{address / _FACTS} names a file outside of its folder: {outside[0]!r}.")
    try:
        with whole_folder(copy) as folder:
            download(address, folder, names)
            (folder / _FACTS).write_bytes(content)
            Bundle(folder, json.loads(content))._verify()
    except FileNotFoundError as error:
        raise IncompleteError(f"{address} lacks a file ({error}); copy the whole folder again.") from error
    return copy


def _no_model(root: Place) -> Exception:
    if not root.exists():
        return UnreadableFileError(
            f"{root} does not exist; a model is a run folder or a bundle made by `scviaduct train`."
        )
    if (root / "run.json").exists():
        return IncompleteError(f"The run in {root} has not finished; continue it with `scviaduct train … --resume`.")
    return UnreadableFileError(
        f"{root} is not a model: it holds no model.json. Give the --out of `scviaduct train`, or its bundle folder."
    )
