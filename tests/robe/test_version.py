"""The version is in one place, and what repeats it agrees."""

import re
from pathlib import Path

import robe
from robe.version import __version__

ROOT = Path(__file__).parents[2]


def test_version():
    assert robe.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", __version__)


def test_citation_has_the_version():
    (line,) = [line for line in (ROOT / "CITATION.cff").read_text().splitlines() if line.startswith("version:")]
    assert line == f"version: {__version__}"
