"""Pictures of a mapping: UMAP of reference and queries before (PCA) and after (the model's latent space)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scviaduct.distributed.bundle import Bundle
from scviaduct.storage.view import View

CELLS = 2000
"""Cells drawn of the reference, and of each query at most."""


def before_and_after(view: View, bundle: Bundle, results: Sequence[Path], truth: str, out: Path) -> Path:
    """Draw four panels into `out` (PNG): PCA of log-normalised counts and the latent space, by study and by cell type.

    `results` are files written by `map`; their cell types are taken from the obs column `truth`.
    """
    cells = ad.concat([_reference(view, bundle), *(_query(path, bundle, truth) for path in results)])
    latent = cells.obsm["latent"]
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=30)
    panels = {"before: PCA": _umap(cells.obsm["X_pca"]), "after: latent space": _umap(latent)}
    _draw(panels, cells.obs[["batch", "type"]], out)
    return out


def _reference(view: View, bundle: Bundle) -> ad.AnnData:
    """The first blocks of the view, which is a random sample as views are shuffled."""
    schema = bundle.schema
    source, latent = view.source(schema), bundle.latent()
    assert latent is not None  # of a model that was trained here
    blocks = [source.read(b) for b in range(min(-(-CELLS // view.block_rows), -(-view.n_rows // view.block_rows)))]
    counts = sp.vstack([sp.csr_matrix((b.data, b.indices, b.indptr), (b.n_cells, b.n_genes)) for b in blocks])[:CELLS]
    batch = np.concatenate([b.batch_index for b in blocks])[:CELLS]
    names = np.array([*schema.labels.categories, schema.unlabeled_category] if schema.labels else ["cell"], object)
    codes = np.concatenate([b.labels for b in blocks])[:CELLS] if schema.labels else np.zeros(len(batch), np.int64)
    obs = pd.DataFrame({"batch": np.array(schema.batch.categories, object)[batch], "type": names[codes]})
    obs.index = [f"reference {k}" for k in range(len(obs))]
    return ad.AnnData(counts.tocsr(), obs=obs, obsm={"latent": np.array(latent[: len(obs)])})


def _query(path: Path, bundle: Bundle, truth: str) -> ad.AnnData:
    """A sample of one result's mapped cells, on the reference's genes."""
    data = ad.read_h5ad(path)
    latent = data.obsm[bundle.model().obsm_key]
    rows = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(latent[:, 0])))[:CELLS]
    columns = data.var_names.get_indexer(list(bundle.schema.genes))
    padded = sp.hstack([data.X[rows], sp.csr_matrix((len(rows), 1), dtype=np.float32)]).tocsc()
    counts = padded[:, np.where(columns < 0, data.n_vars, columns)].tocsr()
    obs = pd.DataFrame({"batch": path.stem, "type": data.obs[truth].astype(str).to_numpy()[rows]})
    obs.index = [f"{path.stem} {k}" for k in range(len(obs))]
    return ad.AnnData(counts, obs=obs, obsm={"latent": latent[rows]})


def _umap(space: NDArray[Any]) -> NDArray[np.float32]:
    holder = ad.AnnData(obsm={"space": np.asarray(space, np.float32)}, shape=(len(space), 0))
    sc.pp.neighbors(holder, use_rep="space", random_state=0)
    sc.tl.umap(holder, random_state=0)
    return holder.obsm["X_umap"]


def _draw(panels: dict[str, NDArray[np.float32]], colours: pd.DataFrame, out: Path) -> None:
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplots(len(colours.columns), len(panels))
    order = np.random.default_rng(0).permutation(len(colours))
    for row, column in zip(axes, colours.columns, strict=True):
        kinds = pd.Categorical(colours[column].astype(str))
        palette = sc.pl.palettes.default_20 if len(kinds.categories) <= 20 else sc.pl.palettes.default_102
        for panel, (title, xy) in zip(row, panels.items(), strict=True):
            paint = [palette[code % len(palette)] for code in kinds.codes[order]]
            panel.scatter(*xy[order].T, c=paint, s=3, linewidths=0)
            panel.set(title=f"{title}, by {column}", xticks=[], yticks=[])
        for code, name in enumerate(kinds.categories):
            row[-1].scatter([], [], color=palette[code % len(palette)], label=name)
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=1)
    figure.savefig(out, dpi=110)
