"""The whole forward pass of a model as one operator, without Python between its parts."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlrm.config import DLRMConfig
from dlrm.embeddings import Tables, VocabularyTables
from dlrm.inference.packing import Chain, Cross, lists
from robe import RobeEmbeddingBagCollection


class Plan:
    """A model in float32, prepared for ``torch.ops.dlrm.run_plan``.

    A row's probability is the same to the bit alone and in any batch, on any number of threads.

    Args:
        config: of the model.
        embeddings: of the model. They are read where they are: do not change them afterwards.
        bottom, top: the model's MLPs.
        interaction: a Cross, or a module that computes dot products.

    Attributes:
        reads_ids: whether it reads the embeddings itself. If not, it is called with them.
    """

    def __init__(self, config: DLRMConfig, embeddings: nn.Module, bottom: Chain, interaction: Any, top: Chain):
        dim, features = config.embedding_dim, len(config.table_rows)
        scale = filter = None
        self._rows: Callable[[Tensor], Tensor] | None = None
        layout: tuple[Any, ...] = dim, dim, "identity", False, None
        self.reads_ids = config.hots is None and _can_be_read(embeddings)
        if not self.reads_ids:  # an array that nothing is read from
            weight, tables = torch.zeros(dim), (torch.zeros(features).long(), torch.ones(features).long())
        elif isinstance(embeddings, Tables):
            weight, tables = embeddings.weight.view(-1), (embeddings.first_rows * dim, embeddings.table_rows)
            self._rows = embeddings.rows
        else:
            assert isinstance(embeddings, RobeEmbeddingBagCollection)
            weight, scale = embeddings.array.read()
            filter = None if embeddings.admission is None else embeddings.admission.filter
            tables = embeddings.table_keys, embeddings.num_embeddings_per_feature
            layout = dim, embeddings.block_size, embeddings.hash, embeddings.sign, None
        chains: list[Any] = [bottom, top]
        if isinstance(interaction, Cross):
            chains += [chain for layer in interaction.layers for chain in layer]
        self._number = torch.ops.dlrm.make_plan(
            weight.detach(),
            *tables,
            *layout,
            scale,
            filter,
            *lists(layer for chain in chains for layer in chain.layers),
            [chain.width for chain in chains],
            [len(chain.layers) for chain in chains],
        )
        weakref.finalize(self, torch.ops.dlrm.drop_plan, self._number)

    def __call__(self, dense: Tensor, ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Predict a batch, without autograd.

        Args:
            dense: (B, num_dense) float32.
            ids: (B, F) int64 or int32.
            embeddings: (B, F, D) float32, instead of ids.

        Returns:
            (B,) float32 probabilities.

        Raises:
            ValueError: an argument is something else.
            IndexError: an id is outside its table.
        """
        if ids is not None and self._rows is not None:
            ids = self._rows(ids)
        return torch.ops.dlrm.run_plan(self._number, dense, ids, embeddings)


def _can_be_read(embeddings: nn.Module) -> bool:
    """Whether calling a module is no more than a lookup in its array or tables."""
    if type(embeddings) not in (RobeEmbeddingBagCollection, Tables, VocabularyTables):
        return False
    if embeddings._forward_hooks or embeddings._forward_pre_hooks:
        return False
    if isinstance(embeddings, RobeEmbeddingBagCollection):
        return embeddings.array.read()[0].dtype in (torch.float32, torch.bfloat16, torch.int8)
    return embeddings.weight.dtype is torch.float32
