"""Plans against the model's parts, called one by one."""

import gc

import pytest
import torch
from torch import nn

from dlrm.inference.plan import Plan
from dlrm.inference.predictor import Predictor
from robe import RobeEmbeddingBagCollection
from tests.dlrm.inference.test_predictor import CONFIG, CONFIGS, expected, make, rows_of
from tests.helpers.kernels import needs_kernels

pytestmark = needs_kernels


def by_parts(predictor, dense, sparse):
    return predictor(dense, sparse, clock=lambda stage: None)


@pytest.mark.parametrize("array_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_probabilities_are_those_of_the_parts(name, array_dtype):
    if array_dtype != "float32" and name in ("full", "full, several ids", "hash"):
        return  # tables have no array
    predictor = Predictor(make(CONFIGS[name]), array_dtype=array_dtype)
    for count in (0, 1, 63, 65, 1100):
        dense, sparse = rows_of(predictor.config, count)
        torch.testing.assert_close(predictor(dense, sparse), by_parts(predictor, dense, sparse), rtol=1e-6, atol=1e-12)


def prune(model, block):
    """Set half of the blocks of an MLP's outputs to zero."""
    with torch.no_grad():
        for linear in model.modules():
            if isinstance(linear, nn.Linear):
                kept = torch.rand(-(-len(linear.weight) // block), linear.in_features) < 0.5
                linear.weight *= kept.repeat_interleave(block, 0)[: len(linear.weight)]


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("name", ["robe", "cross", "full"])
def test_blocks_of_zeros_are_left_out(name, block):
    model = make(CONFIGS[name])
    prune(model, block)
    predictor = Predictor(model)
    layers = [layer for chain in (predictor._bottom, predictor._top) for layer in chain.layers]
    assert all(layer.weights.dim() == 2 for layer in layers)
    dense, sparse = rows_of(CONFIG, 300)
    torch.testing.assert_close(predictor(dense, sparse), expected(model, dense, sparse), rtol=0, atol=1e-6)
    alone = [predictor(*row) for row in zip(dense.split(1), sparse.split(1))]
    assert torch.equal(torch.cat(alone), predictor(dense, sparse))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(name, threads):
    predictor = Predictor(make(CONFIGS[name]))
    dense, sparse = rows_of(predictor.config, 600)
    want = predictor(dense, sparse)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in (1, 2, 5, 12, 77, 513):
            pieces = zip(dense.split(size), sparse.split(size))
            got = torch.cat([predictor(*piece) for piece in list(pieces)[:60]])
            assert torch.equal(got, want[: len(got)])
    finally:
        torch.set_num_threads(before)


def test_ids_of_32_bits_and_strided_rows():
    predictor = Predictor(make(CONFIGS["full"]))
    dense, sparse = rows_of(CONFIG, 70)
    sparse = sparse % 2**31
    want = predictor(dense, sparse)
    assert torch.equal(predictor(dense, sparse.int()), want)
    assert torch.equal(predictor(dense.T.contiguous().T, sparse.repeat_interleave(2, 1)[:, ::2]), want)


def test_embeddings_of_any_layout_take_the_place_of_ids():
    predictor = Predictor(make(CONFIGS["cross"]))
    dense, sparse = rows_of(CONFIG, 70)
    plan = Plan(CONFIGS["full, several ids"], nn.Identity(), predictor._bottom, predictor._interaction, predictor._top)
    with torch.no_grad():
        embeddings = predictor.embeddings(sparse)
    want = predictor(dense, sparse)
    others = embeddings.transpose(0, 1).contiguous().transpose(0, 1), embeddings.repeat_interleave(2, 2)[:, :, ::2]
    for same in (embeddings, *others):
        assert torch.equal(plan(dense, embeddings=same), want)
    with pytest.raises(ValueError, match=r"embeddings: expected float32 \(70, 4, 8\), got torch.float32 \(70, 4, 7\)"):
        plan(dense, embeddings=embeddings[:, :, :7])
    with pytest.raises(ValueError, match="ids and embeddings: expected one of them"):
        plan(dense, sparse, embeddings)


class Doubled(RobeEmbeddingBagCollection):
    def forward(self, *ids):
        return 2 * super().forward(*ids)


@pytest.mark.parametrize("what", ["subclass", "hook", "float16", "module"])
def test_embeddings_that_are_more_than_a_lookup_are_called(what):
    model = make(CONFIG)
    if what == "subclass":
        model.embeddings.__class__ = Doubled
    elif what == "hook":
        model.embeddings.register_forward_hook(lambda module, ids, result: 2 * result)
    elif what == "float16":
        model.embeddings.half()
    else:
        model.embeddings = nn.Sequential(model.embeddings)
    dense, sparse = rows_of(CONFIG, 600)
    with torch.no_grad():
        embeddings = model.embeddings(sparse).float()
        want = torch.sigmoid(model.top(model.interaction(model.bottom(dense), embeddings))).squeeze(1)
    predictor = Predictor(model)
    assert not predictor._plan.reads_ids
    torch.testing.assert_close(predictor(dense, sparse), want, rtol=0, atol=1e-6)


def test_a_plan_is_freed_with_its_predictor():
    predictor = Predictor(make(CONFIG))
    request = rows_of(CONFIG, 3)
    number = predictor._plan._number
    torch.ops.dlrm.run_plan(number, *request)
    del predictor
    gc.collect()
    with pytest.raises(ValueError, match=r"plan: expected one that make_plan returned, got \d+"):
        torch.ops.dlrm.run_plan(number, *request)
