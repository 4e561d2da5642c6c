"""The parts that kernels share: tiles of long embeddings, and the assertions on ids, offsets and tables."""

import pytest
import torch

from robe.ops import POOLINGS, REFERENCE
from tests.helpers.problems import Problem, assert_close
from tests.helpers.triton_bodies import KERNELS, summed

# isort: split
from triton.runtime import interpreter

from robe.triton_kernels import device


def test_this_file_runs_the_interpreter():
    assert isinstance(device.tile, interpreter.InterpretedFunction)


@pytest.fixture
def assertions(monkeypatch):
    """The interpreter leaves assertions out, whatever a kernel's options say."""
    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.mark.usefixtures("assertions")
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("hash", ["mix", "identity"])
def test_an_id_out_of_range_trips_an_assertion(bad, hash):
    problem = Problem([50], hash=hash, padding_idx=-7)
    arguments = problem.lookup(4)
    KERNELS["lookup"](*arguments)
    arguments[1][2] = bad
    with pytest.raises(Exception, match="index out of range: an id is not below num_embeddings of its table"):
        KERNELS["lookup"](*arguments)
    weight, values, *rest = problem.bag(4, "sum")
    KERNELS["bag"](weight, values, *rest)
    values[0] = bad
    with pytest.raises(Exception, match="index out of range"):
        KERNELS["bag"](weight, values, *rest)


@pytest.mark.usefixtures("assertions")
@pytest.mark.parametrize("offsets", [[1, 2, 3], [0, 3, 2], [0, 2, 6], [0, -1, 3]])
def test_offsets_that_do_not_rise_trip_an_assertion(offsets):
    weight, _, _, *rest = Problem([50]).bag(2, "sum")
    KERNELS["bag"](weight, torch.arange(5), torch.tensor([0, 3, 5]), *rest)
    with pytest.raises(Exception, match="offsets: expected to rise from 0 to at most the number of values"):
        KERNELS["bag"](weight, torch.arange(5), torch.tensor(offsets), *rest)


@pytest.mark.usefixtures("assertions")
@pytest.mark.parametrize(("key", "rows"), [(-8, 50), (3, 50), (8 * 990, 50), (0, 0)])
def test_a_table_beside_the_array_trips_an_assertion_and_is_not_touched(key, rows, monkeypatch):
    problem = Problem([50], hash="identity")
    weight, ids, _, _, *layout = problem.lookup(4)
    arguments = weight, ids, torch.tensor([key]), torch.tensor([rows]), *layout
    with pytest.raises(Exception, match="a table does not lie within the array, at a multiple of D"):
        KERNELS["lookup"](*arguments)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=False))
    assert not KERNELS["lookup"](*arguments).any()
    assert not KERNELS["lookup_backward"](problem.grad(4), *arguments).any()


@pytest.mark.parametrize("pooling", ["one", *POOLINGS])
@pytest.mark.parametrize("block", [1, 1500, 5000])
def test_rows_of_thousands_of_components(pooling, block):
    """More than a program reads at a time, in blocks or within one."""
    problem = Problem([30, 0], size=7000, dim=3000, block=block, sign=True, padding_idx=2, wide=False)
    name = "lookup" if pooling == "one" else "bag"
    arguments = problem.lookup(2) if pooling == "one" else problem.bag(2, pooling, longest=3)
    assert_close(KERNELS[name](*arguments), REFERENCE[name](*arguments))
    arguments = problem.grad(2), *arguments
    want = REFERENCE[f"{name}_backward"](*arguments)
    for run in (None, 64):
        with summed(run):
            assert_close(KERNELS[f"{name}_backward"](*arguments), want)
