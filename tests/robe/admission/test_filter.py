"""The filter against the formula in Python's own integers, and layers with an Admission against tables without."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import robe
from robe.hashing import table_key
from robe.sketches import SHARED_ID
from tests.helpers.admitted import KEYS, MASK, ids_of, place
from tests.helpers.kernels import IS_NATIVE

# ---------------------------------------------------------------------------------------------------------------------
# The filter


@pytest.mark.parametrize("words", [1, 3, 64, 1000])
def test_the_filter_is_the_formula(words):
    admission = robe.Admission(8 * words)
    ids = ids_of(20, 3)
    admission.admit(ids, KEYS)
    want = [0] * words
    for row in ids.tolist():
        for key, x in zip(KEYS.tolist(), row):
            word, bits = place(key & MASK, x, words)
            want[word] |= bits
    assert [x & MASK for x in admission.filter.tolist()] == want
    others = ids_of(500, 3, seed=1)
    got = admission.admits(others, KEYS)
    assert got.dtype == torch.bool
    for row, of_row in zip(others.tolist(), got.tolist()):
        for key, x, inside in zip(KEYS.tolist(), row, of_row):
            word, bits = place(key & MASK, x, words)
            assert inside == (want[word] & bits == bits)


def test_the_filter_is_frozen():
    """Trained weights mean nothing under another filter: these numbers are never to change."""
    admission = robe.Admission(32)
    admission.admit(torch.tensor([0, 1, -1, 2**40]), torch.tensor(table_key(0, 0)))
    assert admission.filter.tolist() == FROZEN


FROZEN = [42958061568, 576478345303162881, 0, 288]


def test_who_was_let_in_is_in_whatever_comes_after():
    admission = robe.Admission(64)
    some = ids_of(50, 3)
    admission.admit(some, KEYS)
    for seed in range(1, 5):
        admission.admit(ids_of(50, 3, seed=seed), KEYS)
        assert admission.admits(some, KEYS).all()
    assert not robe.Admission(64).admits(some, KEYS).any()


@pytest.mark.parametrize(("bits", "rate"), [(4, 0.16), (6, 0.07), (8, 0.04)])
def test_false_positives_are_as_many_as_the_docs_say(bits, rate):
    admission = robe.Admission(8 * 2000)
    admission.admit(torch.arange(2000 * 64 // bits), KEYS[0])
    wrong = admission.admits(torch.arange(10**6, 2 * 10**6), KEYS[0]).float().mean().item()
    assert wrong == pytest.approx(rate, abs=0.01)
    assert admission.false_positive_rate() == pytest.approx(wrong, abs=0.003)
    # The same id of another table is another id.
    assert admission.admits(torch.arange(2000 * 64 // bits), KEYS[1]).float().mean() < 1.2 * rate + 0.01


def test_an_id_is_let_in_when_it_was_seen_often_enough():
    admission, seen = robe.Admission(1 << 16, threshold=4, counter_bytes=1 << 22), Counter()
    for seed in range(30):
        ids = ids_of(60, 3, seed=seed, top=300)
        admission.observe(ids, KEYS)
        seen.update((k, x) for row in ids.tolist() for k, x in enumerate(row))
        tables, values = map(torch.tensor, zip(*seen))
        want = torch.tensor([n >= 4 for n in seen.values()])
        assert torch.equal(admission.admits(values, KEYS[tables]), want)
    assert 20 < want.sum() < len(want) - 20


def test_no_more_are_let_in_than_the_filter_has_room_for():
    admission = robe.Admission(80, threshold=2, counter_bytes=1 << 20)
    for start in range(0, 1000, 10):
        admission.observe(torch.arange(start, start + 10).repeat(2), KEYS[0])
        twin = copy.deepcopy(admission)
        twin.load_state_dict(admission.state_dict())
        twin.observe(torch.arange(5000, 5010).repeat(2), KEYS[0])
    bits = sum((x & MASK).bit_count() for x in admission.filter.tolist())
    assert 320 <= bits < 320 + 3 * 10
    assert torch.equal(twin.filter, admission.filter)
    assert admission.admits(torch.arange(120), KEYS[0]).all()
    assert admission.admits(torch.arange(300, 1000), KEYS[0]).float().mean() < 0.3


def test_freeze():
    admission = robe.Admission(1 << 10, threshold=2, counter_bytes=1 << 16)
    assert sorted(admission.state_dict()) == ["counter.counters", "filter"]
    admission.observe(torch.tensor([1, 1, 2]), KEYS[0])
    admission.freeze()
    assert list(admission.state_dict()) == ["filter"]
    assert admission.admits(torch.tensor([1, 2]), KEYS[0]).tolist() == [True, False]
    with pytest.raises(ValueError, match="does not count: it was made without a threshold, or is frozen"):
        admission.observe(torch.tensor([2, 2]), KEYS[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: robe.Admission(0), "bytes: expected a positive multiple of 8"),
        (lambda: robe.Admission(12), "bytes: expected a positive multiple of 8"),
        (lambda: robe.Admission(64, threshold=0), "threshold: expected at least 1, got 0"),
        (lambda: robe.Admission.choose(list, KEYS, 7), "bytes: expected at least 8, got 7"),
        (lambda: robe.Admission.choose(list, KEYS, 8, times=0), "times: expected at least 1, got 0"),
        (lambda: robe.Admission.choose(list, KEYS, 8, rounds=0), "rounds: expected at least 1, got 0"),
        (lambda: robe.IdCounter(100), "bytes: expected at least 1024 of an IdCounter, got 100"),
        (
            lambda: robe.RobeEmbedding(9, 4, robe_size=8, hash="linear", admission=robe.Admission(8)),
            "admission: expected hash='mix' with it, got 'linear'",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def collection(admission=None, **options):
    tables = [robe.EmbeddingBagConfig(f"f{k}", rows, 8) for k, rows in enumerate((None, 900, None))]
    torch.manual_seed(3)
    return robe.RobeEmbeddingBagCollection(tables, robe_size=5000, seed=7, admission=admission, **options)


BOUNDED = ids_of(80, 3).clamp(min=0) % 900


@pytest.mark.parametrize("block_size", [8, 4, 3, 11])
@pytest.mark.parametrize("sign", [False, True])
def test_ids_outside_read_the_row_of_one(block_size, sign):
    admission = robe.Admission(512)
    layer = collection(admission, block_size=block_size, sign=sign)
    plain = collection(block_size=block_size, sign=sign)
    assert torch.equal(layer.array.weight, plain.array.weight)
    admission.admit(BOUNDED[:30], layer.table_keys)
    inside = admission.admits(BOUNDED, layer.table_keys)
    assert 30 < inside.sum() < inside.numel() - 30
    every = plain(BOUNDED)
    # The second table is bounded, so its layer would refuse the id; a row of it is a row of the same key unbounded.
    rare = plain._lookup(torch.tensor([[SHARED_ID, 0, SHARED_ID]])).clone()
    wide = robe.RobeEmbedding(None, 8, array=plain.array, table_id=1, block_size=block_size, sign=sign)
    rare[:, 1] = wide(torch.tensor([SHARED_ID]))
    assert torch.equal(layer(BOUNDED), torch.where(inside.unsqueeze(-1), every, rare))
    assert torch.equal(layer.full_weight("f1")[BOUNDED[:, 1]], layer(BOUNDED)[:, 1])


def test_the_filter_is_part_of_what_compression_leaves():
    admission = robe.Admission(200)
    layer = robe.RobeEmbedding(1000, 8, compression=10, admission=admission)
    assert 4 * layer.array.size + admission.bytes == 4 * 1000 * 8 // 10
    half = robe.RobeEmbedding(1000, 8, compression=10, admission=admission, dtype=torch.float16)
    assert half.array.size == 1000 * 8 // 10 - 100
    with pytest.raises(ValueError, match="compressed 1000 times leave none beside the 200 bytes of the admission"):
        robe.RobeEmbedding(1000, 8, compression=1000, admission=admission)


def test_gradients_go_where_the_rows_are_read():
    admission = robe.Admission(512)
    layer = collection(admission).double()
    admission.admit(BOUNDED[:30], layer.table_keys)
    lengths = torch.tensor([2, 0, 3] * 16)
    values = BOUNDED.T[:, :80].reshape(-1)[: int(lengths.sum())]
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    with torch.no_grad():
        layer.array.weight.copy_(torch.randn(5000, dtype=torch.float64))
    factors = torch.rand(len(values), dtype=torch.float64, requires_grad=True)
    of_feature = torch.arange(3).repeat_interleave(lengths.view(3, -1).sum(1))
    rows = torch.stack([layer._lookup(values[k].expand(1, 3))[0, f] for k, f in enumerate(of_feature)])
    bag = torch.arange(48).repeat_interleave(lengths)
    want = torch.zeros(48, 8, dtype=torch.float64).index_add(0, bag, rows * factors.unsqueeze(1))
    upstream = torch.randn(16, 3, 8, dtype=torch.float64)
    want_grads = torch.autograd.grad(
        (want.view(3, 16, 8).transpose(0, 1) * upstream).sum(), [layer.array.weight, factors]
    )
    output = layer(values, offsets, factors)
    torch.testing.assert_close(output, want.view(3, 16, 8).transpose(0, 1))
    grads = torch.autograd.grad((output * upstream).sum(), [layer.array.weight, factors])
    for got, wanted in zip(grads, want_grads):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("optimizer", [robe.optim.SGD, robe.optim.Adagrad, robe.optim.Adam])
def test_optimizers_of_touched_slots_see_the_admission(optimizer):
    admission = robe.Admission(512)
    layer = collection(admission).double()
    admission.admit(BOUNDED[:30], layer.table_keys)
    dense = copy.deepcopy(layer)
    own = optimizer(layer, lr=0.1)
    upstream = torch.randn(80, 3, 8, dtype=torch.float64)
    (layer(BOUNDED) * upstream).sum().backward()
    own.step()  # in the first step torch's leave slots without a gradient as they are, Adam too
    (dense(BOUNDED) * upstream).sum().backward()
    getattr(torch.optim, optimizer.__name__)([dense.array.weight], lr=0.1).step()
    torch.testing.assert_close(layer.array.weight, dense.array.weight)


@pytest.mark.cpu_only("a GPU trips an assertion instead")
def test_padding_and_ranges_are_about_the_ids_given():
    admission = robe.Admission(64)
    layer = robe.RobeEmbedding(10, 4, padding_idx=3, robe_size=50, admission=admission)
    rows = layer(torch.tensor([3, 4, 5]))
    assert not rows[0].any()
    assert torch.equal(rows[1], rows[2])
    assert rows[1].any()
    with pytest.raises(IndexError, match="id 10 of feature 0, whose table has 10 rows"):
        layer(torch.tensor([10]))
    with pytest.raises(IndexError):
        layer(torch.tensor([SHARED_ID]))


def test_layers_count_while_they_train_only():
    admission = robe.Admission(256, threshold=2, counter_bytes=1 << 16)
    bag = robe.RobeEmbeddingBag(
        None, 4, mode="sum", padding_idx=9, table_id=2, robe_size=50, admission=admission, seed=7
    )
    key = bag.table_keys
    bag.eval()
    for _ in range(3):
        bag(torch.tensor([[5, 6], [5, 9]]))
    assert not admission.counter.count(torch.tensor([5]), key).any()
    bag.train()
    bag(torch.tensor([[5, 6], [5, 9]]))
    bag(torch.tensor([5, 9, 8, 8, 8]), torch.tensor([0, 1]))
    with torch.no_grad():
        bag(torch.tensor([[6, 9]]))
    assert admission.admits(torch.tensor([5, 6, 7, 8, 9]), key).tolist() == [True, True, False, True, False]
    assert admission.counter.count(torch.tensor([9]), key).item() == 0


@pytest.mark.parametrize("ours", [False, True])
def test_a_gradient_goes_where_the_row_was_read_though_ids_were_let_in_since(ours):
    """Two layers of one admission: what the second reads lets ids of the first in before the backward pass."""
    admission = robe.Admission(800, threshold=2, counter_bytes=1 << 16)
    array = robe.RobeArray(500, dtype=torch.float64)
    layer = robe.RobeEmbedding(None, 8, array=array, admission=admission)
    _optimizer = robe.optim.SGD(array) if ours else None
    before = layer(torch.tensor([5, 6]))
    shared, _ = layer._slots(0, torch.tensor([SHARED_ID]))
    layer(torch.tensor([5, 6]))
    assert admission.admits(torch.tensor([5, 6]), layer.table_keys).all()
    before.sum().backward()
    grad = array.weight.grad.to_dense() if ours else array.weight.grad
    assert grad.nonzero().flatten().tolist() == sorted(shared.flatten().tolist())


def test_an_admission_is_saved_copied_and_moved_with_its_layer():
    layer = collection(robe.Admission(512))
    layer.admission.admit(BOUNDED[:30], layer.table_keys)
    other = collection(robe.Admission(512))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(BOUNDED), layer(BOUNDED))
    twin = copy.deepcopy(layer)
    twin.admission.admit(BOUNDED, layer.table_keys)
    assert not torch.equal(twin(BOUNDED), layer(BOUNDED))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.admission.filter.dtype == torch.int64
    assert torch.equal(half(BOUNDED), layer(BOUNDED).bfloat16())
    int8 = copy.deepcopy(layer)
    int8.array = int8.array.quantized(8)
    torch.testing.assert_close(int8(BOUNDED), layer(BOUNDED).detach(), rtol=0, atol=3e-4)


def test_an_admission_keeps_its_ids_where_a_layer_is_emptied():
    admission = robe.Admission(512, threshold=2, counter_bytes=1024)
    ids, key = torch.arange(30), torch.tensor(5)
    admission.admit(ids, key)
    admission.counter.add(ids, key)
    layer = torch.nn.utils.skip_init(robe.RobeEmbedding, 1000, 8, robe_size=80, admission=admission)
    assert layer.admission.admits(ids, key).all()
    assert (layer.admission.counter.count(ids, key) >= 1).all()


def test_an_admission_from_the_meta_device_is_empty_until_it_is_loaded():
    source = robe.Admission(512, threshold=2, counter_bytes=1024)
    source.admit(torch.arange(30), torch.tensor(5))
    with torch.device("meta"):
        admission, assigned = (robe.Admission(512, threshold=2, counter_bytes=1024) for _ in range(2))
    admission.to_empty(device="cpu")
    assert not admission.filter.any()
    assert not admission.counter.counters.any()
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned.filter, source.filter)


def test_compiled():
    layer = collection(robe.Admission(512)).eval()
    layer.admission.admit(BOUNDED[:30], layer.table_keys)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(BOUNDED), layer(BOUNDED))


def test_what_runs():
    """The tests above run on the kernels where there are some."""
    assert robe.backend()["cpu"].startswith("native") == IS_NATIVE
