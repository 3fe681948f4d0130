"""Does annbatch read the data sets of an atlas as they are? Run with an interpreter that has annbatch (Python >= 3.12):

    PYTHON benchmarks/interop_annbatch.py atlas.zarr

Opens each data set as annbatch's Loader takes it, draws all cells in shuffled batches, and compares the number of cells
and the sum of counts with the manifests. scviaduct itself is not imported.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import zarr


def loader(path: Path, batch: int):
    """annbatch's Loader over one data set."""
    from annbatch import Loader

    group = zarr.open_group(path, mode="r")
    data = ad.AnnData(
        X=ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"]), var=ad.io.read_elem(group["var"])
    )
    return Loader(batch_size=batch, chunk_size=batch, preload_nchunks=4, shuffle=True, return_index=True).add_adata(
        data
    )


def drawn(path: Path, batch: int) -> tuple[int, int, int]:
    """(cells, different cells, sum of counts) of one pass."""
    total, rows = 0, []
    for got in loader(path, batch):
        x = got["X"]
        total += int(x.sum(dtype=np.int64) if hasattr(x, "dtype") and x.dtype.kind in "iuf" else x.sum().item())
        rows.append(np.asarray(got["index"]))
    rows = np.concatenate(rows)
    return len(rows), len(np.unique(rows)), total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", type=Path)
    parser.add_argument("--batch", type=int, default=512)
    options = parser.parse_args()
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    warnings.simplefilter("ignore")
    wrong = 0
    for marker in sorted(options.atlas.glob("datasets/[!.]*/manifest.json")):
        manifest, start = json.loads(marker.read_text()), time.perf_counter()
        found = drawn(marker.parent, options.batch)
        wanted = (manifest["n_obs"], manifest["n_obs"], manifest["sum"])
        seconds = time.perf_counter() - start
        verdict = "equal" if found == wanted else f"DIFFERENT: {wanted} in the manifest"
        print(f"{manifest['id']}: {found[0]:,} cells, sum {found[2]:,}, {found[0] / seconds:,.0f} cells/s: {verdict}")
        wrong += found != wanted
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
