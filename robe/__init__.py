"""ROBE embeddings: tables of any size on one small shared array of weights."""

import sys

from robe import layers, optim
from robe.admission import Admission, IdCounter
from robe.array import Int8RobeArray, RobeArray
from robe.authors import load_authors_weights
from robe.backends import backend
from robe.compress import CompressionReport, compress
from robe.layers.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.layers.keyed import RobeKeyedEmbeddingBagCollection
from robe.saving import load, save
from robe.version import __version__

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
    "__version__",
    "backend",
    "compress",
    "load",
    "load_authors_weights",
    "optim",
    "save",
]

# Models that 0.8.0 pickled as a whole name these modules.
for _name in ("collection", "embedding", "keyed", "tables"):
    sys.modules[f"robe.{_name}"] = getattr(layers, _name)
