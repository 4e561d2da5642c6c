"""The decompositions compute what the reference computes, and run in ONNX Runtime without operators of robe's."""

import io
from itertools import product

import pytest
import torch
from torch import nn

import robe
from robe.hashing import table_key
from robe.ops import DECOMPOSITIONS, REFERENCE

IDS = torch.tensor([[0, 1, -1, 2**63 - 1], [-(2**63), 12345678901234, -987654321, 7], [3, 5, 2**62, -(2**62)]])
VALUES, OFFSETS = IDS.flatten(), torch.tensor([0, 0, 5, 11])
WEIGHTS = torch.rand(12, generator=torch.Generator().manual_seed(0))
FILTER = torch.randint(-(2**63), 2**63 - 1, (16,), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int8]


def arguments(hash, dim, block, sign, padding_idx, dtype):
    """An array and the arguments of a call that follow the ids; the second of two tables has 10 rows."""
    generator = torch.Generator().manual_seed(0)
    weight, scale, filter = torch.randn(400, generator=generator), None, None
    keys = {"mix": [table_key(3, k) for k in range(2)], "linear": [0, 100], "identity": [0, 20 * dim]}[hash]
    bounds = [20 if hash == "identity" else 0, 10]
    if dtype == torch.int8:
        weight, scale = (weight * 40).to(torch.int8), torch.rand(13, generator=generator)
    if hash == "mix" and padding_idx == 7:
        filter = FILTER
    return weight.to(dtype), (
        torch.tensor(keys),
        torch.tensor(bounds),
        dim,
        block,
        hash,
        sign,
        padding_idx,
        scale,
        filter,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hash", ["mix", "linear", "identity"])
def test_decompositions_compute_what_the_reference_computes(hash, dtype):
    ids = torch.arange(12) if hash == "identity" else VALUES
    second = torch.arange(12) % 10
    for dim, block, sign, padding_idx in product([4, 6], [1, 4, 5, 9], [False, True], [None, 7]):
        weight, rest = arguments(hash, dim, block, sign, padding_idx, dtype)
        pairs = torch.stack([ids, second], 1)
        assert torch.equal(DECOMPOSITIONS["lookup"](weight, pairs, *rest), REFERENCE["lookup"](weight, pairs, *rest))
        values = torch.cat([ids, second, torch.tensor([99])])  # the last one is in no bag
        factors = torch.rand(25).to(torch.float32 if dtype == torch.int8 else dtype)
        for pooling, weights in (("sum", None), ("mean", None), ("max", None), ("sum", factors)):
            bags = values, torch.tensor([0, 0, 5, 12, 12, 17, 24]), weights, pooling
            got, want = (bodies["bag"](weight, *bags, *rest) for bodies in (DECOMPOSITIONS, REFERENCE))
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("id", [10, -1, 2**62])
@pytest.mark.parametrize("hash", ["mix", "identity"])
def test_an_id_outside_its_table_is_an_error(hash, id):
    weight, rest = arguments(hash, 4, 4, False, None, torch.float32)
    with pytest.raises(IndexError):
        DECOMPOSITIONS["lookup"](weight, torch.tensor([[0, id]]), *rest)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


def admission():
    admission = robe.Admission(64)
    admission.admit(VALUES[::2], torch.tensor(table_key(0, 0)))
    return admission


def int8():
    layer = robe.RobeEmbedding(None, 4, robe_size=100)
    layer.array = layer.array.quantized(32)
    return layer


def bags(mode, **options):
    return robe.RobeEmbeddingBag(None, 4, mode=mode, padding_idx=7, robe_size=100, **options)


def collection():
    return robe.RobeEmbeddingBagCollection([robe.EmbeddingBagConfig(name, None, 4) for name in "ab"], robe_size=100)


class Towers(nn.Module):
    """Two towers whose dot product is the score, on tables that share an array."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(2000, 8), nn.Embedding(3000, 8, padding_idx=0)
        self.words = nn.EmbeddingBag(5000, 8, mode="mean")
        self.top = nn.Linear(8, 8)

    def forward(self, user, item, words):
        return (self.top(self.user(user)) * (self.item(item) + self.words(words))).sum(1)


class Facebook(nn.Module):
    """Sums of bags, cut by offsets, as facebookresearch/dlrm reads them; the tables of a list."""

    def __init__(self):
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(2000, 8, mode="sum") for _ in range(3))
        self.bot, self.top = nn.Linear(13, 8), nn.Linear(14, 1)

    def forward(self, dense, offsets, ids):
        x = self.bot(dense)
        vectors = torch.stack([x, *(table(ids[k], offsets[k]) for k, table in enumerate(self.emb_l))], 1)
        lower = torch.tril_indices(4, 4, -1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, lower[0], lower[1]]
        return torch.sigmoid(self.top(torch.cat([x, dots], 1)))


def towers():
    generator = torch.Generator().manual_seed(0)
    return robe.compress(Towers(), 20), tuple(
        torch.randint(0, 2000, shape, generator=generator) for shape in ((5,), (5,), (5, 3))
    )


def facebook():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2000, (3, 9), generator=generator)
    return robe.compress(Facebook(), 20), (torch.rand(4, 13), torch.tensor([[0, 2, 2, 7]] * 3), ids)


def longer(ids, *more):
    """Inputs of another batch size."""
    if not more:
        return (torch.cat([ids, ids.flip(0)]),)
    offsets, *weights = more
    offsets = None if offsets is None else torch.cat([offsets, torch.tensor([13, 14])])
    return (torch.cat([ids, ids[:3]]), offsets, *(torch.cat([x, x[:3]]) for x in weights))


LAYERS = {
    "ids": (lambda: robe.RobeEmbedding(None, 4, robe_size=100), (IDS,)),
    "int32": (lambda: robe.RobeEmbedding(None, 4, robe_size=100), (IDS.int(),)),
    "blocks, signs, padding": (lambda: robe.RobeEmbedding(None, 8, 7, robe_size=100, block_size=3, sign=True), (IDS,)),
    "long blocks": (
        lambda: robe.RobeEmbedding(None, 4, robe_size=100, block_size=9, sign=True, admission=admission()),
        (IDS,),
    ),
    "linear": (lambda: robe.RobeEmbedding(None, 4, robe_size=100, hash="linear", sign=True), (IDS,)),
    "identity": (lambda: robe.RobeEmbedding(50, 4, compression=1), (IDS % 50,)),
    "admission": (lambda: robe.RobeEmbedding(None, 4, robe_size=100, admission=admission()), (IDS,)),
    "int8": (int8, (IDS,)),
    "sum": (lambda: bags("sum"), (IDS,)),
    "mean": (lambda: bags("mean"), (VALUES, OFFSETS)),
    "max": (lambda: bags("max"), (VALUES, OFFSETS)),
    "weights": (lambda: bags("sum"), (VALUES, OFFSETS, WEIGHTS)),
    "weights of rows": (lambda: bags("sum"), (IDS, None, WEIGHTS.view(3, 4))),
    "collection": (collection, (IDS[:, :2],)),
    "collection of bags": (collection, (VALUES, torch.tensor([0, 2, 3, 3, 9, 10, 12]))),
}


def run_onnx(content, inputs):
    """The output of an exported model."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert {node.domain for node in onnx.load_from_string(content).graph.node} == {""}
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = [x.numpy() for x in inputs if x is not None]
    return torch.from_numpy(session.run(None, dict(zip((x.name for x in session.get_inputs()), given)))[0])


def exported_from_torchscript(model, inputs):
    names = [f"input_{k}" for k, x in enumerate(inputs) if x is not None]
    file = io.BytesIO()
    axes = {name: {0: f"size of {name}"} for name in names}
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter of TorchScript is deprecated, and in use
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_run_in_onnx_runtime_from_torchscript(kind):
    make, inputs = LAYERS[kind]
    layer = make().eval()
    content = exported_from_torchscript(layer, inputs)
    exact = {"rtol": 0, "atol": 0} if isinstance(layer, robe.RobeEmbedding) else {}
    for these in (inputs, longer(*inputs)):
        torch.testing.assert_close(run_onnx(content, these), layer(*these).detach(), **exact)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [towers, facebook])
