"""Places: local paths stay paths, addresses reach an object store, and stores there are read like those here."""

import json
import shutil
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from upath import UPath

from scviaduct.errors import ConfigError, IncompleteError, UnreadableFileError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.loader import Loader, stream
from scviaduct.storage.places import Folder, Span, absolute, file_sizes, is_remote, local, place, read_spans
from scviaduct.storage.prepare import prepare
from scviaduct.storage.sampler import Sampler
from scviaduct.storage.view import View


@pytest.mark.parametrize("text", ["a/b.zarr", "/a/b", "./a", "a:b/c", "C:/Users/a", "s3/bucket"])
def test_local_paths_stay_as_they_are(text):
    assert place(text) == place(Path(text)) == Path(text)
    assert not is_remote(text) and local(text, "It") == Path(text)
    assert absolute(text) == Path(text).absolute()


@pytest.mark.parametrize("path", ["memory://x/a.zarr", Path("memory://x/a.zarr"), UPath("memory://x/a.zarr")])
def test_addresses_are_understood_also_without_the_slash_that_pathlib_takes(path):
    assert is_remote(path) and absolute(path) == place(path)
    assert str(place(path)).rstrip("/").endswith("x/a.zarr") and place(path).name == "a.zarr"
    with pytest.raises(ConfigError, match=r"The atlas cannot be memory:.*copy what must go there"):
        local(path, "The atlas")


def test_file_addresses_are_local():
    assert place("file:///a/b") == Path("/a/b")


def test_unknown_kinds_of_address_are_refused():
    with pytest.raises(ConfigError, match="nowhere://x is neither"):
        place("nowhere://x")


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"Reading s3://b/k needs a driver: pip install 'scviaduct\[s3\]'"):
        place("s3://b/k")


@pytest.fixture(params=["here", "memory"])
def folder(request, tmp_path):
    """A folder with one file of ten bytes."""
    root = tmp_path if request.param == "here" else UPath(f"memory://{tmp_path.name}")
    root.mkdir(exist_ok=True, parents=True)
    (root / "f").write_bytes(b"0123456789")
    return root


def test_spans(folder):
    found = read_spans(folder, [Span("f", 2, 5), Span("f", -3), Span("f", 0), Span("f", 7)])
    assert [x.tobytes() for x in found] == [b"234", b"789", b"0123456789", b"789"]
    assert read_spans(folder, []) == []
    assert file_sizes(folder, ["f", "g"]) == {"f": 10}


@pytest.mark.parametrize("span", [Span("f", 5, 12), Span("f", -11)])
def test_short_files_are_refused(folder, span):
    with pytest.raises(ValueError, match="f is too short"):
        read_spans(folder, [span])


def test_files_that_are_gone_are_named(folder):
    with pytest.raises(FileNotFoundError) as raised:
        read_spans(folder, [Span("f", 0, 1), Span("gone", 0, 1)])
    assert raised.value.filename == "gone"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux tells them")
@pytest.mark.parametrize("held", [0, 2])
def test_files_of_a_folder_stay_open_but_not_many(tmp_path, held):
    def opened():
        return {p.resolve().name for p in Path("/proc/self/fd").iterdir() if tmp_path in p.resolve().parents}

    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode() * 3)
    folder = Folder(tmp_path, held)
    for name in "abacada":
        assert folder.read(Span(name, 1, 3), np.empty).tobytes() == name.encode() * 2
    assert opened() == ({"a", "d"} if held else set())
    del folder
    assert opened() == set()


GENES = 300


def cells(seed):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {"type": pd.Categorical(rng.choice(["B", "T"], 400)), "depth": rng.random(400)},
        index=[f"c{seed}_{i}" for i in range(400)],
    )
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(0.5, (400, GENES)).astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]),
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    for name in "ab":
        cells(ord(name)).write_h5ad(folder / f"{name}.h5ad")
    atlas = convert([folder / "a.h5ad", folder / "b.h5ad"], out=folder / "atlas.zarr")
    prepare(atlas, genes="all", block_rows=32)
    return folder / "atlas.zarr"


@pytest.fixture(scope="module")
def there(here, s3):
    return s3.upload(here, "shared", "some/atlas.zarr")


@pytest.fixture
def own(here, s3, request):
    """An address that a test may damage, and a function that gives or takes an object."""
    bucket = f"own-{abs(hash(request.node.name)) % 10**8}"
    address, client = s3.upload(here, bucket, "atlas.zarr"), s3.client()
    yield address, bucket, client
    client.close()


def source_of(atlas):
    view = View.open(atlas)
    return view.source(view.schema(batch_key="dataset", labels_key="type", continuous_covariate_keys=["depth"]))


