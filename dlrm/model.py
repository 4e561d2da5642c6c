"""The deep learning recommendation model (Naumov et al. 2019): bottom MLP, embeddings, interaction, top MLP.

B examples, F categorical features, D embedding_dim, N = F + 1 vectors that interact.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import dlrm.ops  # noqa: F401  (registers torch.ops.dlrm)
from dlrm.config import DLRMConfig
from dlrm.embeddings import bags, build_embeddings, synthetic_ids


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
        return torch.ops.dlrm.dot_interaction(dense, embeddings)


class LowRankCrossNet(nn.Module):
    """DCNv2's cross net with matrices of low rank (Wang et al. 2021): x' = x0 * (W (V x) + b) + x, layer by layer.

    Initial values as in torchrec: W, V ~ Xavier's normal distribution, b = 0.

    Args:
        width: of the input and of the output.
        layers: how many.
        rank: V is (rank, width), W (width, rank).
    """

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        self.v = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.w = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.xavier_normal_(parameter)

    def forward(self, x0: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        x = x0
        for v, w in zip(self.v, self.w):
            x = torch.addcmul(x, x0, w(v(x)))
        return x


class CrossInteraction(nn.Module):
    """The cross net over all N = F + 1 vectors, one behind the other."""

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        self.net = LowRankCrossNet(width, layers, rank)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """dense (B, D) and embeddings (B, F, D) -> (B, N * D)."""
        return self.net(torch.cat([dense, embeddings.flatten(1)], dim=1))


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
        if config.interaction == "dot":
            self.interaction: nn.Module = DotInteraction()
            width = config.embedding_dim + vectors * (vectors - 1) // 2
        else:
            width = vectors * config.embedding_dim
            self.interaction = CrossInteraction(width, config.cross_layers, config.cross_rank)
        self.top = MLP((width, *config.top_mlp), relu_last=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """The logits of clicks.

        Args:
            dense: (B, num_dense) float.
            sparse: (B, F) int64 ids; (B, sum(config.hots)) with several ids a feature, whose embeddings are summed, but
                for config.synthetic_hots, with which the model makes those of (B, F).

        Returns:
            (B,) float.
        """
        x = self.bottom(dense)  # (B, D)
        config = self.config
        if config.hots is None:
            rows = self.embeddings(sparse)
        else:
            if config.synthetic_hots:
                sparse = synthetic_ids(sparse, config.hots, config.table_rows)
            rows = self.embeddings(*bags(sparse, config.hots))
        return self.top(self.interaction(x, rows)).squeeze(1)
