"""ROBE embeddings: tables of any size on one small shared array of weights."""

from robe.array import RobeArray
from robe.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.embedding import RobeEmbedding, RobeEmbeddingBag

__all__ = ["EmbeddingBagConfig", "RobeArray", "RobeEmbedding", "RobeEmbeddingBag", "RobeEmbeddingBagCollection"]
