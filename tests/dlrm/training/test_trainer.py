"""The training loop against steps written out by hand, and runs that stop against those that do not."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import dlrm.training.averages
from data.rows import Batch
from dlrm import DLRM, DLRMConfig, TrainingConfig
from dlrm.distributed import World
from dlrm.sparsity import sparsity
from dlrm.training.averages import AveragedWeights
from dlrm.training.checkpoint import TrainingCheckpoints
from dlrm.training.optimizers import make_optimizers
from dlrm.training.trainer import Progress, Stopped, Trainer, TrainingError, train_step

MODEL = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=3)
TRAINING = TrainingConfig(batch_size=16, learning_rate=0.1, optimizer="sgd", epochs=2, evaluations_per_epoch=2)
RNG = np.random.default_rng(0)
ROWS = Batch(
    RNG.normal(size=(70, 13)).astype(np.float32),
    RNG.integers(0, 2**32, (70, 2)),
    RNG.integers(0, 2, 70).astype(np.float32),
)
STEPS = 10  # of two epochs; with evaluations after 3, 5, 8 and 10
TIMES = ("seconds",)


def batches(epoch=0, start=0):
    """Other rows first in every epoch."""
    rows = ROWS[np.roll(np.arange(70), 7 * epoch)]
    return [rows[first : first + 16] for first in range(0, 70, 16)][start:]


def scores(**others):
    return {"auc": 0.5, "log_loss": 1.0, **others}


def trainer(model, config=TRAINING, **options):
    options = {"make_batches": batches, "rows": len(ROWS), "evaluate": scores, "show": False, **options}
    return Trainer(model, config, **options)


def train(model, config=TRAINING, **options):
    run = trainer(model, config, **options)
    run.train()
    return run.progress


def build(embedding="robe"):
    torch.manual_seed(0)
    return DLRM(replace(MODEL, embedding=embedding))


def by_hand(model, optimizer, embedding, rates):
    """Two epochs of torch.optim on a dense gradient, but SparseAdam on tables."""
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[optimizer]
    if optimizer == "adam" and embedding != "robe":
        dense = [*model.bottom.parameters(), *model.top.parameters()]
        optimizers = [(kind(dense), 1), (torch.optim.SparseAdam([model.embeddings.weight]), 3)]
    else:
        optimizers = [(kind(model.parameters()), 1)]
    for rate, batch in zip(rates, batches(0) + batches(1), strict=True):
        model.zero_grad()
        probability = torch.sigmoid(model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)))
        functional.binary_cross_entropy(probability, torch.from_numpy(batch.labels)).backward()
        for o, times in optimizers:
            o.param_groups[0]["lr"] = times * rate
            o.step()


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("embedding", ["robe", "full"])
def test_steps_are_those_of_torch_optim(optimizer, embedding, schedule):
    changes = {"warmup_steps": 4, "decay_start": 6, "decay_steps": 3} if schedule else {}
    rates = [0.25, 0.5, 0.75, 1, 1, 1, 4 / 9, 1 / 9, 1 / 9, 1 / 9] if schedule else [1] * STEPS
    trained, model = build(embedding), build(embedding)
    train(trained, replace(TRAINING, optimizer=optimizer, learning_rate=0.01, **changes))
    if schedule:
        config = replace(TRAINING, **changes)
        rates = [config.rate(step) / config.learning_rate for step in range(1, STEPS + 1)]
        assert len(set(rates)) > 5
    by_hand(model, optimizer, embedding, [0.01 * rate for rate in rates])
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(trained.named_parameters())[name], p, rtol=1e-4, atol=1e-6)


def test_evaluates_evenly_and_keeps_the_best():
    aucs = iter([0.5, 0.7, 0.6, 0.65])
    kept = []
    model = build()
    progress = train(
        model,
        evaluate=lambda: scores(auc=next(aucs), rows=7),
        keep=lambda: kept.append(model.top[0].weight.detach().clone()),
    )
    assert [(h["step"], h["epoch"], h["auc"]) for h in progress.history] == [
        (3, 0.6, 0.5), (5, 1.0, 0.7), (8, 1.6, 0.6), (10, 2.0, 0.65)
    ]  # fmt: skip
    assert progress.best == progress.history[1]
    assert progress.history[0].keys() == {"step", "epoch", "train_loss", "auc", "log_loss"}
    assert len(kept) == 2
    assert not torch.equal(kept[0], kept[1])
    assert progress.seconds > 0


def test_what_is_evaluated_and_kept_is_the_average(monkeypatch):
    """Of the weights after each step in turn, from the first on; the last weights go on training."""
    monkeypatch.setattr(dlrm.training.averages, "AVERAGED_STEPS", 1)
    plain, averaged = build(), build()
    weights = []

    def look():  # before each step
        weights.append(plain.embeddings.array.weight.detach().clone())
        return False

    train(plain, wants_to_stop=look)
    look()
    average, expected = torch.zeros(()), {}
    for step, weight in enumerate(weights[1:], start=1):
        average = average + (weight - average) / min(step, 4)
        expected[step] = average
    evaluated, kept = [], []
    weight = averaged.embeddings.array.weight

    def evaluate():
        evaluated.append(weight.detach().clone())
        return scores(auc=0.5 + 0.1 * len(evaluated))

    train(
        averaged,
        replace(TRAINING, averaging_steps=4),
        evaluate=evaluate,
        keep=lambda: kept.append(weight.detach().clone()),
    )
    for step, seen, saved in zip((3, 5, 8, 10), evaluated, kept, strict=True):
        torch.testing.assert_close(seen, expected[step])
        assert torch.equal(saved, seen)
    assert averaged.embeddings.array.weight is weight
    assert torch.equal(weight, weights[-1])


def test_the_first_of_equal_evaluations_is_the_best():
    kept = []
    assert train(build(), keep=lambda: kept.append(1)).best["step"] == 3
    assert kept == [1]


def test_evaluates_the_model_in_its_own_mode_and_trains_in_training_mode():
    model = build()
    modes = []

    def evaluate():
        modes.append(model.training)
        model.eval()
        return scores()

    train(model, evaluate=evaluate)
    assert modes == [True] * 4


def test_train_loss_is_the_mean_over_the_epoch_so_far():
    model = build()
    expected = []
    with torch.no_grad():
        for batch in batches(0) + batches(1):
            logits = model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse))
            expected.append(functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels)).item())
    history = train(model, replace(TRAINING, learning_rate=1e-12)).history
    means = [np.mean(expected[first:last]) for first, last in ((0, 3), (0, 5), (5, 8), (5, 10))]
    assert [point["train_loss"] for point in history] == pytest.approx(means, rel=1e-5)


def test_learns_a_rule():
    """Labels that are a function of an id are learned to near certainty through the array."""
    rng = np.random.default_rng(1)
    sparse = rng.integers(0, 10, (2000, 2))
    rows = Batch(np.zeros((2000, 13), dtype=np.float32), sparse, (sparse[:, 0] % 2).astype(np.float32))
    torch.manual_seed(0)
    model = DLRM(replace(MODEL, compression=1.5))
    config = TrainingConfig(batch_size=50, learning_rate=0.01, optimizer="adam", epochs=5, evaluations_per_epoch=1)
    progress = train(
        model,
        config,
        make_batches=lambda epoch, start: [rows[a : a + 50] for a in range(50 * start, 2000, 50)],
        rows=2000,
    )
    assert progress.history[-1]["train_loss"] < 0.1


# -- Targets ----------------------------------------------------------------------------------------------------------


def test_the_first_evaluation_above_the_target_ends_training():
    aucs = iter([0.5, 0.7, 0.71])
    config = replace(TRAINING, target_auc=0.7)
    run = trainer(build(), config, evaluate=lambda: scores(auc=next(aucs)))
    assert not run.finished
    run.train()
    assert (run.progress.step, run.reached["step"], run.finished) == (8, 8, True)
    run.train()
    assert run.progress.step == 8
    assert run.trained_rows == 70 + 3 * 16


def test_a_target_that_is_not_reached_lets_training_go_on_to_the_end():
    run = trainer(build(), replace(TRAINING, target_auc=0.5))
    run.train()
    assert (run.progress.step, run.reached) == (STEPS, None)


# -- Stopping and going on --------------------------------------------------------------------------------------------


class Run:
    """A run with its checkpoints, as train.py has it."""

    def __init__(self, folder, embedding, optimizer, stop_at=None, in_evaluation=False, **changes):
        config = replace(TRAINING, optimizer=optimizer, learning_rate=0.01, warmup_steps=7, **changes)
        self.checkpoints = TrainingCheckpoints(folder)
        saved = self.checkpoints.load()
        self.model = saved.model if saved else build(embedding)
        self.optimizers = make_optimizers(self.model, config)
        progress = Progress()
        if saved:
            torch.manual_seed(5)  # of another process
            saved.restore(self.optimizers)
            progress = Progress(**saved.state["progress"])
        self.stop_at, self.in_evaluation = stop_at, in_evaluation
        averages = None
        if config.averaging_steps:
            averages = AveragedWeights(self.model, config.averaging_steps, saved and saved.averages)
        self.trainer = trainer(
            self.model,
            config,
            evaluate=self.evaluate,
            save=self.save,
            wants_to_stop=lambda: self.trainer.progress.step == stop_at and not in_evaluation,
            optimizers=self.optimizers,
            averages=averages,
            progress=progress,
        )

    def evaluate(self):
        if self.in_evaluation and self.trainer.progress.step == self.stop_at:
            raise Stopped
        # Moves torch's generator, and depends on it and on the weights.
        weights = sum(float(p.detach().double().abs().sum()) for p in self.model.parameters())
        return scores(auc=float(torch.rand(())), log_loss=weights)

    def save(self, progress):
        averages = self.trainer.averages.tensors if self.trainer.averages else None
        state = {"progress": asdict(progress)}
        self.checkpoints.save(progress.step, self.model, self.optimizers, state, averages=averages)

    def state(self):
        """All that is to be the same, bit for bit."""
        tensors = {name: x.clone() for name, x in self.model.state_dict().items()}
        for k, optimizer in enumerate(self.optimizers):
            for i, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{k}.{i}.{what}": torch.as_tensor(x) for what, x in values.items() if x is not None}
        if self.trainer.averages:
            tensors |= {f"average {name}": x for name, x in self.trainer.averages.tensors.items()}
        progress = {name: x for name, x in asdict(self.trainer.progress).items() if name not in TIMES}
        return tensors | {"generator": torch.get_rng_state()}, progress


def undisturbed(folder, *which, **changes):
    folder.mkdir()
    run = Run(folder, *which, **changes)
    run.trainer.train()
    return run.state()


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
def test_a_run_that_was_stopped_anywhere_ends_the_same(tmp_path, embedding, optimizer):
    expected = undisturbed(tmp_path / "undisturbed", embedding, optimizer)
    places = [(step, False) for step in range(1, STEPS + 1)] + [(step, True) for step in (3, 5, 8, 10)]
    for step, in_evaluation in places:
        folder = tmp_path / f"{step}-{in_evaluation}"
        folder.mkdir()
        stopped = Run(folder, embedding, optimizer, step, in_evaluation)
        with pytest.raises(Stopped):
            stopped.trainer.train()
        assert stopped.trainer.progress.step == step
        assert stopped.checkpoints.steps()[-1] == step
        gone_on = Run(folder, embedding, optimizer)
        assert gone_on.trainer.progress.step == step
        gone_on.trainer.train()
        assert_same(gone_on.state(), expected)


def test_a_run_stopped_at_every_step_ends_the_same(tmp_path):
    expected = undisturbed(tmp_path / "undisturbed", "robe", "adagrad")
    (tmp_path / "run").mkdir()
    for step in range(1, STEPS + 1):
        with pytest.raises(Stopped):
            Run(tmp_path / "run", "robe", "adagrad", step).trainer.train()
    run = Run(tmp_path / "run", "robe", "adagrad")
    run.trainer.train()
    assert_same(run.state(), expected)


PRUNED = {"prune": 0.5, "prune_block": 4, "prune_schedule": (0.2, 1.1)}  # from step 1 to step 6


@pytest.mark.parametrize("changes", [PRUNED, PRUNED | {"averaging_steps": 3}], ids=["weights", "averages"])
def test_a_pruned_run_that_was_stopped_anywhere_ends_the_same(tmp_path, monkeypatch, changes):
    monkeypatch.setattr("dlrm.training.averages.AVERAGED_STEPS", 2)
    expected = undisturbed(tmp_path / "undisturbed", "robe", "adam", **changes)
    weights = expected[0]["top.0.weight"]
    assert (weights == 0).sum() == weights.numel() / 2
    if "averaging_steps" in changes:
        assert torch.equal(expected[0]["average top.0.weight"] == 0, weights == 0)
    for step in range(1, STEPS + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        with pytest.raises(Stopped):
            Run(folder, "robe", "adam", step, **changes).trainer.train()
        gone_on = Run(folder, "robe", "adam", **changes)
        gone_on.trainer.train()
        assert_same(gone_on.state(), expected)


def test_weights_are_kept_once_they_are_pruned():
    config = replace(TRAINING, **PRUNED, target_auc=0.7)
    aucs, kept, model = iter([0.9, 0.8, 0.6, 0.75]), [], build()  # after steps 3, 5, 8 and 10
    run = trainer(model, config, evaluate=lambda: scores(auc=next(aucs)), keep=lambda: kept.append(sparsity(model.top)))
    run.train()
    assert [point["step"] for point in run.progress.candidates] == [8, 10]
    assert (run.progress.best["step"], run.reached["step"]) == (10, 10)
    assert len(kept) == 2
    assert min(kept) > 0.4, "half, but for the last layer"


def test_pruning_starts_with_sorted_layers_and_their_moments():
    model = build()
    config = replace(TRAINING, optimizer="adam", prune=0.5, prune_block=4, prune_schedule=(0.6, 1.1))
    run = trainer(model, config, wants_to_stop=lambda: run.progress.step == 3)
    with pytest.raises(Stopped):
        run.train()
    twin = trainer(build(), replace(config, prune=0), wants_to_stop=lambda: twin.progress.step == 3)
    with pytest.raises(Stopped):
        twin.train()
    (ours,), (theirs,) = run.optimizers, twin.optimizers
    order = twin.model.top[0].weight.abs().sum(1).argsort(descending=True)
    for one, other, dimension in ((0, 0, 0), (2, 2, 1)):
        ours_p, theirs_p = model.top[one].weight, twin.model.top[other].weight
        assert torch.equal(ours_p, theirs_p.index_select(dimension, order))
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[ours_p][name], theirs.state[theirs_p][name].index_select(dimension, order))


def test_batches_that_were_trained_on_are_not_read_again():
    asked = []

    def make(epoch, start):
        asked.append((epoch, start))
        return batches(epoch, start)

    for step in (2, 5, 7):
        train(build(), make_batches=make, progress=Progress(step=step))
    assert asked == [(0, 2), (1, 0), (1, 0), (1, 2)]


def test_the_reader_is_closed_when_training_stops():
    closed = []

    def make(epoch, start):
        try:
            yield from batches(epoch, start)
        finally:
            closed.append(epoch)

    run = trainer(build(), make_batches=make, wants_to_stop=lambda: True)
    with pytest.raises(Stopped) as error:
        run.train()
    assert closed == [0], error  # which holds the frames


# -- When it saves ----------------------------------------------------------------------------------------------------


def saved_steps(**options):
    steps = []
    run = trainer(build(), save=lambda progress: steps.append(progress.step), **options)
    try:
        run.train()
    except Stopped:
        steps.append("stopped")
    return steps


def test_saves_at_the_start_and_after_evaluations():
    assert saved_steps() == [0, 3, 5, 8, 10]
    assert saved_steps(progress=Progress(step=6)) == [8, 10]


def test_saves_when_the_time_has_passed():
    assert list(dict.fromkeys(saved_steps(checkpoint_seconds=0))) == list(range(STEPS + 1))


def test_saves_once_before_it_stops():
    for stop_at in (2, 3):
        steps = iter(range(1, STEPS))
        saved = saved_steps(wants_to_stop=lambda steps=steps, stop_at=stop_at: next(steps) == stop_at)
        assert saved == [0, stop_at, "stopped"]


def test_seconds_are_those_of_the_steps(monkeypatch):
    """By a clock that a step moves by a second, an evaluation by 100, saving by 10,000."""
    now = [0.0]
    monkeypatch.setattr("dlrm.training.trainer.time.perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    def make(epoch, start):
        for batch in batches(epoch, start):
            pass_by(1)
            yield batch

    options = {
        "make_batches": make,
        "evaluate": lambda: pass_by(100) or scores(),
        "keep": lambda: pass_by(1000),
        "save": lambda progress: pass_by(10_000),
    }
    assert train(build(), **options).seconds == STEPS
    assert train(build(), **options, checkpoint_seconds=0).seconds == STEPS
    assert train(build(), **options, progress=Progress(step=4, seconds=4.0)).seconds == STEPS


def test_progress_survives_json():
    progress = train(build())
    assert Progress(**json.loads(json.dumps(asdict(progress)))) == progress


# -- Divergence -------------------------------------------------------------------------------------------------------


def only_finite(model):
    def save(progress):
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        save.steps.append(progress.step)

    save.steps = []
    return save


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training(value):
    model = build()
    broken = batches(1)
    broken[1] = Batch(np.full_like(broken[1].dense, value), broken[1].sparse, broken[1].labels)
    save = only_finite(model)
    with pytest.raises(
        TrainingError, match=r"^the loss is (nan|inf) at step 7 \(batch 2 of epoch 2\); a lower learning rate than 0.1 "
    ) as error:
        train(model, make_batches=lambda e, start: (broken if e else batches(e))[start:], save=save)
    assert error.value.exit_code == 3
    assert save.steps == [0, 3, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 4], ids=["evaluation", "checkpoint"])
def test_a_weight_that_is_not_finite_ends_training_and_is_not_saved(value, at):
    model = build()
    save, kept = only_finite(model), []

    def wants_to_stop():
        if run.progress.step == at:
            # After the loss of this step was computed, as a step of the optimizer would.
            optimizer = run.optimizers[0]
            step = optimizer.step

            def spoiling():
                step()
                model.top[-1].bias.data.fill_(value)

            optimizer.step = spoiling
        return run.progress.step == at

    run = trainer(model, save=save, keep=lambda: kept.append(1), wants_to_stop=wants_to_stop)
    place = rf"a weight is NaN or infinite at step {at} \(batch {at} of epoch 1\)"
    with pytest.raises(TrainingError, match=place):
        run.train()
    assert at not in save.steps
    assert len(kept) == (at > 3)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"interaction": "cross", "cross_rank": 4}, {"hots": (2, 1)}, {"synthetic_hots": True, "hots": (2, 3)}]
    + [{"admission_bytes": 64}],
    ids=str,
)
def test_a_step_stays_on_the_device_and_waits_for_nothing_there(optimizer, changes):
    """The meta device has no values to read back, and refuses tensors of other devices, as a GPU does."""
    model = DLRM(replace(MODEL, **changes)).to("meta")
    optimizers = make_optimizers(model, replace(TRAINING, optimizer=optimizer))
    batch = ROWS[:16]
    if "hots" in changes and "synthetic_hots" not in changes:
        batch = Batch(batch.dense, np.repeat(batch.sparse, changes["hots"], axis=1), batch.labels)
    numbers = train_step(model, optimizers, batch, World("meta"))
    AveragedWeights(model, 10).update(8)
    assert (numbers.shape, numbers.device.type) == ((2,), "meta")
