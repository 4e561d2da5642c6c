"""RobeEmbedding and RobeEmbeddingBag: nn.Embedding and nn.EmbeddingBag on a shared array."""

import operator
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.fx import Proxy

from robe.array import checked_integer
from robe.hashing import TRAITS
from robe.layers.options import LayerOptions, check_options
from robe.layers.tables import RobeTables, check_finite, project
from robe.layers.tracing import record_call
from robe.ops import POOLINGS
from robe.ops.layout import embedding_dtype

_NO_WEIGHT = "{} has no weight: its parameter is array.weight, shared; full_weight() computes the virtual table"


class _RobeTable(RobeTables):
    """One virtual table: the base of RobeEmbedding and RobeEmbeddingBag. torch's arguments come first, in its order."""

    # Attributes of torch's layers.
    max_norm: float | None = None
    norm_type = 2.0
    scale_grad_by_freq = sparse = False

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
        *,
        table_id: int = 0,
        first_row: int = 0,
        padding_row: Tensor | Sequence[float] | None = None,
        **options: Unpack[LayerOptions],
    ):
        # norm_type is accepted because torch accepts it: it means nothing without max_norm.
        _refuse(max_norm, scale_grad_by_freq, sparse, _weight, _freeze)
        super().__init__(
            [num_embeddings],
            embedding_dim,
            table_of_feature=[0],
            table_ids=[table_id],
            first_rows=[first_row],
            device=device,
            dtype=dtype,
            **options,
        )
        num_embeddings = self._rows[0] or None  # Python's integers, of any others
        padding_idx = None if padding_idx is None else checked_integer("padding_idx", padding_idx)
        if padding_idx is not None and num_embeddings is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"padding_idx: expected to lie within {num_embeddings} rows, got {padding_idx}")
            padding_idx %= num_embeddings
        self.num_embeddings, self.padding_idx = num_embeddings, padding_idx
        self.register_buffer("padding_row", self._checked_row(padding_row))
        self.table_id = operator.index(table_id)
        # Where there is room for every weight, the layer laid them out itself.
        self.first_row = self._keys[0] // self.embedding_dim if TRAITS[self.hash].key == "slot" else first_row

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        own = {"num_embeddings": self.num_embeddings, "padding_idx": self.padding_idx}
        return super().arguments() | own | {"table_id": self.table_id, "first_row": self.first_row}

    def _checked_row(self, padding_row: Tensor | Sequence[float] | None) -> Tensor | None:
        """The padding row as a buffer; None where it is zeros, which the operators give."""
        if padding_row is None:
            return None
        row = padding_row.detach() if isinstance(padding_row, Tensor) else torch.tensor(padding_row, device="cpu")
        if self.padding_idx is None or tuple(row.shape) != (self.embedding_dim,):
            raise ValueError(
                f"padding_row: expected {self.embedding_dim} values beside a padding_idx, got shape "
                f"{tuple(row.shape)} and padding_idx={self.padding_idx}"
            )
        if not row.is_meta and not row.isfinite().all():
            raise ValueError(f"padding_row: expected finite values, got {row.tolist()}")
        if not row.is_meta and not row.any():
            return None
        weight = self.array.weight
        return row.to(device=weight.device, dtype=embedding_dtype(weight), copy=True)

    @classmethod
    def _of_table(cls, embeddings: Tensor, freeze: bool, options: dict[str, Any]) -> "_RobeTable":
        if embeddings.dim() != 2:
            shape = tuple(embeddings.shape)
            raise ValueError(f"embeddings: expected (num_embeddings, embedding_dim), got shape {shape}")
        if options.get("array") is not None:
            raise ValueError(
                "array: all of its weights would be set, so expected robe_size= or compression= in its place; "
                "robe.compress(model, init='project') sets an array to several tables"
            )
        options = dict[str, Any](device=embeddings.device, dtype=embeddings.dtype) | options
        check_finite("embeddings", embeddings)
        layer = cls(*embeddings.shape, **options)
        project(layer.array, [(layer, embeddings)])
        layer.array.requires_grad_(not freeze)
        return layer

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(_NO_WEIGHT.format(type(self).__name__))
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Register a parameter as torch does, but refuse "weight", which would never be read."""
        if name == "weight":
            raise AttributeError(_NO_WEIGHT.format(type(self).__name__))
        super().register_parameter(name, param)

    def full_weight(self) -> Tensor:
        """Return the virtual table, torch's ``weight``. For tests and small tables.

        Returns:
            (num_embeddings, embedding_dim) in the array's dtype, with autograd.

        Raises:
            ValueError: num_embeddings is None.
        """
        return self._feature_rows(0, self.padding_idx)

    def extra_repr(self) -> str:
        """Return the arguments that ``repr`` shows."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, block_size={self.block_size}, hash={self.hash!r}"]
        parts += [f"table_id={self.table_id}"] if TRAITS[self.hash].key == "table" else [f"first_row={self.first_row}"]
        parts += ["sign=True"] * self.sign
        parts += [] if self.padding_idx is None else [f"padding_idx={self.padding_idx}"]
        return ", ".join(parts)


