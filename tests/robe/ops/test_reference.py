"""The operators against loops in numpy (conftest), and against what torch asks of operators."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import robe  # noqa: F401  (registers torch.ops.robe)
from tests.helpers.marks import asserted_on_gpus
from tests.helpers.oracle import places, pool_loop, signed, table_key

HASHES = ("mix", "linear", "identity")
MODES = ("sum", "mean", "max")
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class Tables:
    """F tables on one array: the arguments of the operators, and those of the oracle."""

    def __init__(self, rows, *, hash="mix", size=60, embedding_dim=5, block_size=3, sign=False, padding_idx=None):
        if hash == "identity":
            size = sum(rows) * embedding_dim
        self.rows, self.size, self.embedding_dim, self.padding_idx = rows, size, embedding_dim, padding_idx
        first_row = [sum(rows[:k]) for k in range(len(rows))]
        keys = {
            "mix": [signed(table_key(3, k)) for k in range(len(rows))],
            "linear": first_row,
            "identity": [n * embedding_dim for n in first_row],
        }[hash]
        self.arguments = (
            torch.tensor(keys, dtype=torch.long),
            torch.tensor(rows, dtype=torch.long),
            embedding_dim,
            block_size,
            hash,
            sign,
            padding_idx,
        )
        layout = {"hash": hash, "size": size, "embedding_dim": embedding_dim, "block_size": block_size, "sign": sign}
        self.layouts = [{**layout, "seed": 3, "table_id": k, "first_row": n} for k, n in enumerate(first_row)]

    def weight(self, dtype=torch.float64, requires_grad=True):
        """All values different, so that no two rows tie for the maximum but those that read the same slot."""
        generator = torch.Generator().manual_seed(self.size)
        return torch.randn(self.size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def uneven(tensor):
    """The same values at strides that are not contiguous."""
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def flatten_bags(bags):
    """values, offsets and factors, features major, of bags[feature][example] = [(id, factor), ...]."""
    in_order = [bag for of_feature in bags for bag in of_feature]
    pairs = [pair for bag in in_order for pair in bag]
    values = torch.tensor([x for x, _ in pairs], dtype=torch.long)
    factors = torch.tensor([factor for _, factor in pairs], dtype=torch.float64)
    return values, torch.tensor([0, *np.cumsum([len(bag) for bag in in_order])], dtype=torch.long), factors


def random_bags(rng, rows, batch_size, longest=4, ids=None):
    def bag(n):
        return [
            (int(rng.choice(ids)) if ids else int(rng.integers(n)), float(rng.normal()))
            for _ in range(rng.integers(longest + 1))
        ]

    return [[bag(n) for _ in range(batch_size)] for n in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients


@st.composite
def cases(draw):
    """Tables, and ids that are legal in each of them."""
    hash = draw(st.sampled_from(HASHES))
    embedding_dim = draw(st.integers(1, 9))
    block_size = draw(st.integers(1, 2 * embedding_dim + 3))
    bounded = st.integers(1, 12)
    # 0 stands for unbounded; "linear" and "identity" lay tables one behind the other and need to know where they end.
    rows = draw(st.lists(bounded if hash != "mix" else st.one_of(bounded, st.just(0)), min_size=1, max_size=3))
    size = block_size + draw(st.integers(0, 40))
    any_id = st.one_of(st.integers(-5, 12), st.sampled_from([INT64_MIN, INT64_MAX, 2**32, -(2**40)]))
    ids = [st.integers(0, n - 1) if n else any_id for n in rows]
    padding_idx = draw(st.one_of(st.none(), st.integers(-2, 5)))
    if padding_idx is not None:
        ids = [st.one_of(of_table, st.just(padding_idx)) for of_table in ids]
    tables = Tables(
        rows,
        hash=hash,
        size=size,
        embedding_dim=embedding_dim,
        block_size=block_size,
        sign=draw(st.booleans()),
        padding_idx=padding_idx,
    )
    return tables, ids


def fits_int32(values):
    return values.numel() == 0 or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31)


@given(cases(), st.data())
def test_lookup_equals_a_loop(case, data):
    tables, ids_of_table = case
    batch_size = data.draw(st.integers(0, 4))
    columns = [data.draw(st.lists(ids, min_size=batch_size, max_size=batch_size)) for ids in ids_of_table]
    ids = torch.tensor(columns, dtype=torch.long).T  # not contiguous
    if data.draw(st.booleans()):
        ids = ids.contiguous()
    if data.draw(st.booleans()) and fits_int32(ids):
        ids = ids.int()
    weight = tables.weight()
    array = uneven(weight) if data.draw(st.booleans()) else weight
    output = torch.ops.robe.lookup(array, ids, *tables.arguments)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output.backward(uneven(upstream) if data.draw(st.booleans()) else upstream)

    bags = [[[(x, 1.0)] for x in column] for column in columns]
    want, grad, _ = pool_loop(
        weight.detach().numpy(),
        bags,
        upstream.numpy(),
        mode="sum",
        padding_idx=tables.padding_idx,
        layouts=tables.layouts,
    )
    assert output.shape == (batch_size, len(columns), tables.embedding_dim)
    np.testing.assert_array_equal(output.detach().numpy(), want)  # a copy: the same bits
    np.testing.assert_allclose(weight.grad.numpy(), grad, rtol=1e-12, atol=1e-12)


@given(cases(), st.data())
def test_bag_equals_a_loop(case, data):
    tables, ids_of_table = case
    mode = data.draw(st.sampled_from(MODES))
    weighted = mode == "sum" and data.draw(st.booleans())
    batch_size = data.draw(st.integers(0, 3))
    factor = st.floats(-2, 2, width=16) if weighted else st.just(1.0)
    bags = [
        [data.draw(st.lists(st.tuples(ids, factor), max_size=4)) for _ in range(batch_size)] for ids in ids_of_table
    ]
    values, offsets, factors = flatten_bags(bags)
    if data.draw(st.booleans()) and fits_int32(values):
        values = values.int()
    if data.draw(st.booleans()):
        offsets = offsets.int()
    if data.draw(st.booleans()):
        values, offsets, factors = uneven(values), uneven(offsets), uneven(factors)
    weight = tables.weight()
    factors = factors.detach().requires_grad_() if weighted else None
    array = uneven(weight) if data.draw(st.booleans()) else weight
    output = torch.ops.robe.bag(array, values, offsets, factors, mode, *tables.arguments)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output.backward(uneven(upstream) if data.draw(st.booleans()) else upstream)

    want, grad, grad_factors = pool_loop(
        weight.detach().numpy(),
        bags,
        upstream.numpy(),
        mode=mode,
        padding_idx=tables.padding_idx,
        layouts=tables.layouts,
    )
    assert output.shape == (batch_size, len(bags), tables.embedding_dim)
    assert output.is_contiguous()
    np.testing.assert_allclose(output.detach().numpy(), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), grad, rtol=1e-12, atol=1e-12)
    if weighted:
        np.testing.assert_allclose(factors.grad.numpy(), grad_factors, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [0, 2])
@pytest.mark.parametrize("features", [1, 3])
def test_bag_of_nothing_at_all_is_zeros(mode, batch_size, features):
    """No examples, or none with an id: legal, as in nn.EmbeddingBag; the gradient is zero."""
    tables = Tables([4] * features)
    weight = tables.weight()
    offsets = torch.zeros(features * batch_size + 1, dtype=torch.long)
    output = torch.ops.robe.bag(weight, torch.empty(0, dtype=torch.long), offsets, None, mode, *tables.arguments)
    assert output.shape == (batch_size, features, tables.embedding_dim)
    assert not output.any()
    output.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(tables.size, dtype=torch.float64))


def test_bag_leaves_out_the_values_after_the_last_offset():
    """They belong to no bag: neither read, nor checked, and their factors take no gradient."""
    tables = Tables([4])
    weight, factors = tables.weight(), torch.tensor([1.0, 2, 3, 4], dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 1, 2])
    output = torch.ops.robe.bag(weight, torch.tensor([1, 2, 3, 99]), offsets, factors, "sum", *tables.arguments)
    output.sum().backward()
    bags = [[[(1, 1.0)], [(2, 2.0)]]]
    want, grad, grad_factors = pool_loop(
        weight.detach().numpy(), bags, np.ones((2, 1, 5)), mode="sum", padding_idx=None, layouts=tables.layouts
    )
    np.testing.assert_allclose(output.detach().numpy(), want, rtol=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), grad, rtol=1e-12)
    np.testing.assert_allclose(factors.grad.numpy(), [*grad_factors, 0, 0], rtol=1e-12)


def test_max_sends_the_gradient_to_the_first_of_equal_rows():
    """Rows that differ and hold equal values, which sharing never makes and an array of zeros does."""
    tables = Tables([3], hash="identity")
    weight = torch.zeros(tables.size, dtype=torch.float64, requires_grad=True)
    torch.ops.robe.bag(
        weight, torch.tensor([2, 0, 1]), torch.tensor([0, 3]), None, "max", *tables.arguments
    ).sum().backward()
    assert weight.grad.view(3, 5).tolist() == [[0] * 5, [0] * 5, [1] * 5]


def test_the_padding_id_needs_no_row_of_its_own():
    """Out of range for the table and yet legal: it reads zeros, and the gradient goes elsewhere."""
    tables = Tables([4], padding_idx=-1)
    weight = tables.weight()
    output = torch.ops.robe.lookup(weight, torch.tensor([[-1], [3]]), *tables.arguments)
    assert not output[0].any()
    output.sum().backward()
    slots, _ = places([3], **tables.layouts[0])
    assert weight.grad.sum() == 5
    assert set(weight.grad.nonzero().flatten().tolist()) == set(slots.flatten().tolist())


@pytest.mark.parametrize("mode", [None, *MODES])
def test_padding_is_zeros_even_beside_weights_that_are_not_finite(mode):
    """It is left out, not multiplied by zero: 0 * inf is nan. Only the row of id 3 is finite here."""
    tables = Tables([4], hash="identity", padding_idx=1)
    weight = torch.full((20,), torch.inf)
    weight[15:] = 2.0
    weight.requires_grad_()
    factors = torch.tensor([1.0, 3.0, 1.0], requires_grad=True) if mode == "sum" else None
    upstream = torch.ones(3, 1, 5)
    if mode is None:
        output = torch.ops.robe.lookup(weight, torch.tensor([[1], [3], [1]]), *tables.arguments)
        upstream[0] = torch.inf  # must not reach a weight
    else:
        ids, offsets = torch.tensor([1, 3, 1]), torch.tensor([0, 1, 2, 3])
        output = torch.ops.robe.bag(weight, ids, offsets, factors, mode, *tables.arguments)
    output.backward(upstream)
    scale = 3.0 if mode == "sum" else 1.0
    assert output.tolist() == [[[0.0] * 5], [[2.0 * scale] * 5], [[0.0] * 5]]
    assert weight.grad.tolist() == [0.0] * 15 + [scale] * 5
    if factors is not None:
        assert factors.grad.tolist() == [0.0, 10.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sign", [False, True])
def test_half_precision_bags_equal_float32_but_for_one_rounding(dtype, mode, sign):
    """Sums are taken in float32. Rounded once, a value is off by 1 in 2**8 (bfloat16) or 2**11 at most."""
    tables = Tables([50, 50], sign=sign)
    values, offsets, factors = flatten_bags(random_bags(np.random.default_rng(0), tables.rows, 4, longest=60))
    upstream = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    outputs, grads = [], []
    for compute in (dtype, torch.float32):
        weight = tables.weight(dtype, requires_grad=False).to(compute).requires_grad_()
        weights = factors.to(dtype).to(compute).requires_grad_() if mode == "sum" else None
        output = torch.ops.robe.bag(weight, values, offsets, weights, mode, *tables.arguments)
        output.backward(upstream.to(compute))
        assert output.dtype == weight.grad.dtype == compute
        outputs.append(output.detach().float())
        grads.append([x.grad.float() for x in (weight, weights) if x is not None])
    tolerance = torch.finfo(dtype).eps  # twice the largest error of a rounding
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=1e-4)
    for half, full in zip(*grads):
        torch.testing.assert_close(half, full, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lookup_copies_and_sums_its_gradient_in_float32(dtype):
    tables = Tables([2], sign=True)
    ids = torch.zeros(3000, 1, dtype=torch.long)
    weight = tables.weight(dtype)
    output = torch.ops.robe.lookup(weight, ids, *tables.arguments)
    slots, signs = places([0], **tables.layouts[0])
    assert torch.equal(output[7, 0], weight.detach()[torch.from_numpy(slots[0])] * torch.from_numpy(signs[0]))
    output.sum().backward()
    # Adding ones in half precision would stop at 256 (bfloat16) or 2048 (float16).
    want = np.zeros(tables.size)
    np.add.at(want, slots[0], 3000.0 * signs[0])
    torch.testing.assert_close(weight.grad.double(), torch.from_numpy(want), rtol=torch.finfo(dtype).eps, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What torch asks of operators

VARIANTS = {
    "plain": Tables([4, 6], size=20),
    "sign, padding": Tables([4, 6], size=20, sign=True, padding_idx=2),
    "wide blocks": Tables([4, 0], size=20, block_size=9, sign=True),
    "linear": Tables([4, 6], size=20, hash="linear", sign=True),
    "identity": Tables([4, 6], hash="identity", padding_idx=0),
}
HALF = [("plain", "sum", False), ("sign, padding", "sum", True), ("identity", "mean", False), ("plain", "max", False)]
BAG_VARIANTS = [(name, mode, False) for name in VARIANTS for mode in MODES] + [
    ("plain", "sum", True),
    ("sign, padding", "sum", True),
]


def lookup_inputs(tables, dtype=torch.float32, requires_grad=True):
    return tables.weight(dtype, requires_grad), torch.tensor([[1, 2], [3, 5], [2, 2]]), *tables.arguments


def bag_inputs(tables, mode, weighted, dtype=torch.float32, requires_grad=True):
    values, offsets = torch.tensor([1, 2, 3, 2, 5, 1, 0]), torch.tensor([0, 2, 2, 4, 7])
    weights = torch.linspace(-1, 2, 7).to(dtype).requires_grad_(requires_grad) if weighted else None
    return tables.weight(dtype, requires_grad), values, offsets, weights, mode, *tables.arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck_lookup(name, dtype):
    tables = VARIANTS[name]
    torch.library.opcheck(torch.ops.robe.lookup, lookup_inputs(tables, dtype))
    backward = (torch.ones(3, 2, 5, dtype=dtype), *lookup_inputs(tables, dtype, requires_grad=False))
    torch.library.opcheck(torch.ops.robe.lookup_backward, backward)


@pytest.mark.parametrize(
    ("name", "mode", "weighted", "dtype"),
    [(*variant, torch.float32) for variant in BAG_VARIANTS] + [(*variant, torch.bfloat16) for variant in HALF],
)
def test_opcheck_bag(name, mode, weighted, dtype):
    tables = VARIANTS[name]
    torch.library.opcheck(torch.ops.robe.bag, bag_inputs(tables, mode, weighted, dtype))
    backward = (torch.ones(2, 2, 5, dtype=dtype), *bag_inputs(tables, mode, weighted, dtype, requires_grad=False))
    torch.library.opcheck(torch.ops.robe.bag_backward, backward)
    if weighted:
        torch.library.opcheck(torch.ops.robe.bag_weights_backward, backward)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck_lookup(name):
    weight, *others = lookup_inputs(VARIANTS[name], torch.float64)
    assert torch.autograd.gradcheck(lambda w: torch.ops.robe.lookup(w, *others), weight)


@pytest.mark.parametrize(("name", "mode", "weighted"), [case for case in BAG_VARIANTS if "sign" in case[0]])
def test_gradcheck_bag(name, mode, weighted):
    weight, values, offsets, weights, *others = bag_inputs(VARIANTS[name], mode, weighted, torch.float64)
    assert torch.autograd.gradcheck(lambda w, s: torch.ops.robe.bag(w, values, offsets, s, *others), (weight, weights))


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (torch.ops.robe.lookup, lookup_inputs(VARIANTS["sign, padding"])),
        *[(torch.ops.robe.bag, bag_inputs(VARIANTS["sign, padding"], mode, False)) for mode in MODES],
        (torch.ops.robe.bag, bag_inputs(VARIANTS["sign, padding"], "sum", True)),
    ],
    ids=["lookup", *MODES, "weighted sum"],
)
def test_backward_keeps_no_index(op, inputs):
    """What autograd saves is what came in: nothing of the size of the rows read, N * D."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op(*inputs).sum()
    weight, *others = (x.data_ptr() for x in inputs if isinstance(x, torch.Tensor))
    assert {x.data_ptr() for x in saved} - {weight} == set(others)


