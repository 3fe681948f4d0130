"""Gene names: version suffixes, id types, matching by names or var columns, duplicates, picking columns."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.errors import DataError
from scviaduct.storage.genes import gene_axis, id_type, match, mismatch_hint, normalise, select

SCMIXOLOGY = Path(__file__).parents[3] / "shared/data/rna/scmixology_3celllines_celseq2_dropseq.h5ad"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000000003.14", "ENSG00000000003"),
        ("ENSG00000000003.7", "ENSG00000000003"),
        ("ENSG00000000003", "ENSG00000000003"),
        ("ENSMUSG00000000001.5", "ENSMUSG00000000001"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378_PAR_Y"),
        ("ENSG00000182378_PAR_Y", "ENSG00000182378_PAR_Y"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("AC000003.2", "AC000003.2"),
        ("HLA-DRA.1", "HLA-DRA.1"),
        ("ENSA", "ENSA"),
        ("ENSG00000000003.14-1", "ENSG00000000003.14-1"),
    ],
)
def test_normalise(name: str, expected: str) -> None:
    assert normalise([name]) == [expected]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ENSG00000000003.14", "ENSG00000000419"], "ensembl"),
        (["ENSMUSG00000000001", "ENSMUSG00000000003", "ERCC-00002"], "ensembl"),
        (["ACTB", "RP11-34P13.7"], "symbol"),
        (["ENSA", "GAPDH"], "symbol"),
        ([], "symbol"),
    ],
)
def test_id_type(names: list[str], expected: str) -> None:
    assert id_type(names) == expected


ENSEMBL = ["ENSG00000000003", "ENSG00000000419", "ENSG00000000457"]
SYMBOLS = ["TSPAN6", "DPM1", "SCYL3"]
VERSIONED = [f"{name}.{i + 9}" for i, name in enumerate(ENSEMBL)]


@pytest.mark.parametrize(
    ("reference", "names", "columns", "positions", "via"),
    [
        (SYMBOLS, ["SCYL3", "X", "TSPAN6"], {}, [2, -1, 0], "names"),
        (ENSEMBL, VERSIONED[::-1], {}, [2, 1, 0], "names"),
        (VERSIONED, ENSEMBL, {}, [0, 1, 2], "names"),
        (ENSEMBL, SYMBOLS, {"gene_ids": VERSIONED}, [0, 1, 2], "gene_ids"),
        (SYMBOLS, ENSEMBL, {"n_cells": [1, 2, 3], "feature_name": SYMBOLS[::-1]}, [2, 1, 0], "feature_name"),
        (SYMBOLS, ENSEMBL, {"partial": ["DPM1", None, "x"], "symbol": SYMBOLS}, [0, 1, 2], "symbol"),
        (SYMBOLS, SYMBOLS, {"symbol": SYMBOLS[::-1]}, [0, 1, 2], "names"),
    ],
)
def test_match_finds_each_gene_by_the_best_names(
    reference: list[str], names: list[str], columns: dict[str, list[str]], positions: list[int], via: str
) -> None:
    found = match(reference, pd.DataFrame(columns, index=names))
    assert found.positions.tolist() == positions
    assert found.via == via
    assert found.missing == tuple(g for g, p in zip(reference, positions, strict=True) if p < 0)
    assert found.n_matched == sum(p >= 0 for p in positions)
    assert found.n_extra == len(names) - found.n_matched


def test_categorical_columns_are_matched_too() -> None:
    var = pd.DataFrame({"symbol": pd.Categorical(SYMBOLS)}, index=ENSEMBL)
    assert match(SYMBOLS, var).via == "symbol"


@pytest.mark.parametrize(
    ("reference", "names", "columns", "words"),
    [
        (["A", "B"], ["A", "B", "A"], {}, ["A", "var_names", "my.h5ad"]),
        (["A", "A"], ["A"], {}, ["the reference", "A"]),
        (["ENSG00000000003.1"], ["ENSG00000000003.1", "ENSG00000000003.2"], {}, ["ENSG00000000003"]),
        (["A", "B"], ["x", "y", "z"], {"symbol": ["A", "B", "B"]}, ["B", "'symbol'"]),
    ],
)
def test_duplicates_are_refused(
    reference: list[str], names: list[str], columns: dict[str, list[str]], words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        match(reference, pd.DataFrame(columns, index=names), where="my.h5ad")
    assert all(word in str(error.value) for word in words)


def test_duplicates_among_genes_nobody_asked_for_do_not_matter() -> None:
    assert match(["A"], pd.DataFrame(index=["B", "A", "B"])).positions.tolist() == [1]


@pytest.mark.parametrize(
    ("reference", "names", "word"),
    [
        (ENSEMBL, SYMBOLS, "ensembl names, the file symbol names"),
        (["ACTB", "GAPDH", "CD3E"], ["Actb", "Gapdh", "Cd3e"], "another organism"),
        (ENSEMBL, ["ENSMUSG00000000001", "ENSMUSG00000000028"], "another organism"),
        (["ACTB", "GAPDH"], ["g1", "g2"], "The names differ"),
    ],
)
def test_hint_names_the_likely_cause(reference: list[str], names: list[str], word: str) -> None:
    assert word in mismatch_hint(reference, pd.DataFrame(index=names))


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 20), st.booleans())
def test_select_equals_scipy_column_indexing(seed: int, n_vars: int, n_cells: int, ordered: bool) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.5, (n_cells, n_vars)).astype(np.float32)
    chosen = rng.permutation(n_vars)[: rng.integers(1, n_vars + 1)]
    chosen = np.sort(chosen) if ordered else chosen
    columns = np.full(n_vars, -1, np.int32)
    columns[chosen] = np.arange(len(chosen))
    counts = select(sp.csr_matrix(dense), columns, len(chosen))
    assert np.array_equal(counts.toarray(), dense[:, chosen])
    for start, stop in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        assert (np.diff(counts.indices[start:stop]) > 0).all()


def test_genes_a_file_lacks_are_columns_of_zeros() -> None:
    found = match(["A", "gone", "B"], pd.DataFrame(index=["B", "A"]))
    counts = select(sp.csr_matrix(np.array([[5, 7]], np.float32)), found.columns(2), 3)
    assert counts.toarray().tolist() == [[7, 0, 5]]


@pytest.mark.skipif(not SCMIXOLOGY.exists(), reason="needs the shared data")
def test_real_ensembl_names_match_with_versions() -> None:
    with h5py.File(SCMIXOLOGY) as file:
        names = [name.decode() for name in file["var"][file["var"].attrs["_index"]][()]]
    reference = [f"{name}.{10 + i % 9}" for i, name in enumerate(names) if name.startswith("ENSG")][:2000]
    found = match(reference, pd.DataFrame(index=names))
    assert found.n_matched == 2000
    assert [names[p] for p in found.positions[:5]] == [name.split(".")[0] for name in reference[:5]]


CELLXGENE = pd.DataFrame({"feature_name": SYMBOLS, "feature_type": ["protein_coding"] * 3}, index=ENSEMBL)
TENX = pd.DataFrame({"gene_ids": VERSIONED, "feature_types": ["Gene Expression"] * 3}, index=SYMBOLS)
ONLY_SYMBOLS = pd.DataFrame(index=["SCYL3", "ACTB"])
ONLY_IDS = pd.DataFrame({"length": [1, 2]}, index=[ENSEMBL[2], "ENSG00000999999.3"])
RENAMED = pd.DataFrame({"gene_ids": ENSEMBL}, index=["TSPAN6", "DPM1", "SCYL3-old"])


@pytest.mark.parametrize(
    ("frames", "kind", "via", "names"),
    [
        ([CELLXGENE], "ensembl", ["names"], [ENSEMBL]),
        ([TENX], "symbol", ["names"], [SYMBOLS]),
        ([TENX, TENX], "symbol", ["names"] * 2, [SYMBOLS] * 2),
        ([CELLXGENE, TENX], "ensembl", ["names", "gene_ids"], [ENSEMBL, ENSEMBL]),
        ([TENX, ONLY_IDS], "ensembl", ["gene_ids", "names"], [ENSEMBL, [ENSEMBL[2], "ENSG00000999999"]]),
        ([CELLXGENE, ONLY_SYMBOLS], "symbol", ["feature_name", "names"], [SYMBOLS, ["SCYL3", "ACTB"]]),
        ([CELLXGENE, TENX, ONLY_SYMBOLS], "symbol", ["feature_name", "names", "names"], [SYMBOLS] * 2),
        # symbols share two genes, their ids three
        ([TENX, RENAMED], "ensembl", ["gene_ids", "gene_ids"], [ENSEMBL, ENSEMBL]),
        # a name that is a number is not a gene's, unless there is nothing else
        ([TENX.set_index(pd.Index(["0", "1", "2"]))] * 2, "ensembl", ["gene_ids"] * 2, [ENSEMBL] * 2),
        ([pd.DataFrame(index=["672", "675"])] * 2, "number", ["names"] * 2, [["672", "675"]] * 2),
        ([pd.DataFrame(index=["a"]), pd.DataFrame(index=["b"])], "symbol", ["names"] * 2, [["a"], ["b"]]),
        ([], "symbol", [], []),
    ],
)
def test_axis(frames: list[pd.DataFrame], kind: str, via: list[str], names: list[list[str]]) -> None:
    axis = gene_axis({f"d{i}": frame for i, frame in enumerate(frames)})
    assert axis.kind == kind
    assert list(axis.via.values()) == via
    assert list(axis.names.values())[: len(names)] == names
    assert not axis.ambiguous


def test_axis_joins_in_order_of_appearance() -> None:
    axis = gene_axis({"a": CELLXGENE.iloc[::-1], "b": TENX.iloc[1:], "c": ONLY_IDS})
    assert axis.genes() == (*ENSEMBL[::-1], "ENSG00000999999")
    assert axis.genes("intersection") == (ENSEMBL[2],)
    assert axis.columns("b", [ENSEMBL[2], "x", ENSEMBL[1]]).tolist() == [2, 0]


def test_the_copy_of_a_gene_on_the_y_chromosome_stays_apart() -> None:
    par = ["ENSG00000182378.15", "ENSG00000182378.15_PAR_Y", "ENSG00000000003.1"]
    symbols = ["PLCXD1", "PLCXD1", "TSPAN6"]
    first, second = pd.DataFrame({"symbol": symbols}, index=par), pd.DataFrame({"ids": par[:2]}, index=["PLCXD1", "x"])
    assert gene_axis({"a": first, "b": second}).genes("intersection") == ("ENSG00000182378", "ENSG00000182378_PAR_Y")
    # by symbol the two copies cannot be told apart
    by_symbol = gene_axis({"a": first, "b": pd.DataFrame(index=["PLCXD1", "TSPAN6"])})
    assert by_symbol.genes("intersection") == ("TSPAN6",)
    assert by_symbol.ambiguous == {"a": ("PLCXD1",)}


def test_ambiguous_names_are_left_out_where_they_are_and_told(caplog: pytest.LogCaptureFixture) -> None:
    twice = pd.DataFrame({"feature_name": ["DPM1", "DPM1", "SCYL3", None]}, index=[*ENSEMBL, "ENSG00000000460"])
    axis = gene_axis({"a": twice, "b": pd.DataFrame(index=["DPM1", "SCYL3"])})
    assert axis.names == {"a": [None, None, "SCYL3", None], "b": ["DPM1", "SCYL3"]}
    assert axis.ambiguous == {"a": ("DPM1",)}
    assert axis.genes("intersection") == ("SCYL3",)
    assert "data set 'a': 1 gene names occur more than once in var column 'feature_name'" in caplog.text


@pytest.mark.parametrize(
    "columns",
    [{}, {"biotype": ["lncRNA"] * 3}, {"description": ["tetraspanin 6", "mannosyltransferase", "kinase-like"]}],
)
def test_no_kind_of_names_in_common(columns: dict[str, list[str]]) -> None:
    with pytest.raises(DataError, match=r"'a' has ensembl in var_names \(ENSG0.*'b' has symbol in var_names \(TSPAN6"):
        gene_axis({"a": pd.DataFrame(columns, index=ENSEMBL), "b": pd.DataFrame(index=SYMBOLS)})


@given(st.lists(st.lists(st.sampled_from([*ENSEMBL, *SYMBOLS, "7", "A-1"]), min_size=1, max_size=6), max_size=3))
def test_every_name_on_the_axis_means_one_gene(names: list[list[str]]) -> None:
    try:
        axis = gene_axis({f"d{i}": pd.DataFrame(index=index) for i, index in enumerate(names)})
    except DataError:
        return
    assert len(axis.genes()) == len(set(axis.genes()))
    for index, (dataset_id, here) in zip(names, axis.names.items(), strict=True):
        assert [n for n, m in zip(index, here, strict=True) if m is not None] == [
            n for n in index if index.count(n) == 1
        ]
        assert set(axis.ambiguous.get(dataset_id, ())) == {n for n in index if index.count(n) > 1}
        assert set(axis.genes("intersection")) <= set(here)
