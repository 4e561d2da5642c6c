"""Block sparsity against numpy, and against the layers as they were."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dlrm import DLRM, DLRMConfig
from dlrm.sparsity import BlockPruner, chains_of, cubic, is_pruned, prunable_of, rearrange, sparsity

CONFIG = DLRMConfig(embedding_dim=4, bottom_mlp=(40, 9, 4), top_mlp=(20, 33, 1), table_rows=(10, 20), compression=3)


def layer(fan_in=30, fan_out=40, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(fan_in, fan_out)


def block_sums(weight, block):
    """By numpy, in float64: (blocks, fan_in)."""
    return np.add.reduceat(np.abs(weight.detach().double().numpy()), np.arange(0, len(weight), block))


@pytest.mark.parametrize("block", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_smallest_blocks_become_zero(block, share):
    linear = layer()
    before = linear.weight.detach().clone()
    sums = block_sums(before, block)
    BlockPruner([linear], block).step(share)
    after = block_sums(linear.weight, block)
    gone = after == 0
    assert gone.sum() == round(share * gone.size)
    assert sums[gone].max(initial=0) <= sums[~gone].min(initial=np.inf)
    kept = (~gone).repeat(block, 0)[:40]
    assert torch.equal(linear.weight[torch.from_numpy(kept)], before[torch.from_numpy(kept)]), "as they were"


def test_what_is_pruned_stays_so_while_the_share_grows_and_the_weights_move():
    linear = layer()
    pruner, gone = BlockPruner([linear]), torch.zeros(40, 30, dtype=torch.bool)
    for step in range(1, 30):
        share = 0.8 * cubic(step, 5, 20)
        linear.weight.data += torch.randn(40, 30) * 0.1
        pruner.step(share)
        assert not linear.weight[gone].any()
        gone = linear.weight == 0
        assert int((block_sums(linear.weight, 16) == 0).sum()) == round(share * 90)
    assert share == 0.8


def test_a_new_pruner_goes_on_where_the_last_one_was():
    linear = layer()
    first = BlockPruner([linear])
    first.step(0.4)
    twin = copy.deepcopy(linear)
    second = BlockPruner([twin])
    for step, share in enumerate((0.4, 0.4, 0.55, 0.7)):
        for one, pruner in ((linear, first), (twin, second)):
            torch.manual_seed(step)
            one.weight.data += torch.randn(40, 30) * 0.1
            pruner.step(share)
        assert torch.equal(linear.weight, twin.weight)


def test_tensors_beside_a_weight_lose_the_same_entries():
    linear, average = layer(), torch.ones(40, 30)
    BlockPruner([linear], 8).step(0.5, lambda weight: [average] if weight is linear.weight else [])
    assert torch.equal(average != 0, linear.weight != 0)


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(ValueError, match="block: expected at least 1, got 0"):
        BlockPruner([layer()], 0)
    with pytest.raises(ValueError, match=r"layers: expected nn.Linear, got ReLU"):
        BlockPruner([nn.ReLU()])
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share: expected 0 to 1"):
            BlockPruner([layer()]).step(share)


def test_the_cubic_schedule():
    assert [cubic(step, 10, 20) for step in (1, 10, 20, 30)] == [0, 0, 1, 1]
    assert cubic(15, 10, 20) == pytest.approx(1 - 0.5**3)
    assert cubic(11, 10, 20) == pytest.approx(1 - 0.9**3)
    assert [cubic(step, 5, 5) for step in (4, 5, 6)] == [0, 0, 1]


def test_sorting_outputs_leaves_the_function_as_it_is():
    chain = [layer(13, 40), layer(40, 24, 1), layer(24, 5, 2)]
    model = nn.Sequential(chain[0], nn.ReLU(), chain[1], nn.ReLU(), chain[2])
    before = copy.deepcopy(model)
    moments = {id(p): p.detach() * 7 for p in model.parameters()}
    rearrange(chain, lambda parameter: [moments[id(parameter)]])
    x = torch.rand(100, 13)
    torch.testing.assert_close(model(x), before(x), rtol=1e-6, atol=1e-6)
    for one, was in zip(chain[:-1], (before[0], before[2])):
        strength = one.weight.abs().sum(1)
        assert (strength[:-1] >= strength[1:] * (1 - 1e-6)).all()
        assert not torch.equal(one.weight, was.weight)
    for parameter in model.parameters():
        assert torch.equal(moments[id(parameter)], parameter * 7), "in the same order"


def test_layers_of_a_model():
    model = DLRM(CONFIG)
    bottom, top = chains_of(model)
    assert [x.out_features for x in bottom] == [40, 9, 4]
    assert [x.out_features for x in top] == [20, 33, 1]
    assert prunable_of(model) == [*bottom[1:], *top[:-1]]
    crossed = DLRM(CONFIG.from_dict(CONFIG.to_dict() | {"interaction": "cross", "cross_layers": 2, "cross_rank": 3}))
    net = crossed.interaction.net
    assert chains_of(crossed)[2:] == [[net.v[0], net.w[0]], [net.v[1], net.w[1]]]
    assert prunable_of(crossed)[-4:] == [net.v[0], net.w[0], net.v[1], net.w[1]]


@pytest.mark.parametrize("interaction", ["dot", "cross"])
def test_sorting_a_model_leaves_its_predictions_as_they_are(interaction):
    torch.manual_seed(0)
    model = DLRM(CONFIG.from_dict(CONFIG.to_dict() | {"interaction": interaction, "cross_layers": 2, "cross_rank": 3}))
    before = copy.deepcopy(model)
    for chain in chains_of(model):
        rearrange(chain)
    dense, sparse = torch.rand(50, 13), torch.randint(0, 99, (50, 2))
    torch.testing.assert_close(model(dense, sparse), before(dense, sparse), rtol=1e-6, atol=1e-6)


def test_sparsity_counts_the_zeros_of_linear_layers():
    model = nn.Sequential(layer(10, 20), nn.LayerNorm(20), layer(20, 10))
    assert sparsity(model) == 0
    assert not is_pruned(model)
    with torch.no_grad():
        model[0].weight[:10] = 0
    assert sparsity(model) == 0.25
    assert is_pruned(model)
    assert sparsity(nn.ReLU()) == 0
