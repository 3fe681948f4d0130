"""Imports go one way, the light stays light, and no module grows into a heap."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scviaduct"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {
    "schema": {"schema", "errors"},
    "errors": {"errors"},
    "storage": {"schema", "errors", "storage"},
    "models": {"schema", "errors", "models"},
    "distributed": {"schema", "errors", "storage", "models", "distributed"},
    "jobs": {"schema", "errors", "storage", "models", "distributed", "jobs"},
}
OWNERS = {"zarr": "storage", "dask": "storage", "h5py": "storage", "zarrs": "storage", "ray": "distributed"}
OWNERS |= {"mlflow": "distributed"}


def imported(path):
    """Absolute names of all modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrow(path):
    part = part_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "scviaduct" and len(parts) > 1 and parts[1] in ALLOWED and part in ALLOWED:
            assert parts[1] in ALLOWED[part], f"{part} must not import {name}"
        assert OWNERS.get(parts[0], part) == part, f"only {OWNERS.get(parts[0])} may import {parts[0]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{path.name}:{node.name} has {lines} lines"
            assert node.args.kwarg is None, f"{path.name}:{node.name} takes **{node.args.kwarg}"


def loaded_by(code):
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return {name.split(".")[0] for name in run.stdout.split()}


HEAVY = {"torch", "ray", "mlflow", "anndata", "scanpy", "zarr", "dask"}


def test_importing_the_package_is_light():
    assert not loaded_by("import scviaduct; dir(scviaduct)") & HEAVY


def test_a_worker_does_not_pay_for_what_the_driver_needs():
    unused = {"matplotlib", "mlflow", "anndata", "scanpy", "zarr", "dask", "h5py"}
    assert not loaded_by("from scviaduct.distributed.train import train") & unused


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["map", "--help"], ["--version"]], ids=" ".join)
def test_help_is_light(arguments):
    code = f"import sys; sys.argv = ['scviaduct', *{arguments!r}]\nfrom scviaduct.jobs.__main__ import main\ntry: main()\nexcept SystemExit as e: assert not e.code"
    assert not loaded_by(code) & HEAVY


def test_dask_still_finds_its_distributed_from_the_root_of_the_repository():
    # what `ray job submit --working-dir .` does to the path of every worker
    code = "import distributed, sys; print(distributed.__file__)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert str(ROOT) not in run.stdout.replace(str(ROOT / ".venv"), "")
    assert "site-packages" in run.stdout or "No module named 'distributed'" in run.stderr


def test_public_names_resolve():
    import scviaduct

    for name in scviaduct.__all__:
        assert getattr(scviaduct, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scviaduct.nothing
