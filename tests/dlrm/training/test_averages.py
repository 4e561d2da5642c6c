"""Averaged weights against the recurrence written out."""

from contextlib import suppress

import pytest
import torch

from dlrm.training.averages import AVERAGED_STEPS, AveragedWeights


def a_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)


def test_averages_follow_the_recurrence():
    model = a_model()
    averages = AveragedWeights(model, 4 * AVERAGED_STEPS)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 10 * AVERAGED_STEPS + 1):
        move(model)
        averages.update(step)
        if step % AVERAGED_STEPS == 0:
            weight = AVERAGED_STEPS / min(step, 4 * AVERAGED_STEPS)
            for name, p in model.named_parameters():
                expected[name] += weight * (p.detach() - expected[name])
        torch.testing.assert_close(averages.tensors, expected)


def test_the_first_update_takes_the_weights_as_they_are():
    model = a_model()
    averages = AveragedWeights(model, 3)  # fewer than the steps between updates
    move(model)
    averages.update(AVERAGED_STEPS)
    assert all(torch.equal(averages.tensors[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_has_the_averages_within_the_statement_only(fails):
    model = a_model()
    averages = AveragedWeights(model, 10)
    before = {name: x.clone() for name, x in averages.tensors.items()}
    move(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with suppress(ZeroDivisionError), averages.in_the_model():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        if fails:
            raise ZeroDivisionError
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(averages.tensors[name], x) for name, x in before.items())


def test_averages_go_on_from_those_that_were_saved():
    model = a_model()
    saved = {name: torch.full_like(p, 7.0) for name, p in reversed(list(model.named_parameters()))}
    averages = AveragedWeights(model, 2 * AVERAGED_STEPS, saved)
    assert list(averages.tensors) == [name for name, _ in model.named_parameters()]
    averages.update(2 * AVERAGED_STEPS)
    for name, p in model.named_parameters():
        torch.testing.assert_close(averages.tensors[name], (7.0 + p.detach()) / 2)
