"""Files of torch.save, read without running them: a zip of a pickle and of the numbers behind its tensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scviaduct.distributed.inert import STORAGES, Misused, Storage
from scviaduct.distributed.pickles import read_pickle
from scviaduct.errors import UnreadableFileError


def read_torch(path: Path) -> Any:
    """What torch.save wrote to a file: plain data, arrays, tensors on the CPU and inert records.

    Files of torch < 1.6 are no zips; of those, state dicts can be read, by torch itself, which then makes nothing but
    tensors and containers.

    Raises:
        UnreadableFileError: no such file, one that is damaged, or one that asks for more than a saved model needs.
    """
    if not path.is_file():
        raise UnreadableFileError(f"{path} does not exist.")
    if not zipfile.is_zipfile(path):
        return _read_old(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise UnreadableFileError(f"{path} is damaged: {error}.") from error


def _read(archive: zipfile.ZipFile, path: Path) -> Any:
    packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UnreadableFileError(f"{path} was not written by torch.save: {packed[0]!r} in it is compressed.")
    if sum(i.file_size for i in archive.infolist()) > path.stat().st_size:
        raise UnreadableFileError(f"{path} was not written by torch.save: its parts are larger than the file.")
    names = set(archive.namelist())
    root = next(
        (n.removesuffix("data.pkl") for n in sorted(names) if n.count("/") == 1 and n.endswith("/data.pkl")), None
    )
    if root is None:
        raise UnreadableFileError(f"{path} was not written by torch.save: it is a zip without data.pkl.")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise UnreadableFileError(f"{path} was saved on a big-endian machine; load and save it again on another.")
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        kind, type_, key, _, n = pid if isinstance(pid, tuple) and len(pid) == 5 else (None,) * 5
        name = getattr(type_, "name", "").removeprefix("torch.")
        if kind != "storage" or name not in STORAGES or not isinstance(key, str):
            raise Misused("data that is no storage of torch")
        if key not in storages:
            if f"{root}data/{key}" not in names:
                raise UnreadableFileError(f"{path} is damaged: it lacks data/{key[:40]}.")
            storages[key] = _storage(archive.read(f"{root}data/{key}"), STORAGES[name])
        if n != len(storages[key].values):
            raise Misused(f"{n!r:.20} numbers where it has {len(storages[key].values)}")
        return storages[key]

    return read_pickle(archive.read(f"{root}data.pkl"), str(path), storage)


def _storage(raw: bytes, dtype: torch.dtype) -> Storage:
    if len(raw) % dtype.itemsize:
        raise Misused("a storage that ends inside a number")
    values = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return Storage(values, [0])


def _read_old(path: Path) -> Any:
    """A file of torch < 1.6."""
    try:
        with path.open("rb") as file:
            return torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnreadableFileError(
            f"{path} was not written by torch.save, or is damaged ({type(error).__name__}); nothing in it was executed."
        ) from error


def state_dict(value: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a state dict by name; what is no tensor (Pyro's store) is left out.

    Raises:
        UnreadableFileError: it is none.
        DataError: tensors have values that are not finite.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UnreadableFileError(f"{where} holds no weights by name.")
    tensors = {name: t.detach() for name, t in value.items() if isinstance(t, Tensor)}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise UnreadableFileError(f"{where}: {len(broken)} tensors hold NaN or infinity, e.g. {broken[0]!r}.")
    return tensors


def as_text(value: Any) -> list[str]:
    """Names in an array or list, as text; [] when it holds anything but text and numbers."""
    items = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(items, list | tuple) or not all(isinstance(x, str | int | float | np.generic) for x in items):
        return []
    return [str(int(x)) if isinstance(x, float) and x.is_integer() else str(x) for x in items]
