"""Simulated studies with known truth, for the demonstration and for tests: seeded, vectorised, written as h5ad.

A cell's counts are negative binomial: x ~ NB(mean = library · softmax(gene + lineage + type + study + sample), theta
per gene). Studies and samples shift random subsets of the genes; the library is log-normal and differs by study.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray


@dataclass(frozen=True)
class Biology:
    """What all studies share: the log expression of every cell type, and each gene's dispersion."""

    profiles: NDArray[np.float64]
    """(types, genes)."""
    theta: NDArray[np.float64]
    """(genes,) inverse dispersion."""
    seed: int

    @classmethod
    def make(cls, n_types: int = 16, n_genes: int = 2000, n_lineages: int = 4, seed: int = 0) -> Biology:
        """Types of one lineage differ in fewer genes than lineages do."""
        rng = np.random.default_rng([seed, 1])
        base = rng.normal(0, 1.4, n_genes)
        lineage = rng.normal(0, 1.5, (n_lineages, n_genes)) * (rng.random((n_lineages, n_genes)) < 0.06)
        own = rng.normal(0, 1.0, (n_types, n_genes)) * (rng.random((n_types, n_genes)) < 0.03)
        return cls(base + lineage[np.arange(n_types) % n_lineages] + own, rng.gamma(2, 2, n_genes) + 0.3, seed)

    @property
    def types(self) -> list[str]:
        """Names of the cell types."""
        return [f"type {k:02d}" for k in range(len(self.profiles))]

    @property
    def genes(self) -> list[str]:
        """Names of the genes, in the manner of Ensembl."""
        return [f"ENSG{k:011d}" for k in range(1, self.profiles.shape[1] + 1)]

    def study(self, number: int, n_cells: int, types: list[int] | None = None, n_samples: int = 3) -> ad.AnnData:
        """One study's cells: obs cell_type, study, sample; X raw counts, CSR float32. `types` limits what occurs."""
        rng = np.random.default_rng([self.seed, 2, number])
        allowed = np.arange(len(self.profiles)) if types is None else np.array(types)
        kind = rng.choice(allowed, n_cells, p=rng.dirichlet(np.full(len(allowed), 3.0)))
        sample = rng.integers(0, n_samples, n_cells)
        shift = self._shift(rng, 1, 0.5) + self._shift(rng, n_samples, 0.2)
        library = rng.lognormal(np.log(2000) + rng.normal(0, 0.4), 0.45, n_cells)
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical([self.types[k] for k in kind]),
                "study": pd.Categorical([f"study {number}"] * n_cells),
                "sample": pd.Categorical([f"study {number} sample {s}" for s in sample]),
            },
            index=[f"study{number}-cell{k:06d}" for k in range(n_cells)],
        )
        counts = self._counts(rng, kind, shift[sample], library)
        return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=self.genes))

    def _shift(self, rng: np.random.Generator, n: int, size: float) -> NDArray[np.float64]:
        shape = (n, self.profiles.shape[1])
        return rng.normal(0, size, shape) * (rng.random(shape) < 0.4)

    def _counts(
        self,
        rng: np.random.Generator,
        kind: NDArray[np.int64],
        shift: NDArray[np.float64],
        library: NDArray[np.float64],
        rows: int = 2000,
    ) -> sp.csr_matrix:
        """Draw `rows` cells at a time: 2,000 x 2,000 genes of float64 are 32 MB."""
        blocks = []
        for start in range(0, len(kind), rows):
            part = slice(start, start + rows)
            logits = self.profiles[kind[part]] + shift[part]
            share = np.exp(logits - logits.max(1, keepdims=True))
            mean = library[part, None] * share / share.sum(1, keepdims=True)
            blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(self.theta, mean / self.theta)).astype(np.float32)))
        return sp.vstack(blocks, format="csr")


def write_studies(
    folder: Path, seed: int = 0, n_reference: int = 5, cells: int = 4500, query_cells: int = 2000
) -> tuple[list[Path], list[Path]]:
    """Write reference studies and unseen query studies as h5ad; the last query is broken on purpose.

    The first query has another gene order and lacks a tenth of the genes; the second holds a cell type that the reference
    has never seen; the third holds normalised values instead of counts.
    """
    biology = Biology.make(seed=seed)
    novel = len(biology.types) - 1
    known = list(range(novel))
    folder.mkdir(parents=True)
    reference = []
    for number in range(1, n_reference + 1):
        reference.append(folder / f"study_{number}.h5ad")
        biology.study(number, cells, known).write_h5ad(reference[-1], compression="gzip")
    rng = np.random.default_rng([seed, 3])
    reordered = biology.study(n_reference + 1, query_cells, known)
    n_genes = reordered.n_vars
    reordered = reordered[:, rng.permutation(n_genes)[: n_genes - n_genes // 10]].copy()
    unseen = biology.study(n_reference + 2, query_cells)
    broken = biology.study(n_reference + 3, query_cells // 4, known)
    broken.X = broken.X.multiply(1e4 / broken.X.sum(1)).tocsr().log1p()
    queries = []
    for name, data in (("reordered_genes", reordered), ("unseen_type", unseen), ("broken_normalised", broken)):
        queries.append(folder / f"query_{name}.h5ad")
        data.write_h5ad(queries[-1], compression="gzip")
    return reference, queries
