"""Telling what a file is: one of the kinds that are read, or else what to do about it."""

from __future__ import annotations

import errno
import gzip
import re
from pathlib import Path

import h5py
import zarr

from scviaduct.errors import UnreadableFileError
from scviaduct.storage.chunks import guarded
from scviaduct.storage.heaps import check_heaps
from scviaduct.storage.layouts import AnnDataLayout, Layout, TenxLayout
from scviaduct.storage.manifest import ATLAS_MARKER
from scviaduct.storage.mudata import MuDataLayout

ZARR_MARKERS = ("zarr.json", ".zgroup", ".zattrs")
"""A directory with one of these files is a Zarr store."""
_HDF5 = b"\x89HDF\r\n\x1a\n"
_R_HINT = "in R: zellkonverter::writeH5AD(Seurat::as.SingleCellExperiment(x), '{stem}.h5ad')"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "unzip it and pass the h5ad files inside"),
    (b"RDX", "an R data file", _R_HINT),
    (b"X\n\x00\x00\x00", "an R object (rds)", _R_HINT),
    (b"BZh", "a bzip2 file", "unpack it (bunzip2); if it is an R object, " + _R_HINT),
    (b"\xfd7zXZ", "an xz file", "unpack it (unxz); if it is an R object, " + _R_HINT),
    (b"%%MatrixMarket", "a Matrix Market file", "scanpy.read_10x_mtx(DIRECTORY).write_h5ad('{stem}.h5ad')"),
    (b"<!DOCTYPE", "a web page, perhaps an error page saved by a download", "download the file again"),
    (b"<html", "a web page, perhaps an error page saved by a download", "download the file again"),
)
_READ = "{reader}(PATH).write_h5ad('{stem}.h5ad')"


def open_layout(path: Path) -> Layout:
    """Open an h5ad, an AnnData Zarr store, a 10x Genomics h5 or a MuData for reading.

    Raises:
        UnreadableFileError: the path is missing, empty, truncated, locked, or another format.
    """
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist{_neighbours(path)}")
    return _open_directory(path) if path.is_dir() else _open_file(path)


def _open_directory(path: Path) -> Layout:
    if not any((path / name).exists() for name in ZARR_MARKERS):
        raise UnreadableFileError(f"{path} is {_directory(path)}; one file, or one AnnData Zarr store, is needed")
    root = guarded(path, lambda: zarr.open_group(path, mode="r"))
    names = guarded(path, lambda: {name for name in ("obs", "var", "mod", "tables", "datasets") if name in root})
    if {"obs", "var", "mod"} <= names:
        return MuDataLayout(path, root)
    if {"obs", "var"} <= names:
        return AnnDataLayout(path, root)
    raise UnreadableFileError(f"{path} is {_other_zarr(path, names)}")


def _other_zarr(path: Path, names: set[str]) -> str:
    if (path / ATLAS_MARKER).exists() or "datasets" in names:
        return "an atlas already, not a file to convert: its data sets are in datasets/"
    if "tables" in names:
        return f"a SpatialData store, not an AnnData: pass one of its tables, such as {path}/tables/table"
    return "a Zarr store without obs and var: write it with anndata's write_zarr"


def _open_file(path: Path) -> Layout:
    if path.stat().st_size == 0:
        raise UnreadableFileError(f"{path} is empty (0 bytes): copy or download it again")
    if not h5py.is_hdf5(path):
        what, fix = _other(path)
        raise UnreadableFileError(f"{path} is {what}, not an h5ad: {fix.format(stem=path.stem)}")
    try:
        # Dense matrices are read in slabs of rows; a cache of whole chunks saves decoding the same one twice.
        file = h5py.File(path, "r", rdcc_nbytes=64 * 2**20)
    except OSError as error:
        raise UnreadableFileError(_cannot_open(path, error)) from error
    try:
        return guarded(path, lambda: _layout(path, file))
    except UnreadableFileError:
        file.close()
        raise


