"""A trained DLRM made ready to predict: precision chosen, and weights laid out for the CPU."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.batch import Batch
from dlrm.embeddings import bags, synthetic_ids
from dlrm.model import DLRM, MLP, CrossInteraction
from dlrm.ops import pack_linear
from robe import RobeEmbeddingBagCollection, backend

DTYPES = ("float32", "bfloat16", "int8")

LinearFunction = Callable[[Tensor], Tensor]  # (B, fan_in), float32 or the dtype of the layer before -> (B, fan_out)

_ROWS_AT_ONCE = 512  # so that activations and embeddings of a larger batch stay in the second-level cache


class Predictor:
    """Computes click probabilities of a trained model, as fast as this CPU can.

    Embeddings and interaction are computed in float32 whatever the dtypes. The weights are laid out when the predictor
    is made: do not change the model afterwards. A call changes nothing in the predictor, so several threads may call it
    at once. It can be pickled and copied; the copy's weights are laid out for the CPU it is on.

    Args:
        model: a DLRM on the CPU.
        array_dtype: dtype of the ROBE array. "float32"; "bfloat16" takes half the memory; "int8" a quarter, and a scale
            for every 64 weights. Embeddings without an array stay float32.
        mlp_dtype: dtype in which the MLPs and the cross net compute. "float32"; "bfloat16", with sums in float32;
            "int8", with a scale for each output of the weights and one scale for the activations of a whole batch, so
            that a prediction depends slightly on the other rows of its batch.

    Raises:
        ValueError: a dtype is unknown, there is no array for array_dtype, or this CPU lacks the instructions for
            mlp_dtype, which would then be slower than float32; or the model has parts that a DLRM has not, such as
            hooks or other layers in its MLPs, which would be left out.

    Examples:
        >>> predictor = Predictor(checkpoint.load("runs/robe"), array_dtype="int8")
        >>> probabilities = predictor(torch.rand(64, 13), torch.randint(0, 2**32, (64, 26)))  # (64,)
    """

    def __init__(self, model: DLRM, *, array_dtype: str = "float32", mlp_dtype: str = "float32"):
        check_mlp_dtype(mlp_dtype)
        _check_model(model)
        self.config = model.config
        self.array_dtype, self.mlp_dtype = array_dtype, mlp_dtype
        self.embeddings = with_array_dtype(model.embeddings, array_dtype)
        self._layers = model.bottom, model.interaction, model.top
        self._lay_out()

    def _lay_out(self) -> None:
        bottom, interaction, top = self._layers
        self._interaction = interaction
        if isinstance(interaction, CrossInteraction):
            self._interaction = _packed_cross(interaction, self.mlp_dtype)
        self._widths = self.config.num_dense, self.config.num_ids
        self._bottom, self._top = _packed(bottom, self.mlp_dtype), _packed(top, self.mlp_dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Without what _lay_out has made: it is for this CPU, and torch can't pickle all of it.
        return {name: self.__dict__[name] for name in ("config", "array_dtype", "mlp_dtype", "embeddings", "_layers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_mlp_dtype(state["mlp_dtype"])
        self.__dict__.update(state)
        self._lay_out()

    def twin(self) -> "Predictor":
        """Return this predictor, which other threads may call too. In 0.8.0 each of them needed a twin."""
        return self

    def __call__(self, dense: Tensor, sparse: Tensor, clock: Callable[[str], None] | None = None) -> Tensor:
        """Predict a batch of any size, an empty one included.

        Args:
            dense: (B, num_dense) float32. A row with NaN has probability NaN.
            sparse: (B, H) int64 or int32 ids, as for DLRM.
            clock: called with "mlp", "embedding" or "interaction" whenever a piece of that work is done.

        Returns:
            (B,) float32 probabilities.

        Raises:
            ValueError: dense or sparse is something else; the message says which, and what was expected. With MLPs in
                low precision also for NaN and infinity in dense, which would change into some number there.
        """
        with torch.inference_mode():
            if isinstance(sparse, Tensor) and sparse.dtype is torch.int32:
                sparse = sparse.long()
            self._check(dense, sparse)
            if len(dense) <= _ROWS_AT_ONCE:
                return self._predict_piece(dense, sparse, clock)
            pieces = zip(dense.split(_ROWS_AT_ONCE), sparse.split(_ROWS_AT_ONCE))
            return torch.cat([self._predict_piece(*piece, clock) for piece in pieces])

    def _check(self, dense: Tensor, sparse: Tensor) -> None:
        """Check the arguments of a call, without an operator of torch where it can be: each takes 10 us."""
        dense_width, sparse_width = self._widths
        _require_matrix("dense", dense, dense_width, torch.float32)
        _require_matrix("sparse", sparse, sparse_width, torch.int64)
        if len(dense) != len(sparse):
            raise ValueError(f"dense and sparse: expected as many rows, got {len(dense)} and {len(sparse)}")
        if self.mlp_dtype != "float32":
            _require_finite(dense)

    def predict(self, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """Yield the probabilities of each batch, (B,) float32.

        Args:
            batches: labels are not used.

        Raises:
            ValueError: a batch is not as ``__call__`` takes it, or a probability is NaN.
        """
        for batch in batches:
            probabilities = self(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)).numpy()
            if np.isnan(probabilities).any():
                _require_finite(torch.from_numpy(batch.dense))
                raise ValueError("the model predicts NaN")
            yield probabilities

    def _predict_piece(self, dense: Tensor, sparse: Tensor, clock: Callable[[str], None] | None) -> Tensor:
        x = self._bottom(dense).float()
        if clock:
            clock("mlp")
        embeddings = self._embed(sparse)
        if clock:
            clock("embedding")
        x = self._interaction(x, embeddings)
        if clock:
            clock("interaction")
        x = self._top(x).float().squeeze(1).sigmoid_()
        if clock:
            clock("mlp")
        return x

    def _embed(self, sparse: Tensor) -> Tensor:
        """Return the embeddings (B, F, D) of ids (B, H)."""
        config = self.config
        ids: tuple[Tensor, ...] = (sparse,)
        if config.hots is not None:
            if config.synthetic_hots:
                sparse = synthetic_ids(sparse, config.hots, config.table_rows)
            ids = bags(sparse, config.hots)
        return self.embeddings(*ids).float()


def _check_model(model: DLRM) -> None:
    """Check that a model computes what a DLRM does, since the predictor computes that in its place."""
    if type(model).forward is not DLRM.forward or "forward" in vars(model):
        raise ValueError(f"model: expected a DLRM, got a {type(model).__name__} with a forward of its own")
    for name, module in model.named_modules():
        if name.partition(".")[0] != "embeddings" and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(f"model: {name or 'it'} has hooks, which a Predictor would not run")
    for name in ("bottom", "top"):
        for k, layer in enumerate(getattr(model, name)):
            expected = nn.ReLU if k % 2 else nn.Linear
            if not isinstance(layer, expected):
                raise ValueError(f"model: expected a {expected.__name__} at {name}.{k}, got a {type(layer).__name__}")
    for name, parameter in model.named_parameters():
        if name.partition(".")[0] != "embeddings" and (parameter.dtype != torch.float32 or not parameter.is_cpu):
            raise ValueError(f"model: expected float32 on the cpu, {name} is {parameter.dtype} on {parameter.device}")


def _require_matrix(name: str, x: Tensor, width: int, dtype: torch.dtype) -> None:
    if (
        isinstance(x, Tensor)
        and x.dtype is dtype
        and x.dim() == 2
        and x.shape[1] == width
        and x.is_cpu
        and x.layout is torch.strided
    ):
        return
    got = type(x).__name__
    if isinstance(x, Tensor):
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" + f", {x.layout}" * (x.layout is not torch.strided)
    raise ValueError(f"{name}: expected a tensor (B, {width}) {dtype} on cpu, got {got}".replace("torch.", ""))


def _require_finite(dense: Tensor) -> None:
    finite = dense.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"dense: expected finite numbers, got {dense[row, column]:g} in row {row}, column {column}")


def check_mlp_dtype(mlp_dtype: str) -> None:
    """Check that MLPs can compute in a dtype on this CPU.

    Raises:
        ValueError: the dtype is unknown, or would be slower than float32 for lack of instructions.
    """
    if mlp_dtype not in DTYPES:
        raise ValueError(f"mlp_dtype: expected one of {', '.join(DTYPES)}, got {mlp_dtype!r}")
    has = torch.cpu.get_capabilities()
    needed = {
        "float32": ("", True),
        "bfloat16": ("AVX512-BF16 or AMX", has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16")),
        "int8": ("VNNI", has.get("avx512_vnni") or has.get("avx_vnni")),
    }
    instructions, there = needed[mlp_dtype]
    if not there:
        raise ValueError(
            f"mlp_dtype: {mlp_dtype} needs {instructions} instructions, which this CPU lacks: it would be slower "
            "than float32"
        )


def with_array_dtype(embeddings: nn.Module, array_dtype: str) -> nn.Module:
    """Return the same embeddings, ready for inference, with their ROBE array in a dtype.

    Args:
        embeddings: of a DLRM; they are not changed.
        array_dtype: "float32" reads the same array; the others a converted copy.

    Raises:
        ValueError: the dtype is unknown, or the embeddings have no array.
    """
    if array_dtype not in DTYPES:
        raise ValueError(f"array_dtype: expected one of {', '.join(DTYPES)}, got {array_dtype!r}")
    other = copy.copy(embeddings)  # the module, not its weights
    other.training = False  # or an admission would count ids
    if array_dtype == "float32":
        return other
    if not isinstance(embeddings, RobeEmbeddingBagCollection):
        raise ValueError(f"array_dtype: {array_dtype} needs a model with a ROBE array; this one has tables")
    other._modules = dict(embeddings._modules)
    array = embeddings.array
    if array_dtype == "int8":
        other.array = array.quantized()
    else:
        other.array = copy.copy(array)
        other.array._parameters = {"weight": nn.Parameter(array.weight.detach().bfloat16(), requires_grad=False)}
    return other


def array_bytes(embeddings: nn.Module) -> int:
    """Return the bytes that embeddings are read from: an array, its scales and an admission's filter; or tables."""
    if isinstance(embeddings, RobeEmbeddingBagCollection):
        filter = None if embeddings.admission is None else embeddings.admission.filter
        tensors = [x for x in (*embeddings.array.read(), filter) if x is not None]
    else:
        tensors = [*embeddings.parameters(), *embeddings.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)


