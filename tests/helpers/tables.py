"""Layers of one table, the table that they stand for, and where its gradient goes, by the oracle."""

import numpy as np
import pytest
import torch
from torch import nn

from robe import RobeArray
from tests.helpers.oracle import places, table_grad_to_array

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


ROWS, DIM = 40, 6


MODES = ("sum", "mean", "max")


# Options of a layer of ROWS x DIM weights, and where the oracle then looks for them.
LAYOUTS = {
    "compression 10": ({"compression": 10}, {"hash": "mix", "size": 24, "block_size": 6}),
    "no compression": ({"compression": 1}, {"hash": "identity", "size": 240, "block_size": 6}),
    "small blocks": (
        {"robe_size": 30, "block_size": 4, "sign": True, "seed": 5, "table_id": 3},
        {"hash": "mix", "size": 30, "block_size": 4, "sign": True, "seed": 5, "table_id": 3},
    ),
    "wide blocks": (
        {"compression": 7.5, "block_size": 13, "sign": True},
        {"hash": "mix", "size": 32, "block_size": 13, "sign": True},
    ),
    "block of one": ({"compression": 3, "block_size": 1}, {"hash": "mix", "size": 80, "block_size": 1}),
    "linear": (
        {"robe_size": 50, "block_size": 4, "sign": True, "hash": "linear", "first_row": 1000},
        {"hash": "linear", "size": 50, "block_size": 4, "sign": True, "first_row": 1000},
    ),
    "identity behind another table": (
        {"array": RobeArray(300, dtype=torch.float64), "hash": "identity", "first_row": 10},
        {"hash": "identity", "size": 300, "block_size": 6, "first_row": 10},
    ),
}


every_layout = pytest.mark.parametrize("layout", LAYOUTS)

POOLING = [("sum", False), ("sum", True), ("mean", False), ("max", False)]


every_pooling = pytest.mark.parametrize(("mode", "weighted"), POOLING)


def with_values(layer):
    """The layer in float64 with values all different, so that only equal slots tie for a maximum."""
    layer.double()
    weight = layer.array.weight
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(len(weight)))
    return layer


def virtual_table(weight, rows, embedding_dim, padding_idx=None, **layout):
    """The virtual table (rows, embedding_dim), by the oracle."""
    slots, signs = places(range(rows), embedding_dim=embedding_dim, **layout)
    table = weight.detach()[torch.from_numpy(slots)] * torch.from_numpy(signs)
    if padding_idx is not None:
        table[padding_idx] = 0
    return table


def assert_trains_as_its_counterpart(layer, counterpart, layout, inputs, *, exact=False, torch_inputs=None):
    """Same output, and the gradient of the array is that of the counterpart's table, at the oracle's slots."""
    output, want = layer(*inputs), counterpart(*(inputs if torch_inputs is None else torch_inputs))
    assert output.shape == want.shape
    assert output.dtype == want.dtype
    torch.testing.assert_close(output, want, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    layer.zero_grad()
    output.backward(upstream)
    want.backward(upstream)
    grad = table_grad_to_array(counterpart.weight.grad, **layout)
    np.testing.assert_allclose(layer.array.weight.grad.numpy(), grad, rtol=1e-11, atol=1e-12)


def id_tensor(shape, *, rows=ROWS, seed=0):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def bag_inputs(form, *, weighted=False, include_last_offset=False):
    """input, offsets, per_sample_weights in one of the forms that nn.EmbeddingBag takes."""
    if form == "2-D":
        ids, offsets = id_tensor((4, 7)), None
    else:
        ids = id_tensor((20,)) if form == "1-D" else id_tensor((0,))
        starts = [0, 0, 3, 3, 4, 11, 20, 20] if form == "1-D" else [0, 0, 0]
        if form == "no bags":
            starts = []
        offsets = torch.tensor(starts + [len(ids)] * include_last_offset, dtype=torch.long)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return ids, offsets, weights if weighted else None
