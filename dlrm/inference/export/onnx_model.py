"""A DLRM as an ONNX file: standard operators, the hash among them, and the weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.config import DLRMConfig
from dlrm.embeddings import SYNTHETIC, Tables, VocabularyTables
from dlrm.inference.export.onnx_graph import Graph, optional_package
from dlrm.inference.predictor import array_bytes
from dlrm.model import DLRM, CrossInteraction
from robe import Admission, RobeEmbeddingBagCollection
from robe.hashing import GOLDEN, row_hash, table_key
from robe.sketches import BITS_OF_ID, BITS_OF_WORD, SHARED_ID

HASHES = ("mix",)  # the versions of the hash that are written as ONNX operators
MAX_BYTES = (1 << 31) - (1 << 20)  # protobuf writes at most 2 GB; the graph itself needs far less than 1 MB

_OPSET, _IR_VERSION = 20, 10


def write_onnx(model: DLRM, embeddings: nn.Module, file: Path) -> None:
    """Write a model as an ONNX file.

    Args:
        model: a DLRM on the CPU.
        embeddings: what it reads in the file, in place of its own embeddings.
        file: where to write.

    Raises:
        ValueError: the package onnx is missing, or the weights take more than 2 GB.
    """
    onnx = optional_package("onnx")
    tensors = [*model.bottom.parameters(), *model.top.parameters(), *model.interaction.parameters()]
    weight_bytes = array_bytes(embeddings) + sum(x.numel() * x.element_size() for x in tensors)
    if weight_bytes > MAX_BYTES:
        raise ValueError(
            f"format onnx: the weights are {weight_bytes / 1e9:.1f} GB, and one ONNX file holds 2 GB; use --format aoti"
        )
    graph = Graph()
    x = graph.mlp(model.bottom, "dense")  # (B, D)
    x = _interaction(graph, model.config, model.interaction, x, _embeddings(graph, model.config, embeddings))
    x = graph.op("Sigmoid", graph.mlp(model.top, x))  # (B, 1)
    graph.nodes.append(graph.helper.make_node("Squeeze", [x, graph.constant(np.array([1]))], ["probability"]))
    content = _model_proto(graph, model.config)
    onnx.checker.check_model(content)
    file.write_bytes(content.SerializeToString())


def load_onnx(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load an ONNX file into ONNX Runtime, with as many threads as torch has now.

    Returns:
        A function of dense and sparse that returns probabilities.

    Raises:
        ValueError: the package onnxruntime is missing.
    """
    runtime = optional_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(dense: Tensor, sparse: Tensor) -> Tensor:
        inputs = {"dense": dense.numpy(), "sparse": sparse.numpy()}
        return torch.from_numpy(session.run(["probability"], inputs)[0])

    return run