def _packed(mlp: MLP, dtype: str) -> LinearFunction:
    linears = [x for x in mlp if isinstance(x, nn.Linear)]
    return _chain(linears, dtype, relu_last=isinstance(mlp[-1], nn.ReLU))


def _packed_cross(cross: CrossInteraction, dtype: str):
    layers = [
        (_chain([v], dtype, relu_last=False), _chain([w], dtype, relu_last=False))
        for v, w in zip(cross.net.v, cross.net.w)
    ]

    def run(dense: Tensor, embeddings: Tensor) -> Tensor:
        x = x0 = torch.cat([dense, embeddings.flatten(1)], dim=1)
        for v, w in layers:
            x = torch.addcmul(x, x0, w(v(x)).float())
        return x

    return run


def _chain(linears: Sequence[nn.Module], dtype: str, relu_last: bool) -> LinearFunction:
    """Return linear layers with ReLU between them as one function, its weights laid out for this CPU."""
    weights: list[tuple[Tensor, Tensor | None]] = []
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        weights.append((linear.weight.detach(), None if linear.bias is None else linear.bias.detach()))
    if dtype == "float32" and "avx" in backend()["cpu"]:  # elsewhere torch's own BLAS is faster
        packed, biases = map(list, zip(*(pack_linear(*layer) for layer in weights)))
        width = len(weights[-1][0])
        return lambda x: torch.ops.dlrm.mlp(x, packed, biases, width, relu_last)
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
