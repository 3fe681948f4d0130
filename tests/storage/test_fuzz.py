"""Damaged files: a refusal in words, or exactly the counts that h5py reads; never another error, a crash or a hang.

Files are damaged and read in processes of their own, in batches, so that a crash of the HDF5 library is seen and
the case that caused it is named. `python test_fuzz.py FIRST LAST` runs cases by hand.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.errors import ScviaductError
from scviaduct.jobs.__main__ import main as command_line
from scviaduct.storage.convert import convert
from scviaduct.storage.h5ad import CountsFile, open_counts

CASES, BATCH = 240, 120
CONVERTED, INSPECTED = 9, 15
"""One of so many cases goes through `convert`, or the command line, as well."""
N_OBS, N_VARS = 60, 40


def build(path: Path, kind: str) -> None:
    """A good file; obs has columns of each kind that anndata writes."""
    rng = np.random.default_rng(1)
    x = sp.csr_matrix(rng.poisson(0.7, (N_OBS, N_VARS)).astype(np.float32))
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(np.resize(["a", "b", None], N_OBS)),
            "text": np.resize(["u", "v"], N_OBS).astype(object),
            "number": rng.normal(size=N_OBS),
        },
        index=[f"cell{i}" for i in range(N_OBS)],
    )
    data = ad.AnnData(x, obs=obs, var=pd.DataFrame({"length": range(N_VARS)}, index=[f"g{i}" for i in range(N_VARS)]))
    options = {"gzip": {"compression": "gzip"}, "lzf": {"compression": "lzf"}}.get(kind, {})
    if kind == "csc":
        data.X = x.tocsc()
    elif kind == "dense":
        data.X = x.toarray()
    elif kind == "layer":
        data.X, data.layers["counts"] = x.log1p(), x
    data.write_h5ad(path, **options)
    if kind in ("chunked", "10x"):
        _rewrite(path, kind, x)


def _rewrite(path: Path, kind: str, x: sp.csr_matrix) -> None:
    """X in many small chunks with gzip; or all of it as a 10x file."""
    with h5py.File(path, "w" if kind == "10x" else "r+") as file:
        group = file.create_group("matrix") if kind == "10x" else file["X"]
        for name in ("data", "indices", "indptr"):
            if name in group:
                del group[name]
            values = getattr(x, name)
            group.create_dataset(name, data=values, chunks=(100,), maxshape=(None,), compression="gzip", shuffle=True)
        if kind == "10x":
            group["shape"] = [N_VARS, N_OBS]
            group["barcodes"] = np.array([f"AC{i}-1" for i in range(N_OBS)], "S")
            group["features/id"] = np.array([f"ENSG{i:011}" for i in range(N_VARS)], "S")
            group["features/feature_type"] = np.array(["Gene Expression"] * N_VARS, "S")


KINDS = ("plain", "gzip", "chunked", "lzf", "csc", "dense", "layer", "10x")


def cut(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, int(rng.integers(0, path.stat().st_size)))


def flip(path: Path, rng: np.random.Generator, bits: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(bits):
        raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)


def flip_stored(path: Path, rng: np.random.Generator) -> None:
    """A bit of the stored counts or indices, compressed as they are."""
    with h5py.File(path) as file:
        flat = [n for n in names(file, h5py.Dataset) if n.rpartition("/")[2] in ("data", "indices", "indptr", "X")]
        dataset = file[rng.choice(flat)]
        if dataset.chunks:
            info = dataset.id.get_chunk_info(int(rng.integers(dataset.id.get_num_chunks())))
            start, size = info.byte_offset, info.size
        else:
            start, size = dataset.id.get_offset(), dataset.nbytes
    raw = bytearray(path.read_bytes())
    raw[start + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)


def flip_many(path: Path, rng: np.random.Generator) -> None:
    flip(path, rng, bits=int(rng.integers(2, 40)))


def blank(path: Path, rng: np.random.Generator) -> None:
    raw = bytearray(path.read_bytes())
    at, size = int(rng.integers(len(raw))), int(rng.integers(1, 400))
    raw[at : at + size] = rng.bytes(len(raw[at : at + size])) if rng.integers(2) else bytes(len(raw[at : at + size]))
    path.write_bytes(raw)


def names(file: h5py.File, what: type) -> list[str]:
    found: list[str] = []
    file.visititems(lambda name, node: found.append(name) if isinstance(node, what) else None)
    return found


def inside(change: Callable[[h5py.File, np.random.Generator], None]) -> Callable[[Path, np.random.Generator], None]:
    def mutate(path: Path, rng: np.random.Generator) -> None:
        with h5py.File(path, "r+") as file:
            change(file, rng)

    mutate.__name__ = change.__name__
    return mutate


@inside
def retype(file: h5py.File, rng: np.random.Generator) -> None:
    name = rng.choice(names(file, h5py.Dataset))
    values, attrs = file[name][()], dict(file[name].attrs)
    dtype = rng.choice(["S3", "f2", "f8", "i1", "u2", "i8", "u8", "?", "c8", ">f4"])
    try:
        values = np.asarray(values).astype(dtype)
    except (ValueError, TypeError):
        values = np.arange(np.asarray(values).size).reshape(np.shape(values)).astype(dtype)
    del file[name]
    file[name] = values
    file[name].attrs.update(attrs)


@inside
def reshape(file: h5py.File, rng: np.random.Generator) -> None:
    name = rng.choice(names(file, h5py.Dataset))
    values, attrs = np.atleast_1d(file[name][()]), dict(file[name].attrs)
    del file[name]
    file[name] = values[: int(rng.integers(len(values) + 1))] if rng.integers(2) else values.reshape(-1, 1)
    file[name].attrs.update(attrs)


@inside
def remove(file: h5py.File, rng: np.random.Generator) -> None:
    del file[rng.choice(names(file, h5py.HLObject))]


@inside
def swap(file: h5py.File, rng: np.random.Generator) -> None:
    a, b = rng.choice(names(file, h5py.HLObject), 2)
    if a != b and not a.startswith(b) and not b.startswith(a):
        file.move(a, "elsewhere")
        file.move(b, a)
        file.move("elsewhere", b)


@inside
def attribute(file: h5py.File, rng: np.random.Generator) -> None:
    holders = [name for name in names(file, h5py.HLObject) if len(file[name].attrs)] or ["matrix"]
    node = file[rng.choice(holders)]
    for key in list(node.attrs)[:1] if "shape" not in node.attrs else ["shape", "encoding-type"]:
        junk: list[object] = [[0, 0], [61, 40], [60, 41], [-1, 40], [2**40, 2**40], [60], "text", 7, "csc_matrix"]
        junk += ["dense", "array", "dataframe", b"\xff\xfe", 0.5]
        if rng.integers(4):
            node.attrs[key] = junk[int(rng.integers(len(junk)))]
        else:
            del node.attrs[key]


@inside
def values(file: h5py.File, rng: np.random.Generator) -> None:
    """Numbers of the matrix: pointers, indices and counts that are wrong, or right but others."""
    flat = [n for n in names(file, h5py.Dataset) if n.rpartition("/")[2] in ("data", "indices", "indptr", "X")]
    node = file[rng.choice(flat)]
    whole = node[()]
    at = tuple(int(rng.integers(n)) for n in whole.shape)
    number = int(rng.choice([0, 1, 2, 5, -1, 39, 40, 41, 59, 60, 2**24, 2**31 - 1, -(2**31)]))
    whole[at] = number
    node[...] = whole


MUTATIONS = (cut, flip, flip, flip_many, blank, blank, retype, reshape, remove, swap, attribute, values)
MUTATIONS += (flip_stored, flip_stored)


def expected(path: Path, name: str, kind: str) -> np.ndarray:
    """The matrix as h5py reads it, put together entry by entry."""
    with h5py.File(path) as file:
        node = file[name]
        if isinstance(node, h5py.Dataset):
            return node[()].astype(np.float64)
        data, indices, indptr = (node[part][()] for part in ("data", "indices", "indptr"))
        if kind == "10x Genomics h5":
            (n, m), rowwise = node["shape"][()][::-1], True
        else:
            (n, m), rowwise = node.attrs["shape"], str(node.attrs["encoding-type"]).startswith("csr")
    dense = np.zeros((n, m))
    major = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr.astype(np.int64)))
    minor = indices.astype(np.int64)
    np.add.at(dense, (major, minor) if rowwise else (minor, major), data.astype(np.float64))
    return dense


def read(file: CountsFile) -> np.ndarray:
    blocks = [block.toarray() for _, block, _ in file.audited(17)]
    assert len(file.obs) == file.n_obs and len(file.var) == file.n_vars
    for column in file.obs.columns:
        str(file.obs[column].iloc[-1])
    return np.vstack(blocks)


def check_convert(path: Path, out: Path, found: np.ndarray | None) -> None:
    """`convert` takes the same files, with the same counts."""
    try:
        atlas = convert([path], out=out, workers=1)
    except ScviaductError:
        assert found is None
    else:
        assert found is not None
        assert np.array_equal(np.vstack([b.toarray() for _, b in atlas.chunks(path.stem)]), found)


def check_inspect(path: Path, found: np.ndarray | None) -> None:
    """`scviaduct inspect` ends with exit code 0, or with 2 and one message."""
    sys.argv = ["scviaduct", "inspect", str(path)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line()
        except SystemExit as end:
            code = end.code
    assert code == (2 if found is None else 0), err.getvalue()
    assert (found is None) == err.getvalue().startswith("Error: ")
    assert (found is None) != ("ready to convert" in out.getvalue())


def verdict(path: Path, folder: Path, case: int) -> str:
    """What became of a file; an error that is not one of ours is raised."""
    try:
        with open_counts(path) as file:
            found, name, kind = read(file), file.matrix, file.kind
    except ScviaductError as error:
        assert str(path) in str(error), error
        found = None
    if case % CONVERTED == 0:
        check_convert(path, folder / "atlas.zarr", found)
    if case % INSPECTED == 0:
        check_inspect(path, found)
    if found is None:
        return "refused"
    wanted = expected(path, name, kind)
    if kind == "10x Genomics h5" and found.shape != wanted.shape:
        with h5py.File(path) as file:
            types = file["matrix/features/feature_type"][()]
        wanted = wanted[:, types == b"Gene Expression"]
    assert np.array_equal(found, wanted), "other counts than h5py reads"
    return "equal"


def damage(path: Path, good: Path, case: int) -> str:
    """Copy the good file of a case and damage it; what was done."""
    rng = np.random.default_rng(case)
    kind, mutate = KINDS[case % len(KINDS)], MUTATIONS[int(rng.integers(len(MUTATIONS)))]
    if not (good / kind).exists():
        build(good / kind, kind)
    shutil.copyfile(good / kind, path)
    mutate(path, rng)
    return f"{kind} {mutate.__name__}"


def tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(first: int, last: int) -> None:
    """Each case: a line before it and one after."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))  # absurd sizes fail at once
    with tempfile.TemporaryDirectory() as good:
        for case in range(first, last):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "a.h5ad"
                tell(f"{case} {damage(path, Path(good), case)} ")
                try:
                    tell(verdict(path, Path(folder), case) + "\n")
                except Exception as error:  # noqa: BLE001 - any error is a finding
                    traceback.print_exc()
                    tell(f"FAILED {type(error).__name__} {' '.join(str(error).split())[:200]}\n")


