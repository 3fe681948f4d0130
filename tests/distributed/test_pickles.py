"""The restricted reader: saved models are read, and whatever else a pickle might ask for is refused without being run."""

import collections
import io
import pickle
import struct
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scviaduct.distributed.inert import Foreign, Global, Pending
from scviaduct.distributed.pickles import read_pickle
from scviaduct.distributed.saved import read_saved
from scviaduct.distributed.torchfile import read_torch
from scviaduct.errors import UnreadableFileError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Calls:
    """Pickles as a call of `function(*arguments)`, with a state."""

    def __init__(self, function, *arguments, state=None):
        self.made_by = (function, arguments, state)

    def __reduce__(self):
        return self.made_by


def equal(a, b):
    if isinstance(a, np.ndarray):
        # of an empty array numpy forgets the order of bytes
        same = isinstance(b, np.ndarray) and a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=")
        return same and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.binary()
ARRAYS = arrays.arrays(
    st.sampled_from(["<i8", ">i4", "<f4", "|b1", "<U3", "<u2"]), arrays.array_shapes(min_side=0, max_dims=3)
).filter(lambda a: not (a.dtype.kind == "f" and np.isnan(a).any()))
DATA = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@given(data=DATA, protocol=st.sampled_from(PROTOCOLS), fortran=st.booleans())
def test_plain_data_and_arrays_are_what_pickle_makes_of_them(data, protocol, fortran):
    data = {"data": np.asfortranarray(data) if fortran and isinstance(data, np.ndarray) else data}
    made = pickle.dumps(data, protocol)
    assert equal(read_pickle(made, "file"), pickle.loads(made))  # noqa: S301 - of our own making


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_saved_models_hold(protocol):
    nested = collections.defaultdict(list, {"a": [1]})
    content = {
        "registry": nested,
        "ordered": collections.OrderedDict(b=1, a=2),
        "names": np.array(["x", None, 3], object),
        "scalar": np.float32(1.5),
        "sets": ({1, 2}, frozenset("ab")),
        "shared": (nested, nested),
        "empty": np.zeros((0, 3)),
    }
    found = read_pickle(pickle.dumps(content, protocol), "file")
    assert found["registry"] == {"a": [1]} and type(found["registry"]) is dict
    assert list(found["ordered"].items()) == [("b", 1), ("a", 2)]
    assert found["names"].tolist() == ["x", None, 3] and found["scalar"] == np.float32(1.5)
    assert found["sets"] == ({1, 2}, frozenset("ab")) and found["empty"].shape == (0, 3)
    assert found["shared"][0] is found["shared"][1] is found["registry"]


def test_objects_of_pandas_are_records():
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": pd.Categorical(["x", "y"])})
    found = read_pickle(pickle.dumps({"history": frame, "index": frame.columns, "n": 3}), "attr.pkl")
    assert isinstance(found["history"], Foreign) and found["history"].name == "pandas.core.frame.DataFrame"
    assert isinstance(found["index"], Foreign) and found["n"] == 3


MARKED = "touched"