@pytest.mark.parametrize("fake", ["meta", "FakeTensorMode"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fakes_know_the_shapes(fake, weighted):
    tables = Tables([4, 6])
    if fake == "meta":
        convert, dtype = (lambda x: x.to("meta")), torch.bfloat16
    else:
        convert, dtype = FakeTensorMode().from_tensor, torch.float32
    lookup, bag, lookup_grad, bag_grad = (
        [convert(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        for inputs in (
            lookup_inputs(tables, dtype, False),
            bag_inputs(tables, "sum", weighted, dtype, False),
            (torch.ones(3, 2, 5, dtype=dtype),),
            (torch.ones(2, 2, 5, dtype=dtype),),
        )
    )
    ops = torch.ops.robe
    for tensor, shape in (
        (ops.lookup(*lookup), (3, 2, 5)),
        (ops.bag(*bag), (2, 2, 5)),
        (ops.lookup_backward(*lookup_grad, *lookup), (60,)),
        (ops.bag_backward(*bag_grad, *bag), (60,)),
        *([(ops.bag_weights_backward(*bag_grad, *bag), (7,))] if weighted else []),
    ):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.device == lookup[0].device


def test_compile_takes_both_operators_whole():
    """One graph, forward and backward, and the numbers of eager mode."""
    tables = Tables([4, 6], sign=True, padding_idx=1)
    _, ids, *_ = lookup_inputs(tables)
    _, values, offsets, factors, mode, *_ = bag_inputs(tables, "sum", True)

    def loss(weight, factors):
        one = torch.ops.robe.lookup(weight, ids, *tables.arguments)
        many = torch.ops.robe.bag(weight, values, offsets, factors, mode, *tables.arguments)
        return one.square().sum() + (many * many.sum()).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        weight, weights = tables.weight(torch.float32), factors.detach().requires_grad_()
        value = function(weight, weights)
        results.append([value.detach(), *torch.autograd.grad(value, (weight, weights))])
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)


# ---------------------------------------------------------------------------------------------------------------------
# Errors. They come from the operators, so that no layer and no caller goes unchecked.

TWO = Tables([4, 6])
IDS = torch.tensor([[1, 2]])
VALUES, OFFSETS = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])


def lookup_with(weight=None, ids=IDS, **changes):
    torch.ops.robe.lookup(TWO.weight() if weight is None else weight, ids, *changed(**changes))


def bag_with(weight=None, values=VALUES, offsets=OFFSETS, weights=None, mode="sum", **changes):
    weight = TWO.weight() if weight is None else weight
    torch.ops.robe.bag(weight, values, offsets, weights, mode, *changed(**changes))


def changed(**changes):
    names = ("table_keys", "num_embeddings", "embedding_dim", "block_size", "hash", "sign", "padding_idx")
    return (dict(zip(names, TWO.arguments)) | changes).values()


@pytest.mark.parametrize("call", [lookup_with, bag_with])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.ones(60, 1)},
            r"weight: expected a floating-point vector \(m,\), got torch.float32 \(60, 1\)",
        ),
        ({"weight": torch.ones(60, dtype=torch.int64)}, r"weight: .* got torch.int64 \(60,\)"),
        ({"table_keys": torch.tensor([1])}, r"one entry per feature in each, got shapes \(1,\) and \(2,\)"),
        (
            {"table_keys": torch.ones(2, 1, dtype=torch.long), "num_embeddings": torch.ones(2, 1, dtype=torch.long)},
            r"one entry per feature in each, got shapes \(2, 1\) and \(2, 1\)",
        ),
        ({"hash": "md5"}, "hash: expected one of mix, linear, identity, got 'md5'"),
        ({"embedding_dim": 0}, "embedding_dim and block_size: expected at least 1, got 0 and 3"),
        ({"block_size": 0}, "embedding_dim and block_size: expected at least 1, got 5 and 0"),
        ({"block_size": 61}, "weight: 60 weights do not hold one block of 61"),
        ({"block_size": 61, "hash": "linear"}, "weight: 60 weights do not hold one block of 61"),
    ],
)
def test_both_operators_refuse(call, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS.float(), "ids: expected int32 or int64, got torch.float32"),
        (IDS.short(), "ids: expected int32 or int64, got torch.int16"),
        (IDS[0], r"ids: expected 2 dimensions, got shape \(2,\)"),
        (IDS[:, :1], r"ids: expected \(B, 2\), one column per feature, got \(1, 1\)"),
        (IDS.unsqueeze(0), r"ids: expected 2 dimensions, got shape \(1, 1, 2\)"),
    ],
)
def test_lookup_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        lookup_with(ids=ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": VALUES.double()}, "values: expected int32 or int64, got torch.float64"),
        ({"values": VALUES.view(3, 1)}, r"values: expected 1 dimension, got shape \(3, 1\)"),
        ({"offsets": OFFSETS.float()}, "offsets: expected int32 or int64, got torch.float32"),
        ({"offsets": OFFSETS.view(1, 3)}, r"offsets: expected 1 dimension, got shape \(1, 3\)"),
        ({"offsets": OFFSETS[:2]}, r"offsets: expected \(F \* B \+ 1,\) for F = 2 features, got \(2,\)"),
        ({"offsets": OFFSETS[:0]}, r"offsets: expected \(F \* B \+ 1,\) for F = 2 features, got \(0,\)"),
        asserted_on_gpus(
            {"offsets": torch.tensor([1, 2, 3])}, "offsets: expected to rise from 0 to at most 3, .* got 1 ... 3$"
        ),
        asserted_on_gpus(
            {"offsets": torch.tensor([-1, 2, 3])}, "offsets: expected to rise from 0 to at most 3, .* got -1 ... 3$"
        ),
        asserted_on_gpus(
            {"offsets": torch.tensor([0, 2, 4])}, "offsets: expected to rise from 0 to at most 3, .* got 0 ... 4$"
        ),
        asserted_on_gpus(
            {"offsets": torch.tensor([0, 3, 2])}, "offsets: expected to rise .* got 0 ... 2 and a fall between"
        ),
        ({"mode": "median"}, "pooling: expected one of sum, mean, max, got 'median'"),
        ({"weights": torch.ones(3).double(), "mode": "mean"}, "supported with pooling 'sum' only, got pooling 'mean'"),
        ({"weights": torch.ones(3).double(), "mode": "max"}, "supported with pooling 'sum' only, got pooling 'max'"),
        ({"weights": torch.ones(2).double()}, r"expected torch.float64 \(3,\) .* got torch.float64 \(2,\)"),
        ({"weights": torch.ones(3)}, r"expected torch.float64 \(3,\) .* got torch.float32 \(3,\)"),
    ],
)
def test_bag_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        bag_with(**changes)


