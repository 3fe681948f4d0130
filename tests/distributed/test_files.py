import pytest

from scviaduct.distributed.files import whole_folder
from scviaduct.errors import OutputExistsError
from scviaduct.storage.manifest import refuse_existing


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(ValueError, match="half way"), whole_folder(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
        raise ValueError("half way")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
    assert (final / "sub" / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists already; nothing was written"):
        refuse_existing(tmp_path / "out")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "out"):
        pass
