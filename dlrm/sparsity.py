"""1xN block sparsity: weights of linear layers that are zero for N outputs beside each other and one input.

    pruner = BlockPruner([linear1, linear2], block=16)
    for step, batch in enumerate(batches, 1):
        ...
        optimizer.step()
        pruner.step(0.75 * cubic(step, first=1000, last=3000))

The blocks with the smallest sums of absolute values go first, in each layer for itself (Lin et al. 2021, "1xN Pattern
for Pruning Convolutional Neural Networks"). A pruned layer is an nn.Linear like any other, in which these weights are
zero. ``dlrm.inference.Predictor`` leaves out blocks of 16 and 32.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dlrm.model import DLRM, CrossInteraction

Beside = Callable[[Tensor], Iterable[Tensor]]  # of a parameter: tensors of its shape that go with it


class BlockPruner:
    """Prunes linear layers in blocks while they are trained.

    What is pruned stays so: a block of zeros has the smallest sum. A new pruner of the same layers therefore goes on
    where the last one was.

    Args:
        layers: to prune.
        block: N, the outputs of a block; the last block of a layer may have fewer.

    Raises:
        ValueError: block is below 1, or a layer is no nn.Linear.

    Examples:
        >>> layer = torch.nn.Linear(100, 64)
        >>> BlockPruner([layer], block=16).step(0.75)
        >>> sparsity(layer)
        0.75
    """

    def __init__(self, layers: Sequence[nn.Linear], block: int = 16):
        if block < 1:
            raise ValueError(f"block: expected at least 1, got {block}")
        for layer in layers:
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"layers: expected nn.Linear, got {type(layer).__name__}")
        self._layers, self._block = list(layers), block
        self._masks = [(self._sums(layer) > 0) for layer in self._layers]  # (blocks, fan_in)
        self._kept = [self._weights_of(layer, mask) for layer, mask in zip(self._layers, self._masks)]

    @torch.no_grad()
    def step(self, share: float, beside: Beside = lambda parameter: ()) -> None:
        """Set blocks to zero; to be called after each step of the optimizer, which moves pruned weights too.

        Args:
            share: of the blocks of each layer, to the nearest block.
            beside: of a weight: tensors in which the same entries are set to zero, such as its moving average.

        Raises:
            ValueError: share is not in [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share: expected 0 to 1, got {share}")
        for i, layer in enumerate(self._layers):
            mask = self._masks[i]
            count = round(share * mask.numel())
            if count > mask.numel() - int(mask.sum()):
                sums = self._sums(layer).masked_fill(~mask, -1)
                mask = torch.ones_like(mask)
                # Sorted and stable, so that every process and every run takes the same of equal ones.
                mask.view(-1)[sums.flatten().argsort(stable=True)[:count]] = False
                self._masks[i], self._kept[i] = mask, self._weights_of(layer, mask)
            for tensor in (layer.weight, *beside(layer.weight)):
                tensor.mul_(self._kept[i])

    def _sums(self, layer: nn.Linear) -> Tensor:
        """The sum of absolute values of each block, (blocks, fan_in)."""
        weight = layer.weight.detach().abs()
        padded = nn.functional.pad(weight, (0, 0, 0, -len(weight) % self._block))
        return padded.view(-1, self._block, weight.shape[1]).sum(1)

    def _weights_of(self, layer: nn.Linear, mask: Tensor) -> Tensor:
        """1 for each weight of the blocks in a mask, and 0 for the others."""
        return mask.repeat_interleave(self._block, 0)[: len(layer.weight)].to(layer.weight.dtype)


def cubic(step: int, first: int, last: int) -> float:
    """Return how much of the pruning is done after a step: 1 - (1 - t)^3 (Zhu and Gupta 2017).

    Args:
        step: counted from 1.
        first: up to this step, 0.
        last: from this step on, 1.
    """
    done = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
    return 1 - (1 - done) ** 3


@torch.no_grad()
def rearrange(chain: Sequence[nn.Linear], beside: Beside = lambda parameter: ()) -> None:
    """Sort the outputs of each layer but the last by the sum of their weights' absolute values, the largest first.

    Outputs that are alike then share blocks. The inputs of the next layer follow, so the chain computes the same
    function, except for rounding.

    Args:
        chain: layers that follow each other, with nothing but activation functions of single numbers between them.
        beside: of a parameter: tensors that are put in the same order, such as its moments in an optimizer.
    """
    for layer, following in pairwise(chain):
        order = layer.weight.abs().sum(1).argsort(descending=True, stable=True)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                for tensor in (parameter, *beside(parameter)):
                    tensor.copy_(tensor[order])
        for tensor in (following.weight, *beside(following.weight)):
            tensor.copy_(tensor[:, order])


def sparsity(module: nn.Module) -> float:
    """Return the share of the weights of a module's linear layers that are zero.

    Args:
        module: any.
    """
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(sum(weight.numel() for weight in weights), 1)


def is_pruned(module: nn.Module) -> bool:
    """Return whether linear layers of a module were pruned: training alone makes next to no weight exactly zero."""
    return sparsity(module) > 0.01


def chains_of(model: DLRM) -> list[list[nn.Linear]]:
    """Return the linear layers of a DLRM that follow each other: of the MLPs, and V and W of each cross layer."""
    chains = [_linears(model.bottom), _linears(model.top)]
    if isinstance(model.interaction, CrossInteraction):
        net = model.interaction.net
        chains += [[*_linears(v), *_linears(w)] for v, w in zip(net.v, net.w)]
    return chains


def prunable_of(model: DLRM) -> list[nn.Linear]:
    """Return the layers of a DLRM to prune: all but the one of the dense features and the one of the logit.

    These two have few weights, and each of them decides a lot.
    """
    bottom, top, *cross = chains_of(model)
    return [*bottom[1:], *top[:-1], *(layer for chain in cross for layer in chain)]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [x for x in module.modules() if isinstance(x, nn.Linear)]
