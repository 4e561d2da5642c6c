"""Threads that change the array, the ids or the tables while operators read: a wrong gradient, never a wrong write.

As in training on one array from several threads (Hogwild), or with a loader that fills the same buffer of ids again.
Whether a write was wrong is for AddressSanitizer to say (`make test-sanitized`).
"""

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from robe.ops import REFERENCE
from robe.ops.layout import UpdateLists, unpack_bag_backward, unpack_lookup_backward
from tests.helpers.kernels import machine, needs_kernels
from tests.helpers.native import native, native_update
from tests.helpers.problems import Problem

SECONDS = 0.4


@contextmanager
def changing(change):
    """Call ``change`` again and again in a thread of its own."""
    stop = threading.Event()

    def run():
        while not stop.is_set():
            change()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run_for(seconds, call):
    """Call again and again; ids that are outside their table at that moment are refused."""
    end, calls = time.monotonic() + seconds, 0
    while time.monotonic() < end or not calls:
        try:
            call()
        except IndexError as error:
            assert str(error).startswith("index out of range: ")  # noqa: PT017  (only where the race made one)
        calls += 1


def backwards(problem, mode, batch=64):
    """The backward operators and update_ of one call, and its arguments from the weight on."""
    grad = problem.grad(batch)
    if mode == "one":
        arguments, name = problem.lookup(batch), "lookup_backward"
        call = unpack_lookup_backward(arguments[1:])
    else:
        arguments, name = problem.bag(batch, mode, longest=20), "bag_backward"
        call = unpack_bag_backward(arguments[1:])
    lists = UpdateLists.pack([(grad, call)])
    weight, momentum = problem.weight.clone(), torch.zeros_like(problem.weight)
    run = [
        lambda: native(name, grad, *arguments),
        lambda: native_update(weight, [momentum], "sgd", [0.0, 0.0, 0.9, 0.0, 0.0], *lists),
    ]
    return run, name, grad, arguments


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_may_change_while_the_largest_are_found(threads):
    problem = Problem([0], size=4096, dim=64, block=64)
    (backward, _), name, grad, arguments = backwards(problem, "max")
    numbers = torch.Generator().manual_seed(1)
    before = problem.weight.clone()
    with machine(threads=threads):
        with changing(lambda: problem.weight.normal_(generator=numbers)):
            run_for(SECONDS, backward)
        problem.weight.copy_(before)
        assert torch.equal(native(name, grad, *arguments), REFERENCE[name](grad, *arguments))


@needs_kernels
@pytest.mark.parametrize("hash", ["mix", "identity"])
@pytest.mark.parametrize("mode", ["one", "sum", "mean", "max"])
def test_ids_may_change_while_they_are_read(hash, mode):
    rows = [50, 70]
    problem = Problem(rows, size=2000, dim=16, block=16, hash=hash, padding_idx=3)
    run, name, grad, arguments = backwards(problem, mode)
    ids = arguments[1]
    before, outside, padding = ids.clone(), torch.full_like(ids, 2**40), torch.full_like(ids, 3)

    def change():
        for values in (outside, before, padding, before.flip(0)):
            ids.copy_(values)

    with changing(change):
        for call in run:
            run_for(SECONDS / 2, call)
    ids.copy_(before)
    want = REFERENCE[name](grad, *arguments)
    got = native(name, grad, *arguments)
    assert torch.equal(got, want) if mode != "mean" else torch.allclose(got, want, atol=1e-4)


@needs_kernels
def test_tables_with_slots_of_their_own_may_change_while_they_are_read():
    """Keys and bounds are addresses there. A call that finds them outside the array refuses them."""
    problem = Problem([50, 70], dim=16, hash="identity")
    weight, ids, keys, bounds, *rest = problem.lookup(64)
    far, good = torch.tensor([2**40, 2**40]), keys.clone()

    def change():
        keys.copy_(far)
        bounds.copy_(far)
        keys.copy_(good)
        bounds.copy_(torch.tensor(problem.rows))

    def call():
        try:
            native("lookup", weight, ids, keys, bounds, *rest)
            native("lookup_backward", problem.grad(64), weight, ids, keys, bounds, *rest)
        except ValueError as error:
            assert "does not lie within the array" in str(error)  # noqa: PT017

    with changing(change):
        run_for(SECONDS, call)
