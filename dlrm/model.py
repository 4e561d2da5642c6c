"""The deep learning recommendation model (Naumov et al. 2019): bottom MLP, embeddings, pairwise dots, top MLP.

B examples, F categorical features, D embedding_dim, N = F + 1 vectors that interact.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dlrm.config import DLRMConfig
from dlrm.embeddings import bags, build_embeddings


class MLP(nn.Sequential):
    """Linear layers with ReLU between them.

    Initial values as in facebookresearch/dlrm: W ~ N(0, 2 / (fan_in + fan_out)), b ~ N(0, 1 / fan_out).

    Args:
        widths: of the input and after each layer.
        relu_last: whether the last layer has a ReLU too.
    """

    def __init__(self, widths: Sequence[int], relu_last: bool):
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.normal_(linear.weight, std=math.sqrt(2 / (fan_in + fan_out)))
            nn.init.normal_(linear.bias, std=math.sqrt(1 / fan_out))
            layers += [linear, nn.ReLU()]
        super().__init__(*(layers if relu_last else layers[:-1]))


class DotInteraction(nn.Module):
    """The dot products of all pairs of N = F + 1 vectors.

    Strictly lower triangle, row by row, as in facebookresearch/dlrm.
    """

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """dense (B, D) and embeddings (B, F, D) -> (B, D + N * (N - 1) / 2): dense, then the products."""
        return torch.ops.robe.dot_interaction(dense, embeddings)


class DLRM(nn.Module):
    """A DLRM; the loss and the sigmoid lie outside.

    Args:
        config: its hyperparameters.
        embeddings: a module (B, F) int64 -> (B, F, D), such as RobeEmbeddingBagCollection; None: the config's.
    """

    def __init__(self, config: DLRMConfig, embeddings: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.embeddings = build_embeddings(config) if embeddings is None else embeddings
        vectors = len(config.table_rows) + 1
        self.bottom = MLP((config.num_dense, *config.bottom_mlp), relu_last=True)
        self.interaction = DotInteraction()
        self.top = MLP((config.embedding_dim + vectors * (vectors - 1) // 2, *config.top_mlp), relu_last=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """The logits of clicks.

        Args:
            dense: (B, num_dense) float.
            sparse: (B, F) int64 ids; (B, sum(config.hots)) with several ids a feature, whose embeddings are summed.

        Returns:
            (B,) float.
        """
        x = self.bottom(dense)  # (B, D)
        rows = self.embeddings(sparse) if self.config.hots is None else self.embeddings(*bags(sparse, self.config.hots))
        return self.top(self.interaction(x, rows)).squeeze(1)
