"""Run the Python of the README and the docs, and check that the programs take the options shown there."""

import doctest
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

import benchmarks.accuracy
import data.prepare
import infer
import robe
import train
from dlrm import DLRM, DLRMConfig, checkpoint

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train.py": train.parse,
    "infer.py": infer.parse,
    "-m data.prepare": data.prepare.parse,
    "-m benchmarks.accuracy": lambda arguments: benchmarks.accuracy.parse(),
}
# Modules whose public classes and functions have examples.
DOCUMENTED = [
    "robe.array",
    "robe.admission.filter",
    "robe.compress",
    "robe.layers.collection",
    "robe.layers.embedding",
    "robe.layers.keyed",
]
DOCS = sorted(ROOT.joinpath("docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
NEEDS_A_CHECKPOINT = {"inference.md"}  # its snippet has a test of its own


def python_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def commands():
    """Yield (program, arguments) of all pages, from lines indented by four spaces."""
    line = re.compile(r"^ {4}(?:python|torchrun --nproc-per-node \d+) (" + "|".join(PROGRAMS) + ") (.+)$", re.MULTILINE)
    for page in PAGES:
        for program, arguments in line.findall(page.read_text().replace("\\\n", " ")):
            yield pytest.param(program, shlex.split(arguments, comments=True), id=f"{page.name}: {program} {arguments}")


COMMANDS = list(commands())
SNIPPETS = [snippet for page in PAGES if page.name not in NEEDS_A_CHECKPOINT for snippet in python_of(page)]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_what_it_says(snippet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"__name__": "snippet"})
    promised = re.findall(r"print\(.*\)  # (\d+|\[.*\])", snippet)
    table = "2 of 3 tables swapped; floats of embeddings: 1,920,112 before, 38,512 after, 38,400 of them shared"
    printed = capsys.readouterr().out
    for said in promised or [table if "weekday" in snippet else "torch.Size(["]:
        assert said in printed


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_of_docstrings_are_true(name):
    module = importlib.import_module(name)
    examples = doctest.DocTestFinder().find(module, globs={"torch": torch, "nn": torch.nn} | vars(robe))
    runner = doctest.DocTestRunner(verbose=False)
    results = [runner.run(example) for example in examples if example.examples]
    assert results
    assert sum(result.failed for result in results) == 0


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 15
    assert {command.values[0] for command in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_command_is_understood(program, arguments, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    arguments = [os.path.expandvars(argument) for argument in arguments]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    assert PROGRAMS[program](arguments)


def test_predictor_of_the_docs(tmp_path, monkeypatch):
    snippet, pruning = python_of(ROOT / "docs" / "inference.md")
    config = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10,) * 26, compression=3)
    checkpoint.save(tmp_path / "runs" / "robe", DLRM(config))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert names["probabilities"].shape == (64,)
    exec(pruning, {})  # ends with a claim of its own


def test_readme_is_short_and_shows_the_layer_first():
    text = ROOT.joinpath("README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 200
    first_screen = "\n".join(lines[:40])
    for part in ("pip install", "robe.compress", "docs/images/accuracy.png", "docs/architecture.md"):
        assert part in first_screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_to_files(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", prose):
        assert (page.parent / target).exists(), target


def test_images_are_small():
    for path in (*ROOT.joinpath("docs/images").iterdir(), *ROOT.joinpath("docs/results").glob("*")):
        assert path.stat().st_size <= 100_000, path


def test_architecture_names_files_that_exist():
    """Every path in backquotes, such as `robe/hashing.py` or `dlrm/training/`, is in the checkout."""
    text = ROOT.joinpath("docs/architecture.md").read_text()
    roots = "robe|dlrm|data|tests|benchmarks|docs"
    paths = re.findall(rf"`((?:{roots})/[\w./*]*|\w+\.(?:py|toml|yml))`", text)
    assert len(paths) > 40
    for path in paths:
        assert list(ROOT.glob(path)), path
