"""robe.optim against torch.optim on the dense gradient, and against loops over slots in numpy."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import robe
from robe.ops import REFERENCE
from tests.helpers.oracle import places, pool_loop

SIZE, DIM = 97, 6
OPTIMIZERS = {
    "SGD": (robe.optim.SGD, {"lr": 0.3}),
    "SGD, momentum": (robe.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "Adagrad": (robe.optim.Adagrad, {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.05}),
    "Adam": (robe.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.05}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def build(name, array):
    kind, options = OPTIMIZERS[name]
    return kind(array, **options)


def an_array(dtype=torch.float64, seed=0, size=SIZE):
    torch.manual_seed(seed)
    return robe.RobeArray(size, init_std=1.0, dtype=dtype)


def an_embedding(dtype=torch.float64, seed=0, **options):
    return robe.RobeEmbedding(None, DIM, array=an_array(dtype, seed), block_size=4, sign=True, **options)


def loss_of(output):
    """Another gradient for each component, that depends on the values."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum() + output.square().sum() / 2


def train(model, optimizer, batches):
    for inputs in batches:
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()


def ids(n=8, *, seed=0, high=30):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, n))


def steps(count=4):
    return [(ids(seed=k),) for k in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# As torch.optim, with which no optimizer is attached and the gradient is dense


def models(array):
    """Layers of every kind, each with the inputs of a step."""
    offsets = torch.tensor([0, 3, 3, 7])
    tables = [robe.EmbeddingBagConfig(name, n, DIM) for name, n in (("a", 30), ("b", None), ("c", 30))]
    hashed = {"array": array, "block_size": 4}

    def factors(seed):
        return torch.linspace(-1, 2, 9, dtype=array.weight.dtype) + seed

    yield robe.RobeEmbedding(30, DIM, **hashed), lambda seed: (ids(9, seed=seed),)
    yield robe.RobeEmbedding(30, DIM, 5, sign=True, **hashed), lambda seed: (ids(8, seed=seed, high=7).view(4, 2),)
    yield robe.RobeEmbedding(16, DIM, array=array, hash="identity"), lambda seed: (ids(5, seed=seed, high=16).int(),)
    for mode in ("sum", "mean", "max"):
        layer = robe.RobeEmbeddingBag(30, DIM, mode=mode, padding_idx=2, sign=True, **hashed)
        yield layer, lambda seed: (ids(9, seed=seed), offsets)
    weighted = robe.RobeEmbeddingBag(30, DIM, mode="sum", **hashed)
    yield weighted, lambda seed: (ids(9, seed=seed), offsets, factors(seed))
    yield robe.RobeEmbeddingBagCollection(tables, **hashed), lambda seed: (ids(12, seed=seed).view(4, 3),)
    for pooling in ("sum", "mean", "max"):
        tables = [robe.EmbeddingBagConfig(name, 30, DIM, pooling=pooling) for name in "abc"]
        layer = robe.RobeEmbeddingBagCollection(tables, **hashed)
        yield layer, lambda seed: (ids(9, seed=seed), torch.tensor([0, 2, 2, 5, 5, 8, 9]))


KINDS = 11
TORCH = [
    (robe.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (robe.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    (robe.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.2, "lr_decay": 0.5, "initial_accumulator_value": 0.3}),
    (robe.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.2, "eps": 0.1}),
]


@pytest.mark.parametrize("kind", range(KINDS))
@pytest.mark.parametrize(("ours", "theirs", "options"), TORCH, ids=lambda x: x.__module__ if callable(x) else str(x))
def test_without_decay_it_is_torch_step_for_step(kind, ours, theirs, options):
    layers = [list(models(an_array()))[kind] for _ in range(2)]
    (model, inputs), (twin, _) = layers
    assert torch.equal(model.array.weight, twin.array.weight)
    optimizer, reference = ours(model, **options), theirs(twin.parameters(), **options)
    before = model.array.weight.detach().clone()
    for step in range(4):
        train(model, optimizer, [inputs(step)])
        train(twin, reference, [inputs(step)])
        assert model.array.weight.grad is None
        torch.testing.assert_close(model.array.weight, twin.array.weight, rtol=1e-10, atol=1e-10)
    assert not torch.equal(model.array.weight, before)


def test_models_are_as_many_as_the_parameters_of_the_test():
    assert len(list(models(an_array()))) == KINDS


# ---------------------------------------------------------------------------------------------------------------------
# As the documentation says, slot by slot


class Loop:
    """The documented rules in float64: a slot moves in steps that touch it, by the sum of its gradients."""

    def __init__(self, weight, rule, *, lr, weight_decay=0.0, momentum=0.0, lr_decay=0.0, betas=None, eps=None):
        self.weight, self.rule, self.t = weight.copy(), rule, 0
        self.lr, self.decay, self.momentum, self.lr_decay, self.betas = lr, weight_decay, momentum, lr_decay, betas
        self.eps = {"Adagrad": 1e-10, "Adam": 1e-8}.get(rule, 0) if eps is None else eps
        self.first, self.second = np.zeros_like(weight), np.zeros_like(weight)

    def step(self, gradient, touched):
        self.t += 1
        for s in sorted(touched):
            g = gradient[s] + self.decay * self.weight[s]
            if self.rule == "SGD":
                self.first[s] = self.momentum * self.first[s] + g
                self.weight[s] -= self.lr * self.first[s]
            elif self.rule == "Adagrad":
                self.first[s] += g * g
                self.weight[s] -= self.lr / (1 + (self.t - 1) * self.lr_decay) * g / (self.first[s] ** 0.5 + self.eps)
            else:
                b1, b2 = self.betas
                self.first[s] = b1 * self.first[s] + (1 - b1) * g
                self.second[s] = b2 * self.second[s] + (1 - b2) * g * g
                mean, square = self.first[s] / (1 - b1**self.t), self.second[s] / (1 - b2**self.t)
                self.weight[s] -= self.lr * mean / (square**0.5 + self.eps)


LAYOUT = {"hash": "mix", "size": SIZE, "embedding_dim": DIM, "block_size": 4, "sign": True}


@every_optimizer
@pytest.mark.parametrize("size", [SIZE, 5000])
def test_each_rule_is_the_documented_loop_over_touched_slots(name, size):
    """Repeated ids and colliding slots too; what no id of a step reads keeps its bits."""
    array = an_array(size=size)
    model = robe.RobeEmbedding(None, DIM, array=array, block_size=4, sign=True, padding_idx=4)
    layout = LAYOUT | {"size": size}
    optimizer = build(name, model)
    loop = Loop(array.weight.detach().numpy(), name.split(",")[0], **OPTIMIZERS[name][1])
    for step in range(6):
        batch = ids(7, seed=step, high=9)
        before = array.weight.detach().clone()
        output = model(batch)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        output.backward(upstream)
        optimizer.step()
        bags = [[[(int(x), 1.0)] for x in batch]]
        _, gradient, _ = pool_loop(
            loop.weight, bags, upstream.unsqueeze(1).numpy(), mode="sum", padding_idx=4, layouts=[layout]
        )
        touched = set(places(batch[batch != 4].numpy(), **layout)[0].flat)
        assert 0 < len(touched) < size
        loop.step(gradient, touched)
        np.testing.assert_allclose(array.weight.detach().numpy(), loop.weight, rtol=1e-11, atol=1e-11)
        untouched = sorted(set(range(size)) - touched)
        assert torch.equal(array.weight[untouched], before[untouched])


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam"])
def test_a_slot_touched_with_zero_gradient_moves_by_its_moments(name):
    array = an_array()
    model = robe.RobeEmbedding(None, DIM, array=array)
    kind, options = OPTIMIZERS[name]
    optimizer = kind(array, **options | {"weight_decay": 0.0})
    model(torch.tensor([3])).sum().backward()
    optimizer.step()
    before = array.weight.detach().clone()
    optimizer.zero_grad()
    (model(torch.tensor([3])) * 0).sum().backward()
    optimizer.step()
    slots, _ = places([3], **LAYOUT | {"sign": False, "block_size": DIM})
    moved = (array.weight != before).nonzero().flatten().tolist()
    assert moved == sorted(set(slots.flat))


def test_weight_decay_acts_where_a_step_reads_though_the_gradient_is_zero():
    array = an_array()
    model, optimizer = robe.RobeEmbedding(None, DIM, array=array), robe.optim.SGD(array, lr=0.5, weight_decay=0.5)
    want = array.weight.detach().clone()
    slots, _ = places([3], **LAYOUT | {"sign": False, "block_size": DIM})
    want[slots.flatten()] *= 0.75
    (model(torch.tensor([3, 3])) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(array.weight.detach(), want, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What makes a step


class Two(nn.Module):
    """Two layers on one array, that read some slots both."""

    def __init__(self, array):
        super().__init__()
        self.one = robe.RobeEmbedding(None, DIM, array=array, block_size=4, sign=True)
        self.many = robe.RobeEmbeddingBag(None, DIM, mode="mean", array=array, table_id=1, block_size=3)

    def forward(self, x):
        return torch.cat([self.one(x), self.many(x.view(-1, 1)), self.one(x + 1)])


@every_optimizer
def test_layers_on_one_array_make_one_update(name):
    """The rule sees the sum of all gradients of a slot, as it would see the dense gradient."""
    array = an_array()
    model = Two(array)
    assert len(list(model.parameters())) == 1
    optimizer = build(name, model)
    loop = Loop(array.weight.detach().numpy(), name.split(",")[0], **OPTIMIZERS[name][1])
    for (batch,) in steps():
        twin = Two(an_array())
        with torch.no_grad():
            twin.one.array.weight.copy_(torch.from_numpy(loop.weight))
        loss_of(twin(batch)).backward()
        slots = [places(x.numpy(), **LAYOUT)[0] for x in (batch, batch + 1)]
        slots.append(places(batch.numpy(), **LAYOUT | {"table_id": 1, "block_size": 3})[0])
        train(model, optimizer, [(batch,)])
        loop.step(twin.one.array.weight.grad.numpy(), {int(s) for x in slots for s in x.flat})
        np.testing.assert_allclose(array.weight.detach().numpy(), loop.weight, rtol=1e-10, atol=1e-10)


@every_optimizer
def test_gradients_add_up_over_backward_calls_until_the_step(name):
    results = []
    for pieces in (1, 2, 4):
        model = an_embedding()
        optimizer = build(name, model)
        for (batch,) in steps():
            optimizer.zero_grad()
            for part in batch.chunk(pieces):
                model(part).square().sum().backward()
            optimizer.step()
        results.append(model.array.weight.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@every_optimizer
def test_a_step_uses_the_gradients_up_and_zero_grad_forgets_them(name):
    model = an_embedding()
    optimizer = build(name, model)
    before = model.array.weight.detach().clone()
    optimizer.step()
    model(ids()).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.array.weight, before)
    assert not optimizer.state
    train(model, optimizer, steps())
    before = model.array.weight.detach().clone()
    optimizer.step()
    model(ids())  # no backward
    optimizer.step()
    assert torch.equal(model.array.weight, before)


def test_model_zero_grad_of_torch_does_not_reach_the_gradients_of_the_array():
    """nn.Module.zero_grad clears .grad, which the array has not; the optimizer's own is the one to call."""
    model = an_embedding()
    optimizer = robe.optim.SGD(model, lr=1.0)
    model(ids()).sum().backward()
    assert model.array.weight.grad is None
    before = model.array.weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.array.weight, before)


@pytest.mark.parametrize("frozen", [False, True])
def test_per_sample_weights_get_their_gradient(frozen):
    results = []
    for optimized in (False, True):
        model = robe.RobeEmbeddingBag(None, DIM, mode="sum", array=an_array(), sign=True)
        model.array.weight.requires_grad_(not frozen)
        optimizer = robe.optim.SGD(model, lr=0.5) if optimized else torch.optim.SGD(model.parameters(), lr=0.5)
        factors = torch.linspace(-1, 2, 8, dtype=torch.float64, requires_grad=True)
        loss_of(model(ids(), torch.tensor([0, 3, 3]), factors)).backward()
        optimizer.step()
        results.append((factors.grad, model.array.weight.detach()))
    assert results[0][0].any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(results[1][1], an_array().weight) == frozen


def test_a_closure_is_called_and_its_loss_returned():
    model = an_embedding()
    optimizer = robe.optim.SGD(model, lr=0.1)
    before = model.array.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(ids()))
        loss.backward()
        return loss

    with torch.no_grad():
        want = loss_of(model(ids()))
    assert torch.equal(optimizer.step(closure), want)
    assert not torch.equal(model.array.weight, before)


def test_reading_without_autograd_records_nothing():
    model = an_embedding()
    optimizer = robe.optim.SGD(model, lr=0.1, weight_decay=0.5)
    before = model.array.weight.detach().clone()
    with torch.no_grad():
        want = model(ids())
    with torch.inference_mode():
        assert torch.equal(model(ids()), want)
    assert torch.equal(model(ids()).detach(), want)
    optimizer.step()
    assert torch.equal(model.array.weight, before)


def test_an_empty_batch_trains_nothing():
    model = an_embedding()
    optimizer = robe.optim.Adam(model, weight_decay=0.5)
    before = model.array.weight.detach().clone()
    model(ids(0)).sum().backward()
    optimizer.step()
    assert torch.equal(model.array.weight, before)


def checkpointed(model, batch):
    return torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False)


