"""The MLP operator against float64 numpy."""

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch

from dlrm.ops import BLOCKS, PANEL, REFERENCE, pack_linear
from robe.backends import backend
from tests.helpers.kernels import IS_NATIVE, SETS, machine, needs_kernels

# Widths below, at and above a panel, and more rows than any kernel takes at once.
WIDTHS = [(13, 512, 256, 64, 16), (5, 1), (1, 31, 33, 2), (64, 32, 64), (367, 100, 1), (3, 1024, 7)]
ROWS = [0, 1, 2, 3, 5, 7, 12, 13, 29, 64, 100, 701]


def make(widths, rows, seed=0):
    rng = np.random.default_rng([seed, rows, *widths])
    layers = [(rng.normal(0, a**-0.5, (b, a)), rng.normal(0, 0.3, b)) for a, b in pairwise(widths)]
    return rng.normal(size=(rows, widths[0])), layers


def by_numpy(x, layers, relu_last):
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        if relu_last or i + 1 < len(layers):
            x = np.maximum(x, 0)
    return x


def float32(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def packed(layers, relu_last, blocks=(None,)):
    """The operator's arguments behind x; the layers have these blocks in turn."""
    lists = zip(*(pack_linear(float32(w), float32(b), block) for (w, b), block in zip(layers, itertools.cycle(blocks))))
    return *map(list, lists), len(layers[-1][1]), relu_last


def run(x, layers, relu_last, blocks=(None,)):
    return torch.ops.dlrm.mlp(float32(x), *packed(layers, relu_last, blocks))


def prune(layers, block, share, seed=0):
    """Set blocks of outputs to zero for some inputs; the first block of all has no weight left."""
    rng = np.random.default_rng([seed, block])
    pruned = []
    for weight, bias in layers:
        kept = rng.random((-(-len(weight) // block), weight.shape[1])) >= share
        kept[0] &= share < 0.5
        pruned.append((weight * kept.repeat(block, 0)[: len(weight)], bias))
    return pruned


def assert_is(got, want):
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("relu_last", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_equals_numpy(widths, rows, relu_last):
    x, layers = make(widths, rows)
    assert_is(run(x, layers, relu_last), by_numpy(x, layers, relu_last))


@needs_kernels
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_instruction_set_equals_numpy(widths, name):
    with machine(name):
        assert backend()["cpu"] == f"native ({name})"
        for rows in (1, 6, 23):
            x, layers = make(widths, rows)
            assert_is(run(x, layers, True), by_numpy(x, layers, True))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_reference_equals_numpy(widths):
    x, layers = make(widths, 9)
    assert_is(REFERENCE["mlp"](float32(x), *packed(layers, False)), by_numpy(x, layers, False))


@needs_kernels
@pytest.mark.parametrize("name", SETS)
def test_a_row_has_the_same_bits_whatever_is_beside_it(name):
    x, layers = make((40, 300, 70, 3), 700)
    results = []
    with machine(name):
        for threads in (1, 2, 3):
            with machine(threads=threads):
                results.append(run(x, layers, False))
        results.append(torch.cat([run(row[None], layers, False) for row in x]))
        results.append(torch.cat([run(rows, layers, False) for rows in np.array_split(x, 9)]))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("share", [0, 0.7, 1])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_blocks_of_zeros_are_left_out_to_the_bit(widths, block, share):
    for rows in (1, 9, 61):
        x, layers = make(widths, rows)
        layers = prune(layers, block, share)
        arguments = packed(layers, True, (block,))
        for (w, _), values in zip(layers, arguments[0]):
            kept = np.add.reduceat(w != 0, np.arange(0, len(w), block)) > 0
            assert len(values) == kept.sum() + (~kept.any(0)).sum(), "zeros for inputs without a weight"
        got = torch.ops.dlrm.mlp(float32(x), *arguments)
        assert_is(got, by_numpy(x, layers, True))
        if IS_NATIVE:
            assert torch.equal(got, run(x, layers, True)), "adding zero changes nothing"
        torch.testing.assert_close(got, REFERENCE["mlp"](float32(x), *arguments), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("blocks", [(16,), (32,), (32, None, 16), (None, 16)], ids=str)
def test_every_instruction_set_takes_layers_of_any_kind(blocks, name):
    x, layers = make((40, 300, 70, 33), 150)
    layers = prune(layers, 16, 0.6)
    with machine(name):
        want = run(x, layers, False)
        assert_is(want, by_numpy(x, layers, False))
        arguments = packed(layers, False, blocks)
        results = []
        for size in (1, 2, 7, 13, 31, 47, 50, 97, 150):
            pieces = float32(x).split(size)
            results.append(torch.cat([torch.ops.dlrm.mlp(rows, *arguments) for rows in pieces]))
    assert all(torch.equal(result, want) for result in results)


def test_more_inputs_than_16_bits_can_name():
    x, layers = make((70_000, 20), 3)
    layers = prune(layers, 16, 0.99)
    assert_is(run(x, layers, False, (16,)), by_numpy(x, layers, False))


def test_without_bias():
    x, [(weight, _)] = make((20, 40), 6)
    layer = pack_linear(float32(weight), None)
    assert_is(torch.ops.dlrm.mlp(float32(x), *([part] for part in layer), 40, False), x @ weight.T)


def test_strides_do_not_matter():
    x, layers = make((30, 50, 4), 17)
    arguments = packed(layers, False)
    want = torch.ops.dlrm.mlp(float32(x), *arguments)
    wide = float32(np.concatenate([np.full((17, 5), np.nan), x, np.full((17, 2), np.nan)], axis=1))
    assert torch.equal(torch.ops.dlrm.mlp(wide[:, 5:-2], *arguments), want)
    assert torch.equal(torch.ops.dlrm.mlp(float32(x.T).T, *arguments), want)
    assert torch.equal(torch.ops.dlrm.mlp(float32(x)[:1].expand(4, -1), *arguments), want[:1].expand(4, -1))


def test_nan_and_infinity_are_not_lost():
    layers = [(np.eye(3), np.zeros(3)), (np.eye(3), np.zeros(3))]
    x = np.array([[np.nan, 1, -1], [1, np.inf, 2], [-np.inf, 0, 3]])
    got = run(x, [layers[0]], True)  # an infinity times the zeros of the other outputs is NaN
    want = torch.relu(float32(x) @ torch.eye(3))
    torch.testing.assert_close(got, want, equal_nan=True)
    assert run(x, layers, False)[0].isnan().any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_of_an_input_without_a_weight_is_seen(value):
    x, layers = make((40, 70, 33), 5)
    layers[0][0][:, 7] = 0
    x[3, 7] = value
    got = run(x, layers, False, (16,))
    assert got.isnan().any(1).tolist() == [False, False, False, True, False]


NO_INPUTS, NO_STARTS = [torch.zeros(0).int()] * 2, [torch.zeros(0).long()] * 2
DENSE = [
    *(torch.ones(2, 13), [torch.zeros(2, 13, 32), torch.zeros(1, 40, 32)], [torch.zeros(64), torch.zeros(32)]),
    *(NO_INPUTS, NO_STARTS, 5, False),
]
# 3 weights of the first of two blocks, 1 of the second, of 9 inputs.
SPARSE = [torch.ones(2, 9), [torch.zeros(4, 16)], [torch.zeros(32)]]
SPARSE += [[torch.tensor([0, 3, 8, 8]).int()], [torch.tensor([0, 3, 4, 9])], 20, False]


@pytest.mark.parametrize(
    ("good", "changes", "message"),
    [
        (DENSE, {0: torch.ones(2, 13).double()}, r"x: expected a float32 matrix \(B, fan_in\), got torch.float64"),
        (DENSE, {0: torch.ones(13)}, r"x: expected a float32 matrix \(B, fan_in\), got torch.float32 \(13,\)"),
        (DENSE, {0: torch.ones(2, 12)}, r"x: expected \(B, 13\), got \(2, 12\)"),
        (DENSE, {1: []}, "weights, biases, inputs and starts: expected one of each for each layer"),
        (DENSE, {2: [torch.zeros(64)]}, "weights, biases, inputs and starts: expected one of each for each layer"),
        (DENSE, {3: []}, "weights, biases, inputs and starts: expected one of each for each layer"),
        (
            DENSE,
            {1: [torch.zeros(2, 13, 16), torch.zeros(1, 40, 32)]},
            r"weights: expected .* got torch.float32 \(2, 13, 16\)",
        ),
        (
            DENSE,
            {1: [torch.zeros(2, 13, 32), torch.zeros(1, 65, 32)]},
            r"\(panels, 64, 32\), got torch.float32 \(1, 65, 32\)",
        ),
        (DENSE, {1: [torch.zeros(13, 2, 32).transpose(0, 1), torch.zeros(1, 40, 32)]}, "weights: expected contiguous"),
        (
            DENSE,
            {2: [torch.zeros(63), torch.zeros(32)]},
            r"biases: expected contiguous float32 \(64,\), got .* \(63,\)",
        ),
        (DENSE, {5: 0}, "width: expected 1 to 32, got 0"),
        (DENSE, {5: 33}, "width: expected 1 to 32, got 33"),
        (SPARSE, {0: torch.ones(2, 8)}, r"x: expected \(B, 9\), got \(2, 8\)"),
        (
            SPARSE,
            {1: [torch.zeros(4, 8)]},
            r"weights: expected contiguous float32 \(n, 16\) or \(n, 32\), got .* \(4, 8\)",
        ),
        (SPARSE, {3: [torch.zeros(3).int()]}, r"inputs: expected contiguous int32 \(4,\), got torch.int32 \(3,\)"),
        (SPARSE, {3: [torch.tensor([0, 3, 9, 8]).int()]}, "inputs: expected 0 to 8"),
        (SPARSE, {3: [torch.tensor([0, 3, -1, 8]).int()]}, "inputs: expected 0 to 8"),
        (
            SPARSE,
            {4: [torch.tensor([9])]},
            r"starts: expected contiguous int64 \(blocks \+ 2,\), got torch.int64 \(1,\)",
        ),
        (SPARSE, {4: [torch.tensor([0, 5, 4, 9])]}, "starts: expected to rise from 0 to 4, the number of weights"),
        (SPARSE, {4: [torch.tensor([0, 3, 5, 9])]}, "starts: expected to rise from 0 to 4, the number of weights"),
        (SPARSE, {4: [torch.tensor([0, 3, 4, 2**31])]}, "starts: expected"),
    ],
)
@pytest.mark.parametrize("which", ["operator", "reference"])
def test_what_does_not_fit_is_refused(good, changes, message, which):
    function = torch.ops.dlrm.mlp if which == "operator" else REFERENCE["mlp"]
    function(*good)
    with pytest.raises(ValueError, match=message):
        function(*(changes.get(i, x) for i, x in enumerate(good)))


def test_opcheck():
    x, layers = make((6, 40, 3), 4)
    torch.library.opcheck(torch.ops.dlrm.mlp, (float32(x), *packed(layers, True, (None, 16))))


def test_panels_hold_the_weights():
    weight, bias = torch.randn(40, 7), torch.randn(40)
    panels, biases, inputs, starts = pack_linear(weight, bias)
    assert panels.shape == (2, 7, PANEL)
    assert torch.equal(panels.transpose(1, 2).reshape(-1, 7)[:40], weight)
    assert torch.equal(biases[:40], bias)
    assert not panels[1, :, 8:].any()
    assert not biases[40:].any()
    assert (inputs.numel(), starts.numel()) == (0, 0)


def test_a_sparse_layer_lists_the_inputs_of_each_block():
    weight = torch.zeros(40, 7)
    weight[3, 2] = weight[20, 5] = weight[31, 2] = weight[39, 6] = 1.5
    weight[0, 0] = weight[0, 1] = weight[0, 3] = 2.0
    values, bias, inputs, starts = pack_linear(weight, None, 16)
    assert inputs.tolist() == [0, 1, 2, 3, 4, 2, 5, 6], "input 4 has no weight"
    assert starts.tolist() == [0, 5, 7, 8, 7]
    assert [x.nonzero().squeeze(1).tolist() for x in values] == [[0], [0], [3], [0], [], [15], [4], [7]]
    assert bias.tolist() == [0] * 48
