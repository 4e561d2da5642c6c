"""The MLPs of a trained model as functions, with their weights laid out for this CPU."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrm.model import MLP, CrossInteraction
from dlrm.ops import BLOCKS, PANEL, PackedLinear, pack_linear
from robe import backend

_DENSE_IS_FASTER = 0.8  # time of a product, with a list of the inputs and without

LinearFunction = Callable[[Tensor], Tensor]  # (B, fan_in), float32 or the dtype of the layer before -> (B, fan_out)


@dataclass(frozen=True)
class Chain:
    """Linear layers with ReLU between them, in float32: the arguments of ``torch.ops.dlrm.mlp``.

    Attributes:
        layers: the packed layers.
        width: of the output.
        relu_last: whether a ReLU follows the last layer too.
    """

    layers: Sequence[PackedLinear]
    width: int
    relu_last: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Apply all layers to x (B, fan_in)."""
        return torch.ops.dlrm.mlp(x, *lists(self.layers), self.width, self.relu_last)


def lists(layers: Iterable[PackedLinear]) -> tuple[list[Tensor], ...]:
    """Return weights, biases, inputs and starts, each with a tensor for each layer, as operators take them."""
    return tuple(map(list, zip(*layers)))


def packed(mlp: MLP, dtype: str) -> LinearFunction:
    """Return an MLP as one function, its weights laid out for this CPU.

    Args:
        mlp: of a model.
        dtype: in which it computes: float32, bfloat16 or int8.
    """
    linears = [x for x in mlp if isinstance(x, nn.Linear)]
    return _chain(linears, dtype, relu_last=isinstance(mlp[-1], nn.ReLU))


class Cross:
    """A cross net as one function, (B, D) and (B, F, D) -> (B, (F + 1) * D), its weights laid out for this CPU.

    Args:
        cross: of a model.
        dtype: as for ``packed``.

    Attributes:
        layers: V and W of each layer.
    """

    def __init__(self, cross: CrossInteraction, dtype: str):
        self.layers = [
            (_chain([v], dtype, relu_last=False), _chain([w], dtype, relu_last=False))
            for v, w in zip(cross.net.v, cross.net.w)
        ]

    def __call__(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """Apply all layers."""
        x = x0 = torch.cat([dense, embeddings.flatten(1)], dim=1)
        for v, w in self.layers:
            x = torch.addcmul(x, x0, w(v(x)).float())
        return x


def block_of(weight: Tensor) -> int | None:
    """Return the outputs of a block for ``pack_linear`` that make a layer fastest; None: all weights are kept.

    Args:
        weight: (fan_out, fan_in).
    """
    work: dict[int | None, float] = {None: _DENSE_IS_FASTER * -(-len(weight) // PANEL) * PANEL * weight.shape[1]}
    for block in BLOCKS:
        blocks = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % block)).view(-1, block, weight.shape[1])
        work[block] = block * int((blocks != 0).any(1).sum())
    return min(work, key=lambda block: work[block])


def pack_chain(weights: Sequence[tuple[Tensor, Tensor | None]], blocks: Sequence[int | None], relu_last: bool) -> Chain:
    """Return linear layers with ReLU between them as a chain.

    Args:
        weights: weight (fan_out, fan_in) and bias (fan_out,) or None of each layer.
        blocks: of each layer, as for ``pack_linear``.
        relu_last: whether a ReLU follows the last layer too.
    """
    layers = [pack_linear(*layer, block) for layer, block in zip(weights, blocks)]
    return Chain(layers, len(weights[-1][0]), relu_last)


def _chain(linears: Sequence[nn.Module], dtype: str, relu_last: bool) -> LinearFunction:
    """Return linear layers with ReLU between them as one function, its weights laid out for this CPU."""
    weights: list[tuple[Tensor, Tensor | None]] = []
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        weights.append((linear.weight.detach(), None if linear.bias is None else linear.bias.detach()))
    if dtype == "float32" and "avx" in backend()["cpu"]:  # elsewhere torch's own BLAS is faster
        return pack_chain(weights, [block_of(weight) for weight, _ in weights], relu_last)
    pack = {"float32": _float32_linear, "bfloat16": _bfloat16_linear, "int8": _int8_linear}[dtype]
    layers = [pack(*layer, relu=relu_last or i + 1 < len(weights)) for i, layer in enumerate(weights)]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def _float32_linear(weight: Tensor, bias: Tensor | None, relu: bool) -> LinearFunction:
    transposed = weight.t()
    bias = weight.new_zeros(len(weight)) if bias is None else bias

    def run(x: Tensor) -> Tensor:
        x = torch.addmm(bias, x, transposed)
        return x.relu_() if relu else x

    return run


def _bfloat16_linear(weight: Tensor, bias: Tensor | None, relu: bool) -> LinearFunction:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)
    bias = None if bias is None else bias.bfloat16()
    after = "relu" if relu else "none"
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, bias, after, [], "")


def _int8_linear(weight: Tensor, bias: Tensor | None, relu: bool) -> LinearFunction:
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    with warnings.catch_warnings():
        # torch deprecates quantized tensors, but its kernels take the weights in no other form.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
        rounded = torch.quantize_per_channel(
            weight, scale.double(), torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8
        )
    packed = torch.ops.quantized.linear_prepack(rounded, bias)
    operator = torch.ops.quantized.linear_relu_dynamic if relu else torch.ops.quantized.linear_dynamic
    return lambda x: operator(x.float(), packed)