def moved_away(model, batch):
    with torch.autograd.graph.save_on_cpu():
        return model(batch)


@pytest.mark.parametrize("run", [checkpointed, moved_away])
@every_optimizer
def test_activation_checkpointing_trains_the_same(name, run):
    """Saved tensors come back as other objects there; the gradient belongs to the array all the same."""
    results = []
    for forward in (lambda model, batch: model(batch), run):
        model = an_embedding()
        optimizer = build(name, model)
        for (batch,) in steps():
            optimizer.zero_grad()
            loss_of(forward(model, batch)).backward()
            optimizer.step()
        results.append(model.array.weight.detach())
    assert not torch.equal(results[0], an_array().weight)
    assert torch.equal(results[0], results[1])


# ---------------------------------------------------------------------------------------------------------------------
# As an Optimizer of torch: schedulers, groups, states


def test_a_scheduler_changes_the_rate():
    """SGD moves by the rate times the gradient, here the same in every step."""
    model = robe.RobeEmbedding(None, DIM, array=an_array())
    optimizer = robe.optim.SGD(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    slots, _ = places([3], **LAYOUT | {"sign": False, "block_size": DIM})
    for step in range(4):
        before = model.array.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.tensor([3])).sum().backward()
        optimizer.step()
        scheduler.step()
        moved = (before - model.array.weight.detach())[slots.flatten()]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5**step), rtol=1e-9, atol=0)


