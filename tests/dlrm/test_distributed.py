"""Several processes against one that does all of it.

Starting processes takes seconds, so those of a size are started once, do all there is to do, and the tests look at what
they made of it.
"""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import robe
from data.batches import share
from data.rows import Batch
from dlrm import DLRM, DLRMConfig, TrainingConfig
from dlrm.distributed import PeerFailed, World
from dlrm.metrics import evaluate
from dlrm.training.trainer import Stopped, Trainer
from tests.helpers.processes import in_processes

ROOT = Path(__file__).parents[2]
ALONE = World()


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    return in_processes((2, 3), everything, tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def found(request, found_by):
    """What ``everything`` returned in each of so many processes."""
    return found_by[request.param]


@pytest.fixture(scope="module")
def alone():
    return {name: work(ALONE) for name, work in SHARED.items()}


def everything(world):
    return {work.__name__: work(world) for work in OF_PROCESSES} | {name: work(world) for name, work in SHARED.items()}


def outcome(call):
    """What it returned or raised."""
    try:
        return call()
    except (PeerFailed, ValueError, RuntimeError) as error:
        return type(error).__name__, str(error), getattr(error, "exit_code", None)


# ---------------------------------------------------------------------------------------------------------------------
# Messages


class Odd(RuntimeError):
    exit_code = 7


def fail(error):
    raise error


def answers(world):
    calls = []

    def note():
        calls.append(world.rank)
        return world.rank

    made = {
        "value": world.first(lambda: {"rank": world.rank, "list": [1, 2]}),
        "none": world.first(lambda: None),
        "error": outcome(lambda: world.first(lambda: fail(ValueError("bad data")))),
        "code": outcome(lambda: world.first(lambda: fail(Odd("odd")))),
        "each": world.each(note),
        "calls": list(calls),
        "each, error": outcome(lambda: world.each(lambda: fail(ValueError(f"of {note()}")))),
        "all calls": calls,
        "after": world.first(lambda: 5),
    }
    rows = world.gather_in_first(torch.full((world.rank * 2, 3), world.rank, dtype=torch.int64))
    nothing = world.gather_in_first(torch.empty(0, 2))
    model = nn.BatchNorm1d(3)
    with torch.no_grad():
        for i, tensor in enumerate((*model.parameters(), *model.buffers())):
            tensor.fill_(10 * world.rank + i)
    world.same_weights(model)
    return made, rows, nothing, [tensor.flatten()[0].item() for tensor in model.state_dict().values()]


def test_what_the_first_process_says(found):
    for rank, of_process in enumerate(found):
        made = of_process["answers"][0]
        assert made["value"] == {"rank": 0, "list": [1, 2]}
        assert made["none"] is None
        assert made["error"] == (("PeerFailed", "", 2) if rank else ("ValueError", "bad data", None))
        assert made["code"] == (("PeerFailed", "", 7) if rank else ("Odd", "odd", 7))
        assert made["each"] == rank
        assert made["calls"] == [rank]
        assert made["each, error"] == (("PeerFailed", "", 2) if rank else ("ValueError", "of 0", None))
        assert made["all calls"] == [rank] + [0] * (rank == 0), "the others don't try what failed"
        assert made["after"] == 5


def test_rows_of_all_are_gathered_in_the_first(found):
    _, rows, nothing, _ = found[0]["answers"]
    assert rows.tolist() == [[rank] * 3 for rank in range(len(found)) for _ in range(2 * rank)]
    assert nothing.shape == (0, 2)
    assert all(of_process["answers"][1] is of_process["answers"][2] is None for of_process in found[1:])


def test_weights_and_buffers_of_the_first_are_given_to_all(found):
    assert all(of_process["answers"][3] == [0, 1, 2, 3, 4] for of_process in found)


def test_a_world_of_one_passes_everything_through():
    assert ALONE.first(lambda: 3) == ALONE.each(lambda: 3) == 3
    assert ALONE.gather_in_first(tensor := torch.ones(2)) is tensor
    assert ALONE.average_gradients([], tensor) is tensor
    with pytest.raises(ValueError, match="bad"):
        ALONE.first(lambda: fail(ValueError("bad")))


def gradients_of(rank):
    torch.manual_seed(rank)
    table = torch.sparse_coo_tensor(
        torch.randint(0, 5, (1, 3 * rank)), torch.randn(3 * rank, 2), (5, 2), check_invariants=True
    )
    return {"dense": torch.randn(4, 3), "table": table, "vector": torch.randn(7), "none": None}


def averaged(world):
    parameters = {
        name: nn.Parameter(torch.zeros(shape))
        for name, shape in {"dense": (4, 3), "table": (5, 2), "vector": (7,), "none": (2,)}.items()
    }
    for name, gradient in gradients_of(world.rank).items():
        parameters[name].grad = gradient
    sums = world.average_gradients(iter(parameters.values()), torch.tensor([0.25, world.rank + 1.0]))
    assert parameters["table"].grad.is_sparse
    assert parameters["none"].grad is None
    return {name: p.grad.to_dense() for name, p in parameters.items() if name != "none"}, sums


def test_gradients_are_averaged_and_numbers_summed(found):
    size = len(found)
    of_ranks = [gradients_of(rank) for rank in range(size)]
    for of_process in found:
        averages, sums = of_process["averaged"]
        assert sums.tolist() == [0.25 * size, size * (size + 1) / 2]
        for name, average in averages.items():
            torch.testing.assert_close(average, sum(g[name].to_dense() for g in of_ranks) / size)
            assert torch.equal(average, found[0]["averaged"][0][name]), "the same bits everywhere"


# ---------------------------------------------------------------------------------------------------------------------
# Scores


class Logit(nn.Module):
    """The first dense value."""

    def forward(self, dense, sparse):
        return dense[:, 0]


def labelled(rows, labels=None):
    rng = np.random.default_rng(rows)
    dense = rng.normal(size=(rows, 13)).round(1).astype(np.float32)  # some are equal, which counts half in an AUC
    if labels is None:
        labels = rng.random(rows) < 1 / (1 + np.exp(-dense[:, 0]))
    return Batch(dense, np.zeros((rows, 2), np.int64), np.broadcast_to(labels, rows).astype(np.float32))


def scores(world):
    def of(rows):
        own = share(range(len(rows)), world.rank, world.size)
        parts = [rows[at : min(at + 7, own.stop)] for at in range(own.start, own.stop, 7)]
        found = outcome(lambda: evaluate(Logit(), parts, world))
        if isinstance(found, dict):
            assert found.pop("seconds") > 0
        return found

    made = {rows: of(labelled(rows)) for rows in (2, 101, 1000)}
    made[2] = of(labelled(2, [0, 1]))  # fewer rows than processes
    broken = labelled(9)
    broken.dense[:] = np.nan
    made[9] = of(labelled(9, 1))  # of one label, which has no AUC
    return made, [of(labelled(0)), of(broken)]


def test_scores_are_those_of_one_process(found, alone):
    for of_process in found:
        for rows, expected in alone["scores"][0].items():
            assert of_process["scores"][0][rows] == expected
            assert expected["rows"] == rows


def test_what_has_no_score_is_refused_by_all(found, alone):
    for rank, of_process in enumerate(found):
        for got, expected in zip(of_process["scores"][1], alone["scores"][1], strict=True):
            assert expected[0] == "ValueError"
            assert got == (("PeerFailed", "", 2) if rank else expected)


# ---------------------------------------------------------------------------------------------------------------------
# robe.optim: every process has its rows of a batch


OPTIMIZERS = {
    "SGD": (robe.optim.SGD, {"lr": 0.3}),
    "SGD, momentum": (robe.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "Adagrad": (robe.optim.Adagrad, {"lr": 0.2, "lr_decay": 0.1}),
    "Adam": (robe.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95)}),
}
SIZE, DIM, STEPS = 97, 6, 3
LAYERS = ("lookup", "several ids", "sum", "mean", "max", "weighted", "collection", "one array", "calls")


