"""Bad arguments: the compiled kernels raise what the reference raises."""

import numpy as np
import pytest
import torch

from robe.ops import REFERENCE
from tests.helpers.kernels import machine, needs_kernels
from tests.helpers.native import BAG, IDS, KEYS, LOOKUP, OFFSETS, ROWS, VALUES, error_of, native, replaced
from tests.helpers.problems import (
    Problem,
)

BAD_LOOKUPS = {
    "weight of integers": [(0, torch.ones(60, dtype=torch.int64))],
    "weight of two dimensions": [(0, torch.ones(60, 1))],
    "weight shorter than a block": [(0, torch.ones(2))],
    "float ids": [(1, IDS.float())],
    "short ids": [(1, IDS.short())],
    "bool ids": [(1, IDS.bool())],
    "ids of one dimension": [(1, IDS[0])],
    "ids of three dimensions": [(1, IDS.unsqueeze(0))],
    "ids of one column": [(1, IDS[:, :1])],
    "one key": [(2, KEYS[:1])],
    "no feature": [(2, KEYS[:0]), (3, ROWS[:0]), (1, IDS[:, :0])],
    "keys of two dimensions": [(2, KEYS.unsqueeze(1)), (3, ROWS.unsqueeze(1))],
    "no components": [(4, 0)],
    "blocks of nothing": [(5, 0)],
    "negative dim": [(4, -1)],
    "dim of 2**31": [(4, 2**31)],
    "dim of 2**63 - 1": [(4, 2**63 - 1)],
    "blocks of 2**62": [(5, 2**62)],
    "keys of int32": [(2, KEYS.int())],
    "bounds of float": [(3, ROWS.float())],
    "negative bound": [(3, torch.tensor([4, -6]))],
    "identity tables of 2**62 rows": [(2, KEYS * 0), (3, torch.tensor([4, 2**62])), (4, 4), (5, 4), (6, "identity")],
    "identity tables past the end": [(2, torch.tensor([0, 2**62])), (6, "identity")],
    "identity tables without end": [(3, torch.tensor([4, 0])), (6, "identity")],
    "scale of no dimension": [(0, torch.ones(60, dtype=torch.int8)), (9, torch.tensor(1.0))],
    "no scale": [(0, torch.ones(60, dtype=torch.int8)), (9, torch.ones(0))],
    "unknown hash": [(6, "md5")],
    "scale": [(9, torch.ones(60))],
    "id too large": [(1, torch.tensor([[3, 2], [4, 6]]))],
    "id of the second feature": [(1, torch.tensor([[3, 6]], dtype=torch.int32))],
    "negative id": [(1, torch.tensor([[-(2**63), 1]]))],
}


BAD_BAGS = {
    "weight of integers": [(0, torch.ones(60, dtype=torch.int64))],
    "float values": [(1, VALUES.float())],
    "values of two dimensions": [(1, VALUES.view(1, 3))],
    "float offsets": [(2, OFFSETS.float())],
    "offsets of two dimensions": [(2, OFFSETS.view(1, 3))],
    "one offset less": [(2, OFFSETS[:2])],
    "no offsets": [(2, OFFSETS[:0])],
    "offsets from 1": [(2, torch.tensor([1, 2, 3]))],
    "offsets below 0": [(2, torch.tensor([-1, 2, 3]))],
    "offsets past the end": [(2, torch.tensor([0, 2, 4]))],
    "offsets that fall": [(2, torch.tensor([0, 3, 2]))],
    "offsets that fall within": [(2, torch.tensor([0, 2, 1, 3, 3], dtype=torch.int32))],
    "unknown mode": [(4, "median")],
    "weights with mean": [(3, torch.ones(3)), (4, "mean")],
    "two weights": [(3, torch.ones(2))],
    "weights of another type": [(3, torch.ones(3).double())],
    "int8 weights for an int8 array": [
        (0, torch.ones(60, dtype=torch.int8)),
        (3, torch.ones(3, dtype=torch.int8)),
        (12, torch.ones(4)),
    ],
    "one key": [(5, KEYS[:1])],
    "unknown hash": [(9, "md5")],
    "id too large": [(1, torch.tensor([3, 5, 6]))],
    "negative id": [(1, torch.tensor([-1, 5, 6]))],
}