@every_optimizer
def test_groups_have_rates_of_their_own(name):
    kind, options = OPTIMIZERS[name]
    apart = [an_embedding(seed=seed) for seed in (0, 1)]
    together = [an_embedding(seed=seed) for seed in (0, 1)]
    groups = kind([{"params": [together[0]]}, {"params": together[1].array, "lr": 0.7}], **options)
    assert [group["lr"] for group in groups.param_groups] == [options["lr"], 0.7]
    for model, rate in zip(apart, (options["lr"], 0.7)):
        train(model, kind(model, **options | {"lr": rate}), steps())
    for (batch,) in steps():
        groups.zero_grad()
        (loss_of(together[0](batch)) + loss_of(together[1](batch))).backward()
        groups.step()
    for one, other in zip(apart, together):
        assert torch.equal(one.array.weight, other.array.weight)


def test_momentum_may_begin_later():
    """As in torch, whose SGD makes its buffer when it is first needed."""
    model, twin = an_embedding(), an_embedding()
    optimizer, other = robe.optim.SGD(model, lr=0.1), robe.optim.SGD(twin, lr=0.1)
    for each in (model, optimizer), (twin, other):
        train(*each, steps(1))
    optimizer.param_groups[0]["momentum"] = 0.9
    # The first step with momentum has none to go on from, so it is the step without.
    for each in (model, optimizer), (twin, other):
        train(*each, steps(2)[1:])
    torch.testing.assert_close(model.array.weight, twin.array.weight, rtol=1e-12, atol=1e-12)
    for each in (model, optimizer), (twin, other):
        train(*each, steps(3)[1:])
    assert not torch.allclose(model.array.weight, twin.array.weight)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_goes_on_to_the_bit(name, dtype):
    model = an_embedding(dtype)
    optimizer = build(name, model)
    train(model, optimizer, steps(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, steps(6)[3:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = an_embedding(dtype, seed=1)
    kind, _ = OPTIMIZERS[name]
    again = kind(twin)  # the options come from the state
    twin.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(twin, again, steps(6)[3:])
    assert torch.equal(model.array.weight, twin.array.weight)
    assert not torch.equal(model.array.weight, saved["model"]["array.weight"])
    for one, other in zip(optimizer.state.values(), again.state.values()):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key]))


