"""RobeArray: the one array of weights behind any number of virtual tables."""

import torch
from torch import nn

INIT_STD = 0.01


class RobeArray(nn.Module):
    """The shared weights. Hand one array to several layers and they share its memory.

    Args:
        size: m, the number of weights.
        seed: of the hash, any integer: arrays with the same seed lay the same tables out in the same way. It is not in
            the ``state_dict``: it belongs to the code that builds the model, as ``padding_idx`` does in torch.
        init_std: standard deviation of the initial values, N(0, init_std**2), drawn from torch's global generator.
            None: 0.01. Rows that training seldom sees keep reading these values, so a large scale is noise that never
            trains away; see docs/accuracy.md for the figures behind the choice.
        dtype, device: of the weights, as in torch.

    Attributes:
        weight: Parameter (size,), the only entry of the ``state_dict``.

    Raises:
        ValueError: size below 1, or init_std negative.
    """

    def __init__(self, size: int, *, seed: int = 0, init_std: float | None = None, dtype=None, device=None):
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1 weight, got {size}")
        if init_std is not None and init_std < 0:
            raise ValueError(f"init_std: expected at least 0, got {init_std}")
        self.seed = seed
        self.init_std = INIT_STD if init_std is None else init_std
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def size(self) -> int:
        """m, the number of weights."""
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Draw the initial values again."""
        nn.init.normal_(self.weight, std=self.init_std)

    def extra_repr(self) -> str:
        return f"{self.size}, seed={self.seed}, init_std={self.init_std}"
