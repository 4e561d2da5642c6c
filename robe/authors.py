"""load_authors_weights: layers from checkpoints of the ROBE authors' code."""

import os
import pickle
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robe.hashing import LINEAR
from robe.layers.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection

_ARRAY = "hashed_weight"
_CONSTANTS = "random_numbers"


def load_authors_weights(
    source: str | os.PathLike | Mapping,
    num_embeddings: Sequence[int],
    embedding_dim: int,
    *,
    block_size: int = 1,
    names: Sequence[str] | None = None,
) -> RobeEmbeddingBagCollection:
    """A collection that reads the array of a model trained with the ROBE authors' code, as that code reads it.

    Checkpoints of their DLRM hold the array and the constants of the hash, but neither the sizes of the tables, which
    lie one behind the other in the hash, nor the block size: those are of the command line that trained it.

    Args:
        source: a file that ``torch.save`` wrote, or what it holds: a ``state_dict``, or a dict with one in it, as their
            DLRM saves it. Of a file only tensors and plain Python values are read.
        num_embeddings: rows of each table, in the order of their ``emb_l``.
        embedding_dim: d, their ``--arch-sparse-feature-size``.
        block_size: Z, their ``--rma-chunk-size`` or ``uma_chunk_size``.
        names: of the tables; None: cat_0, cat_1 ...

    Returns:
        A RobeEmbeddingBagCollection with hash="linear" and pooling "sum", on an array in the dtype of theirs. Theirs
        overflows where row + first row of the table is above 1e10; this does not.

    Raises:
        ValueError: there is no array in it, or several different ones; other constants of the hash than theirs are by
            default (seed 1024), which "linear" stands for; or other numbers of tables.
        FileNotFoundError, PermissionError: of the file.
    """
    weights, where = _state_dict(source)
    arrays = [weights[name] for name in weights if name.split(".")[-1] == _ARRAY]
    if not arrays:
        raise ValueError(f"source: expected a {_ARRAY} among the weights{where}, got {_some(weights)}")
    if any(array.dim() != 1 or not torch.equal(array, arrays[0]) for array in arrays):
        raise ValueError(
            f"source: expected one array that all tables share{where}, got {len(arrays)} different ones; load each "
            "table with weights of its own alone"
        )
    tables = [name for name in weights if name.split(".")[-1] == _CONSTANTS]
    for name in tables:
        constants = tuple(weights[name][:4].tolist())
        if constants != LINEAR:
            raise ValueError(
                f"source: {name}{where}: expected the constants {LINEAR} of the authors' seed 1024, got {constants}"
            )
    if tables and len(tables) != len(num_embeddings):
        raise ValueError(f"num_embeddings: there are {len(tables)} tables{where}, got {len(num_embeddings)} sizes")
    names = [f"cat_{k}" for k in range(len(num_embeddings))] if names is None else names
    if len(names) != len(num_embeddings):
        raise ValueError(f"names: expected {len(num_embeddings)}, one a table, got {len(names)}")
    collection = RobeEmbeddingBagCollection(
        [EmbeddingBagConfig(name, rows, embedding_dim) for name, rows in zip(names, num_embeddings)],
        robe_size=len(arrays[0]),
        block_size=block_size,
        hash="linear",
        dtype=arrays[0].dtype,
    )
    with torch.no_grad():
        collection.array.weight.copy_(arrays[0])
    return collection


def _state_dict(source: str | os.PathLike | Mapping) -> tuple[dict[str, Tensor], str]:
    where = ""
    if not isinstance(source, Mapping):
        where = f" of {os.fspath(source)}"
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"source: expected what torch.save wrote in {where[4:]}: {error}") from error
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping):
        raise ValueError(f"source: expected a state_dict, or a dict with one{where}, got a {type(source).__name__}")
    return {str(name): tensor for name, tensor in source.items() if isinstance(tensor, Tensor)}, where


def _some(weights: Mapping[str, Tensor]) -> str:
    return ", ".join([*list(weights)[:5], *["..."] * (len(weights) > 5)]) or "none"