# ---------------------------------------------------------------------------------------------------------------------
# Types, bodies, threads


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_update_of_each_type_is_that_of_the_reference(name, dtype, monkeypatch):
    """Half precision is updated in float32 and rounded once, so one step differs by one rounding at most."""
    model = an_embedding(dtype)
    optimizer = build(name, model)
    calls = []

    run = torch.ops.robe.update_

    def run_both(weight, state, *others):
        copies = weight.detach().clone(), [tensor.clone() for tensor in state]
        run(weight, state, *others)
        REFERENCE["update_"](*copies, *others)
        calls.append(([weight.detach().clone(), *(s.clone() for s in state)], [copies[0], *copies[1]]))

    monkeypatch.setattr(torch.ops.robe, "update_", run_both)
    train(model, optimizer, steps())
    assert len(calls) == 4
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for got, want in calls:
        for a, b in zip(got, want):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.cpu_only("about the threads of a CPU")
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(name, dtype):
    """Enough rows for several threads, most of them on the same slots."""
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            array = robe.RobeArray(5000, init_std=1.0, dtype=dtype)
            model = robe.RobeEmbedding(None, 32, array=array, block_size=16)
            optimizer = build(name, model)
            for step in range(2):
                optimizer.zero_grad()
                output = model(ids(2000, seed=step, high=40))
                output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(step)).to(dtype))
                optimizer.step()
            results.append(array.weight.detach().clone())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