def _model_proto(graph: Graph, config: DLRMConfig) -> Any:
    value = graph.helper.make_tensor_value_info
    inputs = [
        value("dense", graph.kinds.FLOAT, ["batch", config.num_dense]),
        value("sparse", graph.kinds.INT64, ["batch", config.num_ids]),
    ]
    outputs = [value("probability", graph.kinds.FLOAT, ["batch"])]
    model = graph.helper.make_model(
        graph.helper.make_graph(graph.nodes, "dlrm", inputs, outputs, graph.constants),
        opset_imports=[graph.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="robe-dlrm",
    )
    graph.helper.set_model_props(model, {"config": json.dumps(config.to_dict())})
    return model


def _embeddings(graph: Graph, config: DLRMConfig, embeddings: nn.Module) -> str:
    """Return the embeddings (B, F, D) of the ids in the input "sparse"."""
    ids = _synthetic_ids(graph, config) if config.synthetic_hots else "sparse"
    feature = np.array(config.feature_of_id)
    if isinstance(embeddings, RobeEmbeddingBagCollection):
        vectors = _RobeLookup(graph, embeddings, feature).vectors(ids)  # (B, H, D)
    else:
        assert isinstance(embeddings, Tables)
        vectors = _table_vectors(graph, embeddings, ids, feature)
    if len(feature) == len(config.table_rows):
        return vectors
    # The sums over the ids of each feature as one product.
    belongs = np.arange(len(config.table_rows))[:, None] == feature
    return graph.op("MatMul", belongs.astype(np.float32), vectors)


def _synthetic_ids(graph: Graph, config: DLRMConfig) -> str:
    """Return dlrm.embeddings.synthetic_ids of the input "sparse", (B, H)."""
    assert config.hots is not None
    feature = np.array(config.feature_of_id)
    number = np.concatenate([np.arange(hot) for hot in config.hots])
    keys = np.array([table_key(SYNTHETIC, k) for k in range(len(config.hots))]).astype(np.uint64)
    mixed = graph.mix64(graph.op("Add", graph.cast("sparse", "UINT64"), keys))
    mixed = graph.mix64(graph.op("Add", graph.op("Gather", mixed, feature, axis=1), number.astype(np.uint64)))
    others = graph.cast(graph.multiply_high(mixed, np.array(config.table_rows, np.uint64)[feature]), "INT64")
    return graph.op("Where", number == 0, graph.op("Gather", "sparse", feature, axis=1), others)


class _RobeLookup:
    """Hash "mix" and the reads from the array, as robe.hashing.slots defines them.

    Args:
        graph: to which nodes are added.
        embeddings: the collection that is read.
        feature: (H,), the feature of each id of an example.
    """

    def __init__(self, graph: Graph, embeddings: RobeEmbeddingBagCollection, feature: np.ndarray):
        self.graph, self.embeddings, self.count = graph, embeddings, len(feature)
        self.dim, self.block_size = embeddings.embedding_dim, embeddings.block_size
        self.table_keys = embeddings.table_keys[torch.from_numpy(feature)]

    def vectors(self, ids: str) -> str:
        """Return the embeddings (B, H, D) of ids (B, H)."""
        return self._from_long_blocks(ids) if self.block_size > self.dim else self._from_blocks(ids)

    def _from_long_blocks(self, ids: str) -> str:
        """Read blocks longer than an embedding, which lies in one of them or in two neighbours."""
        graph, dim, block_size = self.graph, self.dim, self.block_size
        if self.embeddings.admission is not None:
            inside = graph.cast(self._admitted(self.embeddings.admission, self._hashed_ids(ids)), "BOOL")
            ids = graph.op("Where", inside, ids, np.int64(SHARED_ID))
        quotient, remainder = graph.floor_divide(ids, block_size)
        position = graph.op("Mul", remainder, np.int64(dim))
        block, start = graph.floor_divide(position, block_size)  # start: the place in the first block
        block = graph.op("Add", graph.op("Mul", quotient, np.int64(dim)), block)
        first, second = (graph.mix64(self._hashed_ids(x)) for x in (block, graph.op("Add", block, np.int64(1))))
        component = graph.op("Add", graph.unsqueeze(start, -1), np.arange(dim))
        in_first = graph.op("Less", component, np.int64(block_size))
        behind = graph.op("Sub", self._offset(second), np.int64(block_size))
        begin = graph.op("Where", in_first, graph.unsqueeze(self._offset(first), -1), graph.unsqueeze(behind, -1))
        vectors = self._read(graph.op("Add", begin, component), self.count, dim)
        if self.embeddings.sign:
            both = (graph.unsqueeze(self._signs(x), -1) for x in (first, second))
            vectors = graph.op("Mul", vectors, graph.op("Where", in_first, *both))
        return vectors

    def _from_blocks(self, ids: str) -> str:
        """Read whole blocks, one or more for an embedding.

        Where an embedding is one block, the hash is computed on shapes with the ids innermost: ONNX Runtime is slow in
        arithmetic that repeats an innermost dimension of 1.
        """
        graph, dim, block_size = self.graph, self.dim, self.block_size
        blocks = math.ceil(dim / block_size)
        hashed = self._hashed_ids(ids)
        if self.embeddings.admission is not None:
            shared = row_hash(torch.tensor(SHARED_ID), self.table_keys).numpy().view(np.uint64)
            inside = self._admitted(self.embeddings.admission, hashed)
            # ONNX Runtime's Where takes no uint64.
            hashed = graph.op("BitwiseXor", graph.op("Mul", graph.op("BitwiseXor", hashed, shared), inside), shared)
        if blocks > 1:
            numbers = np.arange(blocks, dtype=np.uint64) * np.uint64(GOLDEN)
            hashed = graph.op("Add", graph.unsqueeze(hashed, -1), numbers)  # (B, H, blocks)
        hashed = graph.mix64(hashed)
        shape = (self.count, blocks, block_size) if blocks > 1 else (self.count, dim)
        slot = graph.op("Add", graph.unsqueeze(self._offset(hashed), -1), np.arange(block_size))
        vectors = self._read(slot, *shape)
        if self.embeddings.sign:
            vectors = graph.op("Mul", vectors, graph.unsqueeze(self._signs(hashed), -1))
        if blocks > 1:
            vectors = graph.reshape(vectors, 0, 0, blocks * block_size)
        if blocks * block_size > dim:
            vectors = graph.op("Slice", vectors, np.array([0]), np.array([dim]), np.array([2]))
        return vectors

    def _hashed_ids(self, ids: str) -> str:
        keys = self.table_keys.numpy().view(np.uint64)
        multiplied = self.graph.op("Mul", self.graph.cast(ids, "UINT64"), np.uint64(GOLDEN))
        return self.graph.mix64(self.graph.op("Add", multiplied, keys))

    def _offset(self, hashed: str) -> str:
        choices = np.uint64(self.embeddings.array.size - self.block_size + 1)
        return self.graph.cast(self.graph.multiply_high(hashed, choices), "INT64")

    def _signs(self, hashed: str) -> str:
        lowest = self.graph.cast(self.graph.op("BitwiseAnd", hashed, np.uint64(1)), "FLOAT")
        return self.graph.op("Sub", np.float32(1), self.graph.op("Add", lowest, lowest))

    def _admitted(self, admission: Admission, hashed: str) -> str:
        """Return 1 for each id that was let in and 0 for the others, uint64 (B, H), from their hashes."""
        graph, filter, ones = self.graph, admission.filter.numpy().view(np.uint64), np.uint64((1 << BITS_OF_WORD) - 1)
        word = graph.cast(graph.multiply_high(hashed, np.uint64(len(filter))), "INT64")
        word = graph.reshape(graph.op("GatherElements", filter, graph.reshape(word, -1)), -1, self.count)
        found = word
        for k in range(BITS_OF_ID):
            bit = graph.op("BitwiseAnd", graph.shift_right(hashed, k * BITS_OF_WORD), ones)
            shifted = graph.op("BitShift", word, bit, direction="RIGHT")
            found = graph.op("BitwiseAnd", shifted, found if k else np.uint64(1))
        return found

    def _read(self, slot: str, *shape: int) -> str:
        """Return the weights at slots, float32 (B, *shape)."""
        graph, array = self.graph, self.embeddings.array
        weight, scale = array.read()
        # On vectors: ONNX Runtime's Gather copies each number by a call of its own.
        slot = graph.reshape(slot, -1)
        values = graph.op("GatherElements", weight, slot)
        if weight.dtype != torch.float32:
            values = graph.cast(values, "FLOAT")
        if scale is not None:
            group = graph.op("Div", slot, np.int64(array.group_size))
            values = graph.op("Mul", values, graph.op("GatherElements", scale, group))
        return graph.reshape(values, -1, *shape)


def _table_vectors(graph: Graph, tables: Tables, ids: str, feature: np.ndarray) -> str:
    """Return the embeddings (B, H, D) of ids (B, H) in tables."""
    table_rows, first_rows = (x.numpy()[feature] for x in (tables.table_rows, tables.first_rows))
    if isinstance(tables, VocabularyTables):
        row = _vocabulary_rows(graph, tables, ids, feature)
    else:
        row = graph.op("Mod", ids, table_rows)  # has the sign of the divisor, as in Python
    return graph.op("Gather", tables.weight, graph.op("Add", row, first_rows))


def _vocabulary_rows(graph: Graph, tables: VocabularyTables, ids: str, feature: np.ndarray) -> str:
    """Return VocabularyTables.rows of ids (B, H). ONNX has no searchsorted, so a binary search is written out."""
    keys, count = graph.constant(tables.keys), len(tables.keys)
    low = graph.op("BitwiseAnd", ids, np.int64(0xFFFFFFFF))
    key = graph.reshape(graph.op("BitwiseOr", low, tables.features.numpy()[feature]), -1)
    place = graph.op("Mul", key, np.int64(0))

    while count > 1:  # a known key lies in place ... place + count - 1
        half = count // 2
        middle = graph.op("GatherElements", keys, graph.op("Add", place, np.int64(half - 1)))
        less = graph.cast(graph.op("Less", middle, key), "INT64")
        place = graph.op("Add", place, graph.op("Mul", less, np.int64(half)))
        count -= half
    found = graph.op("GatherElements", keys, place)
    found = graph.reshape(graph.op("Equal", found, key), -1, len(feature))
    known = graph.op("And", found, graph.op("Equal", low, ids))
    row = graph.op("Sub", graph.reshape(place, -1, len(feature)), tables.first_rows.numpy()[feature] - feature)
    return graph.op("Where", known, row, tables.table_rows.numpy()[feature] - 1)


def _interaction(graph: Graph, config: DLRMConfig, interaction: nn.Module, dense: str, embeddings: str) -> str:
    vectors = graph.op("Concat", graph.unsqueeze(dense, 1), embeddings, axis=1)  # (B, N, D)
    if isinstance(interaction, CrossInteraction):
        x = x0 = graph.op("Flatten", vectors)
        for v, w in zip(interaction.net.v, interaction.net.w):
            x = graph.op("Add", x, graph.op("Mul", x0, graph.linear(w, graph.linear(v, x))))
        return x
    # The strictly lower triangle. Its places are expanded because GatherElements is many times faster than Gather.
    count = len(config.table_rows) + 1
    dots = graph.op("MatMul", vectors, graph.op("Transpose", vectors, perm=[0, 2, 1]))
    lower, columns = np.tril_indices(count, -1)
    places = (lower * count + columns).astype(np.int32)
    batch = graph.op("Shape", dense, start=0, end=1)
    shape = graph.op("Concat", batch, np.array([len(places)]), axis=0)
    dots = graph.reshape(dots, 0, count * count)
    dots = graph.op("GatherElements", dots, graph.op("Expand", places, shape), axis=1)
    return graph.op("Concat", dense, dots, axis=1)