@needs_kernels
@pytest.mark.parametrize("name", BAD_LOOKUPS)
def test_lookup_raises_what_the_reference_raises(name):
    arguments = replaced(LOOKUP, *BAD_LOOKUPS[name])
    want = error_of(REFERENCE["lookup"], arguments)
    assert want[0] in (ValueError, IndexError)
    assert error_of(torch.ops.robe.lookup, arguments) == want
    assert error_of(torch.ops.robe.lookup_out, (*arguments, torch.empty(len(arguments[1]), 2, 5))) == want


@needs_kernels
@pytest.mark.parametrize("name", BAD_BAGS)
def test_bag_raises_what_the_reference_raises(name):
    arguments = replaced(BAG, *BAD_BAGS[name])
    want = error_of(REFERENCE["bag"], arguments)
    assert want[0] in (ValueError, IndexError)
    assert error_of(torch.ops.robe.bag, arguments) == want
    assert error_of(torch.ops.robe.bag_out, (*arguments, torch.empty(1, 2, 5))) == want


@needs_kernels
@pytest.mark.parametrize("name", ["lookup_backward", "bag_backward", "bag_weights_backward"])
def test_backwards_raise_what_the_reference_raises_for_an_id_outside(name):
    grad = torch.ones(1, 2, 5)
    if name == "lookup_backward":
        arguments = grad, *replaced(LOOKUP[:-1], (1, torch.tensor([[4, 6]])))
    else:
        arguments = grad, *replaced(BAG[:-1], (1, torch.tensor([3, 5, 6])), (3, torch.ones(3)))
    want = error_of(REFERENCE[name], arguments)
    assert want[0] is IndexError
    assert error_of(getattr(torch.ops.robe, name), arguments) == want


@needs_kernels
@pytest.mark.parametrize("name", ["lookup_out", "bag_out"])
@pytest.mark.parametrize(
    "out",
    [torch.empty(1, 2, 4), torch.empty(2, 5), torch.empty(1, 2, 5, 1), torch.empty(1, 2, 5).double()],
    ids=lambda out: f"{out.dtype}, {tuple(out.shape)}",
)
def test_an_out_that_does_not_fit_is_refused(name, out):
    arguments = *(LOOKUP if name == "lookup_out" else BAG), out
    for body in (getattr(torch.ops.robe, name), REFERENCE[name]):
        with pytest.raises(ValueError, match=r"^out: expected .*, got "):
            body(*arguments)


BUFFER = torch.zeros(200)
SHARED_OUTS = {
    "entries": (torch.ones(60), IDS, torch.zeros(5).expand(1, 2, 5), "each entry to have memory of its own"),
    "parts of entries": (torch.ones(60), IDS, BUFFER.as_strided((1, 2, 5), (9, 4, 1)), "each entry to have memory"),
    "weight": (BUFFER[:60], IDS, BUFFER[59:69].view(1, 2, 5), "it shares some with weight"),
    "ids": (torch.ones(60), BUFFER[:4].view(torch.int64).view(1, 2), BUFFER[:10].view(1, 2, 5), "shares some with ids"),
}


@needs_kernels
@pytest.mark.parametrize("name", SHARED_OUTS)
def test_an_out_that_shares_memory_is_refused(name):
    weight, ids, out, message = SHARED_OUTS[name]
    for body in (torch.ops.robe.lookup_out, REFERENCE["lookup_out"]):
        with pytest.raises(ValueError, match=f"^out: expected .*{message}"):
            body(weight, ids, *LOOKUP[2:], out)


