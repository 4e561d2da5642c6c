"""load_authors_weights: reads checkpoints of the ROBE authors' code."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

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
    """Make the collection that reads the array of a model trained with the ROBE authors' code.

    Checkpoints of their DLRM hold the array and the constants of the hash. The sizes of the tables, which lie one after
    another in the hash, and the block size are in the command line that trained the model, not in the checkpoint.

    Args:
        source: a file that ``torch.save`` wrote, or its content: a ``state_dict``, or a dict with one in it, as their
            DLRM saves it. Only tensors and plain Python values are read from a file.
        num_embeddings: size of each table, in the order of their ``emb_l``.
        embedding_dim: D, their ``--arch-sparse-feature-size``.
        block_size: Z, their ``--rma-chunk-size`` or ``uma_chunk_size``.
        names: of the tables; None: cat_0, cat_1 ...

    Returns:
        A RobeEmbeddingBagCollection with hash="linear" and pooling "sum", on an array with the dtype of theirs. Their
        hash overflows where id + first row of the table exceeds 1e10; this one does not.

    Raises:
        ValueError: no array in it, or several different ones; hash constants other than their default (seed 1024),
            which "linear" stands for; or another number of tables.
        FileNotFoundError: there is no such file.
        OSError: the file can't be read.
    """
    weights, where = _state_dict(source)
    arrays = [weights[name] for name in weights if name.split(".")[-1] == _ARRAY]
    if not arrays:
        raise ValueError(f"source: expected a {_ARRAY} among the weights{where}, got {_some(weights)}")
    for array in arrays:
        _check_array(array, where)
    if any(array.dim() != 1 or not torch.equal(array, arrays[0]) for array in arrays):
        raise ValueError(
            f"source: expected one array that all tables share{where}, got {len(arrays)} different ones; load each "
            "table with weights of its own alone"
        )
    tables = [name for name in weights if name.split(".")[-1] == _CONSTANTS]
    for name in tables:
        constants = tuple(weights[name].flatten()[:4].tolist()) if weights[name].layout == torch.strided else ()
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
        source = _read(os.fspath(source))
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping):
        raise ValueError(f"source: expected a state_dict, or a dict with one{where}, got a {type(source).__name__}")
    return {str(name): tensor for name, tensor in source.items() if isinstance(tensor, Tensor)}, where


def _read(file: str) -> Any:
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe would wait for ever
        raise ValueError(f"source: expected a file, got {file}")
    with open(file, "rb") as opened:
        try:
            return torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:  # the file is a program for torch's unpickler, and a damaged one ends in anything
            reason = (str(error).splitlines() or [""])[0][:200]
            kind = type(error).__name__
            raise ValueError(f"source: expected what torch.save wrote in {file}: {kind}: {reason}") from error


def _check_array(array: Tensor, where: str) -> None:
    kind = f"{array.dtype} {tuple(array.shape)}"
    if array.layout != torch.strided or array.is_meta or array.is_quantized or not array.is_floating_point():
        raise ValueError(f"source: expected a {_ARRAY} of floating-point numbers{where}, got {array.layout} {kind}")
    if array.dim() == 1 and array.numel() * array.element_size() > array.untyped_storage().nbytes():
        raise ValueError(f"source: expected a {_ARRAY} that is stored number by number{where}, got {kind}")


def _some(weights: Mapping[str, Tensor]) -> str:
    return ", ".join([*list(weights)[:5], *["..."] * (len(weights) > 5)]) or "none"
