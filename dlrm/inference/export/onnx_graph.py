"""A DLRM as an ONNX graph: standard operators, the hash among them, and the weights."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.config import DLRMConfig
from dlrm.embeddings import SYNTHETIC, Tables, VocabularyTables
from dlrm.inference.predictor import array_bytes
from dlrm.model import DLRM, MLP, CrossInteraction
from robe import Admission, RobeEmbeddingBagCollection
from robe.admission import BITS_OF_ID, BITS_OF_WORD, RARE
from robe.hashing import GOLDEN, MULTIPLIERS, SHIFTS, row_hash, table_key

_OPSET, _IR_VERSION = 20, 10
_ONNX_BYTES = (1 << 31) - (1 << 20)  # protobuf writes 2 GB; the graph itself needs far less than 1 MB


def optional_package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"format onnx needs the package {name}: pip install onnx onnxruntime") from None


class Graph:
    """An ONNX graph being built: constants and nodes, each with one output.

    Inputs of nodes are the names of others, or arrays, which become constants of their own.
    """

    def __init__(self) -> None:
        self.helper = optional_package("onnx").helper
        self.kinds = optional_package("onnx").TensorProto
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(operator, names, [name], name=name, **attributes))
        return name

    def constant(self, values: Any) -> str:
        """Add a constant: an array, a number of numpy's, or a tensor."""
        kind = None
        if isinstance(values, Tensor):
            values = values.detach().contiguous()
            if values.dtype == torch.bfloat16:  # which numpy lacks
                kind, values = self.kinds.BFLOAT16, values.view(torch.int16)
            values = values.numpy()
        values = np.asarray(values)
        kind = kind or self.helper.np_dtype_to_tensor_dtype(values.dtype)
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True))
        return name

    def cast(self, x: str, kind: str) -> str:
        return self.op("Cast", x, to=getattr(self.kinds, kind))

    def unsqueeze(self, x: str, axis: int) -> str:
        return self.op("Unsqueeze", x, np.array([axis]))

    def reshape(self, x: str, *shape: int) -> str:
        """A 0 in the shape is the same as in x."""
        return self.op("Reshape", x, np.array(shape))

    def floor_divide(self, x: str, divisor: int) -> tuple[str, str]:
        """Python's divmod of int64; ONNX's division rounds towards 0."""
        n = np.int64(divisor)
        quotient = self.op("Div", x, n)
        remainder = self.op("Sub", x, self.op("Mul", quotient, n))
        negative = self.cast(self.op("Less", remainder, np.int64(0)), "INT64")
        return self.op("Sub", quotient, negative), self.op("Add", remainder, self.op("Mul", negative, n))

    def shift_right(self, x: str, count: int) -> str:
        return self.op("BitShift", x, np.uint64(count), direction="RIGHT")

    def mix64(self, x: str) -> str:
        """robe.hashing.mix64 of uint64."""
        for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
            x = self.op("Mul", self.op("BitwiseXor", x, self.shift_right(x, shift)), np.uint64(multiplier))
        return self.op("BitwiseXor", x, self.shift_right(x, SHIFTS[2]))

    def multiply_high(self, x: str, n: np.ndarray | np.uint64) -> str:
        """robe.hashing.multiply_high of uint64; n: a number, or one for each in the last dimension."""
        mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        n_high, n_low = n >> half, n & mask
        x_high, x_low = self.shift_right(x, 32), self.op("BitwiseAnd", x, mask)
        carry = self.shift_right(self.op("Mul", x_low, n_low), 32)
        middle = self.op("Add", self.op("Mul", x_high, n_low), carry)
        high = self.shift_right(middle, 32)
        if np.any(n_high):
            low = self.op("Add", self.op("BitwiseAnd", middle, mask), self.op("Mul", x_low, n_high))
            high = self.op("Add", high, self.op("Mul", x_high, n_high))
            high = self.op("Add", high, self.shift_right(low, 32))
        return high

    def linear(self, layer: nn.Module, x: str) -> str:
        assert isinstance(layer, nn.Linear)
        bias = [] if layer.bias is None else [layer.bias]
        return self.op("Gemm", x, layer.weight, *bias, transB=1)

    def mlp(self, mlp: MLP, x: str) -> str:
        for layer in mlp:
            x = self.linear(layer, x) if isinstance(layer, nn.Linear) else self.op("Relu", x)
        return x


