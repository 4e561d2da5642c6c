"""compress on models of every kind, against nn.functional on the virtual tables and numpy's least squares."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import robe
from robe.compress import Table
from tests.helpers.processes import in_processes

IDS = torch.randint(0, 2000, (64, 5), generator=torch.Generator().manual_seed(0))


class Recommender(nn.Module):
    """As a user has it: ten bags in a ModuleList, an Embedding somewhere deeper, a small one, MLPs."""

    def __init__(self, **options):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(2000 + k, 8, mode="sum", **options) for k in range(10))
        self.parts = nn.ModuleDict({"user": nn.Sequential(nn.Embedding(5000, 4, padding_idx=0), nn.Flatten(1))})
        self.day = nn.Embedding(7, 8)
        self.top = nn.Sequential(nn.Linear(10 * 8 + 5 * 4 + 8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, ids):
        vectors = [bag(ids) for bag in self.bags] + [self.parts["user"](ids), self.day(ids[:, 0] % 7)]
        return self.top(torch.cat(vectors, dim=1)).squeeze(1)


def train(model, steps=30):
    """The user's loop; the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels = (IDS[:, 0] % 2).float()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(IDS), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_model_with_ten_bags_in_one_line_and_the_same_loop():
    torch.manual_seed(0)
    model = Recommender()
    names = [name for name, _ in model.named_modules()]
    compressed = robe.compress(model, 20)
    assert compressed is model
    assert [name for name, _ in model.named_modules() if not name.endswith("array")] == names
    arrays = {id(module) for module in model.modules() if isinstance(module, robe.RobeArray)}
    floats = sum(2000 + k for k in range(10)) * 8 + 5000 * 4
    assert len(arrays) == 1
    assert model.bags[0].array.size == int(floats / 20)
    assert sum(p.numel() for p in model.parameters()) == int(floats / 20) + 7 * 8 + 108 * 16 + 16 + 16 + 1
    losses = train(model)
    assert losses[-1] < 0.1 < 0.6 < losses[0]


def test_what_the_modules_compute():
    """Each is torch's own on the virtual table."""
    model = nn.ModuleDict(
        {
            "rows": nn.Embedding(3000, 6, padding_idx=-1),
            "mean": nn.EmbeddingBag(1000, 8),
            "sum": nn.EmbeddingBag(1500, 8, mode="sum", padding_idx=3, include_last_offset=True),
            "max": nn.EmbeddingBag(1200, 5, mode="max"),
        }
    )
    robe.compress(model, 10, block_size=4, sign=True, seed=3)
    rows, ids, offsets = model["rows"], IDS.flatten() % 1000, torch.tensor([0, 3, 3, 100, 320])
    ids[5] = 3
    torch.testing.assert_close(rows(IDS + 1000), functional.embedding(IDS + 1000, rows.full_weight()))
    assert not rows(torch.tensor(2999)).any()
    for name in ("mean", "max"):
        want = functional.embedding_bag(ids, model[name].full_weight(), offsets[:-1], mode=name)
        torch.testing.assert_close(model[name](ids, offsets[:-1]), want)
    layer, weights = model["sum"], torch.rand(320)
    want = functional.embedding_bag(
        ids,
        layer.full_weight(),
        offsets,
        mode="sum",
        per_sample_weights=weights,
        padding_idx=3,
        include_last_offset=True,
    )
    torch.testing.assert_close(layer(ids, offsets, weights), want)
    assert [layer.table_id for layer in model.values()] == [0, 1, 2, 3]
    assert {(layer.block_size, layer.sign, layer.array.seed) for layer in model.values()} == {(4, True, 3)}


def test_training_mode_dtype_and_requires_grad():
    model = nn.ModuleDict({name: nn.Embedding(1000, 4, dtype=torch.float64) for name in "abcd"})
    model["b"] = nn.EmbeddingBag(1000, 4)
    model["c"].weight.requires_grad_(False)
    model["a"].eval()
    robe.compress(model, 10, init="project")
    weights = {name: model[name].array.weight for name in "abcd"}
    assert [model[name].training for name in "abcd"] == [False, True, True, True]
    assert [weights[name].dtype for name in "abcd"] == [torch.float64, torch.float32, torch.float64, torch.float64]
    assert [weights[name].requires_grad for name in "abcd"] == [True, True, False, True]
    assert weights["a"] is weights["d"]
    assert [len(weights[name]) for name in "abc"] == [800, 400, 400]
    assert model.compression_report.array_floats == 1600
    assert "there are 3 arrays" in str(model.compression_report)