def inputs_of(kind, rows, seed):
    """For each row of a batch, a list of (id, factor)."""
    rng = np.random.default_rng(seed)
    length = {"lookup": 1, "several ids": 3, "calls": 1}.get(kind)
    lengths = rng.integers(0, 5, rows) if length is None else [length] * rows
    return [[(int(rng.integers(0, 30)), float(rng.normal())) for _ in range(n)] for n in lengths]


def a_layer(kind, dtype):
    torch.manual_seed(3)
    array = robe.RobeArray(SIZE, init_std=1.0, dtype=dtype)
    options = {"array": array, "block_size": 4, "sign": True}
    if kind in ("lookup", "several ids", "calls"):
        return array, robe.RobeEmbedding(30, DIM, padding_idx=2, **options)
    if kind == "collection":
        tables = [robe.EmbeddingBagConfig(name, 30, DIM) for name in "ab"]
        return array, robe.RobeEmbeddingBagCollection(tables, array=array, block_size=4)
    if kind == "one array":
        bag = robe.RobeEmbeddingBag(30, DIM, mode="mean", table_id=1, **options)
        return array, nn.ModuleList([robe.RobeEmbedding(30, DIM, table_id=0, **options), bag])
    mode = "sum" if kind == "weighted" else kind
    return array, robe.RobeEmbeddingBag(30, DIM, mode=mode, padding_idx=2, **options)