# ---------------------------------------------------------------------------------------------------------------------
# Whose gradients an optimizer takes


def test_frozen_arrays_train_nothing():
    model = an_embedding()
    model.array.weight.requires_grad_(False)
    optimizer = robe.optim.SGD(model, lr=1.0, weight_decay=0.5)
    before = model.array.weight.clone()
    output = model(ids())
    assert not output.requires_grad
    optimizer.step()
    assert torch.equal(model.array.weight, before)


def test_an_array_may_be_frozen_and_go_on_later():
    model = an_embedding()
    optimizer = robe.optim.Adam(model, weight_decay=0.5)
    train(model, optimizer, steps(2))
    model.array.weight.requires_grad_(False)
    before = model.array.weight.clone()
    optimizer.zero_grad()
    assert not model(ids()).requires_grad
    optimizer.step()
    assert torch.equal(model.array.weight, before)
    model.array.weight.requires_grad_(True)
    train(model, optimizer, steps(1))
    assert not torch.equal(model.array.weight, before)


def test_the_last_optimizer_takes_over():
    model, twin = an_embedding(), an_embedding()
    first, second = robe.optim.SGD(model, lr=1.0), robe.optim.Adagrad(model, lr=0.1)
    model(ids()).sum().backward()
    before = model.array.weight.detach().clone()
    first.step()
    assert torch.equal(model.array.weight, before)
    second.step()
    alone = robe.optim.Adagrad(twin, lr=0.1)
    twin(ids()).sum().backward()
    alone.step()
    assert torch.equal(model.array.weight, twin.array.weight)


def test_an_optimizer_that_could_not_be_made_takes_no_gradients():
    model = an_embedding()
    first = robe.optim.SGD(model, lr=1.0)
    with pytest.raises(ValueError, match="lr"):
        robe.optim.Adagrad(model, lr=-1)
    before = model.array.weight.detach().clone()
    model(ids()).sum().backward()
    first.step()
    assert not torch.equal(model.array.weight, before)


@pytest.mark.parametrize("how", ["functional_call", "another parameter"])
def test_a_weight_that_the_optimizer_does_not_have_gets_an_ordinary_gradient(how):
    """Were its gradient kept for a step, none would ever take it."""
    model, plain = an_embedding(), an_embedding()
    optimizer = robe.optim.SGD(model, lr=1.0)
    weight = nn.Parameter(an_array(seed=1).weight.detach().clone())
    if how == "functional_call":
        output = torch.func.functional_call(model, {"array.weight": weight}, (ids(),))
    else:
        model.array.weight = weight
        output = model(ids())
    with torch.no_grad():
        plain.array.weight.copy_(weight)
    output.square().sum().backward()
    plain(ids()).square().sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, plain.array.weight.grad)
    optimizer.step()
    assert torch.equal(weight, plain.array.weight)