def test_device():
    def make():
        return nn.ModuleDict({"a": nn.Embedding(1000, 4), "b": nn.EmbeddingBag(1000, 4, device="meta")})

    model = robe.compress(make(), 10)
    assert [model[name].array.weight.device.type for name in "ab"] == ["cpu", "meta"]
    model = robe.compress(make(), 10, device="cpu")
    assert model["a"].array is model["b"].array
    assert model["b"](IDS % 1000).isfinite().all()


@pytest.mark.parametrize(
    ("scales", "given", "want"), [([1, 2], None, 0.01), ([3e-4, 1e-4, 1], None, 3e-4), ([1], 0.5, 0.5)]
)
def test_initial_values_have_the_scale_of_the_tables_but_not_torchs(scales, given, want):
    model = nn.ModuleList(nn.Embedding(10_000, 8) for _ in scales)
    for table, scale in zip(model, scales):
        nn.init.normal_(table.weight, std=scale)
    robe.compress(model, 4, init_std=given)
    array = model[0].array
    assert array.init_std == pytest.approx(want, rel=0.02)
    assert array.weight.std().item() == pytest.approx(want, rel=0.05)


def test_tables_that_would_not_fit():
    with torch.device("meta"):
        tables = nn.ModuleList(nn.EmbeddingBag(10**9, 128) for _ in range(3))
    layer = robe.compress(tables, 10**6, device="cpu")[2]
    assert layer.array.size == 3 * 128 * 1000
    assert layer(torch.tensor([[10**9 - 1, 5]])).shape == (1, 128)


def test_tied_tables_stay_tied():
    one = nn.Embedding(1000, 8)
    model = nn.ModuleDict({"a": one, "b": one, "c": nn.Embedding(1000, 8), "d": nn.EmbeddingBag(1000, 8, mode="sum")})
    model["d"].weight = one.weight
    robe.compress(model, 4)
    assert model["a"] is model["b"]
    assert model["a"].array.size == 2 * 1000 * 8 // 4
    assert torch.equal(model["a"].full_weight(), model["d"].full_weight())
    assert not torch.equal(model["a"].full_weight(), model["c"].full_weight())
    report = model.compression_report
    assert [table.names for table in report.swapped] == [("a", "b", "d"), ("c",)]
    assert (report.floats_before, report.floats_after) == (16000, 4000)


def hooked():
    module = nn.Embedding(1000, 8)
    module.register_forward_hook(lambda *_: None)
    return module


def parametrized():
    module = nn.Embedding(1000, 8)
    nn.utils.parametrizations.weight_norm(module)
    return module


