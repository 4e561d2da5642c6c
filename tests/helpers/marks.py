"""Marks of tests."""

import pytest


def asserted_on_gpus(*values):
    """Return the parameters of a test that expects an error where a GPU trips an assertion."""
    return pytest.param(*values, marks=pytest.mark.cpu_only("a GPU trips an assertion instead"))
