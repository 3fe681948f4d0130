import numpy as np
import pandas as pd
import pytest

from scviaduct.errors import DataError, MissingColumnError
from scviaduct.schema import Covariate, Schema
from scviaduct.storage.query import Query
from scviaduct.storage.query_labels import with_labels
from tests.storage.test_loader import cells

LABELS = Covariate("type", ("B", "T", "7"))


def query(values, kept=None):
    kept = np.arange(len(values)) if kept is None else np.array(kept)
    return Query(
        id="q",
        batch=cells(len(kept)),
        schema=Schema(genes=tuple(f"g{k}" for k in range(30)), batch=Covariate("batch", ("a",)), labels=LABELS),
        match=None,
        proteins=None,
        kept=kept,
        obs=pd.DataFrame({"kind": pd.Series(values)}),
        n_obs=len(values),
        sha256="",
    )


@pytest.mark.parametrize(
    ("values", "kept", "codes", "remark"),
    [
        (["B", "T", "B"], None, [0, 1, 0], ""),
        (["B", None, "Unknown", "T"], None, [0, -1, -1, 1], ""),
        (
            ["B", "NK", "T", "NK"],
            None,
            [0, -1, 1, -1],
            "2 cells with labels that the reference does not know (e.g. 'NK')",
        ),
        (["NK", "T", "B"], [1, 2], [1, 0], ""),
        ([7, 7, 8], None, [2, 2, -1], "1 cells with labels that the reference does not know (e.g. '8')"),
    ],
)
def test_labels_become_the_reference_s_codes(values, kept, codes, remark):
    labelled, said = with_labels(query(values, kept), LABELS, "kind", "Unknown")
    assert labelled.batch.labels.tolist() == codes
    assert said.startswith(remark) and bool(said) == bool(remark)


def test_what_cannot_be_used():
    with pytest.raises(MissingColumnError, match="did you mean 'kind'"):
        with_labels(query(["B"]), LABELS, "kid", "Unknown")
    with pytest.raises(
        DataError, match=r"no cell has a label of the reference in 'kind' \(e\.g\. 'NK'\); it knows B, T"
    ):
        with_labels(query(["NK", None]), LABELS, "kind", "Unknown")
    with pytest.raises(DataError, match="all are empty"):
        with_labels(query([None, "Unknown"]), LABELS, "kind", "Unknown")


def test_other_fields_stay():
    before = query(["B", "T"])
    after, _ = with_labels(before, LABELS, "kind", "Unknown")
    assert after.batch.data is before.batch.data and (after.kept is before.kept) and after.obs is before.obs