def _layout(path: Path, file: h5py.File) -> Layout:
    check_heaps(path, file)
    if "obs" in file and "var" in file:
        return MuDataLayout(path, file) if "mod" in file else AnnDataLayout(path, file)
    groups = [node for node in file.values() if isinstance(node, h5py.Group)]
    if any("barcodes" in g and ("features" in g or "genes" in g) and "indptr" in g for g in groups):
        return TenxLayout(path, file)
    what, fix = _other_hdf5(file)
    raise UnreadableFileError(f"{path} is {what}, not an h5ad: {fix.format(stem=path.stem)}")


def _neighbours(path: Path) -> str:
    """Files of the same directory that may be meant."""
    found = sorted(p.name for p in path.parent.glob("*.h5ad"))[:5] if path.parent.is_dir() else []
    return f"; {path.parent} has {', '.join(found)}" if found else ""


def _directory(path: Path) -> str:
    if any(path.glob("matrix.mtx*")):
        return f"a 10x matrix directory (scanpy.read_10x_mtx(PATH).write_h5ad('{path.name}.h5ad') makes a file of it)"
    files = sorted(p.name for p in path.glob("*.h5ad"))
    return f"a directory with {len(files)} h5ad files" + (f" ({path}/*.h5ad names them)" if files else "")


def _other(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"\x1f\x8b"):
        return _gzipped(path)
    for magic, what, fix in _MAGIC:
        if head.startswith(magic):
            return what, fix
    if b"\0" not in head and head.isascii():
        fix = "read it with scanpy.read_text or pandas and write an h5ad"
        return f"a text file (it begins {head[:24].decode()!r})", fix
    return f"no HDF5 file (it begins with the bytes {head[:8].hex(' ')})", "it is damaged or of an unknown format"


def _gzipped(path: Path) -> tuple[str, str]:
    try:
        with gzip.open(path) as file:
            head = file.read(16)
    except (OSError, EOFError):
        return "a damaged gzip file", "download it again"
    if head.startswith(_HDF5):
        return "a gzip-compressed HDF5 file", "unpack it first (gunzip)"
    if head.startswith((b"RDX", b"X\n", b"A\n")):
        return "an R object (rds)", _R_HINT
    return "a gzip file", "unpack it first (gunzip)"


def _cannot_open(path: Path, error: OSError) -> str:
    sizes = re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error))
    if sizes:
        found, wanted = (int(n) for n in sizes.groups())
        return f"{path} is truncated: it has {found:,} of {wanted:,} bytes: copy or download it again"
    if error.errno in (errno.EAGAIN, errno.EACCES) and "lock" in str(error):
        return (
            f"{path} is locked: another program writes it, or its file system (NFS, Lustre) has no locks; "
            "in the latter case set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
        )
    if isinstance(error, PermissionError) or error.errno == errno.EACCES:
        return f"{path} may not be read by you: change its permissions"
    return f"{path} is a damaged HDF5 file ({error}): copy or download it again"


def _other_hdf5(file: h5py.File) -> tuple[str, str]:
    """What an HDF5 file without obs, var and a matrix is, and what to do."""
    if "row_attrs" in file and "col_attrs" in file:
        return "a loom file", _READ.replace("{reader}", "anndata.io.read_loom")
    if "meta.data" in file or "assays" in file:
        return "an h5Seurat file", "in R: SeuratDisk::Convert(PATH, dest = 'h5ad')"
    if "barcode_idx" in file and "umi" in file:
        return "a 10x Genomics molecule file", "pass filtered_feature_bc_matrix.h5 of the same run"
    if any(isinstance(node, h5py.Group) and "barcodes" in node for node in file.values()):
        return "a damaged 10x Genomics h5 file", "it has barcodes but no matrix; copy or download it again"
    names = ", ".join(list(file)[:6]) or "nothing"
    return f"an HDF5 file without obs and var (it holds {names})", "write it with anndata's write_h5ad"
