"""Pickles of other programs read as data: nothing of them is ever called or imported.

A pickle is a program. `pickle.load` runs it, so whoever wrote the file runs what they like. Here its opcodes (the standard
library's `pickletools` decodes them) are carried out one by one, and only these effects exist:

* numbers, strings, bytes, lists, tuples, dicts and sets are made;
* a name such as `numpy.core.multiarray._reconstruct` is looked up in a list (`inert.ALLOWED`), never imported, and calling
  it makes what the list says, with functions of this package;
* classes of pandas, scvi-tools and the like become an inert `Foreign` record: a name, arguments, a state;
* whatever else a pickle asks for is refused by its name, before anything came of it.

What can be made is limited by the size of the file: no tensor, array or string is larger than the bytes it is made of.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from scviaduct.distributed.inert import Foreign, Global, Misused, Pending, find, keyed, rebuilt
from scviaduct.errors import UnreadableFileError

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_IGNORED = {"PROTO", "FRAME"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()

Persistent = Callable[[Any], Any]


def read_pickle(data: bytes, where: str, persistent: Persistent | None = None) -> Any:
    """The object a pickle describes, made of plain data, arrays, tensors and `Foreign` records.

    Args:
        data: the pickle.
        where: the file, for messages.
        persistent: what the pickle's persistent ids stand for (torch's storages); None when it must have none.

    Raises:
        UnreadableFileError: it asks for something that no saved model needs, or is damaged. Nothing was executed.
    """
    return _Machine(data, where, persistent).run()


class _Machine:
    """A stack, a memo and the opcodes."""

    def __init__(self, data: bytes, where: str, persistent: Persistent | None) -> None:
        self.data, self.where, self.persistent = data, where, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0
        """Bytes made of strings so far; a file can hold no more of them than its own size."""

    def run(self) -> Any:
        try:
            for opcode, argument in self._opcodes():
                if opcode == "STOP":
                    return self.stack.pop()
                self._step(opcode, argument)
        except Misused as refused:
            self._refuse(str(refused))
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UnreadableFileError(f"{self.where} is damaged: {type(error).__name__}: {error!s:.200}.") from error
        raise UnreadableFileError(f"{self.where} is cut off.")

    def _opcodes(self) -> Iterator[tuple[str, Any]]:
        for opcode, argument, _ in pickletools.genops(self.data):
            yield opcode.name, argument

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _NEW:
            self.stack.append(_NEW[opcode]())
        elif opcode in _TUPLES:
            self.stack[-_TUPLES[opcode] :] = [tuple(self._pop(_TUPLES[opcode]))]
        elif opcode not in _IGNORED:
            act = _ACTIONS.get(opcode)
            if act is None:
                self._refuse(f"the opcode {opcode}")
            act(self, argument)

    def _pop(self, n: int) -> list[Any]:
        """The topmost n, which stay where they are."""
        if len(self.stack) < n or any(x is _MARK for x in self.stack[-n:]):
            raise ValueError("a value is missing")
        return self.stack[-n:]

    def _since_mark(self) -> list[Any]:
        """Take everything down to the last mark."""
        at = next(i for i in range(len(self.stack) - 1, -2, -1) if i < 0 or self.stack[i] is _MARK)
        if at < 0:
            raise ValueError("a mark is missing")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _take(self) -> Any:
        self._pop(1)
        return self.stack.pop()

    def _put(self, key: int) -> None:
        value = self._pop(1)[0]
        if isinstance(value, Pending):
            value.keys.append(key)
        self.memo[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self._pop(1)[0]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(keyed((item, None) for item in items))
        elif not isinstance(target, Foreign):
            self._refuse(f"items added to {_named(target)}")

    def _set(self, items: list[Any]) -> None:
        target = self._pop(1)[0]
        if isinstance(target, dict):
            target.update(_dict_of(items))
        elif not isinstance(target, Foreign):
            self._refuse(f"items set in {_named(target)}")

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            self._refuse("a name that is no text")
        self.stack.append(find(module, name))

    def _reduce(self, _: Any) -> None:
        arguments, made_by = self._take(), self._take()
        if not isinstance(made_by, Global) or not isinstance(arguments, tuple):
            self._refuse(f"a call of {_named(made_by)}")
        value = made_by.make(arguments)
        if made_by.name == "_codecs.encode":
            self.encoded += len(value)
            if self.encoded > len(self.data):
                self._refuse("more bytes than it has")
        self.stack.append(value)

    def _build(self, _: Any) -> None:
        state, target = self._take(), self._take()
        if isinstance(target, Pending):
            made = rebuilt(target, state)
            self.memo.update(dict.fromkeys(target.keys, made))
            self.stack.append(made)
            return
        if isinstance(target, Foreign):
            target.state = state
        elif not isinstance(target, OrderedDict):  # torch keeps the modules' versions in a state dict's attributes
            self._refuse(f"a state for {_named(target)}")
        self.stack.append(target)

    def _stack_global(self, _: Any) -> None:
        name, module = self._take(), self._take()
        self._global(module, name)

    def _persistent_id(self, _: Any) -> None:
        if self.persistent is None:
            self._refuse("data outside the file")
        self.stack.append(self.persistent(self._take()))

    def _refuse(self, what: str) -> NoReturn:
        raise UnreadableFileError(
            f"{self.where} asks for {what}, which no saved model needs; the file is not to be trusted. "
            "It was refused, and nothing in it was executed."
        )


def _named(value: Any) -> str:
    """A word for a value, whose own repr might be anything."""
    return value.name if isinstance(value, Global | Foreign) else type(value).__name__


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    """Of keys and values in turn."""
    return keyed(zip(items[::2], items[1::2], strict=True))


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.stack.__delitem__(-1),
    "POP_MARK": lambda m, _: m._since_mark().clear(),
    "DUP": lambda m, _: m.stack.append(m._pop(1)[0]),
    "PUT": lambda m, key: m._put(int(key)),
    "BINPUT": lambda m, key: m._put(key),
    "LONG_BINPUT": lambda m, key: m._put(key),
    "MEMOIZE": lambda m, _: m._put(len(m.memo)),
    "GET": lambda m, key: m.stack.append(m.memo[int(key)]),
    "BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "LONG_BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "LIST": lambda m, _: m.stack.append(m._since_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m._since_mark())),
    "DICT": lambda m, _: m.stack.append(_dict_of(m._since_mark())),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(keyed((x, None) for x in m._since_mark()))),
    "APPEND": lambda m, _: m._extend([m._take()]),
    "APPENDS": lambda m, _: m._extend(m._since_mark()),
    "ADDITEMS": lambda m, _: m._extend(m._since_mark()),
    "SETITEM": lambda m, _: m._set([m._take(), m._take()][::-1]),
    "SETITEMS": lambda m, _: m._set(m._since_mark()),
    "GLOBAL": lambda m, both: m._global(*both.split(" ", 1)),
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
}
"""What the opcodes that are not literals do. INST, OBJ, NEWOBJ_EX, PERSID, EXT1 … and buffers are not among them."""
