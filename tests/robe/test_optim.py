"""robe.optim against torch.optim on the dense gradient, and against loops over slots in numpy."""

import numpy as np
import pytest
import torch

import robe
from tests.helpers.optimizers import (
    DIM,
    LAYOUT,
    OPTIMIZERS,
    SIZE,
    Two,
    an_array,
    an_embedding,
    build,
    every_optimizer,
    ids,
    loss_of,
    steps,
    train,
)
from tests.helpers.oracle import places, pool_loop

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
def test_without_a_gradient_a_step_does_nothing(name):
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
    optimizer.zero_grad()
    before = model.array.weight.detach().clone()
    optimizer.step()
    model(ids())  # no backward
    optimizer.step()
    assert torch.equal(model.array.weight, before)


def test_a_gradient_stays_until_it_is_cleared_as_in_torch():
    results = []
    for ours in (False, True):
        model = an_embedding()
        kind = robe.optim.SGD if ours else torch.optim.SGD
        optimizer = kind(model if ours else model.parameters(), lr=0.1)
        loss_of(model(ids())).backward()
        optimizer.step()
        optimizer.step()
        loss_of(model(ids(seed=1))).backward()
        optimizer.step()
        results.append(model.array.weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


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
