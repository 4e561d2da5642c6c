"""Schemas, fakes and autograd agree with the bodies, as torch asks of operators."""

import pytest
import torch

from robe.ops.layout import UpdateLists, unpack_lookup_backward
from tests.helpers.problems import (
    HASHES,
    RULES,
    Problem,
)

# ---------------------------------------------------------------------------------------------------------------------
# What torch asks of operators


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_opcheck(hash, dtype):
    problem = Problem([10, 20], size=300, dim=5, block=3, hash=hash, dtype=dtype)
    lookup, bag = (*problem.lookup(3), problem.scale), (*problem.bag(3, "sum", weighted=True), problem.scale)
    if dtype != torch.int8:
        weight = problem.weight.clone().requires_grad_()
        torch.library.opcheck(torch.ops.robe.lookup, (weight, *lookup[1:]))
        torch.library.opcheck(torch.ops.robe.bag, (weight, *bag[1:]))
    out = torch.empty(3, 3, 5, dtype=problem.embedding_dtype)
    torch.library.opcheck(torch.ops.robe.lookup_forward, lookup)
    torch.library.opcheck(torch.ops.robe.bag_forward, bag)
    torch.library.opcheck(torch.ops.robe.lookup_out, (*lookup, out[:, 1:]))
    torch.library.opcheck(torch.ops.robe.bag_out, (*bag, out[:, 1:]))


@pytest.mark.parametrize("rule", RULES)
def test_opcheck_update(rule):
    problem = Problem([10, 20], size=300, dim=5, block=3)
    _, *lookup = problem.lookup(3)
    state = [torch.ones(300) for _ in range({"adam": 2}.get(rule, 1))]
    lists = UpdateLists.pack([(problem.grad(3), unpack_lookup_backward(lookup))])
    torch.library.opcheck(torch.ops.robe.update_, (problem.weight, state, rule, RULES[rule], *lists))
    torch.library.opcheck(torch.ops.robe.sum_gradients, (problem.weight, *lists))


# ---------------------------------------------------------------------------------------------------------------------
# What autograd keeps


@pytest.mark.parametrize("pooling", [None, "sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_may_change_before_the_backward_pass_unless_it_reads_them(pooling, weighted):
    """As for nn.Embedding and nn.EmbeddingBag, between whose forward and backward another loss may take a step."""
    if weighted and pooling != "sum":
        return
    problem = Problem([10, 20], size=300, dim=5, block=3)
    op, call = torch.ops.robe.lookup, problem.lookup(3)
    if pooling is not None:
        op, call = torch.ops.robe.bag, problem.bag(3, pooling, weighted=weighted)
    weight = call[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(op(weight, *call[1:]).sum(), weight)
    output = op(weight, *call[1:])
    with torch.no_grad():
        weight += 1
    if pooling == "max" or weighted:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    else:
        output.sum().backward()
        assert torch.equal(weight.grad, want)


def test_meta_tensors_beside_real_ones_are_refused_by_name():
    """Not computed: the result would be memory that nobody has set."""
    problem = Problem([10, 20], size=300, dim=5, block=3)
    lookup, out, grad = problem.lookup(3), torch.empty(3, 3, 5), problem.grad(3)
    operators = torch.ops.robe

    def with_meta(place):
        return [x.to("meta") if k == place else x for k, x in enumerate(lookup)]

    for place, name in enumerate(("weight", "ids", "table_keys", "num_embeddings")):
        for call in (
            lambda arguments: operators.lookup(*arguments),
            lambda arguments: operators.lookup_forward(*arguments),
            lambda arguments: operators.lookup_out(*arguments, None, out),
            lambda arguments: operators.lookup_backward(grad, *arguments),
        ):
            with pytest.raises(
                ValueError, match=f"^{name}: expected a tensor with values, as .* is, got one on the meta"
            ):
                call(with_meta(place))
    with pytest.raises(ValueError, match="out: expected a tensor with values"):
        operators.lookup_out(*lookup, None, out.to("meta"))
    lists = UpdateLists.pack([(grad, unpack_lookup_backward(with_meta(2)[1:]))])
    with pytest.raises(ValueError, match="table_keys: expected a tensor with values"):
        operators.update_(problem.weight, [], "sgd", RULES["sgd"], *lists)
    whole = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in lookup]
    assert operators.lookup(*whole).is_meta
