"""What the documents say is true: their Python runs, their commands exist, their links lead somewhere."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from scviaduct.jobs.__main__ import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n$")
VERBS = [name for name in app if not name.startswith("-")]
SHELL = {"sh", "bash", "shell", "console"}
OTHERS_FLAGS = {"--head", "--port", "--dashboard-host", "--host", "--backend-store-uri", "--working-dir"}
"""Flags of other programs that the documents name."""


class Block(NamedTuple):
    document: Path
    line: int
    language: str
    code: str
    run: bool

    def __str__(self):
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document):
    text = document.read_text()
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        yield Block(document, before.count("\n") + 1, found[1], found[2], run=not NOT_RUN.search(before))


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
PYTHON = [block for block in BLOCKS if block.language == "python" and block.run]


def commands(code):
    """The words of each call of scviaduct in a shell block, without the program's name."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and Path(words[0]).name == "scviaduct":
            yield words[1:]


COMMANDS = [
    pytest.param(words, id=f"{block}: {' '.join(words)}")
    for block in BLOCKS
    if block.language in SHELL
    for words in commands(block.code)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The h5ad files that the documents name: two studies and two queries, small enough to train on in a moment."""
    from scviaduct.storage.simulate import Biology

    folder = tmp_path_factory.mktemp("documents")
    biology = Biology.make(n_types=3, n_genes=60, n_lineages=3, seed=1)
    for number, (name, cells) in enumerate({"A": 60, "B": 60, "Q1": 20, "Q2": 20}.items()):
        study = biology.study(number, cells)
        study.obs = study.obs.rename(columns={"sample": "sample_id", "cell_type": "cluster_id"})
        study.write_h5ad(folder / f"{name}.h5ad")
    return sorted(folder.glob("*.h5ad"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy.*", "ignore::DeprecationWarning:mlflow.*")
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block, files, tmp_path, monkeypatch):
    for file in files:
        os.link(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")  # a new MLflow database takes seconds
    monkeypatch.setattr("torch.multiprocessing.cpu_count", lambda: 1)  # threads only get in each other's way here
    code = compile("\n" * block.line + block.code, str(block.document), "exec")
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        if mlflow := sys.modules.get("mlflow"):
            mlflow.set_tracking_uri(None)  # the page on tracking sets one for the whole process


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_exist(words):
    """cyclopts itself reads the line: verb, flags, arguments and the types of values, without running anything."""
    app.parse_args(words, exit_on_error=False, print_error=False)


def flags_of(verb):
    return {name for argument in app[verb].assemble_argument_collection() for name in argument.names}


def test_flags_in_the_text_exist():
    known = {flag for verb in VERBS for flag in flags_of(verb)} | {"--help"} | OTHERS_FLAGS
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", document.read_text()))
        assert named <= known, f"{document.name}: {named - known}"


def test_every_verb_is_in_the_readme():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(VERBS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_resolve(document):
    text = FENCE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            path = target.partition("#")[0]
            assert (document.parent / path).exists(), f"{document.name} links to {target}"


def test_make_targets_in_the_readme_exist():
    named = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named and set(named) <= set(targets)


def test_files_in_the_readme_s_layout_exist():
    cells = re.findall(r"^\| (`\S+/`.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    folders = [folder for cell in cells for folder in re.findall(r"`(\S+/)`", cell)]
    assert len(folders) >= 4
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_every_decision_says_context_decision_and_consequence():
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, path in enumerate(decisions, 1):
        assert path.name.startswith(f"{number:04d}-")
        parts = re.findall(r"^\*\*(\w+)\.\*\*", path.read_text(), re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequence"]
