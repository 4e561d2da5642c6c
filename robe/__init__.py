"""ROBE embeddings: tables of any size on one small shared array of weights."""

from robe import optim
from robe.admission import Admission, IdCounter
from robe.array import Int8RobeArray, RobeArray
from robe.authors import load_authors_weights
from robe.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.compress import CompressionReport, compress
from robe.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.keyed import RobeKeyedEmbeddingBagCollection
from robe.native import backend
from robe.saving import load, save

__all__ = [
    "Admission",
    "CompressionReport",
    "EmbeddingBagConfig",
    "IdCounter",
    "Int8RobeArray",
    "RobeArray",
    "RobeEmbedding",
    "RobeEmbeddingBag",
    "RobeEmbeddingBagCollection",
    "RobeKeyedEmbeddingBagCollection",
    "backend",
    "compress",
    "load",
    "load_authors_weights",
    "optim",
    "save",
]
