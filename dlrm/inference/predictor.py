"""A trained DLRM made ready to predict: precision chosen, and weights laid out for the CPU."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.batch import Batch
from dlrm.embeddings import bags, synthetic_ids
from dlrm.inference.packing import Chain, Cross, packed
from dlrm.inference.plan import Plan
from dlrm.model import DLRM, CrossInteraction
from robe import RobeEmbeddingBagCollection

DTYPES = ("float32", "bfloat16", "int8")

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
        self._widths = self.config.num_dense, self.config.num_ids
        self._bottom, self._top = packed(bottom, self.mlp_dtype), packed(top, self.mlp_dtype)
        self._interaction: Callable[[Tensor, Tensor], Tensor] = (
            Cross(interaction, self.mlp_dtype) if isinstance(interaction, CrossInteraction) else interaction
        )
        self._plan = None
        if isinstance(self._bottom, Chain) and isinstance(self._top, Chain):
            self._plan = Plan(self.config, self.embeddings, self._bottom, self._interaction, self._top)

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
        self._check(dense, sparse)
        if self._plan is not None and clock is None and self._plan.reads_ids:
            return self._plan(dense, sparse)
        with torch.inference_mode():
            if sparse.dtype is torch.int32:
                sparse = sparse.long()
            if len(dense) <= _ROWS_AT_ONCE:
                return self._predict_piece(dense, sparse, clock)
            pieces = zip(dense.split(_ROWS_AT_ONCE), sparse.split(_ROWS_AT_ONCE))
            return torch.cat([self._predict_piece(*piece, clock) for piece in pieces])

    def _check(self, dense: Tensor, sparse: Tensor) -> None:
        """Check the arguments of a call, without an operator of torch where it can be: each takes 10 us."""
        dense_width, sparse_width = self._widths
        _require_matrix("dense", dense, dense_width, torch.float32)
        _require_matrix("sparse", sparse, sparse_width, torch.int64, torch.int32)
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
        if self._plan is not None and clock is None:
            return self._plan(dense, embeddings=self._embed(sparse))
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


def _require_matrix(name: str, x: Tensor, width: int, *dtypes: torch.dtype) -> None:
    if (
        isinstance(x, Tensor)
        and x.dtype in dtypes
        and x.dim() == 2
        and x.shape[1] == width
        and x.is_cpu
        and x.layout is torch.strided
    ):
        return
    got = type(x).__name__
    if isinstance(x, Tensor):
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" + f", {x.layout}" * (x.layout is not torch.strided)
    raise ValueError(f"{name}: expected a tensor (B, {width}) {dtypes[0]} on cpu, got {got}".replace("torch.", ""))


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