def evil(place):
    """Pickles that would make a file, or worse, if they were run; and what each is refused for."""
    import os
    import subprocess

    touch = f"touch {place / MARKED}"
    build = b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb."
    defaults = b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b."
    return {
        "os.system": (pickle.dumps(Calls(os.system, touch)), "posix.system"),
        "protocol 0": (pickle.dumps(Calls(os.system, touch), 0), "posix.system"),
        "eval": (pickle.dumps(Calls(eval, f"open({str(place / MARKED)!r}, 'w')")), "builtins.eval"),
        "exec": (pickle.dumps(Calls(exec, "1")), "builtins.exec"),
        "getattr": (pickle.dumps(Calls(getattr, [], "append")), "builtins.getattr"),
        "import": (pickle.dumps(Calls(__import__, "os")), "builtins.__import__"),
        "subprocess": (pickle.dumps(Calls(subprocess.Popen, touch)), "subprocess.Popen"),
        "pickle in a pickle": (
            pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.system, touch)))),
            "_pickle.loads",
        ),
        "torch.load": (pickle.dumps(Calls(torch.load, "file")), "torch.serialization.load"),
        "numpy.load": (pickle.dumps(Calls(np.load, "file")), "numpy"),
        "a callable by its dotted name": (
            b"\x80\x04\x8c\x08builtins\x8c\x0bdict.update\x93)R.",
            "builtins.dict.update",
        ),
        "inside an array of objects": (pickle.dumps(np.array([Calls(os.system, touch)], object)), "posix.system"),
        "inside a table of pandas": (pickle.dumps(pd.DataFrame({"a": [Calls(os.system, touch)]})), "posix.system"),
        "as the key of a dict": (pickle.dumps({Calls(os.system, touch): 1}), "posix.system"),
        "a state for a class": (build, "a state for collections.OrderedDict"),
        "a state for a function": (defaults, "a state for _codecs.encode"),
        "a class made to unpickle": (b"\x80\x02cscviaduct.errors\nDataError\n)\x81.", "scviaduct.errors.DataError"),
        "encode to anything": (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
            "_codecs.encode",
        ),
        "bytes of any size": (b"\x80\x02cbuiltins\nbytes\n\x8a\x05\x00\x00\x00\x00\x01\x85R.", "builtins.bytes"),
        "an array of another class": (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\n(K\x00tX\x01\x00\x00\x00b\x87R.",
            "_reconstruct",
        ),
        "a defaultdict that calls": (
            b"\x80\x02ccollections\ndefaultdict\ncnumpy\nndarray\n\x85R.",
            "collections.defaultdict",
        ),
        "INST": (b"(X\x04\x00\x00\x00truei__builtin__\nlen\n.", "the opcode INST"),
        "OBJ": (b"(c__builtin__\nlist\no.", "the opcode OBJ"),
        "NEWOBJ_EX": (b"\x80\x04c__builtin__\nlist\n)}\x92.", "the opcode NEWOBJ_EX"),
        "an extension": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        "a buffer outside": (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
        "data outside": (b"\x80\x02X\x01\x00\x00\x00aQ.", "data outside the file"),
        "a text id": (b"Pa\n.", "the opcode PERSID"),
        "a call of a number": (b"\x80\x02K\x01)R.", "a call of int"),
        "an item set in a list": (b"\x80\x02]K\x01K\x02s.", "items set in list"),
    }


@pytest.mark.parametrize("name", evil(pytest.importorskip("pathlib").Path("x")))
def test_what_no_model_needs_is_refused_by_its_name(name, tmp_path):
    data, what = evil(tmp_path)[name]
    with pytest.raises(UnreadableFileError, match="nothing in it was executed") as refused:
        read_pickle(data, "attr.pkl")
    assert what in str(refused.value) and "attr.pkl" in str(refused.value)
    assert not list(tmp_path.iterdir())


def evil_model(path, payload):
    torch.save({"model_state_dict": {}, "var_names": np.array(["g"], object), "attr_dict": {"a": payload}}, path)


def test_a_model_file_is_refused_like_any_pickle(tmp_path):
    import os

    evil_model(tmp_path / "model.pt", Calls(os.system, f"touch {tmp_path / MARKED}"))
    with pytest.raises(UnreadableFileError, match=r"posix\.system"):
        read_saved(tmp_path)
    assert not (tmp_path / MARKED).exists()


def test_a_torch_file_inside_a_pickle_is_left_alone(tmp_path):
    import os

    inner = io.BytesIO()
    torch.save(Calls(os.system, f"touch {tmp_path / MARKED}"), inner, _use_new_zipfile_serialization=False)
    load = torch.storage._load_from_bytes
    found = read_pickle(pickle.dumps(Calls(load, inner.getvalue())), "attr.pkl")
    assert isinstance(found, Foreign) and not (tmp_path / MARKED).exists()


def test_an_old_torch_file_is_not_run_either(tmp_path):
    import os

    path = tmp_path / "model_params.pt"
    torch.save(Calls(os.system, f"touch {tmp_path / MARKED}"), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableFileError, match="nothing in it was executed"):
        read_torch(path)
    assert not (tmp_path / MARKED).exists()
    weights = {"a": torch.arange(6.0).reshape(2, 3)}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(path)["a"], weights["a"])


def array_of(shape, raw=b"12345678", code="f8"):
    """A pickled array that claims a shape."""
    make, state = np.zeros(1).__reduce__()[0], (1, shape, np.dtype(code), False, raw)
    return pickle.dumps(Calls(make, np.ndarray, (0,), b"b", state=state))


SIZES = {
    "an array larger than its bytes": array_of((10**12,)),
    "an array of negative size": array_of((-1,)),
    "objects more than there are": array_of((10**12,), [1], "O"),
    "a type of no size": array_of((10**9,), b"", "S0"),
    "memory for a long key": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 10**15) + b"abc.",
    "no end": b"\x80\x02]q\x00",
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02K\x01t.",
    "an unknown opcode": b"\x80\x02\xff.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "text that is none": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a dict of three": b"\x80\x02}(K\x01K\x02K\x03u.",
}


@pytest.mark.parametrize("data", SIZES.values(), ids=SIZES)
def test_bombs_and_damage_are_refused_at_once(data):
    begin = time.process_time()
    with pytest.raises(UnreadableFileError):
        read_pickle(data, "attr.pkl")
    assert time.process_time() - begin < 20  # no more than a guard: a bomb would never end


