"""A model as scvi-tools or scArches saved it: which files of a folder it is, and what they say.

[prefix]model.pt                                          scvi-tools >= 0.15: weights, genes, attributes
[prefix]model_params.pt, attr.pkl, var_names.csv          scvi-tools < 0.15, and scArches' own models
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scviaduct.distributed.pickles import read_pickle
from scviaduct.distributed.torchfile import as_text, read_torch, state_dict
from scviaduct.errors import DataError, UnreadableFileError
from scviaduct.storage.manifest import file_digest

NEW, OLD = ("model.pt",), ("model_params.pt", "attr.pkl", "var_names.csv")

SUPPORTED = {
    "SCVI": "scvi",
    "SCANVI": "scanvi",
    "TOTALVI": "totalvi",
    "PEAKVI": "peakvi",
    "POISSONVI": "poissonvi",
    "trVAE": "trvae",
}
"""Classes of scvi-tools and scArches, and our names of these models."""

_SCARCHES = {"cell_type_keys_": "scPoli", "mmd_on_": "trVAE", "mask_": "expiMap", "soft_mask_": "expiMap"}
"""An attribute by which each class of scArches is known; its files do not name it."""


@dataclass(frozen=True)
class Saved:
    """The content of the files, nothing of it executed."""

    path: Path
    """The folder."""
    files: dict[str, str]
    """sha256 of each file by name."""
    kind: str
    """The class, e.g. "SCANVI"."""
    version: str
    """Of scvi-tools, as the file says; "" for scArches, which does not."""
    genes: Any
    """var_names: a list, or by modality."""
    attributes: dict[str, Any]
    """What the class keeps: options, registry, indices."""
    weights: dict[str, Tensor]
    """The state dict."""

    @property
    def model(self) -> str:
        """Our name of the model.

        Raises:
            DataError: we have no such model.
        """
        if self.kind not in SUPPORTED:
            raise DataError(f"{self.path} holds a {self.kind}, which cannot be imported; {', '.join(SUPPORTED)} can.")
        return SUPPORTED[self.kind]


def read_saved(path: str | Path, prefix: str = "") -> Saved:
    """Read the model in a folder; `path` may also be its model.pt.

    Raises:
        UnreadableFileError: files are missing, damaged, or ask for more than a saved model needs.
    """
    folder = Path(path)
    if folder.is_file() and folder.name.endswith("model.pt"):
        folder, prefix = folder.parent, folder.name.removesuffix("model.pt")
    for names, read in ((NEW, _read_new), (OLD, _read_old)):
        files = [folder / f"{prefix}{name}" for name in names]
        if all(file.is_file() for file in files):
            weights, genes, attributes = read(*files)
            digests = {file.name: file_digest(file) for file in files}
            kind, version = _identity(attributes, weights, folder)
            return Saved(folder, digests, kind, version, genes, attributes, weights)
    raise _nothing_there(folder, prefix)


def _nothing_there(folder: Path, prefix: str) -> UnreadableFileError:
    if not folder.is_dir():
        return UnreadableFileError(f"{folder} is no folder; give the one that the model was saved to.")
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    other = next((n.removesuffix(e) for n in there for e in (*NEW, *OLD[:1]) if n.endswith(e) and n != e), None)
    parts = [f"{prefix}{name}" for name in OLD if f"{prefix}{name}" in there]
    missing = [f"{prefix}{name}" for name in OLD if f"{prefix}{name}" not in there]
    if parts:
        return UnreadableFileError(
            f"{folder} has {', '.join(parts)}, but lacks {', '.join(missing)} of the same model."
        )
    hint = f" Its files begin with {other!r}: give --prefix {other}." if other and other != prefix else ""
    return UnreadableFileError(
        f"{folder} holds no saved model: neither {prefix}model.pt nor {prefix}model_params.pt.{hint}"
    )


def _read_new(file: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    content = read_torch(file)
    if not isinstance(content, Mapping) or not {"model_state_dict", "var_names", "attr_dict"} <= content.keys():
        raise UnreadableFileError(
            f"{file} is no model of scvi-tools: it lacks model_state_dict, var_names or attr_dict, which "
            "scvi-tools 0.15 and newer save."
        )
    weights, genes, attributes = content["model_state_dict"], content["var_names"], content["attr_dict"]
    return state_dict(weights, str(file)), _genes(genes), _text_keys(attributes, file)


def _read_old(parameters: Path, attributes: Path, genes: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    found = _text_keys(read_pickle(attributes.read_bytes(), str(attributes)), attributes)
    return state_dict(read_torch(parameters), str(parameters)), genes.read_text().splitlines(), found


def _genes(names: Any) -> Any:
    if isinstance(names, Mapping):
        return {str(modality): as_text(of) for modality, of in names.items()}
    return as_text(names if isinstance(names, np.ndarray | list) else [])


def _text_keys(attributes: Any, file: Path) -> dict[str, Any]:
    if not isinstance(attributes, dict) or not all(isinstance(name, str) for name in attributes):
        raise UnreadableFileError(f"{file} holds no attributes of a model.")
    return attributes


def _identity(attributes: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> tuple[str, str]:
    """The class and the version of scvi-tools."""
    registry = attributes.get("registry_") or attributes.get("scvi_setup_dict_")
    if isinstance(registry, dict):
        kind = registry.get("model_name") or _class_of(weights)
        return str(kind)[:40], str(registry.get("scvi_version", ""))[:20]
    kind = next((name for mark, name in _SCARCHES.items() if mark in attributes), None)
    if kind is None:
        raise UnreadableFileError(
            f"{folder}: its attributes have neither registry_ nor scvi_setup_dict_, as scvi-tools saves them, nor are "
            "they those of trVAE or scPoli of scArches."
        )
    return kind, ""


def _class_of(weights: dict[str, Tensor]) -> str:
    """The class that scvi-tools < 0.15 does not name, by its weights."""
    marks = {
        "encoder.z_mean_encoder.weight": "TOTALVI",
        "z_decoder.output.0.weight": "PEAKVI",
        "classifier.classifier.0.weight": "SCANVI",
        "classifier.classifier.0.fc_layers.Layer 0.0.weight": "SCANVI",
        "decoder.factor_regressor.fc_layers.Layer 0.0.weight": "LinearSCVI",
        "alpha_posterior_logit": "AUTOZI",
        "z_encoder_expression.mean_encoder.weight": "MULTIVI",
        "decoder.px_scale_decoder.0.weight": "SCVI",
    }
    return next((kind for mark, kind in marks.items() if mark in weights), "model of an unknown class")
