"""The operators ``torch.ops.robe.*``: importing this package registers them, with their bodies in plain torch."""

from robe.ops.decomposition import DECOMPOSITIONS, for_torchscript
from robe.ops.layout import POOLINGS
from robe.ops.schema import REFERENCE

__all__ = ["DECOMPOSITIONS", "POOLINGS", "REFERENCE", "for_torchscript"]
