"""RobeKeyedEmbeddingBagCollection: torchrec's EmbeddingBagCollection on one array, without a need for torchrec."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from robe.admission import Admission
from robe.array import RobeArray
from robe.layers.collection import RobeEmbeddingBagCollection, dtype_of_configs, own_config
from robe.layers.options import LayerOptions, SharedOptions, check_options
from robe.layers.tables import has_room, resolve_array
from robe.layers.tracing import is_traced, record_call


class _Column(NamedTuple):
    name: str
    feature: str
    width: int


class RobeKeyedEmbeddingBagCollection(nn.Module):
    """torchrec's EmbeddingBagCollection on one array: a KeyedJaggedTensor goes in, a KeyedTensor comes out.

    Without torchrec, a dict of ids goes in and a dict of embeddings comes out. Tables may have different dimensions and
    poolings; those with the same dimension and pooling are read in one operator call. The class has the methods that
    torchrec's models call, so it fits into torchrec.models.dlrm.DLRM.

    Args:
        tables: torchrec's EmbeddingBagConfigs, or robe's; a feature may be in several tables. Table k has table_id k.
            Their data_type is that of the layer's own array.
        is_weighted: whether the weights of a KeyedJaggedTensor multiply the embeddings; with pooling "sum" only.
        first_slot: where in the array the tables begin, one after another, with a slot for every weight. None: they are
            hashed with "mix"; but where the layer's own array has room for every weight, they begin at 0.
        array, robe_size, compression: exactly one, as in RobeEmbedding. compression is that of all tables together.
        block_size, sign, admission: as in RobeEmbedding.
        seed, init_std, dtype, device: of the layer's own array; see RobeArray.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument out of range; two tables with one name; or an option of a table that a shared array
            can't follow, such as torchrec's init_fn.

    Examples:
        >>> tables = [EmbeddingBagConfig("user", 10_000, 16), EmbeddingBagConfig("words", None, 8, pooling="mean")]
        >>> layer = RobeKeyedEmbeddingBagCollection(tables, robe_size=5_000)
        >>> layer({"user": torch.tensor([7, 8]), "words": torch.tensor([[1, 2], [3, 4]])})["words"].shape
        torch.Size([2, 8])
    """

    _version = 2  # 1, of 0.8.0, hashed in arrays with room for every weight too

    def __init__(
        self,
        tables: Sequence[Any],
        *,
        is_weighted: bool = False,
        first_slot: int | None = None,
        device=None,
        dtype=None,
        **options: Unpack[SharedOptions],
    ):
        super().__init__()
        check_options(type(self), options, SharedOptions.__annotations__)
        tables = list(tables)
        dtype = dtype_of_configs(tables, dtype, options.get("array"))
        configs = [own_config(table) for table in tables]
        if not configs:
            raise ValueError("tables: expected at least one EmbeddingBagConfig")
        repeated = [name for name, n in Counter(config.name for config in configs).items() if n > 1]
        if repeated:
            raise ValueError(f"tables: table names must be unique, {repeated[0]!r} is there twice")
        floats = [None if c.num_embeddings is None else c.num_embeddings * c.embedding_dim for c in configs]
        table_weights = None if None in floats else sum(n or 0 for n in floats)
        array = resolve_array(options, table_weights=table_weights, device=device, dtype=dtype)
        if first_slot is None and has_room(options, array, table_weights):
            first_slot = 0
        block_size = options.get("block_size")
        self._first_slot = first_slot
        self._configs, self._is_weighted = tables, is_weighted
        self._block_size = block_size
        uses = Counter(feature for config in configs for feature in config.feature_names)
        self._columns: list[_Column] = []  # of the output, table by table
        groups: dict[tuple[int, str], tuple[list[int], list[int]]] = {}  # their tables and columns
        for k, config in enumerate(configs):
            members, columns = groups.setdefault((config.embedding_dim, config.pooling), ([], []))
            members.append(k)
            for feature in config.feature_names:
                columns.append(len(self._columns))
                name = f"{feature}@{config.name}" if uses[feature] > 1 else feature
                self._columns.append(_Column(name, feature, config.embedding_dim))
        # In a collection of robe's a feature is in one table.
        configs = [replace(c, feature_names=[f"{feature}@{c.name}" for feature in c.feature_names]) for c in configs]
        shared: LayerOptions = {
            "array": array,
            "block_size": block_size,
            "sign": options.get("sign", False),
            "admission": options.get("admission"),
        }
        slots = dict.fromkeys(groups, 0)
        if first_slot is not None:
            shared["hash"] = "identity"
            # Rows of 4, 8, 16 ... numbers first: wherever they end, the next are aligned.
            for group in sorted(groups, key=lambda group: -(group[0] & -group[0])):
                slots[group] = first_slot
                first_slot += group[0] * sum(configs[k].num_embeddings or 0 for k in groups[group][0])
        self.collections = nn.ModuleList(
            RobeEmbeddingBagCollection(
                [configs[k] for k in members], table_ids=members, first_slot=slots[group], **shared
            )
            for group, (members, _) in groups.items()
        )
        self._columns_of_collection = [columns for _, columns in groups.values()]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        tables, sign = [asdict(own_config(table)) for table in self._configs], self.collections[0].sign
        config = {"tables": tables, "is_weighted": self._is_weighted, "block_size": self._block_size, "sign": sign}
        return config if self._first_slot is None else config | {"first_slot": self._first_slot}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._columns = [_Column(*column) for column in self._columns]  # 0.8.0 pickled plain tuples
        self.__dict__.setdefault("_first_slot", None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if local_metadata.get("version") == 1 and self._first_slot is not None:
            errors.append(
                f"{prefix or 'tables'}: hashed in this checkpoint of 0.8.0, and here every weight has its own slot; "
                "give the layer array=robe.RobeArray(size) to read as 0.8.0 did"
            )

    @property
    def array(self) -> RobeArray:
        """The shared weights."""
        return self.collections[0].array  # type: ignore[return-value]

    @property
    def admission(self) -> Admission | None:
        """The ids that have embeddings of their own; None: all."""
        return self.collections[0].admission  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device of the array."""
        return self.array.weight.device

    def is_weighted(self) -> bool:
        """Return whether the weights of a KeyedJaggedTensor multiply the embeddings."""
        return self._is_weighted

    def embedding_bag_configs(self) -> list:
        """Return the configs as they were given."""
        return self._configs

    def forward(self, features: Any) -> Any:
        """Look the ids of a batch up, and pool the embeddings of each bag.

        Args:
            features: torchrec's KeyedJaggedTensor, in any order of keys; or a dict of each feature's ids, int32 or
                int64: (B,), one each; (B, N), bags of N; or (values (n,), offsets (B + 1,)), with is_weighted
                (values, offsets, weights (n,)). Keys that no table reads are left out.

        Returns:
            For a KeyedJaggedTensor torchrec's KeyedTensor, (B, sum of the dimensions), with keys and order as in
            torchrec's EmbeddingBagCollection: table by table, "feature@table" where several tables read a feature;
            float32, or the array's float64. For a dict a dict with the same keys in the same order, each
            (B, embedding_dim) in the array's dtype.

        Raises:
            ValueError: a missing key, batch sizes that differ by key, or shapes that don't fit.
            TypeError: neither a KeyedJaggedTensor nor a dict.
            IndexError: an id outside its table; on CUDA, an assertion on the device.
        """
        if is_traced(features):
            return record_call(self, features)
        names = [column.name for column in self._columns]
        if isinstance(features, Mapping):
            self._check_keys(features)
            return dict(zip(names, self._pooled(lambda wanted: _of_mapping(features, wanted, self._is_weighted))))
        make = _keyed_tensor(features)
        if features.variable_stride_per_key():
            raise ValueError("features: expected one batch size for all keys; variable stride is not supported")
        place = {key: k for k, key in enumerate(features.keys())}
        self._check_keys(place)
        columns = self._pooled(lambda wanted: _of_keys(features, [place[key] for key in wanted], self._is_weighted))
        values = torch.cat(columns, dim=1)
        return make(
            keys=names,
            length_per_key=[column.width for column in self._columns],
            values=values if values.dtype == torch.float64 else values.float(),
        )

    def _check_keys(self, keys: Mapping) -> None:
        missing = [column.feature for column in self._columns if column.feature not in keys]
        if missing:
            raise ValueError(f"features: expected a key {missing[0]!r}, got {', '.join(keys) or 'none'}")

    def _pooled(self, bags_of: Callable[[list[str]], tuple]) -> list[Tensor]:
        """The columns of the output, from the arguments that a collection takes of some features."""
        embeddings: dict[int, Tensor] = {}
        for collection, columns in zip(self.collections, self._columns_of_collection):
            bags = bags_of([self._columns[c].feature for c in columns])
            embeddings |= zip(columns, collection(*bags).unbind(1))
        return [embeddings[column] for column in range(len(self._columns))]