def _refuse(max_norm, scale_grad_by_freq, sparse, _weight=None, _freeze=False) -> None:
    """Refuse the options of torch that have no meaning on shared weights; each error names the way out."""
    if max_norm is not None:
        raise ValueError(
            "max_norm: rows share weights, so one can't be rescaled alone; use weight decay or clip gradients"
        )
    if scale_grad_by_freq:
        raise ValueError("scale_grad_by_freq: not supported; weight the samples by id frequency in the loss instead")
    if sparse:
        raise ValueError("sparse: the gradient of the array is dense; the array is small, so leave sparse=False")
    if _weight is not None:
        raise ValueError(
            "_weight: the table is virtual; from_pretrained() sets the array as near to weights as it can be"
        )
    if _freeze:
        raise ValueError("_freeze: freeze the array, with requires_grad_(False)")


class RobeEmbedding(_RobeTable):
    """nn.Embedding whose table is virtual: its embeddings are read from a small shared array.

    Give exactly one of array, robe_size and compression.

    Args:
        num_embeddings: size of the table; an id outside raises IndexError. None: any int64 id is legal.
        embedding_dim: D, components of an embedding.
        padding_idx: the id that reads zeros, or padding_row, and takes no gradient.
        max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze: torch's; refused where they ask for anything.
        array: the RobeArray to read from, shared with other layers.
        robe_size: the number of weights of the layer's own array.
        compression: how many times smaller than the table the layer's own array is, together with the filter of an
            admission. Where the array has room for every weight of the table, the mapping is the identity and the layer
            equals nn.Embedding exactly.
        block_size: Z, consecutive weights read at one hashed offset. None: embedding_dim, one read per id. Above
            embedding_dim, a block spans embeddings.
        table_id: tells the tables of one array apart: layers with the same array and table_id read the same embeddings.
        sign: whether each block is multiplied by a hashed +1 or -1.
        hash: "mix"; "linear", the formula of the authors' code; or "identity", a slot for every weight.
        first_row: size of all tables before this one in the array, for "linear" and "identity", which lay tables one
            after another. "identity" takes them to be as wide as this one.
        padding_row: (D,), what padding_idx reads, as nn.Embedding's padding row may hold a value; None: zeros.
        admission: the ids that have an embedding of their own; the others of a table share one. None: all have.
        seed, init_std, dtype, device: of the layer's own array; see RobeArray.

    Attributes:
        array: the RobeArray, the only parameter.
        admission: the Admission, or None.
        padding_row: buffer (D,), or None. It is in the ``state_dict`` where there is one, and loading one that has it
            or has it not makes the layer the same.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument out of range, or an option of nn.Embedding that shared weights can't have.

    Examples:
        >>> layer = RobeEmbedding(40_000_000, 16, compression=1000)
        >>> layer(torch.tensor([[3, 39_999_999]])).shape
        torch.Size([1, 2, 16])
    """

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **options: Any,
    ) -> "RobeEmbedding":
        """Make the layer that approximates a trained table best: least squares, each slot the mean of what it serves.

        Args:
            embeddings: (num_embeddings, embedding_dim); the array gets its device and dtype.
            freeze: whether the array is excluded from training.
            padding_idx: as in the class; its row of embeddings is the padding_row.
            max_norm, norm_type, scale_grad_by_freq, sparse: as in the class.
            **options: other arguments of the class, robe_size= or compression= among them.

        Returns:
            The layer.

        Raises:
            ValueError: as in the class; a shared array; or values that are not finite.
        """
        _refuse(max_norm, scale_grad_by_freq, sparse)
        own: dict[str, Any] = {"padding_idx": padding_idx}
        if padding_idx is not None and embeddings.dim() == 2 and -len(embeddings) <= padding_idx < len(embeddings):
            own["padding_row"] = embeddings[padding_idx]
        return cls._of_table(embeddings, freeze, own | options)  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up in the virtual table.

        Args:
            input: ids, int32 or int64, any shape (...).

        Returns:
            (..., embedding_dim) in the array's dtype.

        Raises:
            IndexError: an id outside num_embeddings; on CUDA, an assertion on the device.
        """
        if isinstance(input, Proxy):
            return record_call(self, input)
        embeddings = self._lookup(input.reshape(-1, 1), self.padding_idx).view(*input.shape, self.embedding_dim)
        if self.padding_idx is None:
            return embeddings
        return self._with_padding_row(embeddings, input)

    def full_weight(self) -> Tensor:
        """Return the virtual table, as in RobeEmbeddingBag; the row of padding_idx is padding_row, or zeros."""
        table = super().full_weight()
        return self._with_padding_row(table, torch.arange(len(table), device=table.device))

    def _with_padding_row(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        row = self._buffers.get("padding_row")  # whole models that 0.8.0 pickled have none
        if row is None or self.padding_idx is None:
            return embeddings
        return torch.where(torch.eq(ids, self.padding_idx).unsqueeze(-1), row.to(embeddings.dtype), embeddings)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        row = self._buffers.get("padding_row")
        return super().arguments() | ({} if row is None else {"padding_row": row.tolist()})

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        if f"{prefix}padding_row" in state_dict and self.padding_idx is not None:
            if self._buffers.get("padding_row") is None:
                self.padding_row = self.array.weight.new_zeros(self.embedding_dim)
        elif f"{prefix}array.weight" in state_dict:  # of a layer whose padding reads zeros
            self._buffers["padding_row"] = None
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class RobeEmbeddingBag(_RobeTable):
    """nn.EmbeddingBag whose table is virtual: its embeddings are read from a small shared array.

    Args:
        num_embeddings: size of the table; an id outside raises IndexError. None: any int64 id is legal.
        embedding_dim: D, components of an embedding.
        mode: the pooling, "sum", "mean" or "max" over the embeddings of a bag; an empty bag gives zeros.
        padding_idx: the id that bags leave out.
        include_last_offset: whether offsets have one more entry, the end of the last bag.
        max_norm, norm_type, scale_grad_by_freq, sparse, _weight: torch's; refused where they ask for anything.
        array, robe_size, compression, block_size, table_id, sign, hash, first_row, admission: as in RobeEmbedding.
        seed, init_std, device, dtype: as in RobeEmbedding.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument out of range, or an option of nn.EmbeddingBag that shared weights can't have.

    Examples:
        >>> layer = RobeEmbeddingBag(40_000_000, 16, mode="sum", compression=1000)
        >>> layer(torch.tensor([3, 5, 7]), torch.tensor([0, 2])).shape  # bags (3, 5) and (7)
        torch.Size([2, 16])
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        table_id: int = 0,
        first_row: int = 0,
        **options: Unpack[LayerOptions],
    ):
        check_options(type(self), options, LayerOptions.__annotations__)  # a bag leaves padding out, whatever its row
        of_torch = max_norm, norm_type, scale_grad_by_freq, sparse, _weight, False, device, dtype
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, *of_torch, table_id=table_id, first_row=first_row, **options
        )
        if mode not in POOLINGS:
            raise ValueError(f"mode: expected one of {', '.join(POOLINGS)}, got {mode!r}")
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **options: Any,
    ) -> "RobeEmbeddingBag":
        """Make the layer that approximates a trained table best; see RobeEmbedding.from_pretrained."""
        _refuse(max_norm, scale_grad_by_freq, sparse)
        options |= {"mode": mode, "include_last_offset": include_last_offset, "padding_idx": padding_idx}
        return cls._of_table(embeddings, freeze, options)  # type: ignore[return-value]

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look bags of ids up in the virtual table, and pool the embeddings of each bag.

        Args:
            input: ids, int32 or int64: (B, N), B bags of N ids; or (n,), cut into bags by offsets.
            offsets: (B,), where each bag begins, first 0; (B + 1,), the end of the last one too, with
                include_last_offset. Only with (n,) input.
            per_sample_weights: weights of the embeddings, shape of input, dtype of the array. Only with mode "sum".

        Returns:
            (B, embedding_dim) in the array's dtype.

        Raises:
            ValueError: shapes, types or offsets that don't fit.
            IndexError: an id outside num_embeddings; on CUDA, an assertion on the device.
        """
        if isinstance(input, Proxy) or isinstance(offsets, Proxy) or isinstance(per_sample_weights, Proxy):
            return record_call(self, input, offsets, per_sample_weights)
        if (
            per_sample_weights is not None
            and not torch.jit.is_tracing()  # whose shapes are no numbers
            and per_sample_weights.shape != input.shape
        ):
            raise ValueError(
                f"per_sample_weights: expected the shape of input {tuple(input.shape)}, "
                f"got {tuple(per_sample_weights.shape)}"
            )
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets: expected None with 2-D input, whose rows are the bags")
            bags, length = input.shape
            offsets = torch.arange(bags + 1, device=input.device) * length
            input = input.reshape(-1)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        elif input.dim() != 1:
            raise ValueError(f"input: expected 1-D with offsets, or 2-D, got shape {tuple(input.shape)}")
        elif offsets is None or offsets.dim() != 1:
            raise ValueError("offsets: expected a 1-D tensor with 1-D input")
        elif not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), input.shape[0])])
        return self._bag(input, offsets, per_sample_weights, self.mode, self.padding_idx).squeeze(1)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        return super().arguments() | {"mode": self.mode, "include_last_offset": self.include_last_offset}

    def extra_repr(self) -> str:
        """Return the arguments that ``repr`` shows."""
        return f"{super().extra_repr()}, mode={self.mode!r}"
