"""Ray behind an Executor: results, errors as they were, and a conversion with the same bytes as in one process."""

import pytest

from scviaduct.distributed.tasks import RayExecutor
from scviaduct.errors import DataError, UnreadableFileError
from scviaduct.storage.convert import convert
from scviaduct.storage.genes import normalise
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.manifest import tree_digest
from scviaduct.storage.tasks import as_done, in_order

pytestmark = pytest.mark.slow


def test_results_in_order_and_errors_as_they_were(ray_cluster, tmp_path):
    with RayExecutor() as pool:
        names = [[f"ENSG0000000000{i}.{i}"] for i in range(5)]
        assert list(in_order(pool, normalise, names, ahead=3)) == [[f"ENSG0000000000{i}"] for i in range(5)]
        with pytest.raises(UnreadableFileError, match="does not exist"):
            list(as_done(pool, open_counts, [tmp_path / "no.h5ad"], ahead=2))


def test_conversion_gives_the_same_bytes(ray_cluster, studies, tmp_path):
    seen = []
    with RayExecutor() as pool:
        atlas = convert(studies[:2], out=tmp_path / "ray", executor=pool, on_progress=lambda *told: seen.append(told))
        assert atlas.n_obs == 600 and seen[-1][1:] == (600, 600)
        convert(studies[:2], out=tmp_path / "here")
        assert tree_digest(tmp_path / "ray") == tree_digest(tmp_path / "here")
        with pytest.raises(DataError, match=r"no\.h5ad does not exist"):
            convert([studies[0], tmp_path / "no.h5ad"], out=tmp_path / "wrong", executor=pool)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "ray"]
