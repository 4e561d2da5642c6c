"""Whatever a model holds beside its ROBE layers comes back from a file, or is refused by its name when it is saved."""

import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

import robe

VALUES = torch.rand(20, generator=torch.Generator().manual_seed(0))
SQUARE = VALUES[:16].view(4, 4)
COMPLEX = torch.complex(VALUES, VALUES.flip(0))


def model(buffers):
    model = nn.ModuleDict({"item": nn.Embedding(2000, 8)})
    for name, tensor in buffers.items():
        model.register_buffer(name, tensor)
    return model


def fresh(buffers):
    """The same names, with memory of their own and other values."""
    return model({name: torch.zeros(x.shape, dtype=x.dtype) for name, x in buffers.items()})


def saved(buffers, tmp_path):
    """A compressed model, and its file."""
    compressed = robe.compress(model(buffers), 10)
    robe.save(compressed, tmp_path / "model")
    return compressed, tmp_path / "model"


KINDS = {
    "slices of each other": {"a": VALUES, "b": VALUES[5:10]},
    "halves without the whole": {"a": VALUES[:12], "b": VALUES[8:]},
    "one tensor under two names": {"a": VALUES, "b": VALUES},
    "one memory, two dtypes": {"a": VALUES, "b": VALUES.view(torch.int32)},
    "transposed": {"a": SQUARE, "b": SQUARE.t()},
    "permuted": {"a": VALUES[:12].view(2, 3, 2).permute(2, 0, 1)},
    "every other column": {"a": SQUARE[:, ::2]},
    "expanded": {"a": torch.ones(1).expand(10), "b": SQUARE[:, :1].expand(4, 3)},
    "channels last": {"a": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)},
    "conjugated": {"a": COMPLEX, "b": COMPLEX.conj(), "c": COMPLEX.conj().imag},
    "no dimension": {"a": torch.tensor(3.0), "b": torch.tensor(7)},
    "no entries": {"a": torch.zeros(0, 3), "b": torch.zeros(0, 3), "c": torch.zeros(3, 0)},
    "not a number": {"a": torch.tensor([math.nan, math.inf, -0.0])},
    "truth values": {"a": VALUES > 0.5},
    "names of the format": {"aaa": VALUES, "robe": VALUES, "format": VALUES},
} | {
    str(dtype): {"a": (VALUES * 100).to(dtype)}
    for dtype in (
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    )
}


