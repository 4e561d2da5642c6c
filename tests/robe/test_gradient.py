"""SlotGradient against the dense gradient that torch makes of the same model: every rule of torch holds for both."""

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import robe
from robe import gradient
from robe.gradient import SlotGradient
from tests.helpers.optimizers import Two, an_array, an_embedding, ids, loss_of, steps

BIG = torch.arange(40)


def backward(ours, model=None, batches=1):
    """A model with its gradient, and the optimizer that makes it a SlotGradient; or None, and a dense gradient."""
    model = model or Two(an_array())
    optimizer = robe.optim.SGD(model, lr=0.1) if ours else None
    for (batch,) in steps(batches):
        loss_of(model(batch)).backward()
    (weight,) = model.parameters()
    assert type(weight.grad) is (SlotGradient if ours else torch.Tensor)
    return model, weight, optimizer


def both():
    """The weights (m,) with a dense gradient and with a SlotGradient, and the optimizer to keep."""
    (_, dense, _), (_, slots, optimizer) = backward(False), backward(True)
    return dense, slots, optimizer


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_it_is_a_tensor_with_the_numbers_of_the_dense_gradient():
    dense, slots, _optimizer = both()
    grad = slots.grad
    assert (grad.shape, grad.dtype, grad.device) == (dense.grad.shape, dense.grad.dtype, dense.grad.device)
    assert repr(grad) == "SlotGradient(size=97, dtype=torch.float64)"
    close(grad.to_dense(), dense.grad)
    assert grad.to_dense(torch.float32).dtype == torch.float32
    copied = grad.to_dense()
    copied.zero_()
    close(grad.to_dense(), dense.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Any operation of torch

READS = {
    "norm": lambda g: g.norm(),
    "1-norm": lambda g: torch.linalg.vector_norm(g, 1),
    "3-norm": lambda g: torch.linalg.vector_norm(g, 3.0),
    "largest": lambda g: torch.linalg.vector_norm(g, float("inf")),
    "smallest": lambda g: torch.linalg.vector_norm(g, float("-inf")),
    "number of nonzeros": lambda g: torch.linalg.vector_norm(g, 0),
    "norm of floats": lambda g: torch.linalg.vector_norm(g.float(), dtype=torch.float64),
    "norm, dimension kept": lambda g: torch.linalg.vector_norm(g, keepdim=True),
    "times": lambda g: g * 3,
    "times a tensor": lambda g: torch.tensor(3.0) * g,
    "times a vector": lambda g: g * torch.arange(97),
    "over": lambda g: g / 3,
    "over 0": lambda g: g / 0,
    "a number over it": lambda g: 3 / (g.abs() + 1),
    "plus itself": lambda g: g + g,
    "plus twice itself": lambda g: torch.add(g, g, alpha=2),
    "plus a tensor": lambda g: g + torch.ones(97),
    "a tensor plus it": lambda g: torch.ones(97) + g,
    "plus a number": lambda g: g + 1,
    "minus": lambda g: 1 - g,
    "negative": lambda g: -g,
    "clone": lambda g: g.clone(),
    "detach": lambda g: g.detach(),
    "float": lambda g: g.float().double(),
    "finite": lambda g: g.isfinite(),
    "view": lambda g: g.view(1, -1),
    "slice": lambda g: g[3:40:2],
    "one": lambda g: g[5],
    "mask": lambda g: g[g > 0],
    "like": lambda g: torch.zeros_like(g),
    "stack": lambda g: torch.stack([g, g]),
    "sorted": lambda g: torch.sort(g).values,
    "numpy": lambda g: torch.from_numpy(g.numpy().copy()),
    "an array of numpy": lambda g: torch.from_numpy(np.asarray(g).copy()),
    "list": lambda g: torch.tensor(g.tolist(), dtype=g.dtype),
    "data": lambda g: g.data,
}


@pytest.mark.parametrize("name", READS)
def test_reading_gives_what_the_dense_gradient_gives(name):
    dense, slots, optimizer = both()
    got, want = READS[name](slots.grad), READS[name](dense.grad)
    close(got.to_dense() if isinstance(got, SlotGradient) else got, want)
    before = dense.detach().clone()
    close(slots.grad.to_dense(), dense.grad)
    optimizer.step()
    close(slots.detach(), before - 0.1 * dense.grad)


CHANGES = {
    "times": lambda g: g.mul_(3),
    "times a tensor": lambda g: g.mul_(torch.tensor(0.5)),
    "times a vector": lambda g: g.mul_(torch.arange(97)),
    "over": lambda g: g.div_(3),
    "over 0": lambda g: g.div_(0),
    "plus": lambda g: g.add_(torch.linspace(0, 1, 97)),
    "plus twice": lambda g: g.add_(torch.linspace(0, 1, 97), alpha=2),
    "plus itself": lambda g: g.add_(g.clone(), alpha=-0.5),
    "clamp": lambda g: g.clamp_(-0.5, 0.5),
    "noise": lambda g: g.add_(torch.randn(97, generator=torch.Generator().manual_seed(0))),
    "zero": lambda g: g.zero_(),
    "fill": lambda g: g.fill_(2),
    "copy": lambda g: g.copy_(torch.arange(97)),
    "copy of another": lambda g: g.copy_((g * 2).detach()),
    "some to zero": lambda g: g[10:50].zero_(),
    "assigned by slice": lambda g: g.__setitem__(slice(10, 50), 1.0),
    "assigned by mask": lambda g: g.__setitem__(g > 0, 0.0),
    "assigned by place": lambda g: g.__setitem__(torch.tensor([3, 5]), 4.0),
    "scaled through a view": lambda g: g.view(-1)[::2].mul_(10),
    "out": lambda g: torch.mul(g, 2, out=g),
    "through numpy": lambda g: g.numpy().fill(2),
    "times of its data": lambda g: g.data.mul_(2),
    "data of another": lambda g: setattr(g, "data", torch.linspace(0, 1, 97).double()),
    "not a number to zero": lambda g: g.nan_to_num_(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("later", ["", "scaled", "added to"])
def test_changes_in_place_are_what_the_step_applies(name, later):
    dense, slots, optimizer = both()
    for weight in (dense, slots):
        CHANGES[name](weight.grad)
        if later == "scaled":
            weight.grad *= 0.5
        if later == "added to":
            model = Two(an_array())
            model.one.array.weight = weight
            model(ids(seed=7)).sum().backward()
    close(slots.grad.to_dense(), dense.grad)
    before = slots.detach().clone()
    optimizer.step()
    close(slots.detach(), before - 0.1 * dense.grad)


# ---------------------------------------------------------------------------------------------------------------------
# What torch's tools do with a gradient


@pytest.mark.parametrize("forget", ["model", "optimizer", "zeros of the model", "None"])
def test_a_bad_batch_that_is_forgotten_leaves_no_trace(forget):
    model = Two(an_array())
    optimizer = robe.optim.SGD(model, lr=0.1)
    weight = model.one.array.weight
    before = weight.detach().clone()
    (model(BIG).sum() * float("nan")).backward()
    if forget == "None":
        weight.grad = None
    elif forget == "optimizer":
        optimizer.zero_grad()
    else:
        model.zero_grad(set_to_none=forget == "model")
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_by_norm(norm_type):
    dense, slots, optimizer = both()
    linear = nn.Linear(3, 1).double()  # clipped together with parameters of another kind
    norms = []
    for weight in (dense, slots):
        linear.weight.grad = torch.ones(1, 3, dtype=torch.float64)
        norms.append(nn.utils.clip_grad_norm_([linear.weight, weight], 0.01, norm_type))
        norms.append(linear.weight.grad.clone())
    close(norms[2:], norms[:2])
    assert type(slots.grad) is SlotGradient
    close(slots.grad.to_dense(), dense.grad)
    before = slots.detach().clone()
    optimizer.step()
    close(slots.detach(), before - 0.1 * dense.grad)


def test_clipping_by_norm_builds_no_dense_gradient():
    _, slots, optimizer = both()
    nn.utils.clip_grad_norm_([slots], 0.01)
    assert slots.grad.pieces._dense is None
    optimizer.step()
    assert slots.grad.pieces._dense is None


def test_clipping_by_value():
    dense, slots, _optimizer = both()
    nn.utils.clip_grad_value_([dense], 0.3)
    nn.utils.clip_grad_value_([slots], 0.3)
    assert dense.grad.abs().max() == 0.3
    close(slots.grad.to_dense(), dense.grad)


def test_gradients_that_are_not_finite_can_be_found_before_the_step():
    model, weight, _optimizer = backward(True)
    (model(BIG).sum() * float("inf")).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("read", [False, True])
def test_a_grad_scaler_unscales_and_skips_the_step_with_an_overflow(read):
    results = []
    for ours in (False, True):
        model = robe.RobeEmbedding(30, 6, array=an_array(torch.float32))
        kind = robe.optim.SGD if ours else torch.optim.SGD
        optimizer = kind(model if ours else model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trace = []
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model(ids(seed=step))) * (float("inf") if step == 2 else 1)
            scaler.scale(loss).backward()
            if read:
                model.array.weight.grad.abs().max()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            trace += [model.array.weight.detach().clone(), scaler.get_scale()]
        assert torch.equal(trace[4], trace[2])
        assert not torch.equal(trace[6], trace[4])
        results.append(trace)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_autograd_grad_returns_it_and_leaves_nothing_behind():
    _, dense, _ = backward(False)
    model = Two(an_array())
    optimizer = robe.optim.SGD(model, lr=0.1)
    weight = model.one.array.weight
    before = weight.detach().clone()
    ((batch,),) = steps(1)
    (grad,) = torch.autograd.grad(loss_of(model(batch)), weight)
    close(grad.to_dense(), dense.grad)
    assert weight.grad is None
    optimizer.step()
    assert torch.equal(weight, before)


def test_hooks_see_it_and_may_change_it():
    seen = []
    model = Two(an_array())
    optimizer = robe.optim.SGD(model, lr=0.1)
    weight = model.one.array.weight
    weight.register_hook(lambda grad: grad * 2)
    weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.norm()))
    ((batch,),) = steps(1)
    loss_of(model(batch)).backward()
    _, dense, _ = backward(False)
    close(weight.grad.to_dense(), dense.grad * 2)
    close(seen, [dense.grad.norm() * 2])
    del optimizer


def test_the_whole_table_gives_its_gradient_too():
    """As where the output layer is tied to the items' table."""
    results = []
    for ours in (False, True):
        item = robe.RobeEmbedding(30, 6, array=an_array())
        kind = robe.optim.Adagrad if ours else torch.optim.Adagrad
        optimizer = kind(item if ours else item.parameters(), lr=0.1)
        for (batch,) in steps():
            optimizer.zero_grad()
            (item(batch) @ item.full_weight().T).logsumexp(1).sum().backward()
            optimizer.step()
        results.append(item.array.weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("penalty_first", [False, True])
def test_a_penalty_on_the_weights_gives_its_gradient_too(penalty_first):
    results = []
    for ours in (False, True):
        model = Two(an_array())
        weight = model.one.array.weight
        optimizer = robe.optim.SGD(model, lr=0.1) if ours else torch.optim.SGD(model.parameters(), lr=0.1)
        for (batch,) in steps():
            optimizer.zero_grad()
            penalty = weight.square().sum()
            (penalty + loss_of(model(batch)) if penalty_first else loss_of(model(batch)) + penalty).backward()
            optimizer.step()
        results.append(weight.detach())
    close(*results)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_gradient_of_the_users_own_is_applied(kind):
    array = an_array()
    optimizer = robe.optim.SGD(array, lr=0.5)
    want = array.weight.detach().clone()
    grad = torch.zeros_like(want)
    grad[[3, 50]] = torch.tensor([1.0, -2.0], dtype=grad.dtype)
    array.weight.grad = grad.to_sparse() if kind == "sparse" else grad
    optimizer.step()
    assert torch.equal(array.weight, want - 0.5 * grad)


def test_a_copied_model_and_optimizer_train_on():
    model, weight, optimizer = backward(True)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    close(copy.deepcopy(weight.grad), weight.grad.to_dense())
    for each, by in ((model, optimizer), (twin, twin_optimizer)):
        by.zero_grad()
        loss_of(each(BIG)).backward()
        by.step()
    assert type(twin.one.array.weight.grad) is torch.Tensor
    close(twin.one.array.weight, weight)


def test_it_is_saved_as_the_dense_gradient():
    _, weight, _optimizer = backward(True)
    file = io.BytesIO()
    torch.save(weight.grad, file)
    file.seek(0)
    close(torch.load(file, weights_only=True), weight.grad.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_with_a_gradient_changes_its_dtype_and_trains_on(dtype):
    (plain, dense, _), (model, weight, optimizer) = backward(False), backward(True)
    for changed in (plain, model):
        changed.to(dtype)
        loss_of(changed(ids(seed=7))).backward()
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad.to_dense(), dense.grad)
    before = dense.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * dense.grad)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_looking_at_a_gradient_does_not_change_the_training(name):
    """A slot that was read with a gradient of zero is one that was read, also after somebody looked."""
    results = []
    for look in (lambda g: None, lambda g: g.norm(), lambda g: g.abs().max()):
        model = an_embedding()
        optimizer = getattr(robe.optim, name)(model, lr=0.1, weight_decay=0.1)
        for (batch,) in steps():
            optimizer.zero_grad()
            (model(batch) * 0).sum().backward()
            look(model.array.weight.grad)
            optimizer.step()
        results.append(model.array.weight.detach())
    assert not torch.equal(results[0], an_array().weight)
    close(results[1:], [results[0]] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# What it is made of


def test_ids_may_be_filled_anew_before_the_step():
    """As loaders do that read each batch into the same memory; factors and offsets as well."""
    results = []
    for spoiled in (False, True):
        model = robe.RobeEmbeddingBag(30, 6, mode="sum", array=an_array())
        optimizer = robe.optim.SGD(model, lr=0.1)
        batch, offsets = ids(), torch.tensor([0, 3, 3])
        factors = torch.linspace(-1, 2, 8, dtype=torch.float64)
        model(batch, offsets, factors).sum().backward()
        if spoiled:
            batch.numpy()[:] = 2**40
            offsets.zero_()
            factors.fill_(5)
        optimizer.step()
        results.append(model.array.weight.detach())
    assert torch.equal(*results)


def test_changed_weights_are_refused_where_the_largest_depends_on_them():
    model = robe.RobeEmbeddingBag(30, 6, mode="max", array=an_array())
    optimizer = robe.optim.SGD(model, lr=0.1)
    model(ids(), torch.tensor([0, 3])).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="weight: changed in place since the backward pass"):
        optimizer.step()
    optimizer.zero_grad()
    model(ids(), torch.tensor([0, 3])).sum().backward()
    optimizer.step()


def test_weights_may_change_between_a_lookup_and_its_backward_pass():
    """As for nn.Embedding: the gradient does not depend on them."""
    grads = []
    for steps_between in (0, 1):
        model = Two(an_array())
        optimizer = robe.optim.SGD(model, lr=0.1)
        output = model(BIG)
        for _ in range(steps_between):
            model(BIG).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        output.sum().backward()
        grads.append(model.one.array.weight.grad.to_dense())
    assert torch.equal(*grads)
    bag = robe.RobeEmbeddingBag(30, 6, mode="max", array=an_array())
    optimizer = robe.optim.SGD(bag, lr=0.1)
    waiting = bag(ids(), torch.tensor([0, 3]))
    bag(ids(), torch.tensor([0, 3])).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.sum().backward()


def test_gradients_that_nobody_clears_do_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(gradient, "_SUM_BEYOND_NUMBERS", 0)
    (_, dense, _), (model, slots, optimizer) = backward(False, batches=30), backward(True, batches=30)
    held = sum(grad.numel() for grad, _ in slots.grad.pieces.calls())
    assert held <= gradient._SUM_BEYOND_ARRAYS * 97 < 30 * model(ids()).numel()
    close(slots.grad.to_dense(), dense.grad)
    before = slots.detach().clone()
    optimizer.step()
    close(slots.detach(), before - 0.1 * dense.grad)


def test_it_is_freed_with_its_array():
    model, weight, optimizer = backward(True)
    gone = weakref.ref(weight.grad.pieces.calls()[0][0]), weakref.ref(weight)
    del model, weight, optimizer
    gc.collect()
    assert [x() for x in gone] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_slots_are_the_dense_gradient_where_it_was_read(dtype):
    dense = robe.RobeEmbedding(30, 6, array=an_array(dtype), padding_idx=3, sign=True, block_size=4)
    model = copy.deepcopy(dense)
    _optimizer = robe.optim.SGD(model)
    for each in (dense, model):
        loss_of(each(ids())).backward()
    slots, values = model.array.weight.grad.pieces.sums()
    assert len(slots.unique()) == len(slots) > 0
    assert values.dtype == (dtype if dtype == torch.float64 else torch.float32)
    want = torch.zeros_like(dense.array.weight)
    want[slots] = values.to(dtype)
    torch.testing.assert_close(want, dense.array.weight.grad)
