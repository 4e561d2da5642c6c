"""RobeEmbeddingBagCollection: all embedding tables of a recommender on one array, read in one operator call."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from itertools import accumulate
from math import sqrt
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.fx import Proxy

from robe.array import RobeArray
from robe.hashing import TRAITS
from robe.layers.options import LayerOptions
from robe.layers.tables import RobeTables
from robe.layers.tracing import record_call
from robe.ops import POOLINGS

_DATA_TYPES = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}  # torchrec's names


@dataclass
class EmbeddingBagConfig:
    """One table, in torchrec's terms.

    Attributes:
        name: unique in a collection.
        num_embeddings: size of the table; None: any int64 id is legal.
        embedding_dim: D.
        feature_names: the features that read this table; empty: one, of the table's name.
        pooling: "sum", "mean" or "max" over the ids of a bag.
    """

    name: str
    num_embeddings: int | None
    embedding_dim: int
    feature_names: list[str] = field(default_factory=list)
    pooling: str = "sum"


def own_config(config: Any) -> EmbeddingBagConfig:
    """Return robe's config for one of torchrec's, whose pooling is an Enum with the same names."""
    if not hasattr(config, "pooling"):
        raise ValueError(f"tables: expected EmbeddingBagConfigs, got a {type(config).__name__}, which has no pooling")
    pooling = getattr(config.pooling, "value", config.pooling).lower()
    features = list(config.feature_names) or [config.name]
    return EmbeddingBagConfig(config.name, config.num_embeddings, config.embedding_dim, features, pooling)


def dtype_of_configs(configs: Sequence[Any], dtype: torch.dtype | None, array: RobeArray | None) -> torch.dtype | None:
    """Return the dtype of the array that tables ask for, and refuse what they ask for and can't have.

    Args:
        configs: torchrec's, or robe's, which ask for nothing.
        dtype, array: of the layer's own array, or the array that it is given.

    Returns:
        dtype; where there is neither, that of the configs' ``data_type``.

    Raises:
        ValueError: an option that a shared array can't follow, such as ``init_fn``; data types that differ.
    """
    types = {config.name: _data_type(config) for config in configs}
    for config in configs:
        _refuse_options(config)
        if types[config.name] != types[configs[0].name]:
            raise ValueError(
                f"tables: one array has one data_type; {configs[0].name!r} has {types[configs[0].name]}, "
                f"{config.name!r} has {types[config.name]}"
            )
    wanted = next(iter(types.values()), None)
    given = dtype if array is None else array.weight.dtype
    if wanted in (None, torch.float32) or given == wanted:  # torchrec's default is float32, which asks for nothing
        return dtype
    if given is not None:
        raise ValueError(f"tables: {configs[0].name!r} has data_type {wanted}, and the array is of {given}")
    return wanted


def _data_type(config: Any) -> torch.dtype | None:
    """The dtype of a table; None if its config has none."""
    value = getattr(config, "data_type", None)
    name = getattr(value, "value", value)
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in _DATA_TYPES:
        raise ValueError(f"tables: {config.name!r} has data_type {name}: expected one of {', '.join(_DATA_TYPES)}")
    return _DATA_TYPES[name]


def _refuse_options(config: Any) -> None:
    """Refuse each option of torchrec that asks for something and is not one of robe's or data_type."""
    own = {"data_type", *(field.name for field in fields(EmbeddingBagConfig))}
    defaults = {field.name: field.default for field in fields(config)} if is_dataclass(config) else {}
    for name, value in vars(config).items():
        if name in own or value is None or value is False or value == defaults.get(name) or value == []:
            continue
        if name == "init_fn" and _is_torchrecs_own(value, config):
            continue
        hint = ""
        if name.startswith(("init_fn", "weight_init")):
            hint = ", as rows share its weights; leave it out, and set init_std= or layer.array.weight"
        raise ValueError(
            f"tables: {config.name!r} has {name}={value!r}, which a table on a shared array can't have{hint}"
        )


def _is_torchrecs_own(init_fn: Any, config: Any) -> bool:
    """Whether it is what torchrec's configs have where init_fn was not given."""
    if not isinstance(init_fn, partial) or init_fn.func is not torch.nn.init.uniform_ or not config.num_embeddings:
        return False
    bound = sqrt(1 / config.num_embeddings)
    return (init_fn.args, init_fn.keywords) == ((), {"a": -bound, "b": bound})