class Normalised(nn.Embedding):
    def forward(self, input):
        return functional.normalize(super().forward(input), dim=-1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.Embedding(1000, 8), nn.Linear(8, 1000)
        self.out.weight = self.rows.weight


LEFT = {
    "has fewer than 1,000 rows": lambda: nn.Embedding(999, 8),
    "its weight is also that of a Linear": Tied,
    "is a Normalised, which has a forward of its own": lambda: Normalised(1000, 8),
    "is parametrized": parametrized,
    "has hooks": hooked,
    "max_norm: rows on an array share weights, so one can't be rescaled alone": lambda: nn.Embedding(
        1000, 8, max_norm=1.0
    ),
    "scale_grad_by_freq: not supported by ROBE layers": lambda: nn.EmbeddingBag(1000, 8, scale_grad_by_freq=True),
    "is frozen, and nothing would train random values: init='project' keeps what it holds": lambda: (
        nn.Embedding.from_pretrained(torch.rand(1000, 8))
    ),
}


@pytest.mark.parametrize(("reason", "make"), LEFT.items(), ids=LEFT)
def test_what_is_left_and_why(reason, make):
    left = make()
    model = nn.ModuleDict({"left": left, "swapped": nn.Embedding(1000, 8)})
    robe.compress(model, 10)
    assert model["left"] is left
    assert isinstance(model["swapped"], robe.RobeEmbedding)
    report = model.compression_report
    (table,) = report.left
    assert (table.names[0].split(".")[0], table.reason) == ("left", reason)
    assert report.swapped == (Table(("swapped",), 1000, 8),)
    assert report.floats_after == table.floats + 800
    assert reason in str(report)
    with pytest.raises(ValueError, match="model: no table to swap: .*" + reason[:20]):
        robe.compress(nn.Sequential(make()))


def test_a_subclass_that_only_adds_to_init_is_swapped():
    class Named(nn.Embedding):
        def __init__(self, rows, name):
            super().__init__(rows, 8)
            self.name = name

    assert isinstance(robe.compress(nn.Sequential(Named(1000, "a")), 10)[0], robe.RobeEmbedding)


def test_a_table_itself_and_what_the_report_says():
    layer = robe.compress(nn.EmbeddingBag(100_000, 16, sparse=True), 100)
    assert isinstance(layer, robe.RobeEmbeddingBag)
    lines = str(layer.compression_report).splitlines()
    assert lines[-2] == (
        "1 of 1 tables swapped; floats of embeddings: 1,600,000 before, 16,000 after, 16,000 of them shared"
    )
    assert "torch.optim.SparseAdam refuses" in lines[-1]


def test_nothing_is_printed(capsys):
    robe.compress(nn.Sequential(nn.Embedding(1000, 8)), 10)
    assert capsys.readouterr() == ("", "")


def test_an_admission_counts_as_memory():
    admission = robe.Admission(400)
    model = nn.ModuleList([nn.Embedding(2000, 8), nn.Embedding(2000, 8, dtype=torch.float64)])
    robe.compress(model, 10, admission=admission)
    assert model[0].admission is model[1].admission is admission
    assert [layer.array.size for layer in model] == [1600 - 50, 1600 - 25]
    assert model.compression_report.admission_bytes == 400
    assert "an admission of 400 bytes" in str(model.compression_report)


# -- What tables hold -------------------------------------------------------------------------------------------------


def filled(**values):
    """Tables of 2000 rows: of a number, one wide and constant; of two, normal with this mean and scale."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Embedding(2000, 1 if isinstance(x, float) else 8) for name, x in values.items()})
    for name, x in values.items():
        nn.init.constant_(model[name].weight, x) if isinstance(x, float) else nn.init.normal_(model[name].weight, *x)
    return model


@pytest.mark.parametrize("init", ["random", "project"])
def test_constants_are_read_as_they_are_and_train(init):
    model = robe.compress(filled(user=(0.0, 0.1), zero=0.0, other=0.0, one=1.0), 10, init=init)
    assert model["zero"].array is model["other"].array
    assert model["zero"].array is not model["user"].array is not model["one"].array
    assert not model["zero"].full_weight().any()
    assert (model["one"].full_weight() == 1).all()
    if init == "random":
        assert model["user"].full_weight().std().item() == pytest.approx(0.01, rel=0.1)
    ids = torch.randint(0, 2000, (500,))
    (model["user"](ids).sum(1) * model["one"](ids)[:, 0] + model["zero"](ids)[:, 0]).sum().backward()
    assert all(model[name].array.weight.grad.any() for name in ("user", "zero", "one"))
    assert "there are 3 arrays" in str(model.compression_report)


def test_the_mean_of_a_table_is_kept():
    model = robe.compress(filled(plain=(0.0, 0.1), gates=(1.0, 0.05), more=(1.0, 0.001), tilted=(0.01, 0.1)), 10)
    assert model["plain"].array is model["tilted"].array
    assert model["gates"].array is model["more"].array
    assert model["gates"].full_weight().mean().item() == pytest.approx(1, abs=0.01)
    assert model["plain"].full_weight().mean().item() == pytest.approx(0, abs=0.01)
    model["gates"].reset_parameters()
    assert model["gates"].full_weight().mean().item() == pytest.approx(1, abs=0.01)


def test_the_report_says_what_tables_held_and_begin_with():
    report = robe.compress(filled(plain=(0.0, 0.1), one=1.0), 10).compression_report
    before, after = zip(*((table.before, table.after) for table in report.swapped))
    assert before[0] == pytest.approx((0, 0.1), abs=0.01)
    assert before[1] == after[1] == (1, 0)
    assert after[0] == (0, 0.01)
    assert "swapped, from mean 1, std 0 to mean 1, std 0" in str(report)


def test_a_padding_row_does_not_hide_a_constant():
    model = nn.ModuleDict({"a": nn.Embedding(2000, 1, padding_idx=5), "b": nn.Embedding(2000, 8)})
    nn.init.constant_(model["a"].weight, 0.5)
    with torch.no_grad():
        model["a"].weight[5] = 0
    robe.compress(model, 10)
    want = torch.full((2000, 1), 0.5)
    want[5] = 0
    assert torch.equal(model["a"].full_weight(), want)


@pytest.mark.parametrize(
    ("options", "values", "reason"),
    [
        ({"sign": True}, {"one": 1.0}, "its values are around 1, and sign=True would turn half of them round"),
        ({"ratio": 1900, "block_size": 2}, {"zero": 0.0}, "would be smaller than a block"),
    ],
)
def test_constants_that_cannot_be_kept_are_left(options, values, reason):
    model = robe.compress(filled(plain=(0.0, 0.1), **values), **{"ratio": 10} | options)
    (left,) = model.compression_report.left
    assert reason in left.reason
    assert robe.compress(filled(plain=(0.0, 0.1), zero=0.0), 10, sign=True).compression_report.left == ()


def test_a_scale_that_is_given_is_that_of_zeros_too():
    model = robe.compress(filled(plain=(0.0, 0.1), zero=0.0), 10, init_std=0.2)
    assert model["plain"].array is model["zero"].array
    assert model["zero"].array.init_std == 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_constants_of_every_dtype(dtype):
    table = nn.Embedding(1000, 4, dtype=dtype)
    nn.init.constant_(table.weight, 0.3)
    want = table.weight.detach().clone()
    assert torch.equal(robe.compress(nn.Sequential(table), 10)[0].full_weight(), want)


@pytest.mark.parametrize("init", ["random", "project"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_table_that_is_not_finite_is_refused_by_name(init, bad):
    model = nn.ModuleDict({"user": nn.Embedding(2000, 8), "item": nn.Embedding(2000, 8, padding_idx=1)})
    tables = list(model.values())
    model["item"].weight.data[1999, 3] = bad
    with pytest.raises(ValueError, match=f"the table item: expected finite values, got {bad} in row 1999, component 3"):
        robe.compress(model, 10, init=init)
    assert list(model.values()) == tables


@pytest.mark.parametrize("init", ["random", "project"])
def test_a_padding_row_with_a_value_is_read_and_not_trained(init):
    table = nn.Embedding(1000, 8, padding_idx=-1)
    nn.init.normal_(table.weight)
    want = table.weight[999].detach().clone()
    layer = robe.compress(nn.Sequential(table), 10, init=init)[0]
    assert torch.equal(layer(torch.tensor(999)), want)
    layer(torch.tensor([999])).sum().backward()
    assert not layer.array.weight.grad.any()
    assert not robe.compress(nn.Sequential(nn.Embedding(1000, 8, padding_idx=0)), 10)[0](torch.tensor(0)).any()


def test_a_row_that_is_padding_for_one_of_two_tied_modules_is_projected_for_the_other():
    model = nn.ModuleDict({"rows": nn.Embedding(1000, 8, padding_idx=0), "bag": nn.EmbeddingBag(1000, 8, mode="sum")})
    model["bag"].weight = model["rows"].weight
    nn.init.normal_(model["rows"].weight)
    want = model["rows"].weight.detach().clone()
    robe.compress(model, 1.0001, init="project", block_size=1)
    other = nn.Embedding(1000, 8)
    other.weight.data.copy_(want)
    alone = robe.compress(nn.Sequential(other), 1.0001, init="project", block_size=1)[0]
    read = model["bag"].full_weight()
    assert read[0].any()
    assert torch.equal(read, alone.full_weight())
    assert torch.equal(model["rows"](torch.tensor(0)), want[0])


# -- Copies -----------------------------------------------------------------------------------------------------------


def compressed(seed=0):
    torch.manual_seed(seed)
    return robe.compress(Recommender(), 50)


def test_state_dict_round_trip():
    model, other = compressed(), compressed(1)
    assert not torch.equal(model(IDS), other(IDS))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 2 * 4 * sum(p.numel() for p in model.parameters())  # the array once, not eleven times
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(model(IDS), other(IDS))
    assert other.bags[3].array.weight is other.bags[0].array.weight


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_share_an_array_of_their_own(copied):
    model = compressed()
    other = copied(model)
    assert torch.equal(model(IDS), other(IDS))
    assert len({id(m.array) for m in other.modules() if hasattr(m, "array")}) == 1
    assert other.bags[0].array is not model.bags[0].array
    assert other.compression_report == model.compression_report
    train(other, steps=2)
    assert not torch.equal(model.bags[0].array.weight, other.bags[0].array.weight)


def test_compiles_whole():
    model = compressed()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(IDS), model(IDS))
    whole(IDS).sum().backward()
    got, model.bags[0].array.weight.grad = model.bags[0].array.weight.grad, None
    model(IDS).sum().backward()
    torch.testing.assert_close(got, model.bags[0].array.weight.grad)


def of_a_world(world):
    """Gradients of half of the batch in each process, averaged by DDP."""
    model = compressed(world.rank)  # DDP begins by giving all the weights of the first
    model = DistributedDataParallel(model)
    mine = IDS.chunk(world.size)[world.rank]
    model(mine).sum().backward()
    return model.module.bags[0].array.weight.grad


def test_distributed_data_parallel(tmp_path):
    gradients = in_processes((2,), of_a_world, tmp_path)[2]
    model = compressed()
    (model(IDS).sum() / 2).backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, model.bags[0].array.weight.grad)


# -- Projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("block_size", [None, 3, 11])
@pytest.mark.parametrize("admitted", [False, True])
def test_projection_is_the_least_squares_solution(sign, block_size, admitted):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(40, 5, padding_idx=2), nn.EmbeddingBag(30, 4)]).double()
    before = [module.weight.detach().clone() for module in model]
    admission = robe.Admission(64) if admitted else None
    robe.compress(model, 5, block_size=block_size, sign=sign, init="project", min_rows=1, admission=admission)
    array = model[0].array
    if admitted:
        for layer in model:
            admission.admit(torch.arange(0, 30, 3), layer.table_keys[0])
        model = nn.ModuleList([nn.Embedding(40, 5, padding_idx=2), nn.EmbeddingBag(30, 4)]).double()
        for module, weight in zip(model, before):
            module.weight.data.copy_(weight)
        robe.compress(model, 5, block_size=block_size, sign=sign, init="project", min_rows=1, admission=admission)
        array = model[0].array
    # Which weight a component reads is what it changes by as that weight does.
    found = array.weight.detach().clone()
    rows = []
    with torch.no_grad():
        for slot in range(array.size):
            array.weight.zero_()
            array.weight[slot] = 1
            rows.append(np.concatenate([layer.full_weight().numpy().ravel() for layer in model]))
    matrix = np.array(rows).T
    target = np.concatenate([weight.numpy().ravel() for weight in before])
    target[2 * 5 : 3 * 5] = 0  # reads zeros, whatever the weights
    want, *_ = np.linalg.lstsq(matrix, target, rcond=None)
    read = np.abs(matrix).sum(0) > 0
    assert 20 < read.sum() <= array.size
    np.testing.assert_allclose(found.numpy()[read], want[read], rtol=1e-9)


def test_projection_is_closer_than_what_it_was():
    torch.manual_seed(0)
    table = nn.Embedding(1000, 8)
    rows = table.weight.detach().clone()
    layer = robe.compress(nn.Sequential(table), 2, init="project")[0]
    error = (layer.full_weight() - rows).pow(2).mean().item()
    assert 0.3 < error < 0.6  # half of the variance, where two components share a weight


# -- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1}, "ratio: expected more than 1, got 1"),
        ({"ratio": float("nan")}, "ratio: expected more than 1, got nan"),
        ({"init": "zeros"}, "init: expected 'random' or 'project', got 'zeros'"),
        ({"ratio": 1e6}, "leave 0, fewer than one block of 8; compress less"),
        ({"ratio": 1100}, "leave 7, fewer than one block of 8; compress less"),
        ({"min_rows": 5000}, "no table to swap: a: has fewer than 5,000 rows"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"admission": robe.Admission(48), "ratio": 500}, "leave 4, fewer than one block of 8"),
    ],
)
def test_refused_and_nothing_changed(options, message):
    model = nn.ModuleDict({"a": nn.Embedding(1000, 8)})
    table = model["a"]
    with pytest.raises(ValueError, match=message):
        robe.compress(model, **options)
    assert model["a"] is table
    assert not hasattr(model, "compression_report")


def test_a_model_without_tables_or_without_weights():
    with pytest.raises(ValueError, match=r"there is no nn\.Embedding or nn\.EmbeddingBag in it"):
        robe.compress(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="init='project': tables on the meta device have no weights"):
        robe.compress(nn.Sequential(nn.Embedding(1000, 8, device="meta")), 10, init="project")
