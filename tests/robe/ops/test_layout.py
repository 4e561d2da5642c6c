"""The arguments of operators: packed and unpacked in the order of the schemas, whichever torch leaves out."""

import pytest
import torch

from robe.hashing import HASHES
from robe.ops.layout import (
    POOLINGS,
    Bags,
    Call,
    LayoutCode,
    Tables,
    UpdateLists,
    embedding_dtype,
    group_bits,
    take_out,
    unpack_bag,
    unpack_bag_backward,
    unpack_lookup,
    unpack_lookup_backward,
)

KEYS, BOUNDS = torch.tensor([5, 6]), torch.tensor([9, 0])
TABLES = Tables(KEYS, BOUNDS, 4, 3, "mix", True, 2)
IDS, VALUES, OFFSETS = torch.tensor([[1, 2]]), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
WEIGHTS, FILTER, SCALE = torch.rand(3), torch.tensor([7]), torch.tensor([0.5])
LOOKUP, BAG = Call(IDS, None, TABLES), Call(VALUES, Bags(OFFSETS, WEIGHTS, "sum"), TABLES)


def names(operator):
    return [argument.name for argument in getattr(torch.ops.robe, operator).default._schema.arguments]


@pytest.mark.parametrize("operator", ["lookup", "lookup_forward", "lookup_out", "lookup_backward"])
def test_a_lookup_is_packed_in_the_order_of_the_schema(operator):
    given = names(operator)[1 + operator.endswith("backward") :]
    assert given[: len(LOOKUP.pack())] == ["ids", *Tables._fields]


@pytest.mark.parametrize("operator", ["bag", "bag_forward", "bag_out", "bag_backward", "bag_weights_backward"])
def test_a_bag_is_packed_in_the_order_of_the_schema(operator):
    given = names(operator)[1 + operator.endswith("backward") :]
    assert given[: len(BAG.pack())] == ["values", *Bags._fields, *Tables._fields]


def test_lists_of_updates_are_in_the_order_of_the_schema():
    assert names("update_")[4:] == list(UpdateLists._fields)


@pytest.mark.parametrize(("call", "unpack"), [(LOOKUP, unpack_lookup), (BAG, unpack_bag)])
def test_unpacking_undoes_packing(call, unpack):
    assert unpack(call.pack()) == call  # torch leaves out trailing arguments that are None
    assert unpack((*call.pack(), SCALE)) == call._replace(scale=SCALE)
    assert unpack((*call.pack(), None, FILTER)) == call._replace(filter=FILTER)


@pytest.mark.parametrize(("call", "unpack"), [(LOOKUP, unpack_lookup_backward), (BAG, unpack_bag_backward)])
def test_backward_calls_have_no_scale(call, unpack):
    assert unpack(call.pack()) == call
    assert unpack((*call.pack(), FILTER)) == call._replace(filter=FILTER)


@pytest.mark.parametrize(("call", "count"), [(LOOKUP, 1), (BAG, 4)])
def test_out_is_taken_out(call, count):
    out = torch.empty(1)
    for rest in ([], [FILTER]):
        arguments, taken = take_out((*call.pack(), SCALE, out, *rest), count)
        assert taken is out
        assert list(arguments) == [*call.pack(), SCALE, *rest]


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("padding_idx", [None, 0, -3])
@pytest.mark.parametrize("pooling", [None, *POOLINGS, "weighted"])
def test_calls_of_an_update_come_back(hash, padding_idx, pooling):
    tables = TABLES._replace(hash=hash, padding_idx=padding_idx, sign=hash == "mix")
    if pooling is None:
        call = Call(IDS, None, tables)
    else:
        weights = WEIGHTS if pooling == "weighted" else None
        call = Call(VALUES, Bags(OFFSETS, weights, pooling.replace("weighted", "sum")), tables)
    filtered = call._replace(filter=FILTER)
    calls = [(torch.rand(1, 2, 4), call), (torch.rand(1, 2, 4), filtered)]
    lists = UpdateLists.pack(calls)
    assert len(lists.layouts) == 2 * len(LayoutCode._fields)
    assert list(lists.unpack()) == calls


@pytest.mark.parametrize(("dtype", "expected"), [(torch.int8, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_embeddings_have_the_dtype_of_the_array_but_for_int8(dtype, expected):
    assert embedding_dtype(torch.zeros(3, dtype=dtype)) == expected


@pytest.mark.parametrize(("weights", "scales", "bits"), [(1, 1, 0), (64, 1, 6), (65, 1, 7), (65, 2, 6), (100, 100, 0)])
def test_groups_are_the_smallest_power_of_two_that_covers_the_array(weights, scales, bits):
    assert group_bits(torch.zeros(weights), torch.zeros(scales)) == bits
