"""RobeEmbeddingBagCollection: all embedding tables of a recommender on one array, read in one operator call."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, Unpack

from torch import Tensor
from torch.fx import Proxy

from robe.hashing import TRAITS
from robe.layers.options import LayerOptions
from robe.layers.tables import RobeTables
from robe.layers.tracing import record_call
from robe.ops import POOLINGS


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
    pooling = getattr(config.pooling, "value", config.pooling).lower()
    features = list(config.feature_names) or [config.name]
    return EmbeddingBagConfig(config.name, config.num_embeddings, config.embedding_dim, features, pooling)


class RobeEmbeddingBagCollection(RobeTables):
    """All embedding tables of a recommender, virtual, on one array, read in one operator call.

    F features, B examples, D = embedding_dim. Features come in the order of ``feature_names``: table by table.

    Args:
        tables: their configs, with one embedding_dim and one pooling for all.
        array, robe_size, compression: exactly one, as in RobeEmbedding. compression is that of all tables together.
            Where the collection's own array has room for every weight, the mapping is the identity.
        table_ids: of the tables in the hash, see RobeEmbedding; None: 0, 1, 2 ... Collections that share an array need
            different ones.
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
            device=device,
            dtype=dtype,
            **options,
        )
        self.tables = tables
        self.table_ids = list(range(len(tables)) if table_ids is None else table_ids)
        self.feature_names = [name for table in tables for name in (table.feature_names or [table.name])]
        self.pooling = tables[0].pooling

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        config = super().arguments() | {"tables": [asdict(table) for table in self.tables], "table_ids": self.table_ids}
        del config["embedding_dim"]  # of the tables
        return config

    @classmethod
    def from_configs(cls, tables: Sequence[Any], **options: Any) -> "RobeEmbeddingBagCollection":
        """Make a collection from torchrec's EmbeddingBagConfigs.

        For several dimensions or poolings, or for KeyedJaggedTensors, see RobeKeyedEmbeddingBagCollection.

        Args:
            tables: torchrec's configs, or robe's.
            **options: keywords of the class.
        """
        return cls([own_config(table) for table in tables], **options)

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
