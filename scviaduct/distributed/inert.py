"""What a pickle may name, and what is made of it: plain arrays and tensors, or records that do nothing."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_PLAIN_TYPE = re.compile(r"[<>|=]?(?:[biuf][1248]|f16|c8|c16|c32|\?|b|S\d{1,5}|U\d{1,5}|O8?)")


class Misused(Exception):
    """A name that is not on the list, or is called with what it never gets; the text completes "the file asks for …"."""


class Foreign:
    """An object of another program: what it was called with and its state, nothing that could run."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None


class Global:
    """A name a pickle may call; `make` is our own function."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self._function = name, function

    def make(self, arguments: tuple[Any, ...]) -> Any:
        """What stands for the object; Misused when the arguments are not those it has in saved models."""
        try:
            return self._function(*arguments)
        except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise Misused(f"{self.name} with arguments that it never has") from error


class Pending:
    """A numpy array or type between its creation and the state that says what it is."""

    def __init__(self, kind: str, of: Any) -> None:
        self.kind, self.of = kind, of
        self.keys: list[int] = []
        """Where the memo holds it."""


class Storage(NamedTuple):
    """The numbers behind some tensors of a torch file."""

    values: torch.Tensor
    """One dimension, as on disk."""
    claimed: list[int]
    """How many numbers tensors have taken of it so far."""


def find(module: str, name: str) -> Global:
    """The list's entry; Misused for any other name, and nothing is imported."""
    module = _MODULES.get(module, module).replace("numpy._core", "numpy.core")
    full = f"{module}.{name}"
    if full in ALLOWED:
        return Global(full, ALLOWED[full])
    if full in _RECORDS or full.startswith(_RECORD_PACKAGES):
        return Global(full, lambda *arguments: Foreign(full, arguments))
    raise Misused(repr(full[:120]))


def rebuilt(pending: Pending, state: Any) -> Any:
    """The numpy type or array that a state completes; an unusual one stays a record."""
    if not isinstance(state, tuple):
        raise Misused("a numpy object with a state that it never has")
    if pending.kind == "dtype":
        return _type(pending.of, state)
    _, shape, dtype, fortran, raw = state
    if isinstance(dtype, Foreign):
        return Foreign("numpy.ndarray", ())
    return _array(raw, dtype, shape, fortran)


def _type(code: str, state: tuple[Any, ...]) -> np.dtype | Foreign:
    order, subtype, names, fields = (*state[1:5], None, None, None, None)[:4]
    if not _PLAIN_TYPE.fullmatch(code) or any(x is not None for x in (subtype, names, fields)):
        return Foreign("numpy.dtype", (code,))
    return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


def _array(raw: Any, dtype: Any, shape: Any, fortran: Any) -> NDArray[Any]:
    """An array over the bytes as they are, or over a list of objects."""
    if not (isinstance(dtype, np.dtype) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)):
        raise Misused("a numpy array with a state that it never has")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if isinstance(raw, list) and dtype.hasobject:
        flat = _objects(raw)
    elif isinstance(raw, bytes | bytearray) and not dtype.hasobject:
        flat = np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)
    else:
        raise Misused("a numpy array without its content")
    if math.prod(shape) != len(flat):
        raise Misused("a numpy array of another size than its content")
    return flat.reshape(shape, order="F" if fortran else "C")


def _objects(items: list[Any]) -> NDArray[Any]:
    """One place for each; assigned as a whole, items that are lists would become dimensions."""
    array = np.empty(len(items), object)
    for i, item in enumerate(items):
        array[i] = item
    return array


def _reconstruct(cls: Any, shape: Any, code: Any) -> Pending:
    if not (isinstance(cls, Global) and cls.name == "numpy.ndarray"):
        raise TypeError
    return Pending("array", None)


def _dtype(code: Any, *_: Any) -> Pending:
    if not isinstance(code, str):
        raise TypeError
    return Pending("dtype", code)


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> Any:
    return Foreign("numpy.ndarray", ()) if isinstance(dtype, Foreign) else _array(buffer, dtype, shape, order == "F")


def _scalar(dtype: Any, raw: Any) -> Any:
    if isinstance(dtype, np.dtype) and not dtype.hasobject:
        return _array(raw, dtype, (1,), fortran=False)[0]
    return Foreign("numpy.generic", (raw,))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError
    return text.encode("latin1")


def _of_items(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """A type called with nothing, or with a list or tuple of items."""

    def make(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise TypeError
        return kind(items)

    return make


def keyed(items: Any) -> dict[Any, Any]:
    """A dict of pairs; keys are scalars, because hashing a tuple of tuples of … would exhaust the stack."""
    pairs = [(key, value) for key, value in items]
    if not all(isinstance(key, str | bytes | int | float | np.generic | None) for key, _ in pairs):
        raise Misused("a dictionary with keys that are no text or numbers")
    return dict(pairs)


def _default_dict(factory: Any = None) -> dict[Any, Any]:
    if not (factory is None or (isinstance(factory, Global) and factory.name in ("builtins.list", "builtins.dict"))):
        raise TypeError
    return {}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """A view of the storage that stays inside it and is no larger than it."""
    if isinstance(storage, Foreign):
        return Foreign("torch.Tensor", ())
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise TypeError
    n, length = math.prod(size), len(storage.values)
    last = offset + sum((k - 1) * s for k, s in zip(size, stride, strict=True))
    storage.claimed[0] += n
    # several tensors may share a storage; many times its size is what no model has, and a way to fill the memory
    if n and (last >= length or storage.claimed[0] > 4 * length):
        raise ValueError
    return torch.as_strided(storage.values, size, stride, offset) if n else storage.values.new_empty(size)


ALLOWED: dict[str, Callable[..., Any]] = {
    "builtins.bytes": _of_items(bytes),
    "builtins.dict": _of_items(keyed),
    "builtins.list": _of_items(list),
    "builtins.set": _of_items(lambda items: set(keyed((x, None) for x in items))),
    "builtins.frozenset": _of_items(lambda items: frozenset(keyed((x, None) for x in items))),
    "_codecs.encode": _encode,
    "collections.OrderedDict": _of_items(lambda items: OrderedDict(keyed(items))),
    "collections.defaultdict": _default_dict,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _dtype,
    "numpy.ndarray": lambda: Foreign("numpy.ndarray", ()),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": _of_items(tuple),
    # a torch file inside the pickle: a pickle of its own, which is left alone
    "torch.storage._load_from_bytes": lambda _: Foreign("torch.storage.UntypedStorage", ()),
}
"""Names a pickle may call, and what is called instead."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Types of the storages of a torch file."""

_RECORDS = {"builtins.slice", "builtins.range", "torch.device", "torch.storage.UntypedStorage"}
_RECORDS |= {f"torch.{name}" for name in STORAGES}
_RECORD_PACKAGES = ("pandas.core.", "pandas._libs.", "scvi.", "scarches.", "anndata.")
"""Classes and functions of these packages become records, whatever they are."""
