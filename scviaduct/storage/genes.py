"""Gene names: what kind they are, when two of them mean the same gene, and where they sit in files of other names."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError

log = logging.getLogger(__name__)

Join = Literal["union", "intersection"]
NAMES = "names"
"""How messages and records call var_names, beside the names of var's columns."""

# "ENSG00000000003.14", "ENSMUSG00000000001.5", "ENSG00000182378.15_PAR_Y". Clone names such as "RP11-34P13.7"
# look versioned but are not, so only ENS ids are touched.
_ENSEMBL = re.compile(r"(ENS[A-Z]+\d{6,})(\.\d+)?(_PAR_Y)?")


def normalise(names: Iterable[str]) -> list[str]:
    """Names without the version suffix of Ensembl ids; everything else unchanged.

    `ENSG00000000003.14` becomes `ENSG00000000003`; the copy of a gene on the Y chromosome stays apart:
    `ENSG00000182378.15_PAR_Y` becomes `ENSG00000182378_PAR_Y`.
    """

    def one(name: str) -> str:
        found = _ENSEMBL.fullmatch(name) if name.startswith("ENS") else None
        return found[1] + (found[3] or "") if found else name

    return [one(str(name)) for name in names]


def id_type(names: Sequence[str]) -> Literal["ensembl", "symbol"]:
    """The kind most of the names are of."""
    n_ensembl = sum(_ENSEMBL.fullmatch(str(name)) is not None for name in names)
    return "ensembl" if 2 * n_ensembl > len(names) else "symbol"


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Where each gene of a reference is found among the genes of a file."""

    positions: NDArray[np.int64]
    """(reference genes,) position in the file, -1 where the file does not have the gene."""
    missing: tuple[str, ...]
    """The reference's genes that the file does not have, in the reference's order."""
    n_extra: int
    """Genes of the file that the reference does not use."""
    via: str
    """What was compared: "names" for var_names, else the name of a var column."""

    @property
    def n_reference(self) -> int:
        """Number of genes asked for."""
        return len(self.positions)

    @property
    def n_matched(self) -> int:
        """Number of genes found."""
        return self.n_reference - len(self.missing)

    @property
    def share(self) -> float:
        """Share of the reference's genes that were found."""
        return self.n_matched / max(1, self.n_reference)

    def columns(self, n_vars: int) -> NDArray[np.int32]:
        """(n_vars,) position in the reference of each gene of the file, -1 where the reference does not use it."""
        columns = np.full(n_vars, -1, np.int32)
        found = np.flatnonzero(self.positions >= 0)
        columns[self.positions[found]] = found
        return columns


def match(reference: Sequence[str], var: pd.DataFrame, *, where: str = "the file") -> GeneMatch:
    """Find the reference's genes in `var` by name: by var_names, or by the text column of `var` that has more of them.

    Columns such as `feature_name`, `gene_ids` or `symbol` need no naming: each text column is tried, and one is taken
    only when it holds more of the reference's genes than var_names do. `where` names the file in messages.

    Raises DataError when a gene of the reference occurs twice, in the reference or in what it is compared with.
    """
    wanted = normalise(reference)
    _refuse_duplicates(wanted, "the reference", "genes")
    known = set(wanted)
    via, names = max(_candidates(var), key=lambda c: len(known.intersection(c[1])))
    _refuse_duplicates([n for n in names if n in known], where, _shown(via))
    at = {name: i for i, name in enumerate(names)}
    positions = np.fromiter((at.get(name, -1) for name in wanted), np.int64, len(wanted))
    missing = tuple(name for name, p in zip(reference, positions, strict=True) if p < 0)
    return GeneMatch(positions, missing, len(var) - len(wanted) + len(missing), via)


