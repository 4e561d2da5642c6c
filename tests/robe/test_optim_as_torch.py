"""robe.optim as an Optimizer of torch: schedulers, groups, states, copies, and whose gradients it takes."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import robe
from robe.gradient import SlotGradient
from robe.ops import REFERENCE
from tests.helpers.optimizers import (
    DIM,
    LAYOUT,
    OPTIMIZERS,
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
from tests.helpers.oracle import places

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


STATES_OF_TORCH = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.3},
    "Adam": {"lr": 0.1, "betas": (0.8, 0.95)},
}


@pytest.mark.parametrize("name", STATES_OF_TORCH)
@pytest.mark.parametrize("begun", [0, 3])
def test_a_state_of_torchs_optimizer_goes_on(name, begun):
    """Where every step reads every slot, so that both rules are the same."""
    results = []
    for ours in (False, True):
        model = robe.RobeEmbedding(16, DIM, array=an_array(), hash="identity")
        with torch.no_grad():
            model.array.weight[16 * DIM :] = 0  # of no row
        optimizer = getattr(torch.optim, name)(model.parameters(), **STATES_OF_TORCH[name])
        every = [(ids(16, seed=step, high=1) + torch.arange(16),) for step in range(8)]
        train(model, optimizer, every[:begun])
        if ours:
            taken = getattr(robe.optim, name)(model)
            taken.load_state_dict(optimizer.state_dict())
            optimizer = taken
        train(model, optimizer, every[begun:])
        results.append(model.array.weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("SGD", {"momentum": 0.9, "dampening": 0.1}),
        ("SGD", {"maximize": True}),
        ("Adagrad", {"maximize": True}),
        ("Adam", {"amsgrad": True}),
    ],
    ids=str,
)
def test_a_state_of_another_rule_is_refused(name, option):
    model = an_embedding()
    state = getattr(torch.optim, name)(model.parameters(), lr=0.1, **option).state_dict()
    with pytest.raises(ValueError, match=f"^{list(option)[-1]}: expected it off"):
        getattr(robe.optim, name)(model).load_state_dict(state)


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


def test_two_optimizers_of_an_array_both_step_as_in_torch():
    results = []
    for ours in (False, True):
        model = an_embedding()
        parameters = model if ours else model.parameters()
        kinds = (robe.optim.SGD, robe.optim.Adagrad) if ours else (torch.optim.SGD, torch.optim.Adagrad)
        if not ours:
            parameters = list(parameters)
        optimizers = [kind(parameters, lr=0.1) for kind in kinds]
        for (batch,) in steps():
            optimizers[0].zero_grad()
            loss_of(model(batch)).backward()
            for optimizer in optimizers:
                optimizer.step()
        results.append(model.array.weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


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
    assert type(model.array.weight.grad) is SlotGradient
    optimizer.zero_grad()
    del optimizer
    gc.collect()
    model(ids()).square().sum().backward()
    plain = an_embedding()
    plain(ids()).square().sum().backward()
    assert type(model.array.weight.grad) is torch.Tensor
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
        assert type(model.one.array.weight.grad) is SlotGradient
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
