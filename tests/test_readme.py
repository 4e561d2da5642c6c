"""The README's Python runs."""

import re
from pathlib import Path

import pytest

from dlrm import DLRM, DLRMConfig, checkpoint


def python_of(name):
    return re.findall(r"```python\n(.*?)```", Path(__file__).parents[1].joinpath(name).read_text(), re.DOTALL)


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


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


def test_predictor_of_the_docs(tmp_path, monkeypatch):
    (snippet,) = python_of("docs/inference.md")
    config = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10,) * 26, compression=3)
    checkpoint.save(tmp_path / "runs" / "robe", DLRM(config))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert names["probabilities"].shape == (64,)