def test_without_its_optimizer_the_gradient_is_dense_again():
    model = an_embedding()
    optimizer = robe.optim.SGD(model)
    model(ids()).square().sum().backward()
    assert model.array.weight.grad is None
    del optimizer
    gc.collect()
    model(ids()).square().sum().backward()
    plain = an_embedding()
    plain(ids()).square().sum().backward()
    assert torch.equal(model.array.weight.grad, plain.array.weight.grad)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_model_has_no_optimizer(how):
    model = an_embedding()
    optimizer = robe.optim.Adam(model, lr=0.1)
    train(model, optimizer, steps(2))
    model(ids()).sum().backward()  # waits for a step while the copy is made
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin.array.weight, model.array.weight)
    optimizer.zero_grad()
    before = model.array.weight.detach().clone()
    twin(ids()).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.array.weight, before)
    plain = an_embedding()
    with torch.no_grad():
        plain.array.weight.copy_(before)
    plain(ids()).square().sum().backward()
    assert torch.equal(twin.array.weight.grad, plain.array.weight.grad)
    # The model itself still trains.
    train(model, optimizer, steps(1))
    assert not torch.equal(model.array.weight, before)


def test_other_parameters_train_beside_the_array():
    """One model, two optimizers: the same as torch's alone on all parameters."""
    results = []
    for ours in (False, True):
        embedding = an_embedding()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, 3)).double()
        rest = list(model.parameters())
        dense = torch.optim.SGD(rest if ours else [*rest, embedding.array.weight], lr=0.05)
        optimizers = [dense, robe.optim.SGD(embedding, lr=0.05)] if ours else [dense]
        for (batch,) in steps():
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model(batch) + model[1](embedding(batch))).backward()
            for optimizer in optimizers:
                optimizer.step()
        results.append([parameter.detach() for parameter in (*rest, embedding.array.weight)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


# torch's own compiler warns about its use of deprecated Python features.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_optimizer
def test_a_compiled_model_trains_as_in_eager_mode(name):
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = Two(an_array())
        optimizer = build(name, model)
        train(torch.compile(model, backend="aot_eager") if compiled else model, optimizer, steps())
        assert model.one.array.weight.grad is None
        results.append(model.one.array.weight.detach())
    assert not torch.equal(results[0], an_array().weight)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (robe.optim.SGD, {"lr": -0.1}, "lr: expected at least 0, got -0.1"),
        (robe.optim.SGD, {"lr": float("nan")}, "lr: expected at least 0, got nan"),
        (robe.optim.SGD, {"lr": float("inf")}, "lr: expected at least 0, got inf"),
        (robe.optim.SGD, {"momentum": -1}, "momentum: expected at least 0, got -1"),
        (robe.optim.SGD, {"weight_decay": -1}, "weight_decay: expected at least 0, got -1"),
        (robe.optim.Adagrad, {"lr_decay": -1}, "lr_decay: expected at least 0, got -1"),
        (robe.optim.Adagrad, {"eps": -1}, "eps: expected at least 0, got -1"),
        (
            robe.optim.Adagrad,
            {"initial_accumulator_value": -1},
            "initial_accumulator_value: expected at least 0, got -1",
        ),
        (robe.optim.Adam, {"betas": (1.0, 0.9)}, r"betas\[0\]: expected at least 0 and below 1, got 1.0"),
        (robe.optim.Adam, {"betas": (0.9, -0.1)}, r"betas\[1\]: expected at least 0 and below 1, got -0.1"),
        (robe.optim.Adam, {"eps": -1}, "eps: expected at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(an_array(), **options)


@pytest.mark.parametrize("kind", [robe.optim.SGD, robe.optim.Adagrad, robe.optim.Adam])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (lambda: nn.Linear(2, 2), "arrays: expected RobeArrays, or modules that hold some; there is none"),
        (list, "empty parameter list"),
        (lambda: nn.Linear(2, 2).parameters(), "got Parameter; parameters that are not an array's need an optimizer"),
        (lambda: [an_array(), an_array().weight], "got Parameter; parameters that are not an array's need"),
        (lambda: an_array().quantized(), "arrays: expected RobeArrays, or modules that hold some; there is none"),
        (lambda: [{"params": []}], "arrays: expected RobeArrays, or modules that hold some; there is none"),
    ],
    ids=["no array", "nothing", "parameters", "a parameter among arrays", "int8", "an empty group"],
)
def test_what_holds_no_array_is_refused(kind, arrays, message):
    with pytest.raises(ValueError, match=message):
        kind(arrays())


def test_arrays_may_be_given_in_many_ways():
    model = Two(an_array())
    for arrays in (model, model.one, model.one.array, [model.one, model.many], iter([model]), [{"params": model}]):
        optimizer = robe.optim.SGD(arrays)
        assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(model.one.array.weight)]]