def test_models_run_in_onnx_runtime_from_torchscript(make):
    model, inputs = make()
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(exported_from_torchscript(model, inputs), inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_id_outside_its_table_is_an_error_in_onnx_runtime():
    layer = robe.RobeEmbedding(50, 4, robe_size=100)
    content = exported_from_torchscript(layer, (IDS % 50,))
    with pytest.raises(Exception, match="out of"):
        run_onnx(content, (IDS,))


class Mixed(nn.Module):
    """Every kind of read in one model: exports of this kind take seconds each."""

    def __init__(self):
        super().__init__()
        self.long = LAYERS["long blocks"][0]()
        self.table = robe.RobeEmbedding(None, 4, 7, robe_size=100, hash="linear")
        self.bags = nn.ModuleDict({mode: bags(mode) for mode in ("sum", "mean", "max")})
        self.top = nn.Linear(4, 2)

    def forward(self, ids, values, offsets, weights):
        vectors = [self.long(ids).sum(1), self.table(ids).sum(1), self.bags["max"](ids), self.bags["mean"](ids)]
        vectors.append(self.bags["sum"](values, offsets, weights))
        return self.top(torch.cat(vectors))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.slow
def test_models_run_in_onnx_runtime_from_torch_export():
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
    model, inputs = Mixed().eval(), (IDS, VALUES, OFFSETS, WEIGHTS)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    file = io.BytesIO()
    torch.onnx.export(model, inputs, file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    for these in (inputs, (*longer(IDS), *longer(*inputs[1:]))):
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(file.getvalue(), these), model(*these))
