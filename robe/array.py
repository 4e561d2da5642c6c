"""RobeArray: the one array of weights behind any number of virtual tables; Int8RobeArray, its copy for inference."""

import operator
import weakref
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

INIT_STD = 0.01
DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16
_WEIGHTS_AT_ONCE = 1 << 20


def checked_integer(name: str, value: Any, bits: int | None = 64) -> int:
    """Return an integer of any type, such as numpy's, as Python's.

    Args:
        name: of the argument, for the message.
        value: of the argument.
        bits: that it may have, with a sign; None: any number.

    Raises:
        ValueError: it is no integer, or has more bits.
    """
    try:
        integer = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r:.50}") from None
    if bits is not None and not -1 << (bits - 1) <= integer < 1 << (bits - 1):
        raise ValueError(f"{name}: expected an integer of {bits} bits, got {integer}")
    return integer


class RobeArray(nn.Module):
    """The shared weights. Several layers that are given one array share its memory.

    Args:
        size: m, the number of weights.
        seed: of the hash, any integer: arrays with the same seed lay the same tables out in the same way. It is not in
            the ``state_dict``: it belongs to the code that builds the model, as ``padding_idx`` does in torch.
        init_std: standard deviation of the initial values, N(0, init_std**2), drawn from torch's global generator.
            None: 0.01. Ids that training seldom sees keep reading these values, so a large scale is noise that never
            trains away; docs/accuracy.md has the figures behind the choice.
        init_mean: mean of the initial values.
        dtype, device: of the weights, as in torch.

    Attributes:
        weight: Parameter (size,), the only entry of the ``state_dict``.

    Raises:
        ValueError: size is below 1, init_std is negative, or an argument is of another type.

    Examples:
        >>> array = RobeArray(1_000_000)
        >>> users = RobeEmbedding(40_000_000, 16, array=array, table_id=0)
        >>> items = RobeEmbedding(2_000_000, 16, array=array, table_id=1)
    """

    init_mean = 0.0  # of whole arrays that 0.8.0 pickled

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        init_std: float | None = None,
        init_mean: float = 0.0,
        dtype=None,
        device=None,
    ):
        super().__init__()
        size = checked_integer("size", size)
        if size < 1:
            raise ValueError(f"size: expected at least 1 weight, got {size}")
        if init_std is not None and not 0 <= init_std < inf:
            raise ValueError(f"init_std: expected at least 0, got {init_std}")
        if not -inf < init_mean < inf:
            raise ValueError(f"init_mean: expected a finite number, got {init_mean}")
        self.seed = checked_integer("seed", seed, bits=None)
        self.init_std = INIT_STD if init_std is None else init_std
        self.init_mean = init_mean
        weight = torch.empty(size, dtype=dtype, device=device)
        if weight.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {weight.dtype}")
        self.weight = nn.Parameter(weight)
        self._optimizer: weakref.ref | None = None
        self.reset_parameters()

    @property
    def size(self) -> int:
        """m, the number of weights."""
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Draw the initial values again."""
        nn.init.normal_(self.weight, self.init_mean, self.init_std)

    def optimizer(self) -> Any:
        """Return the optimizer of robe.optim that takes this array's gradients, or None."""
        return self._optimizer and self._optimizer()

    def set_optimizer(self, optimizer: Any) -> None:
        """Give the array's gradients to an optimizer of robe.optim, which calls this itself."""
        self._optimizer = weakref.ref(optimizer)

    def read(self) -> tuple[Tensor, None]:
        """Return the weights and their scale, as the operators take them."""
        weight = self._parameters.get("weight")  # past the detours of self.weight, where it is still a parameter
        return self._computed() if weight is None else weight, None

    def _computed(self) -> Tensor:
        """The weights that something else makes: a parametrization, or a hook before forward, as torch's prune has."""
        for hook in self._forward_pre_hooks.values():
            hook(self, ())
        return self.weight

    def quantized(self, group_size: int = 64) -> "Int8RobeArray":
        """Return a copy in int8 for inference, in a quarter of the memory: ``layer.array = layer.array.quantized()``.

        Each group of neighbouring weights is rounded to 255 steps between plus and minus its largest magnitude.

        Args:
            group_size: weights that share a scale, a power of two. Smaller groups are more exact and take more memory:
                1 + 4 / group_size bytes a weight.

        Raises:
            ValueError: group_size is not a power of two.
        """
        return Int8RobeArray(self.weight.detach(), self.seed, group_size)

    def __getstate__(self) -> dict:
        # A copy is another array, which the optimizer doesn't train.
        return self.__dict__ | {"_optimizer": None}

    def extra_repr(self) -> str:
        """Return the arguments that ``repr`` shows."""
        return f"{self.size}, seed={self.seed}, init_std={self.init_std}"


class Int8RobeArray(nn.Module):
    """A RobeArray in int8, for inference; made by ``RobeArray.quantized``. Embeddings read from it are float32.

    Attributes:
        weight: buffer (size,) int8.
        scale: buffer (ceil(size / group_size),) float32: slot s has the value weight[s] * scale[s // group_size].
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, seed: int, group_size: int):
        super().__init__()
        if group_size < 1 or group_size & (group_size - 1):
            raise ValueError(f"group_size: expected a power of two, got {group_size}")
        self.seed, self.group_size = seed, group_size
        size = weight.shape[0]
        self.register_buffer("weight", torch.empty(size, dtype=torch.int8, device=weight.device))
        self.register_buffer("scale", torch.empty(-(-size // group_size), device=weight.device))
        # In pieces, so that the intermediate values take little memory.
        some = max(_WEIGHTS_AT_ONCE, group_size)
        for w, rounded, scale in zip(weight.split(some), self.weight.split(some), self.scale.split(some // group_size)):
            groups = nn.functional.pad(w.float(), (0, -len(w) % group_size)).view(-1, group_size)
            scale.copy_(groups.abs().amax(1) / 127)
            steps = groups / scale.where(scale > 0, 1).unsqueeze(1)
            rounded.copy_(steps.round().flatten()[: len(w)])

    @property
    def size(self) -> int:
        """m, the number of weights."""
        return self.weight.shape[0]

    def optimizer(self) -> None:
        """Return None: there is no gradient for an optimizer to take."""
        return None

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the weights and their scale, as the operators take them."""
        return self._buffers["weight"], self._buffers["scale"]  # type: ignore[return-value]

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        # In float32, whatever the dtype of the model around it.
        device = self.weight.device
        self.scale = torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device)
        return self

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.size}, int8, group_size={self.group_size}, seed={self.seed}"
