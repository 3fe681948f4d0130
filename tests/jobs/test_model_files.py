"""import and export of models as people call them."""

import os

import numpy as np
import torch

from scviaduct.distributed.bundle import Bundle


def test_a_run_goes_out_and_comes_back(place, tmp_path, command):
    code, out, err = command(f"export {place}/run --out scvi", tmp_path)
    assert (code, err) == (0, "")
    assert "scvi-tools loads it with SCVI.load(folder, adata)" in out
    assert "the model's 100 genes in its order, the obs columns study, cell_type." in out
    code, out, err = command("import scvi --out back", tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("back: scvi, made of a SCVI of scvi-tools 1.4.2: 100 genes, batches of study (2), labels of")
    assert "Labels cannot be transferred: no file with the reference's cells was given (--adata)." in out
    mine, back = Bundle.open(place / "run"), Bundle.open(tmp_path / "back")
    assert mine.schema == back.schema and mine.facts["config"] == back.facts["config"]

    code, out, _ = command(f"import scvi --out whole --adata {place}/A.h5ad {place}/B.h5ad", tmp_path)
    assert code == 0 and "600 cells of the reference embedded." in out
    rows = [Bundle.open(tmp_path / "whole").latent(), mine.latent()]  # a view is shuffled
    np.testing.assert_allclose(*(np.sort(np.round(latent, 4), axis=0) for latent in rows), atol=2e-4)
    code, out, _ = command("inspect back", tmp_path)
    assert code == 0 and "SCVI of scvi-tools 1.4.2; without the reference's cells" in out
    code, out, _ = command(f"map whole {place}/Q1.h5ad --out mapped --max-epochs 1", tmp_path)
    assert code == 0, out


def test_export_takes_what_the_path_is(place, tmp_path, command):
    code, _, err = command(f"export {place}/run --out x --format h5ad", tmp_path)
    assert code == 2 and "is a model, which has no h5ad" in err
    code, _, err = command(f"export {place}/run --out x --dataset A", tmp_path)
    assert code == 2 and "a model is written whole" in err
    code, _, err = command(f"export {place}/atlas.zarr --out x --format scvi-tools", tmp_path)
    assert code == 2 and "is not a model" in err
    code, _, err = command(f"export {place}/run --out {place}/run --format scvi-tools", tmp_path)
    assert code == 2 and "exists already" in err
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return os.system, ("touch touched",)


def test_a_file_that_wants_to_be_run_is_refused(tmp_path, command):
    (tmp_path / "evil").mkdir()
    attributes = {"init_params_": {}, "registry_": Evil()}
    content = {"model_state_dict": {"px_r": torch.zeros(3)}, "var_names": np.array(["a"], object)}
    torch.save(content | {"attr_dict": attributes}, tmp_path / "evil" / "model.pt")
    code, out, err = command("import evil --out bundle", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("Error: evil/model.pt asks for 'posix.system', which no saved model needs")
    assert err.count("\n") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["evil"]


def test_help_of_import(tmp_path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = command("import --help", tmp_path)
    assert code == 0 and "Usage: scviaduct import" in out and "None" not in out and "[default: ]" not in out