@needs_kernels
@pytest.mark.parametrize("strides", [(2**62, 5, 1), (10, 2**62, 1), (2**62, 2**62, 1)])
def test_the_stride_of_a_dimension_without_a_second_entry_means_nothing(strides):
    batch, features = 1, 1 if strides[1] == 2**62 else 2
    ids, out = IDS[:, :features], torch.zeros(10)[: 5 * features].as_strided((batch, features, 5), strides)
    tables = KEYS[:features], ROWS[:features], *LOOKUP[4:]
    torch.ops.robe.lookup_out(LOOKUP[0], ids.as_strided(ids.shape, (2**62, 1)), *tables, out)
    assert (out == 1).all()


@needs_kernels
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.tensor(1.0), r"grad: expected shape \(1, 2, 5\), got \(\)"),
        (torch.ones(1, 2, 4), r"grad: expected shape \(1, 2, 5\), got \(1, 2, 4\)"),
        (torch.ones(1, 2, 5, dtype=torch.int64), "grad: expected floating-point numbers, got torch.int64"),
    ],
    ids=["a number", "short", "integers"],
)
def test_a_gradient_that_does_not_fit_is_refused(grad, message):
    weighted = replaced(BAG[:-1], (3, torch.ones(3)))
    for name, arguments in (
        ("lookup_backward", LOOKUP[:-1]),
        ("bag_backward", weighted),
        ("bag_weights_backward", weighted),
    ):
        for body in (getattr(torch.ops.robe, name), REFERENCE[name]):
            with pytest.raises(ValueError, match=message):
                body(grad, *arguments)


@needs_kernels
def test_factors_without_factors_have_no_gradient():
    for body in (torch.ops.robe.bag_weights_backward, REFERENCE["bag_weights_backward"]):
        with pytest.raises(ValueError, match="per_sample_weights: expected a tensor, got None"):
            body(torch.ones(1, 2, 5), *BAG[:-1])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_of_many_ids_outside_is_named_whatever_the_threads(threads):
    problem = Problem([100] * 5, dim=64, block=64)
    lookup, grad = list(problem.lookup(1000)), problem.grad(1000)
    bag, ends = list(problem.bag(1000, "sum", longest=3)), [*range(5)]
    for row, feature, wrong in ((990, 0, 777), (501, 3, -5), (501, 4, 123), (700, 1, 999)):
        lookup[1][row, feature] = wrong
    total = int(bag[2][-1])
    for position, wrong in ((total - 1, 777), (total // 2, 555), (total // 2 + 1, -3)):
        bag[1][position] = wrong
    bag_feature = int(np.searchsorted(bag[2].numpy(), total // 2, side="right") - 1) // 1000
    assert bag_feature in ends
    with machine(threads=threads):
        for function, arguments, message in (
            (torch.ops.robe.lookup, lookup, "id -5 of feature 3, whose table has 100 rows"),
            (torch.ops.robe.lookup_backward, [grad, *lookup], "id -5 of feature 3, whose table has 100 rows"),
            (torch.ops.robe.bag, bag, f"id 555 of feature {bag_feature}, whose"),
            (torch.ops.robe.bag_backward, [grad, *bag], f"id 555 of feature {bag_feature}, whose"),
        ):
            with pytest.raises(IndexError, match=f"index out of range: {message}"):
                function(*arguments)


@needs_kernels
def test_an_identity_table_must_lie_within_the_array():
    for keys, rows in (([0, 20], [4, 9]), ([-5, 20], [4, 6]), ([0, 2**62], [4, 6]), ([0, 20], [4, 0])):
        with pytest.raises(
            ValueError, match=r"hash='identity': the table of feature . does not lie within the array's"
        ):
            native("lookup", torch.ones(60), IDS, torch.tensor(keys), torch.tensor(rows), 5, 5, "identity", False, None)
