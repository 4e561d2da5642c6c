"""The MLP operator against float64 numpy."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dlrm.ops import PANEL, REFERENCE, pack_linear
from robe.backends import backend
from tests.helpers.kernels import SETS, machine, needs_kernels

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


def packed(layers, relu_last):
    weights, biases = zip(*(pack_linear(float32(weight), float32(bias)) for weight, bias in layers))
    return list(weights), list(biases), len(layers[-1][1]), relu_last


def run(x, layers, relu_last):
    return torch.ops.dlrm.mlp(float32(x), *packed(layers, relu_last))


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


def test_without_bias():
    x, [(weight, _)] = make((20, 40), 6)
    weights, bias = pack_linear(float32(weight), None)
    assert_is(torch.ops.dlrm.mlp(float32(x), [weights], [bias], 40, False), x @ weight.T)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(2, 13, dtype=torch.float64)}, r"x: expected a float32 matrix \(B, fan_in\), got torch.float64"),
        ({0: torch.ones(13)}, r"x: expected a float32 matrix \(B, fan_in\), got torch.float32 \(13,\)"),
        ({0: torch.ones(2, 12)}, r"x: expected \(B, 13\), got \(2, 12\)"),
        ({1: []}, "weights and biases: expected one of each for each layer"),
        ({2: [torch.zeros(64)]}, "weights and biases: expected one of each for each layer"),
        (
            {1: [torch.zeros(2, 13, 16), torch.zeros(1, 40, 32)]},
            r"weights: expected .* got torch.float32 \(2, 13, 16\)",
        ),
        ({1: [torch.zeros(2, 13, 32), torch.zeros(1, 65, 32)]}, r"\(panels, 64, 32\), got torch.float32 \(1, 65, 32\)"),
        ({1: [torch.zeros(13, 2, 32).transpose(0, 1), torch.zeros(1, 40, 32)]}, "weights: expected contiguous"),
        ({2: [torch.zeros(63), torch.zeros(32)]}, r"biases: expected contiguous float32 \(64,\), got .* \(63,\)"),
        ({3: 0}, "width: expected 1 to 32, got 0"),
        ({3: 33}, "width: expected 1 to 32, got 33"),
    ],
)
@pytest.mark.parametrize("which", ["operator", "reference"])
def test_what_does_not_fit_is_refused(changes, message, which):
    good = [torch.ones(2, 13), [torch.zeros(2, 13, 32), torch.zeros(1, 40, 32)], [torch.zeros(64), torch.zeros(32)], 5]
    arguments = [changes.get(i, x) for i, x in enumerate(good)]
    function = torch.ops.dlrm.mlp if which == "operator" else REFERENCE["mlp"]
    with pytest.raises(ValueError, match=message):
        function(*arguments, False)


def test_opcheck():
    x, layers = make((6, 40, 3), 4)
    torch.library.opcheck(torch.ops.dlrm.mlp, (float32(x), *packed(layers, True)))


def test_panels_hold_the_weights():
    weight, bias = torch.randn(40, 7), torch.randn(40)
    panels, biases = pack_linear(weight, bias)
    assert panels.shape == (2, 7, PANEL)
    assert torch.equal(panels.transpose(1, 2).reshape(-1, 7)[:40], weight)
    assert torch.equal(biases[:40], bias)
    assert not panels[1, :, 8:].any()
    assert not biases[40:].any()
