"""RobeArray, and what every layer on one does: choosing it, its names in a state_dict, moving, copying, filling in."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from robe import EmbeddingBagConfig, RobeArray, RobeEmbedding, RobeEmbeddingBag, RobeEmbeddingBagCollection
from tests.helpers.oracle import places

ROWS, DIM = 40, 6


def collection(num_embeddings=ROWS, embedding_dim=DIM, **options):
    return RobeEmbeddingBagCollection([EmbeddingBagConfig("table", num_embeddings, embedding_dim)], **options)


def embedding(num_embeddings=ROWS, embedding_dim=DIM, **options):
    return RobeEmbedding(num_embeddings, embedding_dim, **options)


def bag(num_embeddings=ROWS, embedding_dim=DIM, **options):
    return RobeEmbeddingBag(num_embeddings, embedding_dim, mode="sum", **options)


LAYERS = [embedding, bag, collection]
every_layer = pytest.mark.parametrize("build", LAYERS)


def read(layer, ids):
    """The rows (n, d) of ids, through whatever forward the layer has."""
    rows = layer(ids) if isinstance(layer, RobeEmbedding) else layer(ids.view(-1, 1))
    return rows.reshape(len(ids), -1)


def assert_reads_its_weight(layer, **layout):
    """The layer reads its present weights where the hash says."""
    ids = torch.arange(ROWS)
    slots, signs = places(ids, embedding_dim=DIM, size=layer.array.size, **layout)
    weight = layer.array.weight.detach()
    assert torch.equal(read(layer, ids).detach(), weight[torch.from_numpy(slots)] * torch.from_numpy(signs))


# ---------------------------------------------------------------------------------------------------------------------
# The array alone


def test_array_is_one_parameter_of_its_size():
    array = RobeArray(100)
    assert list(array.state_dict()) == ["weight"]
    assert isinstance(array.weight, nn.Parameter)
    assert array.weight.shape == (array.size,) == (100,)


@pytest.mark.parametrize(("init_std", "expected"), [(None, 0.01), (0.5, 0.5), (0.0, 0.0)])
def test_initial_values_are_normal_of_the_given_scale(init_std, expected):
    torch.manual_seed(0)
    weight = RobeArray(100_000, init_std=init_std).weight.detach()
    # 5 sigma of the sampling error of a mean, of a standard deviation, and of the share within one sigma.
    assert abs(weight.mean().item()) <= 5 * expected / 100_000**0.5
    assert abs(weight.std().item() - expected) <= 5 * expected / 200_000**0.5
    if expected:
        assert abs((weight.abs() < expected).double().mean().item() - 0.6827) < 5 * 0.4654 / 100_000**0.5


def test_initial_values_come_from_the_global_generator():
    draws = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        draws.append(RobeArray(50, seed=99).weight.detach())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_reset_parameters_draws_again_at_the_scale_of_the_array():
    array = RobeArray(100_000, init_std=2.0)
    before = array.weight.detach().clone()
    array.reset_parameters()
    assert not torch.equal(array.weight, before)
    assert abs(array.weight.std().item() - 2) < 5 * 2 / 200_000**0.5


def test_array_takes_dtype_and_device_as_in_torch():
    array = RobeArray(5, dtype=torch.bfloat16, device="meta")
    assert array.weight.dtype == torch.bfloat16
    assert array.weight.device.type == "meta"


def test_array_follows_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert RobeArray(5).weight.dtype == torch.float64
        assert embedding(compression=10)(torch.tensor(1)).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert RobeArray(5).weight.dtype == before


def test_array_shows_size_seed_and_scale():
    assert repr(RobeArray(100, seed=7)) == "RobeArray(100, seed=7, init_std=0.01)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: expected at least 1 weight, got 0"),
        ({"size": -3}, "size: expected at least 1 weight, got -3"),
        ({"size": 3.0}, "size: expected an integer, got 3.0"),
        ({"size": 1 << 63}, "size: expected an integer of 64 bits, got 9223372036854775808"),
        ({"size": 3, "seed": None}, "seed: expected an integer, got None"),
        ({"size": 3, "seed": 1.0}, "seed: expected an integer, got 1.0"),
        ({"size": 3, "init_std": -0.1}, "init_std: expected at least 0, got -0.1"),
        ({"size": 3, "init_std": float("nan")}, "init_std: expected at least 0, got nan"),
        ({"size": 3, "init_std": float("inf")}, "init_std: expected at least 0, got inf"),
        ({"size": 3, "init_mean": float("nan")}, "init_mean: expected a finite number, got nan"),
        ({"size": 3, "dtype": torch.int64}, "dtype: expected one of torch.float32, .* got torch.int64"),
        ({"size": 3, "dtype": torch.complex64}, "dtype: expected one of torch.float32, .* got torch.complex64"),
    ],
)
def test_array_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        RobeArray(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the array of a layer


@every_layer
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"compression": 10}, 24),
        ({"compression": 7.5}, 32),
        ({"compression": 6.5}, 36),  # 36.9: rounded down, so that the array is never larger than asked
        ({"robe_size": 100}, 100),
        ({"robe_size": 239}, 239),
        ({"array": RobeArray(50)}, 50),
        ({"array": RobeArray(1000)}, 1000),  # shared: others read it too, so room for one is no room for all
    ],
)
def test_size_of_the_array_and_mix_where_it_is_small_or_shared(build, options, size):
    layer = build(**options)
    assert layer.array.size == size
    assert_reads_its_weight(layer, hash="mix", block_size=DIM)


@every_layer
@pytest.mark.parametrize(
    ("options", "size"),
    [({"compression": 1}, 240), ({"compression": 0.25}, 240), ({"robe_size": 240}, 240), ({"robe_size": 300}, 300)],
)
@pytest.mark.parametrize("block_size", [None, 1, 7, 1000])
def test_an_array_of_its_own_with_room_for_every_weight_is_the_table_itself(build, options, size, block_size):
    layer = build(**options, block_size=block_size, sign=True)
    assert layer.array.size == size
    assert torch.equal(read(layer, torch.arange(ROWS)), layer.array.weight[: ROWS * DIM].view(ROWS, DIM))


@every_layer
@pytest.mark.parametrize("block_size", [None, 4, 9])
def test_options_of_the_hash_reach_it(build, block_size):
    layer = build(compression=4, seed=5, sign=True, block_size=block_size)
    assert_reads_its_weight(layer, hash="mix", block_size=block_size or DIM, seed=5, sign=True)


@every_layer
def test_options_of_the_array_reach_it(build):
    array = build(compression=2, seed=5, init_std=3.0, dtype=torch.float64, device="meta").array
    assert (array.seed, array.init_std, array.weight.dtype) == (5, 3.0, torch.float64)
    assert array.weight.device.type == "meta"


@every_layer
def test_linear_stays_linear_however_large_the_array(build):
    assert_reads_its_weight(build(robe_size=1000, hash="linear"), hash="linear", block_size=DIM)


@every_layer
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of array= .* robe_size= .* compression= .* got none"),
        ({"array": RobeArray(9), "robe_size": 9}, "exactly one of .* got array and robe_size"),
        ({"array": RobeArray(9), "compression": 9}, "exactly one of .* got array and compression"),
        ({"robe_size": 9, "compression": 9}, "exactly one of .* got robe_size and compression"),
        ({"array": RobeArray(9), "seed": 0}, "seed, init_std, dtype and device belong to the array"),
        ({"array": RobeArray(9), "init_std": 0.1}, "seed, init_std, dtype and device belong to the array"),
        ({"array": RobeArray(9), "dtype": torch.float32}, "seed, init_std, dtype and device belong to the array"),
        ({"array": RobeArray(9), "device": "cpu"}, "seed, init_std, dtype and device belong to the array"),
        ({"compression": 0}, "compression: expected a positive number, got 0"),
        ({"compression": -2}, "compression: expected a positive number, got -2"),
        ({"compression": float("nan")}, "compression: expected a positive number, got nan"),
        ({"compression": 1000}, "compression: 240 weights compressed 1000 times leave none; share one array="),
        ({"compression": 10, "num_embeddings": None}, "compression: tables without num_embeddings .* give robe_size="),
        ({"robe_size": 0}, "size: expected at least 1 weight, got 0"),
        ({"robe_size": 9, "init_std": -1.0}, "init_std: expected at least 0, got -1.0"),
        ({"robe_size": 9, "embedding_dim": 0}, "embedding_dim: expected at least 1, got 0"),
        ({"robe_size": 9, "num_embeddings": 0}, "num_embeddings: expected at least 1, or None for any int64 id, got 0"),
        ({"robe_size": 9, "hash": "md5"}, "hash: expected one of mix, linear, identity, got 'md5'"),
        ({"robe_size": 9.0}, "robe_size: expected an integer, got 9.0"),
        ({"robe_size": 9, "num_embeddings": 1e6}, "num_embeddings: expected an integer, got 1000000.0"),
        ({"robe_size": 9, "num_embeddings": 1 << 63}, "num_embeddings: expected an integer of 64 bits"),
        ({"robe_size": 9, "embedding_dim": 8.0}, "embedding_dim: expected an integer, got 8.0"),
        ({"robe_size": 9, "block_size": 2.5}, "block_size: expected an integer, got 2.5"),
        ({"robe_size": 9, "sign": "no"}, "sign: expected True or False, got 'no'"),
        ({"robe_size": 9, "admission": 7}, "admission: expected an Admission, got a int"),
        ({"array": torch.zeros(9)}, "array: expected a RobeArray, got a Tensor"),
        ({"robe_size": 9, "block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"robe_size": 9, "block_size": 10}, "block_size: an array of 9 weights does not hold one block of 10"),
        ({"compression": 60}, "block_size: an array of 4 weights does not hold one block of 6"),
        ({"robe_size": 9, "hash": "linear", "block_size": 10}, "an array of 9 weights does not hold one block of 10"),
        ({"robe_size": 239, "hash": "identity"}, "hash='identity': the tables take 240 slots, the array has 239"),
        ({"robe_size": 9, "hash": "identity", "num_embeddings": None}, "every table needs num_embeddings"),
    ],
)
def test_every_layer_refuses(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@every_layer
def test_integers_of_numpy_are_integers(build):
    one, other = (
        build(ROWS, DIM, robe_size=50, block_size=4, seed=7),
        build(*np.array([ROWS, DIM]), robe_size=np.int64(50), block_size=np.int32(4), seed=np.uint8(7)),
    )
    other.load_state_dict(one.state_dict())
    assert torch.equal(read(one, torch.arange(ROWS)), read(other, torch.arange(ROWS)))


@pytest.mark.parametrize("table_id", np.arange(-1, 2))
def test_a_table_id_of_numpy_is_the_number(table_id):
    array = RobeArray(50)
    one, other = (embedding(array=array, table_id=x) for x in (table_id, int(table_id)))
    assert torch.equal(one.full_weight(), other.full_weight())


# ---------------------------------------------------------------------------------------------------------------------
# As modules


@every_layer
@pytest.mark.parametrize("options", [{"compression": 10}, {"compression": 1}, {"robe_size": 50, "hash": "linear"}])
def test_the_state_dict_holds_the_weights_by_a_name_that_is_a_promise(build, options):
    layer = build(**options)
    assert list(layer.state_dict()) == ["array.weight"]
    assert [name for name, _ in layer.named_parameters()] == ["array.weight"]


@every_layer
def test_a_state_dict_restores_the_rows(build):
    trained, fresh = build(compression=10), build(compression=10)
    ids = torch.arange(ROWS)
    assert not torch.equal(read(trained, ids), read(fresh, ids))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(read(trained, ids), read(fresh, ids))


@every_layer
def test_a_state_dict_of_another_size_is_refused(build):
    with pytest.raises(RuntimeError, match=r"size mismatch for array\.weight"):
        build(compression=10).load_state_dict(build(compression=5).state_dict())


@every_layer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_reads_the_same_and_has_weights_of_its_own(build, duplicate):
    layer = build(compression=10, seed=3, sign=True, block_size=4)
    twin = duplicate(layer)
    ids = torch.arange(ROWS)
    assert torch.equal(read(twin, ids), read(layer, ids))
    assert repr(twin) == repr(layer)
    before = read(twin, ids).detach()
    with torch.no_grad():
        layer.array.weight.zero_()
    assert torch.equal(read(twin, ids), before)
    assert_reads_its_weight(twin, hash="mix", block_size=4, seed=3, sign=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_layers_that_share_shares(duplicate):
    array = RobeArray(50)
    twin = duplicate(nn.ModuleList(build(array=array) for build in LAYERS))
    assert len(list(twin.parameters())) == 1
    assert twin[0].array is twin[1].array is twin[2].array
    assert twin[0].array is not array


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_changes_the_weights_and_leaves_the_keys(build, dtype):
    """A key rounded to a float of 11 bits would read other rows."""
    layer = build(compression=10).to(dtype)
    rows = read(layer, torch.arange(ROWS))
    assert rows.dtype == dtype
    assert_reads_its_weight(layer, hash="mix", block_size=DIM)
    rows.sum().backward()
    assert layer.array.weight.grad.dtype == dtype


@every_layer
@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"compression": 10, "seed": 4}, {"hash": "mix", "block_size": DIM, "seed": 4}),
        ({"robe_size": 50, "hash": "linear"}, {"hash": "linear", "block_size": DIM}),
        ({"compression": 1}, {"hash": "identity", "block_size": DIM}),
    ],
)
def test_a_layer_built_on_meta_is_filled_in_by_to_empty_and_reset_parameters(build, options, layout):
    layer = build(**options, init_std=2.0, device="meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu")
    layer.array.weight.detach().fill_(123)  # what memory may hold
    torch.manual_seed(0)
    layer.reset_parameters()
    assert_reads_its_weight(layer, **layout)
    torch.manual_seed(0)
    assert torch.equal(layer.array.weight, build(**options, init_std=2.0).array.weight)
    with pytest.raises(IndexError, match="whose table has 40 rows"):
        read(layer, torch.tensor([ROWS]))


@every_layer
def test_forward_on_meta_gives_the_shape(build):
    layer = build(compression=10, device="meta")
    assert read(layer, torch.arange(7, device="meta")).shape == (7, DIM)


@every_layer
def test_a_pruned_array_trains_the_weights_that_are_kept(build):
    """torch's prune computes the weights in a hook before forward, and an array has no forward."""
    layer, plain = build(robe_size=50), build(robe_size=50)
    plain.load_state_dict(layer.state_dict())
    keep = torch.arange(50) % 2 == 0
    prune.custom_from_mask(layer.array, "weight", keep)
    ids = torch.arange(ROWS)
    for _ in range(3):
        with torch.no_grad():
            plain.array.weight.mul_(keep)
        assert torch.equal(read(layer, ids), read(plain, ids))
        for one in (layer, plain):
            one.zero_grad()
            read(one, ids).square().sum().backward()
            (weight,) = one.parameters()
            with torch.no_grad():
                weight -= 0.1 * weight.grad


