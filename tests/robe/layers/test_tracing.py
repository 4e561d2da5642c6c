"""Models are traced by torch.fx as with torch's tables, and the graph computes the same."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import robe

IDS = torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(0))
VALUES, OFFSETS = IDS.flatten(), torch.tensor([0, 3, 3, 10, 30])
WEIGHTS = torch.rand(30, generator=torch.Generator().manual_seed(0))
TABLES = [robe.EmbeddingBagConfig("a", 50, 4), robe.EmbeddingBagConfig("b", None, 4)]


def admission():
    admission = robe.Admission(64)
    admission.admit(torch.arange(20), torch.tensor(robe.hashing.table_key(0, 0)))
    return admission


LAYERS = {
    "embedding": (lambda: robe.RobeEmbedding(50, 4, 3, robe_size=100, admission=admission()), (IDS,)),
    "embedding of vectors": (lambda: robe.RobeEmbedding(50, 4, robe_size=100), (VALUES,)),
    "bags of one length": (lambda: robe.RobeEmbeddingBag(50, 4, padding_idx=3, robe_size=100), (IDS,)),
    "bags by offsets": (lambda: robe.RobeEmbeddingBag(50, 4, mode="max", robe_size=100), (VALUES, OFFSETS)),
    "weighted bags": (lambda: robe.RobeEmbeddingBag(50, 4, mode="sum", robe_size=100), (VALUES, OFFSETS, WEIGHTS)),
    "collection": (lambda: robe.RobeEmbeddingBagCollection(TABLES, robe_size=100), (IDS[:, :2],)),
    "collection of bags": (
        lambda: robe.RobeEmbeddingBagCollection(TABLES, robe_size=100),
        (VALUES, torch.tensor([0, 4, 9, 20, 30]), WEIGHTS),
    ),
    "keyed": (
        lambda: robe.RobeKeyedEmbeddingBagCollection(TABLES, robe_size=100),
        ({"a": IDS, "b": (VALUES, torch.tensor([0, 1, 4, 9, 9, 20, 30]))},),
    ),
}


class Holder(nn.Module):
    """Holds a layer two levels below; the number of inputs is what torch.fx has to know."""

    def __init__(self, layer, inputs):
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})
        self.inputs = inputs

    def forward(self, x, y=None, z=None):
        return self.inner["layer"](*(x, y, z)[: self.inputs])


def assert_same(got, want):
    got, want = (x if isinstance(x, dict) else {"": x} for x in (got, want))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_traced_model_computes_the_same(kind):
    make, inputs = LAYERS[kind]
    model = Holder(make(), len(inputs))
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["inner.layer"]
    want = model(*inputs)
    assert_same(traced(*inputs), want)
    assert_same(pickle.loads(pickle.dumps(traced))(*inputs), want)
    assert_same(copy.deepcopy(traced)(*inputs), want)
    assert traced.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_traced_layer_computes_the_same(kind):
    make, inputs = LAYERS[kind]
    layer = make().eval()
    traced = fx.symbolic_trace(layer)
    assert not traced.training
    assert_same(traced(*inputs), layer(*inputs))


def test_a_mapping_of_traced_ids():
    layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, robe_size=100)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, ids, values, offsets):
            return self.layer({"a": ids * 1, "b": (values, offsets)})["b"]

    inputs = IDS[:4], VALUES, OFFSETS
    assert torch.equal(fx.symbolic_trace(Model())(*inputs), Model()(*inputs))


def test_gradients_and_counts_are_those_of_the_model():
    model = nn.Sequential(nn.Embedding(2000, 8), nn.Linear(8, 1))
    robe.compress(model, 10, admission=robe.Admission(256, threshold=2, counter_bytes=1024))
    traced = fx.symbolic_trace(copy.deepcopy(model))
    for one in (model, traced):
        one(IDS).sum().backward()
    assert model[0].admission.counter.counters.any()
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), traced.state_dict().values()))
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(model.parameters(), traced.parameters()))


def test_tracers_with_leaves_of_their_own():
    """As torchrec's, which keeps modules whole by their path or class."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, robe.RobeEmbeddingBag) or super().is_leaf_module(module, name)

    make, inputs = LAYERS["weighted bags"]
    model = Holder(make(), len(inputs))
    tracer = Tracer()
    traced = fx.GraphModule(model, tracer.trace(model))
    assert torch.equal(traced(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # deprecated, and in use
@pytest.mark.parametrize("kind", ["embedding", "weighted bags"])
def test_other_tracers_see_the_operators(kind):
    make, inputs = LAYERS[kind]
    model = Holder(make(), len(inputs)).eval()
    want = model(*inputs)
    assert torch.equal(torch.export.export(model, inputs).module()(*inputs), want)
    assert torch.equal(torch.jit.trace(model, inputs)(*inputs), want)
