"""What a ROBE layer has no place for is never dropped: the table is left, and the report says why."""

from functools import partial

import pytest
import torch
from torch import nn

import robe
from robe.swappable import own_attributes, reason_to_leave, tables_of


def changed(change):
    """A table after a change."""
    table = nn.Embedding(1000, 8)
    change(table)
    return table


class WithMethod(nn.Embedding):
    def nearest(self, vector):
        return (self.weight @ vector).argmax()


class WithInit(nn.Embedding):
    def __init__(self, rows):
        super().__init__(rows, 8)

    def reset_parameters(self):
        nn.init.uniform_(self.weight, -0.01, 0.01)


class Mixed(WithInit):
    @property
    def rows(self):
        return self.num_embeddings


def monkey_patched(table):
    table.forward = lambda ids: table.weight[ids]


LEFT = {
    "its weight has hooks": [
        lambda table: table.weight.register_hook(lambda grad: grad),
        lambda table: table.weight.register_post_accumulate_grad_hook(lambda weight: None),
    ],
    "has hooks": [
        lambda table: table.register_forward_hook(lambda *_: None),
        lambda table: table.register_forward_pre_hook(lambda *_: None),
        lambda table: table.register_full_backward_hook(lambda *_: None),
        lambda table: table.register_full_backward_pre_hook(lambda *_: None),
        lambda table: table.register_state_dict_post_hook(lambda *_: None),
        lambda table: table.register_load_state_dict_post_hook(lambda *_: None),
    ],
    "has a buffer of its own, counts": [lambda table: table.register_buffer("counts", torch.zeros(3))],
    "has a parameter of its own, bias": [lambda table: table.register_parameter("bias", nn.Parameter(torch.zeros(8)))],
    "has a module of its own, top": [lambda table: table.add_module("top", nn.Linear(8, 8))],
    "has an attribute forward of its own": [monkey_patched],
    "has an attribute sign of its own": [lambda table: setattr(table, "sign", 1)],
    "is of torch.complex64": [lambda table: setattr(table, "weight", nn.Parameter(torch.zeros(1000, 8) + 0j))],
    "of layout sparse_coo": [
        lambda table: setattr(table, "weight", nn.Parameter(torch.zeros(1000, 8).to_sparse(), requires_grad=True))
    ],
}


@pytest.mark.parametrize(("reason", "change"), [(reason, change) for reason in LEFT for change in LEFT[reason]])
def test_a_table_with_more_than_a_layer_has_is_left(reason, change):
    table = changed(change)
    (modules,) = tables_of(nn.Sequential(table))
    assert modules == [table]
    assert reason in reason_to_leave(nn.Sequential(table), modules, min_rows=1000, init="random")


@pytest.mark.parametrize("change", LEFT["its weight has hooks"])
def test_the_hook_of_a_weight_still_runs_beside_swapped_tables(change):
    seen = []
    table = changed(lambda table: table.weight.register_hook(lambda grad: seen.append(grad.shape)))
    change(table)
    model = robe.compress(nn.ModuleDict({"hooked": table, "plain": nn.Embedding(1000, 8)}), 10)
    (model["hooked"](torch.arange(5)) + model["plain"](torch.arange(5))).sum().backward()
    assert seen == [(1000, 8)]
    assert [left.names for left in model.compression_report.left] == [("hooked",)]


def test_subclasses_are_left_if_they_do_more_than_a_table():
    for make, reason in (
        (WithMethod, "is a WithMethod, which has nearest of its own"),
        (Mixed, "which has rows of its"),
    ):
        table = make(1000, 8) if make is WithMethod else make(1000)
        assert reason in reason_to_leave(table, [table], min_rows=1, init="random")
    table = WithInit(1000)
    assert reason_to_leave(table, [table], min_rows=1, init="random") is None