def _candidates(var: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Whatever may hold gene names, "" for none; var_names first, because `max` keeps the first of equals."""
    text = [c for c in var.columns if not pd.api.types.is_numeric_dtype(var[c])]
    columns = [(str(c), var[c].astype(object).where(var[c].notna(), "")) for c in text]
    return [(NAMES, normalise(var.index)), *((name, normalise(values)) for name, values in columns)]


def _refuse_duplicates(names: list[str], where: str, what: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        shown = ", ".join(twice[:5]) + (", …" if len(twice) > 5 else "")
        raise DataError(
            f"{where}: {len(twice)} gene{'s' if len(twice) > 1 else ''} occur more than once in {what} "
            f"(after removing Ensembl versions): {shown}. Sum or remove the duplicates first."
        )


def _shown(via: str) -> str:
    return "var_names" if via == NAMES else f"var column {via!r}"


@dataclass(frozen=True, eq=False)
class GeneAxis:
    """The names by which the genes of several data sets are compared."""

    kind: str
    """"ensembl", "symbol", or "number" (names that are numbers, such as Entrez ids)."""
    via: dict[str, str]
    """Where each data set has them: "names" for var_names, else a column of var."""
    names: dict[str, list[str | None]]
    """(genes of the data set,) each; None for a gene without such a name, or with one that another gene has too."""
    ambiguous: dict[str, tuple[str, ...]]
    """Names that several genes of a data set have, where there are such."""

    def genes(self, join: Join = "union") -> tuple[str, ...]:
        """Names of any or of all data sets, in order of appearance."""
        found = dict.fromkeys(name for names in self.names.values() for name in names if name is not None)
        if join == "union":
            return tuple(found)
        everywhere = _in_all(self.names)
        return tuple(name for name in found if name in everywhere)

    def columns(self, dataset_id: str, genes: Sequence[str]) -> NDArray[np.int32]:
        """(genes of the data set,) position of each in `genes`, -1 where it is not among them."""
        at = {name: i for i, name in enumerate(genes)}
        names = self.names[dataset_id]
        return np.fromiter((-1 if n is None else at.get(n, -1) for n in names), np.int32, len(names))


def gene_axis(frames: Mapping[str, pd.DataFrame]) -> GeneAxis:
    """The names on which data sets with these var tables, {data set: var}, share their genes.

    Ensembl ids where every data set has them, in var_names or in a text column of var; otherwise symbols. var_names that
    are all of one kind stay the names, unless Ensembl ids elsewhere have more genes in common. A name that several
    genes of one data set have means none of them: it is left out there, and told in a warning.

    Raises DataError when there is no kind of names that all data sets have.
    """
    candidates = {dataset_id: _candidates(var) for dataset_id, var in frames.items()}
    chosen = _ensembl(candidates) or _symbols(candidates)
    given = {dataset_id: options[0] for dataset_id, options in candidates.items()}
    kinds = {_kind(names) for _, names in given.values()}
    if len(kinds) == 1 and (chosen is None or ("number" not in kinds and _n_shared(given) >= _n_shared(chosen))):
        chosen = given
    if chosen is None:
        raise DataError(f"The data sets have no kind of gene names in common: {_kinds_shown(candidates)}")
    ambiguous = {dataset_id: _twice(names) for dataset_id, (_, names) in chosen.items()}
    for dataset_id, names in ambiguous.items():
        if names:
            log.warning(
                "data set %r: %d gene names occur more than once in %s and are left out there: %s",
                dataset_id, len(names), _shown(chosen[dataset_id][0]), ", ".join(names[:5]),
            )  # fmt: skip
    return GeneAxis(
        kind=_kind(next(iter(chosen.values()), (NAMES, []))[1]),
        via={dataset_id: via for dataset_id, (via, _) in chosen.items()},
        names={dataset_id: _unique(names) for dataset_id, (_, names) in chosen.items()},
        ambiguous={dataset_id: names for dataset_id, names in ambiguous.items() if names},
    )


_Named = tuple[str, list[str]]


def _kind(names: Sequence[str]) -> str:
    """As `id_type`, of the names that are there; names that are numbers are neither ids nor symbols."""
    names = [name for name in names if name]
    return "number" if names and all(name.isdecimal() for name in names) else id_type(names)


def _ensembl(candidates: Mapping[str, list[_Named]]) -> dict[str, _Named] | None:
    """The names or column of each data set with the most Ensembl ids, at least for half of its genes."""
    chosen = {}
    for dataset_id, options in candidates.items():
        best = max(options, key=lambda option: _n_ids(option[1]))
        if 2 * _n_ids(best[1]) < len(best[1]):
            return None
        chosen[dataset_id] = best
    return chosen


def _n_ids(names: list[str]) -> int:
    return len({name for name in names if name.startswith("ENS") and _ENSEMBL.fullmatch(name)})


def _symbols(candidates: Mapping[str, list[_Named]]) -> dict[str, _Named] | None:
    """The names or column of each data set with the most symbols that other data sets know."""
    known: Counter[str] = Counter()
    for options in candidates.values():
        known.update({name for option in options if _may_be_symbols(option) for name in option[1]})
    chosen = {}
    for dataset_id, options in candidates.items():
        symbols = [option for option in options if _may_be_symbols(option)]
        scores = [sum(known[name] > 1 for name in set(names)) for _, names in symbols]
        if not symbols or (symbols[0][0] != NAMES and not max(scores)):  # a column of anything, such as descriptions
            return None
        chosen[dataset_id] = symbols[scores.index(max(scores))]
    return chosen


def _may_be_symbols(option: _Named) -> bool:
    """Not ids, not numbers, and for most genes their own: unlike chromosomes or biotypes."""
    via, names = option
    return _kind(names) == "symbol" and (via == NAMES or 2 * len(set(names) - {""}) >= len(names))


def _twice(names: list[str]) -> tuple[str, ...]:
    return tuple(name for name, n in Counter(names).items() if n > 1 and name)


def _unique(names: list[str]) -> list[str | None]:
    counts = Counter(names)
    return [name if name and counts[name] == 1 else None for name in names]


def _in_all(names: Mapping[str, Sequence[str | None]]) -> set[str | None]:
    return set.intersection(*(set(n) for n in names.values())) if names else set()


def _n_shared(chosen: Mapping[str, _Named]) -> int:
    return len(_in_all({dataset_id: _unique(names) for dataset_id, (_, names) in chosen.items()}) - {None})


def _kinds_shown(candidates: Mapping[str, list[_Named]]) -> str:
    shown = []
    for dataset_id, options in candidates.items():
        usable = [o for o in options if o[0] == NAMES or _kind(o[1]) == "ensembl" or _may_be_symbols(o)]
        has = ", ".join(f"{_kind(names)} in {_shown(via)} ({', '.join(names[:2])})" for via, names in usable)
        shown.append(f"{dataset_id!r} has {has}")
    return "; ".join(shown[:5]) + ". Add a column of Ensembl ids or of symbols to the var of those that lack it."


def symbol_candidates(var: pd.DataFrame) -> list[list[str]]:
    """What may be symbols: var_names, and text columns that differ for most genes; ids and numbers aside."""
    return [option[1] for option in _candidates(var) if _may_be_symbols(option)]


def mismatch_hint(reference: Sequence[str], var: pd.DataFrame) -> str:
    """One sentence that tells why so few genes match: other id type, other organism, or unknown."""
    here, there = id_type(reference), id_type(list(var.index))
    examples = f"reference: {', '.join(reference[:3])}; file: {', '.join(map(str, var.index[:3]))}"
    if here != there:
        return f"The reference uses {here} names, the file {there} names ({examples}); put {here} names into var."
    upper = {str(name).upper() for name in reference}
    same_letters = sum(str(name).upper() in upper for name in var.index)
    species = {_species(reference), _species(list(var.index))}
    if 2 * same_letters > len(upper) or len(species) > 1:
        return f"The names look like another organism's ({examples}); map the genes to the reference's organism first."
    return f"The names differ ({examples})."


def _species(names: Sequence[str]) -> str:
    """The species prefix most Ensembl ids share ("ENSG" human, "ENSMUSG" mouse); "" for symbols."""
    prefixes = Counter(re.match(r"(ENS[A-Z]+)?", str(name))[0] for name in names)  # type: ignore[index]
    return prefixes.most_common(1)[0][0] if prefixes else ""


def select(block: csr_matrix, columns: NDArray[np.int32], n_genes: int) -> csr_matrix:
    """The block's counts over the chosen genes: (cells, genes) uint32, indices increasing within a cell.

    `columns` comes from `GeneMatch.columns`. One pass over the non-zeros: at 2,000 of 20,000 genes scipy's
    `block[:, genes]` takes several times as long, and most of it goes into genes that are thrown away.
    """
    indptr, indices = block.indptr.astype(np.int64, copy=False), block.indices.astype(np.int32, copy=False)
    data = block.data.astype(np.uint32, copy=False)
    if np.array_equal(columns, np.arange(n_genes)):  # all genes in their own order
        return csr_matrix((data, indices, indptr), shape=block.shape)
    kept_indptr, kept, counts = np.zeros_like(indptr), np.empty_like(indices), np.empty_like(data)
    pick(indptr, indices, data, columns, kept_indptr[1:], kept, counts)
    nnz = kept_indptr[-1]
    chosen = csr_matrix((counts[:nnz].copy(), kept[:nnz].copy(), kept_indptr), shape=(block.shape[0], n_genes))
    if (np.diff(columns[columns >= 0]) < 0).any():  # the file has the genes in another order than the reference
        chosen.sort_indices()
    return chosen


@numba.njit(nogil=True, cache=True)
def pick(indptr, indices, data, columns, ends, kept_indices, kept_data):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The counts of the chosen genes (`columns` as from `GeneMatch.columns`); `ends` says where each cell's end."""
    at = 0
    for cell in range(len(indptr) - 1):
        for j in range(indptr[cell], indptr[cell + 1]):
            gene = columns[indices[j]]
            # Written always and kept by moving on: a branch here is mispredicted at every other chosen gene.
            kept_indices[at] = gene
            kept_data[at] = data[j]
            at += gene >= 0
        ends[cell] = at
