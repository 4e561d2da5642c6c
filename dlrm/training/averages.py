"""Moving averages of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Steps between updates, each of which reads all weights and averages.
AVERAGED_STEPS = 8


class AveragedWeights:
    """Exponential moving averages of a model's weights: average += (weight - average) / min(step - start, steps).

    A step moves the weights that a batch reads, and with them every row that shares these weights. In the average,
    such moves cancel out. The more rows share a weight, the more the average gains: see docs/accuracy.md.

    Args:
        model: whose parameters are averaged.
        steps: how many steps the average reaches back, about.
        tensors: averages to go on from, by the names of their parameters; None: the weights as they are.

    Attributes:
        start: up to this step the averages are the weights. While a model is pruned, it is another one after each step.
    """

    def __init__(self, model: nn.Module, steps: int, tensors: dict[str, Tensor] | None = None):
        self._parameters = dict(model.named_parameters())
        self._steps, self.start = steps, 0
        tensors = tensors or {name: p.detach().clone() for name, p in self._parameters.items()}
        self.tensors = {name: tensors[name] for name in self._parameters}  # in the order of the parameters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; most steps are skipped.

        Args:
            step: counted from 1.
        """
        if step % AVERAGED_STEPS == 0:
            weight = min(AVERAGED_STEPS / min(max(step - self.start, 1), self._steps), 1.0)
            torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), weight)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Give the model the averages as weights, within a ``with`` statement."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            self.tensors[name], parameter.data = parameter.data, self.tensors[name]
