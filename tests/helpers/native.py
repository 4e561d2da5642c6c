"""The operators as the compiled kernels compute them, and small arguments for them."""

import pytest
import torch
from hypothesis import strategies as st

from tests.helpers.kernels import SETS, machine

native_update = torch.ops.robe.update_


def native(name, *arguments):
    return getattr(torch.ops.robe, name)(*arguments)


machines = st.builds(machine, st.sampled_from(SETS or [""]), st.sampled_from([1, 3]))


def written(name, arguments, like, columns=1):
    """Return what an out operator writes into vectors[:, columns:]; the rest must stay as it is."""
    vectors = torch.full((like.shape[0], like.shape[1] + columns, like.shape[2]), 7, dtype=like.dtype)
    *before, filter = arguments
    assert native(name, *before, vectors[:, columns:], filter) is None
    assert (vectors[:, :columns] == 7).all()
    return vectors[:, columns:]


KEYS, ROWS = torch.tensor([11, 22]), torch.tensor([4, 6])


IDS, VALUES, OFFSETS = torch.tensor([[1, 2]]), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])


TABLES = (KEYS, ROWS, 5, 3, "mix", False, None)


LOOKUP = (torch.ones(60), IDS, *TABLES, None)


BAG = (torch.ones(60), VALUES, OFFSETS, None, "sum", *TABLES, None)


def replaced(arguments, *changes):
    """Arguments with others in place of some: (position, value) pairs."""
    changed = list(arguments)
    for position, value in changes:
        changed[position] = value
    return changed


def error_of(function, arguments):
    with pytest.raises(Exception) as raised:  # noqa: PT011  (which one is what the test compares)
        function(*arguments)
    return raised.type, str(raised.value)