class RobeEmbeddingBagCollection(RobeTables):
    """All embedding tables of a recommender, virtual, on one array, read in one operator call.

    F features, B examples, D = embedding_dim. Features come in the order of ``feature_names``: table by table.

    Args:
        tables: their configs, with one embedding_dim and one pooling for all.
        array, robe_size, compression: exactly one, as in RobeEmbedding. compression is that of all tables together.
            Where the collection's own array has room for every weight, the mapping is the identity.
        table_ids: of the tables in the hash, see RobeEmbedding; None: 0, 1, 2 ... Collections that share an array need
            different ones.
        first_slot: where in the array the first table begins, with hash="identity", which lays one after another.
        block_size, sign, hash, admission: as in RobeEmbedding.
        seed, init_std, dtype, device: of the collection's own array; see RobeArray.

    Attributes:
        tables: the configs.
        feature_names: F names, table by table.
        array, admission: as in RobeEmbedding.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument out of range; a name used twice; tables with different embedding_dim or pooling.

    Examples:
        >>> tables = [EmbeddingBagConfig("user", 40_000_000, 16), EmbeddingBagConfig("item", None, 16)]
        >>> layer = RobeEmbeddingBagCollection(tables, robe_size=100_000)
        >>> layer(torch.tensor([[7, 2**40], [8, -3]])).shape
        torch.Size([2, 2, 16])
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        table_ids: Sequence[int] | None = None,
        first_slot: int = 0,
        device=None,
        dtype=None,
        **options: Unpack[LayerOptions],
    ):
        tables = list(tables)
        _check_configs(tables)
        num_embeddings = [table.num_embeddings for table in tables]
        if table_ids is not None and len(table_ids) != len(tables):
            raise ValueError(f"table_ids: expected {len(tables)}, one a table, got {len(table_ids)}")
        hash = options.get("hash", "mix")
        if hash in TRAITS and TRAITS[hash].key == "row" and None in num_embeddings:
            raise ValueError(f"hash={hash!r}: lays tables one behind the other, so every table needs num_embeddings")
        super().__init__(
            num_embeddings,
            tables[0].embedding_dim,
            table_of_feature=[k for k, table in enumerate(tables) for _ in (table.feature_names or [table.name])],
            table_ids=range(len(tables)) if table_ids is None else table_ids,
            first_rows=[0, *accumulate(n or 0 for n in num_embeddings)][:-1],
            first_slot=first_slot,
            device=device,
            dtype=dtype,
            **options,
        )
        self.tables = tables
        self.table_ids = list(range(len(tables)) if table_ids is None else table_ids)
        self.feature_names = [name for table in tables for name in (table.feature_names or [table.name])]
        self.pooling = tables[0].pooling
        self.first_slot = first_slot

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        config = super().arguments() | {"tables": [asdict(table) for table in self.tables], "table_ids": self.table_ids}
        del config["embedding_dim"]  # of the tables
        return config | ({"first_slot": self.first_slot} if self.first_slot else {})

    @classmethod
    def from_configs(cls, tables: Sequence[Any], **options: Any) -> "RobeEmbeddingBagCollection":
        """Make a collection from torchrec's EmbeddingBagConfigs.

        For several dimensions or poolings, or for KeyedJaggedTensors, see RobeKeyedEmbeddingBagCollection.

        Args:
            tables: torchrec's configs, or robe's. Their data_type is that of the collection's own array.
            **options: keywords of the class.

        Raises:
            ValueError: as in the class; or a table with an option that a shared array can't follow, such as init_fn.
        """
        tables = list(tables)
        dtype = dtype_of_configs(tables, options.get("dtype"), options.get("array"))
        return cls([own_config(table) for table in tables], **options | {"dtype": dtype})

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Look the ids of a batch up.

        Args:
            input: ids, int32 or int64: (B, F), one per feature; or with offsets the values of all bags (n,), features
                major: first the bags of feature 0, example by example.
            offsets: (F * B + 1,), where each bag begins and the last one ends (KeyedJaggedTensor's offsets).
            per_sample_weights: (n,) weights of the embeddings, dtype of the array; with offsets and pooling "sum" only.
            out: (B, F, D) to write into, such as ``vectors[:, 1:]``; without autograd only.

        Returns:
            (B, F, D) in the array's dtype; out where it is given.

        Raises:
            ValueError: shapes, types or offsets that don't fit.
            IndexError: an id outside its table; on CUDA, an assertion on the device.
        """
        if isinstance(input, Proxy) or (
            offsets is not None and (isinstance(offsets, Proxy) or isinstance(per_sample_weights, Proxy))
        ):
            return record_call(self, input, offsets, per_sample_weights, out=out)
        if offsets is None:
            if per_sample_weights is not None:
                raise ValueError("per_sample_weights: expected with offsets; (B, F) input has one id per feature")
            return self._lookup(input, out=out)
        return self._bag(input, offsets, per_sample_weights, self.pooling, out=out)

    def full_weight(self, feature: str) -> Tensor:
        """Return the virtual table of a feature. For tests and small tables.

        Args:
            feature: one of ``feature_names``.

        Returns:
            (num_embeddings, D) in the array's dtype, with autograd.

        Raises:
            ValueError: there is no such feature, or its table is unbounded.
        """
        if feature not in self.feature_names:
            raise ValueError(f"feature: expected one of {', '.join(self.feature_names)}, got {feature!r}")
        return self._feature_rows(self.feature_names.index(feature))

    def extra_repr(self) -> str:
        """Return the arguments that ``repr`` shows."""
        return (
            f"{len(self.tables)} tables, {len(self.feature_names)} features, embedding_dim={self.embedding_dim}, "
            f"block_size={self.block_size}, hash={self.hash!r}, pooling={self.pooling!r}" + ", sign=True" * self.sign
        )


def _check_configs(tables: list[EmbeddingBagConfig]) -> None:
    if not tables:
        raise ValueError("tables: expected at least one EmbeddingBagConfig")
    for what, names in (
        ("table", [table.name for table in tables]),
        ("feature", [name for table in tables for name in (table.feature_names or [table.name])]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tables: {what} names must be unique, {twice[0]!r} is there twice")
    for option in ("embedding_dim", "pooling"):
        for table in tables:
            expected, got = getattr(tables[0], option), getattr(table, option)
            if got != expected:
                raise ValueError(
                    f"tables: all tables of a collection need the same {option}; {tables[0].name!r} has {expected!r}, "
                    f"{table.name!r} has {got!r}: RobeKeyedEmbeddingBagCollection takes several"
                )
    if tables[0].pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {tables[0].pooling!r}")