def outputs(kind, layer, part, dtype):
    """(n, ...): of the rows of a part of a batch."""
    ids = torch.tensor([x for row in part for x, _ in row], dtype=torch.int64)
    ends = np.cumsum([0] + [len(row) for row in part])
    if kind in ("lookup", "calls"):
        return layer(ids)
    if kind == "several ids":
        return layer(ids.view(-1, 3))
    if kind == "collection":  # the second feature has the ids of the first, backwards
        behind = [row[::-1] for row in part]
        values = torch.cat([ids, torch.tensor([x for row in behind for x, _ in row], dtype=torch.int64)])
        return layer(values, torch.from_numpy(np.concatenate([ends, ends[-1] + ends[1:]])))
    offsets = torch.from_numpy(ends[:-1])
    if kind == "one array":
        return layer[0](torch.tensor([len(row) for row in part], dtype=torch.int64)) + layer[1](ids, offsets)
    factors = torch.tensor([x for row in part for _, x in row], dtype=dtype) if kind == "weighted" else None
    return layer(ids, offsets, factors)


def trained_array(world, kind, name, dtype):
    array, layer = a_layer(kind, dtype)
    make, options = OPTIMIZERS[name]
    optimizer = make(layer, process_group=world.group, **options)
    for step in range(STEPS):
        rows = (11, 1, 8)[step]  # 1: fewer than processes, some have an empty part
        optimizer.zero_grad()
        for call in range(2 if kind == "calls" else 1):
            whole = inputs_of(kind, rows, 10 * step + call)
            own = share(range(rows), world.rank, world.size)
            output = outputs(kind, layer, [whole[i] for i in own], dtype)
            # Of each row another gradient, that depends on the values.
            weights = torch.linspace(-1, 2, rows, dtype=dtype)[own.start : own.stop].view(-1, *[1] * (output.dim() - 1))
            loss = (output * weights).sum() + output.square().sum() / 2
            (loss * world.size / rows).backward()
        optimizer.step()
        if step == 0:  # of a saved state, all but the processes
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = {k: v for k, v in optimizer.state[array.weight].items() if isinstance(v, torch.Tensor)}
    return {"weight": array.weight.detach(), **state}


def arrays(world):
    cases = [(kind, name, torch.float64) for kind in LAYERS for name in OPTIMIZERS]
    cases += [(kind, "SGD", torch.float32) for kind in LAYERS] + [("lookup", "Adagrad", torch.bfloat16)]
    return {case: trained_array(world, *case) for case in cases}


def test_arrays_are_trained_as_by_one_process_on_the_whole_batch(found, alone):
    for case, expected in alone["arrays"].items():
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case[2]]
        start = a_layer(case[0], case[2])[0].weight
        assert (expected["weight"] - start).abs().max() > 0.05
        got = found[0]["arrays"][case]
        assert got.keys() == expected.keys()
        for what, value in got.items():
            where = f"{case}, {what}"
            torch.testing.assert_close({where: value}, {where: expected[what]}, rtol=tolerance, atol=tolerance)


def test_two_processes_sum_in_the_order_of_one(found_by, alone):
    """Of one layer and call: halves are exact, and parts of a batch come one behind the other, as its rows do."""
    for case, expected in alone["arrays"].items():
        if case[0] not in ("collection", "one array", "calls"):
            got = found_by[2][0]["arrays"][case]
            assert all(torch.equal(got[what], value) for what, value in expected.items()), case