def _of_mapping(features: Mapping, keys: list[str], weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """values, offsets and weights of some features, one behind the other."""
    values, offsets, batch, before = [], [], None, 0
    weights: list[Tensor] = []
    for key in keys:
        of_key = _bags(f"features[{key!r}]", features[key], weighted)
        bags = len(of_key[1]) - 1
        batch = bags if batch is None else batch
        if bags != batch:
            raise ValueError(f"features[{key!r}]: expected {batch} examples, as features[{keys[0]!r}] has, got {bags}")
        values.append(of_key[0])
        offsets.append(of_key[1][:-1] + before)
        weights += of_key[2:]
        before += len(of_key[0])
    offsets.append(offsets[0].new_full((1,), before))
    return torch.cat(values), torch.cat(offsets), torch.cat(weights) if weighted else None


def _bags(name: str, ids: Any, weighted: bool) -> Sequence[Tensor]:
    """values, offsets (B + 1,) and if weighted weights of one feature."""
    expected = "(values, offsets, weights)" if weighted else "(B,) or (B, N) ids, or (values, offsets)"
    if isinstance(ids, Tensor) and ids.dim() in (1, 2) and not weighted:
        return ids.reshape(-1), torch.arange(len(ids) + 1, device=ids.device) * ids[:1].numel()
    if not isinstance(ids, (list, tuple)) or len(ids) != 2 + weighted:
        length = f" of {len(ids)}" if isinstance(ids, (list, tuple)) else ""
        got = f"a tensor {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}{length}"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    values, offsets = ids[:2]
    for what, x in zip(("values", "offsets", "weights"), ids):
        if not isinstance(x, Tensor) or x.dim() != 1:
            got = f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"{name}: expected {what} as a tensor of one dimension, got {got}")
    if weighted and len(ids[2]) != len(values):
        raise ValueError(f"{name}: expected as many weights as values, {len(values)}, got {len(ids[2])}")
    if not len(offsets):
        raise ValueError(f"{name}: expected offsets (B + 1,), got none")
    ends = offsets[[0, -1]]
    if not ends.is_cuda and ends.tolist() != [0, len(values)]:  # on a GPU, to look would be to wait for it
        raise ValueError(
            f"{name}: expected offsets from 0 to {len(values)}, the number of values, "
            f"got {ends[0].item()} ... {ends[1].item()}"
        )
    return ids


def _keyed_tensor(features: Any) -> Any:
    """Return torchrec's KeyedTensor, from the module that defines the class of features."""
    for one in type(features).__mro__:
        if one.__name__ == "KeyedJaggedTensor":
            return sys.modules[one.__module__].KeyedTensor
    raise TypeError(f"features: expected torchrec's KeyedJaggedTensor, or a dict, got a {type(features).__name__}")


def _of_keys(features: Any, places: list[int], weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """values, offsets and weights of some keys, in another order perhaps."""
    values, offsets, weights = features.values(), features.offsets(), features.weights() if weighted else None
    if places == list(range(len(features.keys()))):
        return values, offsets, weights
    start = features.offset_per_key()
    lengths = features.lengths().view(len(features.keys()), -1)[places].flatten()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def pick(of_ids: Tensor) -> Tensor:
        return torch.cat([of_ids[start[k] : start[k + 1]] for k in places])

    return pick(values), offsets, None if weights is None else pick(weights)