def test_lists_of_the_same_lists_take_no_room(tmp_path):
    bomb = b"\x80\x02]q\x00" + b"".join(b"](" + b"h\x00" * 9 + b"eq\x00" for _ in range(60)) + b"."
    assert len(read_pickle(bomb, "attr.pkl")) == 9  # 9 to the power of 60, were it written out
    evil_model(tmp_path / "model.pt", 0)
    with pytest.raises(UnreadableFileError, match="no attributes"):
        (tmp_path / "attr.pkl").write_bytes(bomb)
        (tmp_path / "model.pt").rename(tmp_path / "model_params.pt")
        (tmp_path / "var_names.csv").write_text("g\n")
        torch.save({"w": torch.zeros(2)}, tmp_path / "model_params.pt")
        read_saved(tmp_path)


def test_bytes_made_of_text_cannot_outgrow_the_file():
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x00"
    again = b"c_codecs\nencode\nh\x00\x85R"
    data = b"\x80\x02(" + text + again * 5000 + b"t."
    with pytest.raises(UnreadableFileError, match="more bytes than it has"):
        read_pickle(data, "attr.pkl")


def rewritten(path, change):
    """The same torch file with data.pkl changed."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, value in content.items():
            new.writestr(name, change(value) if name.endswith("data.pkl") else value)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pt"
    tensors = {f"w{i}": torch.arange(12, dtype=torch.float32).reshape(3, 4) for i in range(2)}
    tensors |= {"half": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(7), "none": torch.zeros(0, 4)}
    tensors["part"] = torch.arange(20.0)[4:12].reshape(2, 4).T
    torch.save(collections.OrderedDict(tensors), path)
    return path, tensors


def test_tensors_are_those_that_were_saved(weights):
    path, tensors = weights
    found = read_torch(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x03K\x04\x86", b"M\xe8\x03M\xe8\x03\x86"),  # shape (3, 4) becomes (1000, 1000)
        (b"K\x04K\x01\x86", b"K\x00K\x00\x86"),  # strides of 0, with
        (b"FloatStorage", b"HalfStorage\n" + b"0"),
        (b"K\x0ct", b"K\x0dt"),  # 13 numbers in a storage of 12
    ],
    ids=["larger than the storage", "strides of 0", "another type", "another length"],
)
def test_tensors_outside_of_their_storage_are_refused(weights, old, new):
    path, _ = weights
    data = zipfile.ZipFile(path).read("weights/data.pkl")
    assert old in data
    if old == b"K\x04K\x01\x86":
        rewritten(path, lambda d: d.replace(b"K\x03K\x04\x86", b"M\xe8\x03M\xe8\x03\x86").replace(old, new))
    else:
        rewritten(path, lambda d: d.replace(old, new))
    with pytest.raises(UnreadableFileError):
        read_torch(path)


def test_damaged_and_foreign_zips_are_refused(weights, tmp_path):
    path, _ = weights
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(UnreadableFileError):
            read_torch(tmp_path / "cut.pt")
    at = whole.index(struct.pack("<f", 5.0))
    (tmp_path / "flipped.pt").write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    with pytest.raises(UnreadableFileError, match="damaged"):
        read_torch(tmp_path / "flipped.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("model/data.pkl", b"\x00" * 10_000_000)
    with pytest.raises(UnreadableFileError, match="compressed"):
        read_torch(tmp_path / "bomb.pt")
    (tmp_path / "twice.pt").write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "twice.pt", "a") as twice:  # the same bytes under many names
        twice.filelist.extend([twice.getinfo("weights/data.pkl")] * 1000)
        twice.writestr("weights/x", b"")
    with pytest.raises(UnreadableFileError, match="larger than the file"):
        read_torch(tmp_path / "twice.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as other:
        other.writestr("readme.txt", "x")
    with pytest.raises(UnreadableFileError, match=r"without data\.pkl"):
        read_torch(tmp_path / "other.pt")


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused_but_never_run(position, value):
    frame = pd.DataFrame({"a": [1.0]})
    data = bytearray(pickle.dumps({"x": np.arange(3), "history": frame, "d": collections.OrderedDict(a=1)}, 2))
    data[position % len(data)] = value
    try:
        found = read_pickle(bytes(data), "attr.pkl")
    except UnreadableFileError:
        return
    assert set(map(type, contents(found))) <= PLAIN


PLAIN = {dict, list, tuple, set, frozenset, collections.OrderedDict, np.ndarray, Foreign, Global, Pending}
PLAIN |= {str, bytes, bytearray, int, float, bool, type(None), np.dtype, *map(type, map(np.dtype, "bhilBHILfd?"))}


def contents(value):
    """A value and all in it."""
    yield value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    inside = (*value.arguments, value.state) if isinstance(value, Foreign) else inside
    for item in inside:
        yield from contents(item)