def same(a, b):
    for name in ("indptr", "indices", "data", "batch_index", "labels", "continuous", "rows", "seeds", "lanes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_an_atlas_there_is_the_one_here(here, there):
    a, b = Atlas.open(here), Atlas.open(there)
    assert a.datasets == b.datasets and a.vocabulary == b.vocabulary and a.digest() == b.digest()
    for info in a.datasets:
        pd.testing.assert_frame_equal(a.obs(info.id), b.obs(info.id))
        pd.testing.assert_frame_equal(a.obs(info.id, ["depth"]), b.obs(info.id, ["depth"]))
        pd.testing.assert_frame_equal(a.var(info.id), b.var(info.id))
        for (i, x), (j, y) in zip(a.chunks(info.id, 150), b.chunks(info.id, 150), strict=True):
            assert i == j and (x != y).nnz == 0 and x.dtype == y.dtype
    x, y = a.lazy()[100:500].to_memory(), b.lazy()[100:500].to_memory()
    assert (x.X != y.X).nnz == 0 and x.obs.equals(y.obs)


def test_batches_there_are_those_here(here, there):
    sampler = Sampler(n_rows=800, block_rows=32, batch_size=50)
    with Loader(source_of(here), sampler).epoch(1) as a, Loader(source_of(there), sampler).epoch(1) as b:
        for x, y in zip(a, b, strict=True):
            same(x, y)
    with stream(source_of(here)) as a, stream(source_of(there)) as b:
        for x, y in zip(a, b, strict=True):
            same(x, y)


def test_blocks_are_requested_together_and_indexes_once(there, s3):
    source = source_of(there)
    with s3.recorded(delay=0.03), stream(source) as blocks:
        n = sum(1 for _ in blocks)
    assert n == 25 and s3.most_at_once >= 16
    gets = [(path, span) for method, path, span in s3.requests if method == "GET"]
    indexes = [path for path, span in gets if span.startswith("bytes=-")]
    assert len(indexes) == len(set(indexes)) == 6  # data, indices, indptr, dataset, type, depth: a shard each
    layouts = [path for path, _ in gets if path.endswith("zarr.json")]
    assert len(layouts) == len(set(layouts)) == 6
    assert len(gets) - 12 == 25 * 6  # one request for each array of a block
    assert {method for method, _, _ in s3.requests} == {"GET"}


def test_opening_a_view_lists_its_files_at_once(there, s3):
    with s3.recorded():
        View.open(there)
    assert len(s3.requests) <= 4


def test_a_view_there_can_be_verified(there):
    View.open(there).verify()


def test_lost_and_cut_objects_are_noticed_at_open(own):
    address, bucket, client = own
    key = "atlas.zarr/views/default/data/c/0"
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=body[:-1])
    with pytest.raises(IncompleteError, match=rf"data/c/0 has {len(body) - 1} bytes instead of {len(body)}"):
        View.open(address)
    client.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(IncompleteError, match="data/c/0 is missing"):
        View.open(address)
    client.delete_object(Bucket=bucket, Key="atlas.zarr/datasets/a/X/data/c/0")
    with pytest.raises(IncompleteError, match=r"X/data/c/0 is missing, its manifest says"):
        Atlas.open(address).counts("a")


@pytest.mark.parametrize("name", ["data", "indices", "indptr", "obs/type"])
def test_objects_lost_after_opening_never_read_as_zeros(own, name):
    address, bucket, client = own
    source = source_of(address)
    client.delete_object(Bucket=bucket, Key=f"atlas.zarr/views/default/{name}/c/0")
    with pytest.raises(IncompleteError, match=f"a chunk of {name} is missing"):
        source.read(0)


def test_objects_cut_or_changed_after_opening_are_noticed(own):
    address, bucket, client = own
    key = "atlas.zarr/views/default/data/c/0"
    body = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    body[len(body) // 3] ^= 4
    source = source_of(address)
    client.put_object(Bucket=bucket, Key=key, Body=bytes(body))
    with pytest.raises(IncompleteError, match="a checksum of data/c/0 is wrong"):
        for block in range(25):
            source.read(block)
    client.put_object(Bucket=bucket, Key=key, Body=bytes(body[: len(body) // 4]))
    with pytest.raises(IncompleteError, match="cannot be read"):
        for block in range(25):
            source.read(block)


def test_what_is_not_there_is_told(there, s3):
    with pytest.raises(UnreadableFileError, match="does not exist"):
        Atlas.open("s3://shared/nothing.zarr")
    with pytest.raises(IncompleteError, match=r"View 'other' of s3://shared/some/atlas.zarr does not exist"):
        View.open(there, "other")


def test_a_store_that_cannot_be_reached_is_told(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with pytest.raises(
        UnreadableFileError, match=r"s3://shared/x.* cannot be reached: NoCredentialsError.*AWS_PROFILE"
    ):
        Atlas.open("s3://shared/x")
    S3FileSystem.clear_instance_cache()


def test_writing_there_is_refused(there, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("s3://shared/new.zarr", Path("s3://shared/new.zarr")):
        with pytest.raises(
            ConfigError,
            match=r"cannot be s3://shared/new.zarr: but for runs of train, object stores are only read.*aws s3 sync",
        ):
            convert([here.parent / "a.h5ad"], out=out)
        with pytest.raises(
            ConfigError, match=r"cannot be s3://shared/some.*: but for runs of train, object stores are only read"
        ):
            prepare(Path(there), genes=10, name="new")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_made_by_other_tools_is_read(there, s3, here, tmp_path):
    client, keys = s3.client(), None
    keys = [o["Key"] for o in client.list_objects_v2(Bucket="shared", Prefix="some/")["Contents"]]
    for key in keys:
        file = tmp_path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("shared", key, str(file))
    client.close()
    assert View.open(tmp_path / "some/atlas.zarr").digest == View.open(here).digest
    shutil.rmtree(tmp_path / "some")
    assert json.loads(place(f"{there}/atlas.json").read_text())
