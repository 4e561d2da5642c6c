"""The launch of kernels for one call of an operator: checked arguments, constants to compile for, and the grid."""

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robe.ops.layout import Call, check_out, embedding_dtype, group_bits

TILE = 1024  # elements of a program: 8 for each thread of 4 warps
# Sums are rounded as the reference rounds them, and ``debug`` keeps the assertions. Products of hashes overflow.
OPTIONS = {"num_warps": 4, "debug": True, "sanitize_overflow": False, "enable_fp_fusion": False}
# Arguments whose values do not lead to a compilation of their own.
NUMBERS = ["choices", "words", "padding", "n_values", "n_bags", "batch_size", "out_b", "out_f"]


class LaunchPlan:
    """The launches of kernels for one call. An id of a lookup counts as a bag of one.

    Attributes:
        shape: (B, F, D) of the embeddings.
        pooling: of the bags; "none" for a lookup.
        n_bags: B * F.
        n_values: the number of ids.
        per_sample_weights: contiguous, or None.
        pieces_per_id: how many runs of slots one embedding is read from.
        longest_piece: slots of the longest of these.
        chunks: how many programs share the components of an embedding.
        arguments: of all kernels of the call, without the array.
        constants: those that the code of a kernel depends on.
        tile: of a program: (BAGS, BLOCKS, WIDTH).
    """

    def __init__(self, weight: Tensor, call: Call) -> None:
        """Check the call against the array, and plan for it.

        Raises:
            ValueError: an argument does not fit, or is on another device than the array.
        """
        call.check(weight)
        self._call = call
        ids, bags, tables, filter, self._scale = call
        features, dim = len(tables.table_keys), tables.embedding_dim
        self.pooling = "none" if bags is None else bags.pooling
        self.n_bags, self.n_values = ids.numel() if bags is None else len(bags.offsets) - 1, ids.numel()
        batch_size = self.n_bags // features
        self.shape = batch_size, features, dim
        factors = None if bags is None else bags.per_sample_weights
        self.per_sample_weights = None if factors is None else factors.contiguous()
        self.arguments: dict[str, Any] = {
            "choices": weight.shape[0] - tables.block_size + 1,
            "ids": ids.reshape(-1).contiguous(),
            "table_keys": tables.table_keys.contiguous().long(),
            "num_embeddings": tables.num_embeddings.contiguous().long(),
            "filter": None if filter is None else filter.contiguous(),
            "words": 0 if filter is None else len(filter),
            "padding": tables.padding_idx or 0,
            "n_bags": self.n_bags,
        }
        if bags is not None:
            self.arguments["offsets"] = bags.offsets.contiguous()
            self.arguments |= {"n_values": self.n_values, "batch_size": batch_size}
        self._check_devices(weight)

        hash = "span" if tables.hash == "mix" and tables.block_size > dim else tables.hash
        step = dim if hash in ("span", "identity") else min(tables.block_size, dim)
        per_embedding = triton.cdiv(dim, step)
        self.pieces_per_id = 2 if hash == "span" else per_embedding
        self.longest_piece = step
        width = min(triton.next_power_of_2(step), TILE)
        blocks = min(triton.next_power_of_2(per_embedding), TILE // width)
        self.chunks = triton.cdiv(step, width) * triton.cdiv(per_embedding, blocks)
        self.tile = {"BAGS": TILE // (width * blocks), "BLOCKS": blocks, "WIDTH": width}
        self.constants = {
            "HASH": hash,
            "SIGN": tables.sign and hash != "identity",
            "PADDED": tables.padding_idx is not None,
            "SUM": tl.float64 if weight.dtype == torch.float64 else tl.float32,
            "F": features,
            "D": dim,
            "Z": tables.block_size,
            "STEP": step,
        }

    def _check_devices(self, weight: Tensor) -> None:
        for name, x in (*self.arguments.items(), ("per_sample_weights", self.per_sample_weights)):
            if isinstance(x, Tensor) and x.device != weight.device:
                raise ValueError(f"{name}: expected on {weight.device}, where the weights are, got {x.device}")

    def check_grad(self, grad: Tensor, weight: Tensor) -> None:
        """Check the gradient of the embeddings.

        Raises:
            ValueError: it is of another shape, dtype or device than they are.
        """
        if grad.shape != self.shape or grad.dtype != weight.dtype or grad.device != weight.device:
            raise ValueError(
                f"grad: expected {weight.dtype} {self.shape} on {weight.device}, "
                f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
            )

    def launch(
        self, kernel: Any, weight: Tensor, *, chunks: int | None = None, tile: dict[str, int] | None = None, **more: Any
    ) -> None:
        """Launch a kernel for all bags, if there are any.

        Args:
            kernel: takes the array, what the plan holds, and ``more``.
            weight: the array.
            chunks, tile: to replace those of the plan.
            more: arguments and constants of this kernel alone.
        """
        if self.n_bags:
            tile = self.tile if tile is None else tile
            grid = triton.cdiv(self.n_bags, tile["BAGS"]), self.chunks if chunks is None else chunks
            with torch.cuda.device_of(weight):
                kernel[grid](weight=weight.contiguous(), **self.arguments, **self.constants, **tile, **more, **OPTIONS)

    def write(self, kernel: Any, weight: Tensor, out: Tensor, **more: Any) -> None:
        """Write the embeddings into a tensor, with a kernel of the forward pass.

        Raises:
            ValueError: the tensor is of another shape or dtype.
        """
        check_out(out, self.shape, embedding_dtype(weight), weight, self._call)
        scale = self._scale
        shift = 0 if scale is None else group_bits(weight, scale)
        direct = out if out.stride(2) == 1 else out.new_empty(out.shape)
        unit = gcd(direct.stride(0), direct.stride(1), 16)
        strides: dict[str, Any] = {"out_b": direct.stride(0) // unit, "out_f": direct.stride(1) // unit, "UNIT": unit}
        scale = None if scale is None else scale.contiguous()
        self.launch(kernel, weight, scale=scale, SHIFT=shift, out=direct, **strides, **more)
        if direct is not out:
            out.copy_(direct)

    def embeddings(self, kernel: Any, weight: Tensor, **more: Any) -> Tensor:
        """The embeddings (B, F, D), from a kernel of the forward pass."""
        out = weight.new_empty(self.shape, dtype=embedding_dtype(weight))
        self.write(kernel, weight, out, **more)
        return out