@pytest.mark.cpu_only("a GPU trips an assertion instead")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(lookup_with, ids=torch.tensor([[1, 2], [4, 2]])), "id 4 of feature 0, whose table has 4 rows"),
        (partial(lookup_with, ids=torch.tensor([[1, 6]])), "id 6 of feature 1, whose table has 6 rows"),
        (partial(lookup_with, ids=torch.tensor([[-1, 2]])), "id -1 of feature 0, whose table has 4 rows"),
        (partial(lookup_with, ids=torch.tensor([[1, INT64_MIN]])), "id -9223372036854775808 of feature 1"),
        (partial(lookup_with, ids=torch.tensor([[1, 7]], dtype=torch.int32)), "id 7 of feature 1"),
        (partial(lookup_with, ids=torch.tensor([[-2, 1]]), padding_idx=-1), "id -2 of feature 0"),
        (
            partial(lookup_with, ids=torch.tensor([[5, 1]]), hash="identity", table_keys=torch.tensor([0, 20])),
            "id 5 of feature 0",
        ),
        (partial(bag_with, values=torch.tensor([4, 2, 3])), "id 4 of feature 0, whose table has 4 rows"),
        (partial(bag_with, values=torch.tensor([3, 5, 6])), "id 6 of feature 1, whose table has 6 rows"),
        (partial(bag_with, values=torch.tensor([3, 5, -1])), "id -1 of feature 1, whose table has 6 rows"),
        (partial(bag_with, offsets=torch.tensor([0, 2, 3, 3, 3]), values=torch.tensor([1, 2, 4])), "id 4 of feature 0"),
    ],
)
def test_an_id_outside_its_table_is_an_index_error_that_names_it(call, message):
    with pytest.raises(IndexError, match=f"index out of range: {message}"):
        call()


@pytest.mark.parametrize("call", [lookup_with, bag_with])
def test_fakes_refuse_what_the_bodies_refuse(call):
    with pytest.raises(ValueError, match="weight: 2 weights do not hold one block of 3"):
        call(weight=torch.ones(2, device="meta"))
