"""Arrays: what Zarr says, without its fill values, and nothing fetched twice."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from scviaduct.storage import shards
from scviaduct.storage.shards import Arrays, Slice

LENGTH, CHUNK, SHARD = 1_000, 16, 128
VALUES = {
    "small": np.random.default_rng(0).integers(1, 200, LENGTH).astype(np.uint8),
    "wide": np.random.default_rng(1).integers(0, 2**40, LENGTH),
    "real": np.random.default_rng(2).random(LENGTH),
    "plain": np.random.default_rng(3).integers(0, 9_000, LENGTH).astype(np.uint16),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    group = zarr.create_group(folder, zarr_format=3)
    for name, values in VALUES.items():
        packed = [] if name == "plain" else [BloscCodec(cname="lz4", clevel=3, shuffle="shuffle")]
        array = group.create_array(
            name,
            shape=(LENGTH,),
            dtype=values.dtype,
            chunks=(CHUNK,),
            shards=(SHARD,),
            compressors=[*packed, Crc32cCodec()],
            fill_value=0 if name == "small" else -1 if name != "plain" else 65535,
        )
        array[:] = values
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@given(st.lists(st.tuples(st.sampled_from(sorted(VALUES)), st.integers(0, LENGTH), st.integers(0, LENGTH)), max_size=5))
def test_slices_are_those_of_the_values(made, wanted):
    slices = [Slice(name, min(a, b), max(a, b)) for name, a, b in wanted]
    for s, found in zip(slices, Arrays(made).read(*slices), strict=True):
        assert found.dtype == VALUES[s.name].dtype
        np.testing.assert_array_equal(found, VALUES[s.name][s.start : s.stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, LENGTH + 1)])
def test_slices_outside_are_refused(made, start, stop):
    with pytest.raises(ValueError, match="small has 1,000 values"):
        Arrays(made).read(Slice("small", start, stop))


def index_of(file):
    raw = bytearray(file.read_bytes())
    n = SHARD // CHUNK
    return raw, np.frombuffer(raw, "<u8", count=2 * n, offset=len(raw) - 16 * n - 4).reshape(n, 2)


def with_crc(raw):
    n = 16 * (SHARD // CHUNK)
    import google_crc32c

    raw[-4:] = google_crc32c.value(bytes(raw[-4 - n : -4])).to_bytes(4, "little")
    return bytes(raw)


def test_chunks_may_lie_in_any_order(copy):
    """zarrs with several threads writes them as they get ready."""
    file = copy / "small/c/0"
    raw, index = index_of(file)
    parts = [bytes(raw[o : o + n]) for o, n in index.tolist()]
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    body, at, moved = b"", 0, np.zeros_like(index)
    for k in order:
        moved[k] = at, len(parts[k])
        body, at = body + parts[k], at + len(parts[k])
    file.write_bytes(with_crc(bytearray(body + moved.tobytes() + bytes(4))))
    np.testing.assert_array_equal(Arrays(copy).read(Slice("small", 5, 300))[0], VALUES["small"][5:300])


def test_a_chunk_that_the_index_lacks_is_missing_and_not_zero(copy):
    file = copy / "small/c/0"
    raw, index = index_of(file)
    index = index.copy()
    index[2] = np.iinfo(np.uint64).max
    raw[-4 - index.nbytes : -4] = index.tobytes()
    file.write_bytes(with_crc(raw))
    assert (zarr.open_array(copy / "small")[32:48] == 0).all()  # what Zarr makes of it
    arrays = Arrays(copy)
    with pytest.raises(ValueError, match="a chunk of small is missing"):
        arrays.read(Slice("small", 30, 40))
    np.testing.assert_array_equal(arrays.read(Slice("small", 48, 60))[0], VALUES["small"][48:60])


@pytest.mark.parametrize("where", [3, -30])
@pytest.mark.parametrize("name", ["small", "plain"])
def test_flipped_bits_are_noticed_in_chunks_and_indexes(copy, name, where):
    file = copy / name / "c/0"
    raw = bytearray(file.read_bytes())
    raw[where] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"a checksum of {name}.* is wrong"):
        Arrays(copy).read(Slice(name, 0, 128))


def test_files_that_are_gone_or_cut(copy):
    (copy / "small/c/1").unlink()
    with pytest.raises(ValueError, match="a chunk of small is missing"):
        Arrays(copy).read(Slice("wide", 0, 5), Slice("small", 100, 200))
    (copy / "wide/c/0").write_bytes(b"short")
    with pytest.raises(ValueError, match="wide/c/0 is too short"):
        Arrays(copy).read(Slice("wide", 0, 5))
    (copy / "real/zarr.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"real/zarr\.json"):
        Arrays(copy).read(Slice("real", 0, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["codecs"][0]["configuration"].update(codecs=[{"name": "bytes"}]), "codecs that this version"),
        (lambda r: r["codecs"][0]["configuration"].update(index_location="start"), "codecs that this version"),
        (lambda r: r.update(codecs=[{"name": "bytes"}]), "does not describe a sharded array"),
        (lambda r: r.update(shape=[3, 4]), "does not describe a sharded array"),
        (lambda r: r.update(data_type="string"), "does not describe a sharded array"),
    ],
)
def test_other_arrays_are_refused(copy, change, message):
    file = copy / "small/zarr.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        Arrays(copy).read(Slice("small", 0, 5))


def test_threads_wait_for_each_other_instead_of_fetching_twice(made, monkeypatch):
    fetched, real, meet = [], shards.read_spans, threading.Barrier(8)

    def recorded(root, spans, *rest):
        fetched.extend(span for span in spans if span.start < 0 or span.name.endswith("zarr.json"))
        return real(root, spans, *rest)

    def read(_):
        meet.wait(timeout=20)
        return arrays.read(Slice("small", 0, LENGTH), Slice("wide", 0, LENGTH))

    monkeypatch.setattr(shards, "read_spans", recorded)
    arrays = Arrays(made)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read, range(8)):
            np.testing.assert_array_equal(found[1], VALUES["wide"])
    assert len(fetched) == len(set(fetched)) == 2 + 2 * 8


def test_what_failed_once_is_tried_again(copy):
    arrays, file = Arrays(copy), copy / "small/c/0"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match="missing"):
        arrays.read(Slice("small", 0, 5))
    file.write_bytes(content)
    np.testing.assert_array_equal(arrays.read(Slice("small", 0, 5))[0], VALUES["small"][:5])
