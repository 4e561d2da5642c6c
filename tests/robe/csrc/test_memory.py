"""The kernels free what they take over."""

import pytest
import torch

from tests.helpers.kernels import needs_kernels
from tests.helpers.memory import STATM, growth
from tests.helpers.native import BAG, IDS, KEYS, LOOKUP, native, native_update, replaced
from tests.helpers.problems import (
    RULES,
    updated,
)


def refused(function, *arguments):
    with pytest.raises(ValueError, match="hash: expected one of"):
        function(*arguments)


@needs_kernels
@pytest.mark.skipif(not STATM.exists(), reason="reads the memory in use from /proc, which only Linux has")
def test_nothing_leaks():
    """The kernels take over tensors and strings from torch, and must free each, however the call ends."""
    # The shortest leaked string would be 1 MB here.
    assert growth(lambda: native("lookup_forward", *LOOKUP), 2000, 40_000) < 500_000
    assert growth(lambda: native("bag_forward", *BAG), 2000, 40_000) < 500_000
    # Arguments that are large: leaked once in a hundred calls, they would be seen.
    wide = lambda: torch.ones(250_000)  # noqa: E731  (1 MB, another one for each call)
    counters = lambda: torch.zeros(4, 62_500, dtype=torch.int32)  # noqa: E731
    hash = "x" * 1_000_000
    ones = torch.ones(1, 2, 5)
    for call in (
        lambda: native("lookup_forward", wide(), *LOOKUP[1:]),
        lambda: native("lookup_out", wide(), *LOOKUP[1:], ones),
        lambda: native("lookup_backward", ones, wide(), *LOOKUP[1:-1]),
        lambda: native("bag_weights_backward", ones, wide(), *BAG[1:3], torch.ones(3), *BAG[4:-1]),
        lambda: updated(native_update, wide(), "adam", RULES["adam"], [(ones, LOOKUP[1:-1])]),
        lambda: native("count_ids_", counters(), IDS, KEYS, counters(), IDS > 1),
        lambda: native("id_counts", counters(), KEYS),
        lambda: native("frequent_rows_", counters(), IDS, KEYS, 0, torch.zeros(100_000, dtype=torch.int64)),
        lambda: native("observe_ids_", counters(), IDS, KEYS, KEYS, 1),
        lambda: refused(torch.ops.robe.lookup_forward, *replaced(LOOKUP, (6, hash))),
        lambda: refused(torch.ops.robe.bag_forward, *replaced(BAG, (9, hash))),
    ):
        assert growth(call, 10, 100) < 20_000_000