@pytest.mark.parametrize("make", [model, fresh])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_come_back_to_values_and_dtype(kind, make, tmp_path):
    compressed, file = saved(KINDS[kind], tmp_path)
    want = {name: x.resolve_conj().resolve_neg().clone() for name, x in compressed.state_dict().items()}
    again = robe.load(file, make(KINDS[kind]))
    for name in KINDS[kind]:
        got = again.state_dict()[name]
        assert got.dtype == want[name].dtype
        assert got.shape == want[name].shape
        assert repr(got.resolve_conj().resolve_neg().tolist()) == repr(want[name].tolist())


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout sparse_coo"),
    "compressed rows": (lambda: torch.eye(3).to_sparse_csr(), "layout sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([VALUES, VALUES[:3]]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([VALUES, VALUES[:3]], layout=torch.jagged), "NestedTensor"),
    "quantized": (lambda: torch.quantize_per_tensor(VALUES, 0.1, 0, torch.quint8), "quint8"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta device"),
    "complex128": (lambda: COMPLEX.to(torch.complex128), "complex128"),
    "float4": (lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2), "float4"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of quantized and sparse tensors
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name(kind, tmp_path):
    make, reason = REFUSED[kind]
    (tmp_path / "model").write_text("what was there")
    with pytest.raises(ValueError, match=f"module: graph .*{reason}.*, which a safetensors file can't hold"):
        saved({"graph": make()}, tmp_path)
    assert (tmp_path / "model").read_text() == "what was there"


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_a_file_cannot_hold_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="has a name of the format's own"):
        saved({name: VALUES}, tmp_path)


def test_a_parameter_without_a_shape_is_refused(tmp_path):
    lazy = robe.compress(nn.ModuleDict({"item": nn.Embedding(2000, 8), "top": nn.LazyLinear(1)}), 10)
    with pytest.raises(ValueError, match=r"top.weight is not initialized yet"):
        robe.save(lazy, tmp_path / "model")


class Counted(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_state_is_kept_where_it_is_a_tensor(tmp_path):
    one = robe.compress(nn.ModuleDict({"item": nn.Embedding(2000, 8), "extra": Counted(torch.arange(7))}), 10)
    robe.save(one, tmp_path / "model")
    other = nn.ModuleDict({"item": nn.Embedding(2000, 8), "extra": Counted(torch.arange(3))})
    robe.load(tmp_path / "model", other)
    assert torch.equal(other["extra"].state, torch.arange(7))
    one["extra"].state = {"vocabulary": ["a"]}
    with pytest.raises(ValueError, match=r"extra._extra_state is a dict, no tensor"):
        robe.save(one, tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# dtypes


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(2000, 8)
        self.top = nn.Linear(8, 1)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids):
        return self.top(self.item(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_loads_in_it(dtype, tmp_path):
    network = robe.compress(Network(), 10).to(dtype)
    robe.save(network, tmp_path / "model")
    again = Network()
    top = again.top.weight
    robe.load(tmp_path / "model", again)
    assert {x.dtype for x in again.parameters()} == {dtype}
    assert again.top.weight is top  # so that what refers to it still does
    assert again.steps.dtype == torch.int64
    ids = torch.arange(5)
    assert torch.equal(again(ids), network(ids))


def test_numbers_of_another_kind_are_refused(tmp_path):
    _, file = saved({"a": VALUES}, tmp_path)
    other = model({"a": torch.zeros(20, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"a is of torch.float32, in this ModuleDict of torch.int64"):
        robe.load(file, other)
    assert isinstance(other["item"], nn.Embedding)


# ---------------------------------------------------------------------------------------------------------------------
# Tied tensors


def test_one_tensor_stands_once_and_slices_as_values_of_their_own(tmp_path):
    _, file = saved({"a": VALUES, "b": VALUES, "c": VALUES[5:10]}, tmp_path)
    with safe_open(file, "pt") as opened:
        assert sorted(opened.keys()) == ["a", "c", "item.array.weight"]
        assert opened.metadata()["b"] == "a"


def test_tensors_that_are_one_here_and_two_in_the_file_are_refused(tmp_path):
    _, file = saved({"a": VALUES, "b": VALUES + 1}, tmp_path)
    tied = model({"a": (zeros := torch.zeros(20)), "b": zeros})
    with pytest.raises(ValueError, match=r"\w has values of its own, and in this module it shares those of \w"):
        robe.load(file, tied)
    assert isinstance(tied["item"], nn.Embedding)
    assert tied.a is tied.b
    assert not tied.a.any()


def test_layers_that_are_one_here_and_two_in_the_file_are_refused(tmp_path):
    robe.save(robe.compress(nn.ModuleList(nn.Embedding(2000, 8) for _ in "ab"), 10), tmp_path / "model")
    table = nn.Embedding(2000, 8)
    with pytest.raises(ValueError, match="'1' and '0' are two layers, and in this module they are one"):
        robe.load(tmp_path / "model", nn.ModuleList([table, table]))


class Unwilling(nn.Module):
    """Fails after other modules took their values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("z", torch.zeros(2))

    def _load_from_state_dict(self, *_):
        raise OSError("not today")


def test_a_module_that_fails_while_it_loads_leaves_all_as_it_was(tmp_path):
    parts = {"item": nn.Embedding(2000, 8), "top": nn.Linear(8, 1), "un": Unwilling()}
    robe.save(robe.compress(nn.ModuleDict(parts), 10).half(), tmp_path / "model")
    other = nn.ModuleDict({"item": nn.Embedding(2000, 8), "top": nn.Linear(8, 1), "un": Unwilling()})
    before = {name: x.clone() for name, x in other.state_dict().items()}
    with pytest.raises(OSError, match="not today"):
        robe.load(tmp_path / "model", other)
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())