def write_onnx(model: DLRM, embeddings: nn.Module, file: Path) -> None:
    onnx = optional_package("onnx")
    config = model.config
    tensors = [*model.bottom.parameters(), *model.top.parameters(), *model.interaction.parameters()]
    weights = array_bytes(embeddings) + sum(x.numel() * x.element_size() for x in tensors)
    if weights > _ONNX_BYTES:
        raise ValueError(
            f"format onnx: the weights are {weights / 1e9:.1f} GB, and one ONNX file holds 2 GB; use --format aoti"
        )
    graph = Graph()
    x = graph.mlp(model.bottom, "dense")  # (B, D)
    x = _interaction(graph, config, model.interaction, x, _embeddings(graph, config, embeddings))
    x = graph.op("Sigmoid", graph.mlp(model.top, x))  # (B, 1)
    graph.nodes.append(graph.helper.make_node("Squeeze", [x, graph.constant(np.array([1]))], ["probability"]))

    floats, value = graph.kinds.FLOAT, graph.helper.make_tensor_value_info
    file_model = graph.helper.make_model(
        graph.helper.make_graph(
            graph.nodes,
            "dlrm",
            [
                value("dense", floats, ["batch", config.num_dense]),
                value("sparse", graph.kinds.INT64, ["batch", config.num_ids]),
            ],
            [value("probability", floats, ["batch"])],
            graph.constants,
        ),
        opset_imports=[graph.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="robe-dlrm",
    )
    graph.helper.set_model_props(file_model, {"config": json.dumps(config.to_dict())})
    onnx.checker.check_model(file_model)
    file.write_bytes(file_model.SerializeToString())


def _embeddings(graph: Graph, config: DLRMConfig, embeddings: nn.Module) -> str:
    """(B, F, D), of the input "sparse"."""
    ids = _synthetic(graph, config) if config.synthetic_hots else "sparse"
    feature = np.array(config.feature_of_id)
    if isinstance(embeddings, RobeEmbeddingBagCollection):
        rows = _robe(graph, embeddings, ids, feature)  # (B, H, D)
    else:
        assert isinstance(embeddings, Tables)
        rows = _tables(graph, embeddings, ids, feature)
    if len(feature) == len(config.table_rows):
        return rows
    # The sums over the ids of each feature as one product.
    belongs = np.arange(len(config.table_rows))[:, None] == feature
    return graph.op("MatMul", belongs.astype(np.float32), rows)


def _synthetic(graph: Graph, config: DLRMConfig) -> str:
    """dlrm.embeddings.synthetic_ids of the input "sparse", (B, H)."""
    assert config.hots is not None
    feature = np.array(config.feature_of_id)
    number = np.concatenate([np.arange(hot) for hot in config.hots])
    keys = np.array([table_key(SYNTHETIC, k) for k in range(len(config.hots))]).astype(np.uint64)
    mixed = graph.mix64(graph.op("Add", graph.cast("sparse", "UINT64"), keys))
    mixed = graph.mix64(graph.op("Add", graph.op("Gather", mixed, feature, axis=1), number.astype(np.uint64)))
    others = graph.cast(graph.multiply_high(mixed, np.array(config.table_rows, np.uint64)[feature]), "INT64")
    return graph.op("Where", number == 0, graph.op("Gather", "sparse", feature, axis=1), others)


def _robe(graph: Graph, embeddings: RobeEmbeddingBagCollection, ids: str, feature: np.ndarray) -> str:
    """ids (B, H) to rows (B, H, D): robe.hashing.slots and the reading there.

    The hash is computed on shapes with the ids innermost where a row is one block: ONNX Runtime is slow in arithmetic
    where an innermost dimension of 1 is repeated.
    """
    dim, block_size, sign = embeddings.embedding_dim, embeddings.block_size, embeddings.sign
    choices = np.uint64(embeddings.array.size - block_size + 1)
    table_keys, admission = embeddings.table_keys[torch.from_numpy(feature)], embeddings.admission
    keys = table_keys.numpy().view(np.uint64)

    def hashed_rows(x: str) -> str:
        return graph.mix64(graph.op("Add", graph.op("Mul", graph.cast(x, "UINT64"), np.uint64(GOLDEN)), keys))

    def offset(hashed: str) -> str:
        return graph.cast(graph.multiply_high(hashed, choices), "INT64")

    def signs(hashed: str) -> str:
        lowest = graph.cast(graph.op("BitwiseAnd", hashed, np.uint64(1)), "FLOAT")
        return graph.op("Sub", np.float32(1), graph.op("Add", lowest, lowest))

    if block_size > dim:
        if admission is not None:
            inside = graph.cast(_admitted(graph, admission, hashed_rows(ids), len(feature)), "BOOL")
            ids = graph.op("Where", inside, ids, np.int64(RARE))
        # A row lies in one block or in two neighbours; start is its place in the first.
        quotient, remainder = graph.floor_divide(ids, block_size)
        position = graph.op("Mul", remainder, np.int64(dim))
        block, start = graph.floor_divide(position, block_size)
        block = graph.op("Add", graph.op("Mul", quotient, np.int64(dim)), block)
        first, second = (graph.mix64(hashed_rows(x)) for x in (block, graph.op("Add", block, np.int64(1))))
        component = graph.op("Add", graph.unsqueeze(start, -1), np.arange(dim))
        in_first = graph.op("Less", component, np.int64(block_size))
        behind = graph.op("Sub", offset(second), np.int64(block_size))
        begin = graph.op("Where", in_first, graph.unsqueeze(offset(first), -1), graph.unsqueeze(behind, -1))
        rows = _read(graph, embeddings, graph.op("Add", begin, component), len(feature), dim)
        if sign:
            both = (graph.unsqueeze(signs(x), -1) for x in (first, second))
            rows = graph.op("Mul", rows, graph.op("Where", in_first, *both))
        return rows

    blocks = math.ceil(dim / block_size)
    hashed = hashed_rows(ids)
    if admission is not None:
        rare = row_hash(torch.tensor(RARE), table_keys).numpy().view(np.uint64)
        inside = _admitted(graph, admission, hashed, len(feature))
        # ONNX Runtime's Where takes no uint64.
        hashed = graph.op("BitwiseXor", graph.op("Mul", graph.op("BitwiseXor", hashed, rare), inside), rare)
    if blocks > 1:
        numbers = np.arange(blocks, dtype=np.uint64) * np.uint64(GOLDEN)
        hashed = graph.op("Add", graph.unsqueeze(hashed, -1), numbers)  # (B, H, blocks)
    hashed = graph.mix64(hashed)
    shape = (len(feature), blocks, block_size) if blocks > 1 else (len(feature), dim)
    slot = graph.op("Add", graph.unsqueeze(offset(hashed), -1), np.arange(block_size))
    rows = _read(graph, embeddings, slot, *shape)
    if sign:
        rows = graph.op("Mul", rows, graph.unsqueeze(signs(hashed), -1))
    if blocks > 1:
        rows = graph.reshape(rows, 0, 0, blocks * block_size)
    if blocks * block_size > dim:
        rows = graph.op("Slice", rows, np.array([0]), np.array([dim]), np.array([2]))
    return rows


def _admitted(graph: Graph, admission: Admission, hashed: str, count: int) -> str:
    """Of each id 1 if it was let in, else 0, uint64 (B, count); hashed: (B, count), of their rows."""
    filter, ones = admission.filter.numpy().view(np.uint64), np.uint64((1 << BITS_OF_WORD) - 1)
    word = graph.cast(graph.multiply_high(hashed, np.uint64(len(filter))), "INT64")
    word = graph.reshape(graph.op("GatherElements", filter, graph.reshape(word, -1)), -1, count)
    found = word
    for k in range(BITS_OF_ID):
        bit = graph.op("BitwiseAnd", graph.shift_right(hashed, k * BITS_OF_WORD), ones)
        found = graph.op("BitwiseAnd", graph.op("BitShift", word, bit, direction="RIGHT"), found if k else np.uint64(1))
    return found


def _read(graph: Graph, embeddings: RobeEmbeddingBagCollection, slot: str, *shape: int) -> str:
    """The weights at slots (B, *shape), as float32."""
    weight, scale = embeddings.array.read()
    # On vectors: ONNX Runtime's Gather copies each number by a call of its own.
    slot = graph.reshape(slot, -1)
    values = graph.op("GatherElements", weight, slot)
    if weight.dtype != torch.float32:
        values = graph.cast(values, "FLOAT")
    if scale is not None:
        group = np.int64(embeddings.array.group_size)
        values = graph.op("Mul", values, graph.op("GatherElements", scale, graph.op("Div", slot, group)))
    return graph.reshape(values, -1, *shape)


def _tables(graph: Graph, tables: Tables, ids: str, feature: np.ndarray) -> str:
    """ids (B, H) to rows (B, H, D) of tables."""
    table_rows, first_rows = (x.numpy()[feature] for x in (tables.table_rows, tables.first_rows))
    if isinstance(tables, VocabularyTables):
        row = _vocabulary_rows(graph, tables, ids, feature)
    else:
        row = graph.op("Mod", ids, table_rows)  # of the divisor's sign, as Python's
    return graph.op("Gather", tables.weight, graph.op("Add", row, first_rows))


def _vocabulary_rows(graph: Graph, tables: VocabularyTables, ids: str, feature: np.ndarray) -> str:
    """VocabularyTables.rows of ids (B, H): ONNX has no searchsorted, so the steps of a binary search."""
    keys, count = graph.constant(tables.keys), len(tables.keys)
    low = graph.op("BitwiseAnd", ids, np.int64(0xFFFFFFFF))
    key = graph.reshape(graph.op("BitwiseOr", low, tables.features.numpy()[feature]), -1)
    place = graph.op("Mul", key, np.int64(0))

    while count > 1:  # the key, if it is known, lies in place ... place + count - 1
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


def _interaction(graph: Graph, config: DLRMConfig, interaction: nn.Module, dense: str, rows: str) -> str:
    vectors = graph.op("Concat", graph.unsqueeze(dense, 1), rows, axis=1)  # (B, N, D)
    if isinstance(interaction, CrossInteraction):
        x = x0 = graph.op("Flatten", vectors)
        for v, w in zip(interaction.net.v, interaction.net.w):
            x = graph.op("Add", x, graph.op("Mul", x0, graph.linear(w, graph.linear(v, x))))
        return x
    # The strictly lower triangle. Its places are expanded because GatherElements is many times faster than Gather.
    count = len(config.table_rows) + 1
    dots = graph.op("MatMul", vectors, graph.op("Transpose", vectors, perm=[0, 2, 1]))
    rows_of_triangle, columns = np.tril_indices(count, -1)
    places = (rows_of_triangle * count + columns).astype(np.int32)
    batch = graph.op("Shape", dense, start=0, end=1)
    shape = graph.op("Concat", batch, np.array([len(places)]), axis=0)
    dots = graph.reshape(dots, 0, count * count)
    dots = graph.op("GatherElements", dots, graph.op("Expand", places, shape), axis=1)
    return graph.op("Concat", dense, dots, axis=1)