def test_every_process_has_the_same_bits(found):
    for of_process in found[1:]:
        for case, tensors in found[0]["arrays"].items():
            assert all(torch.equal(of_process["arrays"][case][what], value) for what, value in tensors.items()), case


def clipped(world, name="SGD"):
    """Norms, weights and what is said without synchronize, of steps with clipped gradients."""
    array, layer = a_layer("one array", torch.float64)
    make, options = OPTIMIZERS[name]
    optimizer = make(layer, process_group=world.group, **options)
    norms, said = [], None
    for step in range(STEPS):
        optimizer.zero_grad()
        whole = inputs_of("sum", 8, step)
        own = share(range(8), world.rank, world.size)
        output = outputs("one array", layer, [whole[i] for i in own], torch.float64)
        (output.square().sum() * world.size / 8).backward()
        if world.size > 1 and step == 0:
            said = [outcome(partial(read, array.weight.grad)) for read in (torch.norm, torch.isfinite)]
        optimizer.synchronize()
        norms.append(nn.utils.clip_grad_norm_(layer.parameters(), 0.5))
        optimizer.step()
    return torch.stack(norms), array.weight.detach(), said


def test_synchronized_gradients_are_clipped_as_by_one_process(found, alone):
    norms, weight, _ = alone["clipped"]
    assert (norms > 0.5).all()
    for of_process in found:
        torch.testing.assert_close(of_process["clipped"][:2], (norms, weight), rtol=1e-12, atol=1e-12)
    for kind, message, _ in found[0]["clipped"][2]:
        assert kind == "RuntimeError"
        assert "synchronize()" in message


def copies(world):
    """Copies of an optimizer are of no process group: what they were copied for may have none."""
    optimizer = robe.optim.SGD(robe.RobeArray(9), process_group=world.group)
    copied = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    return optimizer._process_group is world.group, [of._process_group for of in copied]


def test_copies_of_an_optimizer_have_no_processes(found):
    assert all(of_process["copies"] == (True, [None, None]) for of_process in found)


# ---------------------------------------------------------------------------------------------------------------------
# Training


MODEL = DLRMConfig(
    embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=None, robe_size=97
)
SMALL_ARRAY, LARGE_ARRAY = {"robe_size": 40}, {"robe_size": 400}
HASH = {"embedding": "hash", "robe_size": None, "compression": 2.0}
FULL = {"embedding": "full", "robe_size": None}
RUNS = {
    "sgd, gathered": ("sgd", 0.5, LARGE_ARRAY),
    "sgd, dense": ("sgd", 0.5, SMALL_ARRAY),
    "sgd, full": ("sgd", 0.5, FULL),
    "sgd, hash, several ids": ("sgd", 0.5, HASH | {"hots": (2, 3)}),
    "adagrad, gathered": ("adagrad", 0.05, LARGE_ARRAY),
    "adagrad, gathered, several ids, cross net": (
        "adagrad", 0.05, {"robe_size": 600, "hots": (2, 3), "interaction": "cross", "cross_rank": 2}
    ),
    "adagrad, dense": ("adagrad", 0.05, SMALL_ARRAY),
    "adagrad, full": ("adagrad", 0.05, FULL),
    "adam, dense": ("adam", 0.01, LARGE_ARRAY),
    "adam, hash": ("adam", 0.01, HASH),
    "adam, pruned": ("adam", 0.01, LARGE_ARRAY | {"interaction": "cross", "cross_rank": 2}),
}  # fmt: skip
BATCH, ROWS = 16, 65  # the last batch is one row: other processes have none


def training_rows(hots):
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 2**32, (ROWS, sum(hots or (1, 1))))
    labels = (rng.random(ROWS) < 0.5).astype(np.float32)
    return Batch(rng.normal(size=(ROWS, 13)).astype(np.float32), ids, labels)


