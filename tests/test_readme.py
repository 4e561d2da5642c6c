"""The README's Python runs."""

import re
from pathlib import Path

import pytest

SNIPPETS = re.findall(r"```python\n(.*?)```", Path(__file__).parent.parent.joinpath("README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_shapes(snippet, capsys):
    exec(snippet, {})
    assert "torch.Size([2" in capsys.readouterr().out


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
