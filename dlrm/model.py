"""The deep learning recommendation model (Naumov et al. 2019): bottom MLP, embeddings, interaction, top MLP.

Shapes: B examples, F categorical features, D = embedding_dim, N = F + 1 vectors that interact.
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

    Initial values are those of facebookresearch/dlrm: W ~ N(0, 2 / (fan_in + fan_out)), b ~ N(0, 1 / fan_out).

    Args:
        widths: of the input and after each layer.
        relu_last: whether a ReLU follows the last layer too.
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

    Their order is the strictly lower triangle, row by row, as in facebookresearch/dlrm.
    """

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """Return the dense vector followed by the products, (B, D + N * (N - 1) / 2).

        Args:
            dense: (B, D).
            embeddings: (B, F, D).
        """
        return torch.ops.dlrm.dot_interaction(dense, embeddings)


class LowRankCrossNet(nn.Module):
    """DCNv2's cross net with matrices of low rank (Wang et al. 2021): x' = x0 * (W (V x) + b) + x in each layer.

    Initial values are those of torchrec: W and V from Xavier's normal distribution, b = 0.

    Args:
        width: of the input and of the output.
        layers: the number of layers.
        rank: V is (rank, width), W is (width, rank).
    """

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        self.v = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.w = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.xavier_normal_(parameter)

    def forward(self, x0: Tensor) -> Tensor:
        """Apply all layers.

        Args:
            x0: (B, width).

        Returns:
            (B, width).
        """
        x = x0
        for v, w in zip(self.v, self.w):
            x = torch.addcmul(x, x0, w(v(x)))
        return x


class CrossInteraction(nn.Module):
    """The cross net over the concatenation of all N = F + 1 vectors.

    Args:
        width: N * D.
        layers: of the cross net.
        rank: of its matrices.
    """

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        self.net = LowRankCrossNet(width, layers, rank)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """Return the crossed vectors, (B, N * D).

        Args:
            dense: (B, D).
            embeddings: (B, F, D).
        """
        return self.net(torch.cat([dense, embeddings.flatten(1)], dim=1))


class DLRM(nn.Module):
    """A DLRM that returns logits.

        model = DLRM(PRESETS["kaggle"].model)
        logits = model(torch.randn(2, 13), torch.randint(0, 2**32, (2, 26)))  # (2,)

    Args:
        config: the hyperparameters.
        embeddings: a module (B, F) int64 -> (B, F, D), such as robe.RobeEmbeddingBagCollection; None: the config's.
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
        """Return the logits of clicks, (B,) float.

        Args:
            dense: (B, num_dense) float.
            sparse: (B, F) int64 ids. With config.hots, (B, sum(hots)), and the embeddings of a feature are summed; with
                config.synthetic_hots the model makes these ids from (B, F).
        """
        x = self.bottom(dense)  # (B, D)
        config = self.config
        if config.hots is None:
            embeddings = self.embeddings(sparse)
        else:
            if config.synthetic_hots:
                sparse = synthetic_ids(sparse, config.hots, config.table_rows)
            embeddings = self.embeddings(*bags(sparse, config.hots))
        return self.top(self.interaction(x, embeddings)).squeeze(1)
