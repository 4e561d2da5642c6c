"""An ONNX graph under construction: standard operators, and the arithmetic of the hash made of them."""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.model import MLP
from dlrm.ops import BLOCKS, pack_linear
from robe.hashing import MULTIPLIERS, SHIFTS

_MOST_STORED = 0.9  # of a layer's weights, or all are


def optional_package(name: str) -> Any:
    """Import a package that only format onnx needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"format onnx needs the package {name}: pip install onnx onnxruntime") from None


class Graph:
    """An ONNX graph under construction.

    Every node has one output, whose name stands for its values. A node's inputs are such names, or arrays, which become
    constants.

    Attributes:
        nodes: the nodes so far, as ONNX's NodeProto.
        constants: the constants so far, as ONNX's TensorProto.
    """

    def __init__(self) -> None:
        self.helper = optional_package("onnx").helper
        self.kinds = optional_package("onnx").TensorProto
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node and return the name of its output.

        Args:
            operator: one of ONNX's operators.
            inputs: names, or whatever ``constant`` takes.
            attributes: the operator's attributes.
        """
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(operator, names, [name], name=name, **attributes))
        return name

    def constant(self, values: Any) -> str:
        """Add a constant (a tensor, an array or a numpy number) and return its name."""
        kind = None
        if isinstance(values, Tensor):
            values = values.detach().contiguous()
            if values.dtype == torch.bfloat16:  # numpy has no such type
                kind, values = self.kinds.BFLOAT16, values.view(torch.int16)
            values = values.numpy()
        values = np.asarray(values)
        kind = kind or self.helper.np_dtype_to_tensor_dtype(values.dtype)
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True))
        return name

    def cast(self, x: str, kind: str) -> str:
        """Convert to a type, named as in ONNX's TensorProto."""
        return self.op("Cast", x, to=getattr(self.kinds, kind))

    def unsqueeze(self, x: str, axis: int) -> str:
        """Insert a dimension of 1."""
        return self.op("Unsqueeze", x, np.array([axis]))

    def reshape(self, x: str, *shape: int) -> str:
        """Change the shape; a 0 keeps the size that x has there."""
        return self.op("Reshape", x, np.array(shape))

    def floor_divide(self, x: str, divisor: int) -> tuple[str, str]:
        """Compute Python's divmod of int64. ONNX's own division rounds towards 0."""
        n = np.int64(divisor)
        quotient = self.op("Div", x, n)
        remainder = self.op("Sub", x, self.op("Mul", quotient, n))
        negative = self.cast(self.op("Less", remainder, np.int64(0)), "INT64")
        return self.op("Sub", quotient, negative), self.op("Add", remainder, self.op("Mul", negative, n))

    def shift_right(self, x: str, count: int) -> str:
        """Shift uint64 right by ``count`` bits."""
        return self.op("BitShift", x, np.uint64(count), direction="RIGHT")

    def mix64(self, x: str) -> str:
        """Compute robe.hashing.mix64 of uint64."""
        for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
            x = self.op("Mul", self.op("BitwiseXor", x, self.shift_right(x, shift)), np.uint64(multiplier))
        return self.op("BitwiseXor", x, self.shift_right(x, SHIFTS[2]))

    def multiply_high(self, x: str, n: np.ndarray | np.uint64) -> str:
        """Compute robe.hashing.multiply_high of uint64; ``n`` is one number or one per place of the last dimension."""
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
        """Apply an nn.Linear."""
        assert isinstance(layer, nn.Linear)
        bias = [] if layer.bias is None else [layer.bias]
        return self.op("Gemm", x, self._matrix(layer.weight.detach()), *bias, transB=1)

    def _matrix(self, weight: Tensor) -> str:
        """The weights (fan_out, fan_in) of a layer. Blocks of zeros are put in when the file is loaded."""
        fan_out, fan_in = weight.shape
        values, _, inputs, starts = min((pack_linear(weight, None, n) for n in BLOCKS), key=lambda x: x.weights.numel())
        if values.numel() > _MOST_STORED * weight.numel():
            return self.constant(weight)
        block, blocks = values.shape[1], len(starts) - 2
        block_of = torch.arange(blocks).repeat_interleave(starts[:-1].diff())
        places = self.cast(self.constant((block_of * fan_in + inputs).int().unsqueeze(1)), "INT64")
        shape = self.constant(np.array([blocks * fan_in, block]))
        whole = self.op("ScatterND", self.op("ConstantOfShape", shape), places, values)
        columns = self.op("Transpose", self.reshape(whole, blocks, fan_in, block), perm=[0, 2, 1])
        rows = self.reshape(columns, blocks * block, fan_in)
        return self.op("Slice", rows, np.array([0]), np.array([fan_out]))

    def mlp(self, mlp: MLP, x: str) -> str:
        """Apply an MLP: linear layers and ReLUs."""
        for layer in mlp:
            x = self.linear(layer, x) if isinstance(layer, nn.Linear) else self.op("Relu", x)
        return x
