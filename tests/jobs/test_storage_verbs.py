"""verify, repair and export as people call them."""

import shutil

import anndata as ad
import pytest

import scviaduct


def broken(place, tmp_path):
    """A copy of the atlas with a flipped byte, and of its files."""
    for name in ("A.h5ad", "B.h5ad"):
        shutil.copy(place / name, tmp_path)
    shutil.copytree(place / "atlas.zarr", tmp_path / "atlas.zarr")
    shard = tmp_path / "atlas.zarr/datasets/A/X/data/c/0"
    raw = bytearray(shard.read_bytes())
    raw[70] ^= 1
    shard.write_bytes(raw)


def test_a_damaged_atlas_is_found_and_repaired(place, tmp_path, process):
    broken(place, tmp_path)
    code, out, err = process("verify atlas.zarr", tmp_path)
    assert code == 2 and "Traceback" not in err
    finding, summary = out.splitlines()
    assert finding.startswith("datasets/A/X/data/c/0: damaged") and "concerns 300 cells: 0-299" in finding
    assert "scviaduct repair atlas.zarr --source FILE.h5ad makes it again" in finding
    assert summary.startswith("atlas.zarr: ") and summary.endswith("1 found wrong.")
    code, out, err = process("repair atlas.zarr --source A.h5ad B.h5ad", tmp_path)
    assert code == 0, err
    assert out.splitlines()[0].startswith("datasets/A: converted again from ")
    assert out.splitlines()[-1] == "atlas.zarr: 1 repaired, nothing is wrong."


def test_verify_says_that_all_is_well(place, tmp_path, command):
    for line, said in (("verify", "all is as it was written"), ("verify --quick", "sizes and manifests agree")):
        code, out, _ = command(f"{line} {place}/atlas.zarr", tmp_path)
        assert code == 0 and out.rstrip().endswith(f"{said}.") and len(out.splitlines()) == 1
    code, out, _ = command(f"verify {place}/run", tmp_path)
    assert code == 0 and "every file is the one it was saved with" in out


def test_verify_finds_a_damaged_bundle(place, tmp_path, command):
    shutil.copytree(place / "run/bundle", tmp_path / "bundle")
    with (tmp_path / "bundle/model.safetensors").open("r+b") as file:
        file.seek(400)
        file.write(b"x")
    code, _, err = command("verify bundle", tmp_path)
    assert code == 2 and "is not the file the model was saved with" in err


def test_repair_says_what_it_cannot(place, tmp_path, command):
    broken(place, tmp_path)
    (tmp_path / "A.h5ad").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "atlas.zarr/views")
    code, out, _ = command("repair atlas.zarr --source B.h5ad", tmp_path)
    # the atlas was converted from where A.h5ad still is
    assert code == 0 and "converted again" in out
    code, out, _ = command("repair atlas.zarr", tmp_path)
    assert code == 0 and out.startswith("atlas.zarr: 0 repaired, nothing is wrong.")


def test_export_as_a_process(place, tmp_path, process):
    where = tmp_path / "genes.txt"
    where.write_text("\n".join(scviaduct.Atlas.open(place / "atlas.zarr").genes()[:20]))
    code, out, err = process(
        f"export {place}/atlas.zarr --out some.h5ad --dataset A B --genes genes.txt --join intersection", tmp_path
    )
    assert code == 0, err
    assert out == "some.h5ad: 600 cells x 20 genes.\n"
    assert ad.read_h5ad(tmp_path / "some.h5ad").shape == (600, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--where cell_tpye=='x'", "no data set has an obs column 'cell_tpye'; did you mean 'cell_type'"),
        ("--where cell_type==", "cannot be understood"),
        ("--dataset C", "no data set 'C'"),
        ("--genes none.txt", "none.txt is no file"),
    ],
)
def test_export_says_what_is_wrong(place, tmp_path, command, options, message):
    code, _, err = command(f"export {place}/atlas.zarr --out x.h5ad {options}", tmp_path)
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_inspect_tells_what_is_unfinished_or_stale(place, tmp_path, command):
    shutil.copytree(place / "atlas.zarr", tmp_path / "atlas.zarr")
    for name in ("A.h5ad", "B.h5ad", "Q1.h5ad"):
        shutil.copy(place / name, tmp_path)
    scviaduct.convert([tmp_path / "Q1.h5ad"], out=tmp_path / "atlas.zarr", append=True)
    (tmp_path / "atlas.zarr/views/.x.partial").mkdir()
    (tmp_path / "atlas.zarr/converting.json").write_text('{"files": {"a": 1}}')
    _, out, _ = command("inspect atlas.zarr", tmp_path)
    assert "1 data set appended since: prepare again takes them in" in out
    assert "a conversion of 1 files; the same one goes on" in out
    assert "unfinished view x" in out
    manifest = tmp_path / "atlas.zarr/datasets/A/manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert "stale: data sets were changed" in command("inspect atlas.zarr", tmp_path)[1]