class HoldsInAList(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.user, self.item = nn.Embedding(1000, 8), nn.Embedding(1000, 8)
        self.tables = kept(self.user)

    def forward(self, ids):
        return self.user(ids)


class Holder:
    def __init__(self, content):
        self.content = content


MODULES_KEPT = [
    lambda x: [x],
    lambda x: {"user": (x, 3)},
    lambda x: (1, [x]),
    lambda x: Holder({"a": [x]}),
    lambda x: x.forward,
    lambda x: partial(x, 1),
    lambda x: [nn.Sequential(x)],
]
WEIGHTS_KEPT = [
    lambda x: [([x.weight], 0.1)],  # the penalties of deepctr-torch
    lambda x: x.weight.detach(),
    lambda x: x.weight[-10:].detach(),
    lambda x: list(range(500)) + [x.weight],
]


@pytest.mark.parametrize("kept", MODULES_KEPT)
def test_a_table_that_a_model_also_keeps_elsewhere_is_left(kept):
    model = robe.compress(HoldsInAList(kept), 10)
    (left,) = model.compression_report.left
    reason = "is also in the attribute tables of a HoldsInAList, which is no submodule"
    assert (left.names, left.reason) == (("user",), reason)


@pytest.mark.parametrize("kept", WEIGHTS_KEPT)
def test_a_table_whose_weight_a_model_also_keeps_elsewhere_is_left(kept):
    model = robe.compress(HoldsInAList(kept), 10)
    (left,) = model.compression_report.left
    assert (left.names, left.reason) == (("user",), "its weight is also in the attribute tables of a HoldsInAList")


@pytest.mark.parametrize("kept", [lambda x: None, lambda x: [torch.zeros(1000, 8)], lambda x: Holder(x.__class__)])
def test_other_things_that_a_model_keeps_leave_no_table(kept):
    assert not robe.compress(HoldsInAList(kept), 10).compression_report.left


def test_an_optimizer_that_a_model_keeps_is_noted():
    def with_optimizer(table):
        return Holder(torch.optim.Adam(table.parameters()))

    report = robe.compress(HoldsInAList(with_optimizer), 10).compression_report
    assert not report.left
    assert report.notes == ("the model holds an optimizer, which trains what was there before: make it again",)


def tied_by_memory(other):
    table = nn.Embedding(1000, 8)
    return nn.ModuleDict({"table": table, "other": other(table), "free": nn.Embedding(1000, 8)})


def output_layer(table):
    layer = nn.Linear(8, 1000, bias=False)
    layer.weight.data = table.weight.data
    return layer


def with_buffer(table):
    module = nn.Module()
    module.register_buffer("popular", table.weight.detach()[:10])
    return module


@pytest.mark.parametrize(
    "other",
    [output_layer, with_buffer, lambda table: nn.Embedding(1000, 8, _weight=table.weight.data)],
    ids=["output layer", "buffer", "second table"],
)
def test_tables_that_share_memory_with_something_else_stay_tied(other):
    model = robe.compress(tied_by_memory(other), 10)
    assert [table.names for table in model.compression_report.swapped] == [("free",)]
    assert "its weight is also that of a" in model.compression_report.left[0].reason


def test_pieces_of_one_tensor_that_lie_apart_are_tables_like_others():
    both = torch.randn(2000, 8)
    model = nn.ModuleDict(
        {"a": nn.Embedding(1000, 8, _weight=both[:1000]), "b": nn.Embedding(1000, 8, _weight=both[1000:])}
    )
    assert len(robe.compress(model, 10).compression_report.swapped) == 2


@pytest.mark.parametrize("shape", [(1500, 8), (1000, 12)])
def test_a_table_with_a_weight_of_another_shape_is_left(shape):
    table = changed(lambda table: setattr(table, "weight", nn.Parameter(torch.zeros(shape))))
    reason = reason_to_leave(nn.Sequential(table), [table], min_rows=1000, init="random")
    assert reason == f"its weight was replaced by one of shape {shape}, and it is a table of (1000, 8)"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("empty", [nn.Embedding(0, 8), nn.Embedding(1000, 0), nn.EmbeddingBag(0, 8)])
def test_a_table_without_weights_is_left(empty):
    report = robe.compress(nn.ModuleDict({"a": empty, "b": nn.Embedding(1000, 8)}), 10, min_rows=0).compression_report
    assert [table.reason for table in report.left] == ["has no weights"]


def test_other_attributes_come_along():
    table = changed(lambda table: setattr(table, "vocabulary", {"a": 1}))
    table.weight.no_decay = True
    model = nn.ModuleDict({"a": table, "b": nn.Embedding(1000, 8)})
    assert own_attributes(table) == {"vocabulary": {"a": 1}}
    robe.compress(model, 10)
    assert model["a"].vocabulary is table.vocabulary
    assert model["a"].array.weight.no_decay
    assert not hasattr(model["b"].array.weight, "no_decay")
