"""RobeTables: what a layer tells of itself, whose keys it takes, and which array it gets."""

import copy
import pickle

import pytest
import torch
from torch import nn

import robe
from robe.layers.tables import RobeTables, project, resolve_array


def tables(**options):
    own = {"table_of_feature": [0, 1, 0], "table_ids": [4, 2], "first_rows": [0, 30]}
    return RobeTables([30, None], 6, **own | options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keys_and_bounds_are_known_on_any_device(device):
    layer = tables(robe_size=50, device=device)
    keys, bounds = layer.keys_and_bounds()
    expected = tables(robe_size=50)
    assert keys == expected.table_keys.tolist()
    assert bounds == expected.num_embeddings_per_feature.tolist() == [30, 0, 30]
    assert keys[0] == keys[2] != keys[1]


def test_a_layer_takes_the_keys_of_another():
    one, other = tables(robe_size=50, seed=1), tables(robe_size=50, seed=2)
    assert one.keys_and_bounds() != other.keys_and_bounds()
    one.take_keys(other)
    assert one.keys_and_bounds() == other.keys_and_bounds()
    assert torch.equal(one.table_keys, other.table_keys)
    one.to(torch.float64)  # which places the keys again
    assert torch.equal(one.table_keys, other.table_keys)


# ---------------------------------------------------------------------------------------------------------------------
# From the meta device to use


def on_meta():
    with torch.device("meta"):
        return robe.RobeEmbedding(1000, 8, compression=10)


def assigned(source, layer):
    layer.load_state_dict(source.state_dict(), assign=True)
    return layer


def emptied(source, layer):
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    return layer


def module_by_module(source, layer):
    """As FSDP initialises what was made on the meta device."""
    for module in layer.modules():
        module.to_empty(device="cpu", recurse=False)
        module.reset_parameters()
    layer.load_state_dict(source.state_dict())
    return layer


def weight_by_weight(source, layer):
    """As accelerate loads: past load_state_dict, and every buffer on meta is filled with something."""
    for module in layer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.ones_like(buffer, device="cpu")
    layer.array._parameters["weight"] = nn.Parameter(source.array.weight.detach().clone())
    return layer


def skip_init(source, layer):
    layer = nn.utils.skip_init(robe.RobeEmbedding, 1000, 8, compression=10)
    layer.load_state_dict(source.state_dict())
    return layer


@pytest.mark.parametrize("before", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("fill", [assigned, emptied, module_by_module, weight_by_weight, skip_init])
@pytest.mark.parametrize("start", [on_meta, lambda: robe.RobeEmbedding(1000, 8, compression=10).to("meta")])
def test_a_layer_from_the_meta_device_reads_what_it_is_filled_with(start, fill, before):
    source, ids = robe.RobeEmbedding(1000, 8, compression=10), torch.arange(1000)
    layer = nn.Sequential(before(start()))
    layer[0] = fill(source, layer[0])
    assert torch.equal(layer(ids), source(ids))
    layer(ids).sum().backward()
    source(ids).sum().backward()
    assert torch.equal(layer[0].array.weight.grad, source.array.weight.grad)


def test_a_layer_on_meta_beside_real_ids_is_refused():
    layer = on_meta()
    assert layer(torch.arange(5, device="meta")).shape == (5, 8)
    with pytest.raises(ValueError, match="weight: expected a tensor with values, as ids is, got one on the meta"):
        layer(torch.arange(5))


def test_an_int8_array_from_the_meta_device_reads_what_it_is_filled_with():
    source, ids = robe.RobeEmbedding(1000, 8, compression=10), torch.arange(1000)
    source.array = source.array.quantized()
    for fill in (assigned, emptied):
        layer = fill(source, copy.deepcopy(source).to("meta"))
        assert torch.equal(layer(ids), source(ids))


def test_arguments_make_the_layer_again():
    layer = robe.RobeEmbedding(100, 8, 3, robe_size=64, block_size=4, sign=True, table_id=5)
    again = robe.RobeEmbedding(array=layer.array, **layer.arguments())
    assert torch.equal(again.full_weight(), layer.full_weight())
    assert again.arguments() == layer.arguments()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"robe_size": 7}, 7),
        ({"compression": 10}, 60),
        ({"compression": 7}, 85),
        ({"compression": 1}, 600),
        ({"compression": 0.5}, 600),
        ({"compression": 10, "admission": robe.Admission(80)}, 40),
        ({"robe_size": 7, "admission": robe.Admission(80)}, 7),
    ],
)
def test_the_array_has_the_size_that_was_asked_for(options, size):
    assert resolve_array(options, table_weights=600, device=None, dtype=None).size == size


def test_a_smaller_dtype_leaves_a_filter_more_weights():
    options = {"compression": 10, "admission": robe.Admission(80)}
    assert resolve_array(options, table_weights=600, device=None, dtype=torch.bfloat16).size == 20


def test_projection_sets_each_slot_to_the_mean_of_what_it_serves():
    array = robe.RobeArray(20, dtype=torch.float64)
    layers = [robe.RobeEmbedding(9, 4, array=array, table_id=k, block_size=3, sign=True) for k in range(2)]
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in layers]
    project(array, list(zip(layers, wanted)))
    # The normal equations: at a least squares solution the gradient of the squared distance is zero.
    loss = sum((layer.full_weight() - table).square().sum() for layer, table in zip(layers, wanted))
    (gradient,) = torch.autograd.grad(loss, array.weight)
    torch.testing.assert_close(gradient, torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)
