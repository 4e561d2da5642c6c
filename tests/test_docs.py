"""The Python of the README and the docs runs, and their programs take the options that are shown."""

import os
import re
import shlex
from pathlib import Path

import pytest

import benchmarks.accuracy
import data.prepare
import infer
import train
from dlrm import DLRM, DLRMConfig, checkpoint

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train.py": train.parse,
    "infer.py": infer.parse,
    "-m data.prepare": data.prepare.parse,
    "-m benchmarks.accuracy": lambda arguments: benchmarks.accuracy.parse(),
}


def python_of(name):
    return re.findall(r"```python\n(.*?)```", ROOT.joinpath(name).read_text(), re.DOTALL)


def commands():
    """(program, arguments) of all pages, of lines that start with four spaces."""
    line = re.compile(r"^ {4}(?:python|torchrun --nproc-per-node \d+) (" + "|".join(PROGRAMS) + ") (.+)$", re.MULTILINE)
    for page in (ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))):
        for program, arguments in line.findall(page.read_text().replace("\\\n", " ")):
            yield pytest.param(program, shlex.split(arguments, comments=True), id=f"{page.name}: {program} {arguments}")


COMMANDS = list(commands())


PAGES = ("README.md", "docs/compress.md", "docs/hash.md", "docs/layers.md", "docs/saving.md")
SNIPPETS = [snippet for page in PAGES for snippet in python_of(page)]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_what_it_says(snippet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"__name__": "snippet"})
    promised = re.search(r"print\(.*\)  # (\d+)", snippet)
    table = "2 of 3 tables swapped; floats of embeddings: 1,920,112 before, 38,512 after, 38,400 of them shared"
    said = promised[1] if promised else table if "weekday" in snippet else "torch.Size(["
    assert said in capsys.readouterr().out


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 10
    assert {command.values[0] for command in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_command_is_understood(program, arguments, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    arguments = [os.path.expandvars(argument) for argument in arguments]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    assert PROGRAMS[program](arguments)


def test_predictor_of_the_docs(tmp_path, monkeypatch):
    (snippet,) = python_of("docs/inference.md")
    config = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10,) * 26, compression=3)
    checkpoint.save(tmp_path / "runs" / "robe", DLRM(config))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert names["probabilities"].shape == (64,)