@every_layer
def test_every_layer_compiles_whole_and_trains_as_in_eager_mode(build):
    layer, ids = build(compression=10), torch.tensor([1, 5, 5, 39])
    losses, grads = [], []
    for forward in (read, torch.compile(read, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        loss = forward(layer, ids).square().sum()
        loss.backward()
        losses.append(loss.detach())
        grads.append(layer.array.weight.grad)
    assert torch.equal(*losses)
    assert torch.equal(*grads)
    assert grads[0].any()


@pytest.mark.parametrize(
    ("build", "shapes", "dynamic", "other_shapes"),
    [
        (embedding, [(3, 4)], [{0: "b", 1: "n"}], [(4, 5)]),
        (bag, [(3, 4)], [{0: "b", 1: "n"}], [(4, 5)]),
        (bag, [(6,), (3,)], [{0: "n"}, {0: "b"}], [(9,), (4,)]),
        (collection, [(3, 1)], [{0: "b"}], [(5, 1)]),
        (collection, [(6,), (4,)], [{0: "n"}, {0: "b"}], [(9,), (6,)]),
    ],
    ids=["embedding", "2-D bags", "1-D bags", "one id per feature", "bags of a collection"],
)
def test_every_layer_exports_for_batches_of_any_size(build, shapes, dynamic, other_shapes):
    """One program for every number of examples and of ids: neither may be frozen into it."""
    layer = build(compression=10)
    dims = {name: torch.export.Dim(name, min=3) for name in "bn"}  # torch compiles 0 and 1 on their own
    exported = torch.export.export(
        layer,
        tuple(torch.zeros(shape, dtype=torch.long) for shape in shapes),
        dynamic_shapes=tuple({axis: dims[name] for axis, name in axes.items()} for axes in dynamic),
    ).module()
    inputs = [torch.arange(torch.Size(shape).numel()).view(shape) for shape in other_shapes]
    assert torch.equal(exported(*inputs), layer(*inputs))