def a_trainer(world, name, **options):
    optimizer, rate, changes = RUNS[name]
    rows = training_rows(changes.get("hots"))
    torch.manual_seed(world.rank)  # other values in each
    model = DLRM(replace(MODEL, **changes))
    if world.rank == 0:
        torch.manual_seed(5)
    model = DLRM(replace(MODEL, **changes))
    world.same_weights(model)

    def batches(epoch, start):
        for at in range(start * BATCH, ROWS, BATCH):
            part = range(at, min(at + BATCH, ROWS))
            own = share(part, world.rank, world.size)
            yield rows[own.start : own.stop]

    def validate():
        own = share(range(ROWS), world.rank, world.size)
        return evaluate(model, [rows[own.start : own.stop]], world)

    config = TrainingConfig(
        BATCH,
        rate,
        optimizer,
        3,
        evaluations_per_epoch=-(-ROWS // BATCH),
        warmup_steps=3,
        decay_start=6,
        decay_steps=30,
        prune=0.5 if "pruned" in name else 0.0,
        prune_block=4,
    )
    return Trainer(model, config, batches, ROWS, validate, world=world, show=False, **options)


def trainings(world):
    found = {}
    for name in RUNS:
        trainer = a_trainer(world, name)
        trainer.train()
        touched = any(isinstance(o, robe.optim.SGD | robe.optim.Adagrad) for o in trainer.optimizers)
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        found[name] = {"history": trainer.progress.history, "touched": touched, "weights": weights}
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_curve_is_that_of_one_process(found, alone, name):
    """But for rounding, that grows with the steps; of parts that are smaller than a batch, other sums are taken."""
    expected, got = alone["trainings"][name], found[0]["trainings"][name]
    assert got["touched"] == ("gathered" in name)
    assert expected["touched"] == (
        name.startswith(("sgd, gathered", "sgd, dense", "adagrad, gathered", "adagrad, dense"))
    )
    assert len(got["history"]) == len(expected["history"]) == 15
    # Where two predictions are equal but for rounding, AUC moves by their pair, one of 2,072, and no less.
    for what, tolerance, at_first in (("train_loss", 1e-6, 1e-6), ("log_loss", 1e-6, 1e-6), ("auc", 2e-3, 1.01 / 2072)):
        curves = [[point[what] for point in run["history"]] for run in (got, expected)]
        assert np.ptp(curves[1]) > 0.01, "it does train"
        np.testing.assert_allclose(*curves, rtol=0, atol=tolerance)
        np.testing.assert_allclose(curves[0][:5], curves[1][:5], rtol=0, atol=at_first)
    for part, value in got["weights"].items():
        torch.testing.assert_close(value, expected["weights"][part], rtol=1e-5, atol=2e-6)


def test_every_process_trains_the_same_model(found):
    for of_process in found[1:]:
        for name, run in of_process["trainings"].items():
            first = found[0]["trainings"][name]
            assert run["history"] == first["history"]
            assert all(torch.equal(value, first["weights"][part]) for part, value in run["weights"].items()), name


def stops(world):
    """One process is told to stop after 7 steps."""
    saved, kept = [], []
    trainer = a_trainer(
        world,
        "sgd, gathered",
        save=lambda progress: saved.append(progress.step),
        keep=lambda: kept.append(True),
        wants_to_stop=lambda: trainer.progress.step == 7 and world.rank == world.size - 1,
    )
    with pytest.raises(Stopped):
        trainer.train()
    return trainer.progress.step, saved, len(kept)


def test_one_process_stops_all_and_the_first_saves(found):
    steps, saved, kept = zip(*(of_process["stops"] for of_process in found))
    assert set(steps) == {7}
    assert saved[0][-1] == 7
    assert kept[0] > 0
    assert not any(saved[1:])
    assert not any(kept[1:])


def failures(world):
    trainer = a_trainer(world, "sgd, full")

    def spoil(progress):
        with torch.no_grad():
            trainer.model.top[0].bias.fill_(float("nan"))

    trainer.save = spoil  # in the first process alone: the loss of the others is finite, that of all is not
    return outcome(trainer.train)


def test_a_loss_that_is_not_finite_ends_all(found):
    kinds, texts, codes = zip(*(of_process["failures"] for of_process in found))
    assert set(codes) == {3}
    assert "the loss is nan at step 1 (batch 1 of epoch 1)" in texts[0]
    assert kinds[0] == "TrainingError"


OF_PROCESSES = (answers, averaged, copies, stops, failures)
SHARED = {"scores": scores, "arrays": arrays, "trainings": trainings, "clipped": clipped}


@pytest.mark.parametrize(("processes", "printed"), [(1, "said\nended\n"), (2, "said\n")])
def test_processes_of_several_leave_at_once(processes, printed):
    code = "import atexit; from dlrm.distributed import leave; atexit.register(print, 'ended'); print('said'); leave(3)"
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (got.returncode, got.stdout) == (3, printed)