def batch(first: int) -> list[str]:
    """The lines of a batch; a crash or a hang shows as a line without a verdict."""
    command = [sys.executable, "-X", "faulthandler", __file__, str(first), str(first + BATCH)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as late:
        return [*(late.stdout or b"").decode().splitlines(), "HANGS"]
    lines = done.stdout.splitlines()
    return lines if done.returncode == 0 else [*lines, f"CRASHED {done.returncode} {done.stderr[-800:]}"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return [line for lines in pool.map(batch, range(0, CASES, BATCH)) for line in lines]


def test_damaged_files_are_refused_or_read_as_h5py_reads_them(lines: list[str]) -> None:
    wrong = [line for line in lines if not line.endswith((" refused", " equal"))]
    assert not wrong, "\n".join(wrong)
    assert len(lines) == CASES


def test_the_damage_is_of_every_kind(lines: list[str]) -> None:
    """Both outcomes occur for files of every kind: neither all refused nor nothing touched."""
    told = [line.split() for line in lines]
    assert {(kind, outcome) for _, kind, _, outcome in told} == {(k, o) for k in KINDS for o in ("refused", "equal")}
    assert {mutation for _, _, mutation, _ in told} == {m.__name__ for m in MUTATIONS}
    assert sum(line.endswith("refused") for line in lines) > CASES // 4


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
