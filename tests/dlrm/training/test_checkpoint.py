"""Checkpoints of training: a run goes on with the same bits, and damaged files are refused by name."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

import robe.optim
import robe_files
from dlrm import DLRM, DLRMConfig, checkpoint
from dlrm.checkpoint import CheckpointError
from dlrm.embeddings import VocabularyTables
from dlrm.training import checkpoint as training_checkpoint
from dlrm.training.checkpoint import TrainingCheckpoints

CONFIG = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=3, hash_seed=7)
DENSE, SPARSE = torch.randn(5, 13), torch.randint(0, 2**32, (5, 2))


def build(embedding):
    config = replace(CONFIG, embedding=embedding)
    if embedding != "full":
        return DLRM(config)
    known = [torch.arange(n) for n in (9, 19)]
    return DLRM(replace(config, vocabulary=True), VocabularyTables(config.table_rows, 4, known))


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def dense_and_sparse(model, dense, sparse):
    tables = list(model.embeddings.parameters())
    rest = [p for p in model.parameters() if all(p is not table for table in tables)]
    return [dense(rest), sparse(tables)]


# name: embedding of the model, its optimizers
OPTIMIZERS = {
    "SGD": ("robe", lambda m: [torch.optim.SGD(m.parameters(), lr=0.1)]),
    "SGD with momentum": ("robe", lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)]),
    "Adagrad": ("full", lambda m: [torch.optim.Adagrad(m.parameters(), lr=0.1)]),
    "Adam": ("robe", lambda m: [torch.optim.Adam(m.parameters(), lr=0.1)]),
    "SparseAdam": ("full", lambda m: dense_and_sparse(m, torch.optim.Adam, torch.optim.SparseAdam)),
    "robe SGD": ("robe", lambda m: with_robe(m, lambda arrays: robe.optim.SGD(arrays, lr=0.1))),
    "robe momentum": ("robe", lambda m: with_robe(m, lambda arrays: robe.optim.SGD(arrays, lr=0.1, momentum=0.9))),
    "robe Adagrad": ("robe", lambda m: with_robe(m, lambda arrays: robe.optim.Adagrad(arrays, lr=0.1))),
    "robe Adam": ("robe", lambda m: with_robe(m, lambda arrays: robe.optim.Adam(arrays, lr=0.1))),
}


def with_robe(model, make):
    rest = [*model.bottom.parameters(), *model.top.parameters()]
    return [torch.optim.Adagrad(rest, lr=0.1), make(model)]


def steps(model, optimizers, count=3):
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(5, 13), torch.randint(0, 2**32, (5, 2))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """Steps 3 and 5 of a run, and its checkpoints."""
    model = build("robe")
    optimizers = OPTIMIZERS["robe Adagrad"][1](model)
    steps(model, optimizers)
    checkpoints = TrainingCheckpoints(tmp_path)
    for step in (3, 5):
        checkpoints.save(step, model, optimizers, {"progress": {"step": step}})
    return checkpoints, model, optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_the_same_bits(tmp_path, name):
    embedding, make = OPTIMIZERS[name]
    torch.sparse.check_sparse_tensor_invariants.disable()
    torch.manual_seed(1)
    model = build(embedding)
    model = model if embedding == "robe" else DLRM(replace(model.config, vocabulary=False))
    optimizers = make(model)
    steps(model, optimizers)
    state = {"progress": {"loss": 0.1, "history": [{"auc": 1 / 3}]}, "path": "ä/b"}
    TrainingCheckpoints(tmp_path).save(7, model, optimizers, state)
    steps(model, optimizers)

    torch.manual_seed(2)
    saved = TrainingCheckpoints(tmp_path).load()
    assert {name: saved.state[name] for name in state} == state
    assert saved.model.config == model.config
    others = make(saved.model)
    saved.restore(others)
    steps(saved.model, others)
    for one, other in zip(model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(optimizers, others, strict=True):
        assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
        torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)


def test_state_of_other_optimizers_is_refused(saved):
    checkpoints, _, _ = saved
    found = checkpoints.load()
    with pytest.raises(
        CheckpointError, match=r"optimizer.safetensors: not the state of these optimizers: they have no"
    ):
        found.restore([torch.optim.SGD(found.model.bottom.parameters())])


@pytest.mark.parametrize("dense_first", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_array_goes_on_with_the_other_kind_of_optimizer(tmp_path, dense_first, steps):
    """As it does when the number of processes changes: torch's on a dense gradient, or robe.optim's."""

    def optimizers(model, dense):
        rest = [*model.bottom.parameters(), *model.top.parameters()]
        if dense:
            return [torch.optim.Adagrad([*rest, *model.embeddings.parameters()], lr=0.1)]
        return [torch.optim.Adagrad(rest, lr=0.1), robe.optim.Adagrad(model.embeddings, lr=0.1)]

    def train(model, optimizers, steps):
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(DENSE, SPARSE).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    models = [build("robe") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    one = optimizers(models[0], dense_first)
    train(models[0], one, steps)
    checkpoints = TrainingCheckpoints(tmp_path)
    checkpoints.save(steps, models[0], one, {})
    found = checkpoints.load()
    other = optimizers(found.model, not dense_first)
    found.restore(other)
    train(found.model, other, 3)
    train(models[1], optimizers(models[1], dense_first), steps + 3)
    for got, expected in zip(found.model.parameters(), models[1].parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_the_last_ones_are_kept(tmp_path):
    model = build("robe")
    for keep in (1, 2, 3):
        (tmp_path / str(keep)).mkdir()
        checkpoints = TrainingCheckpoints(tmp_path / str(keep), keep)
        assert (checkpoints.steps(), checkpoints.load()) == ([], None)
        for step in (0, 4, 10, 200, 1000):
            checkpoints.save(step, model, [], {})
        assert checkpoints.steps() == [4, 10, 200, 1000][4 - keep :]
        assert [path.name for path in checkpoints.folder.iterdir() if not path.name.startswith("step-")] == []
        assert checkpoints.load().path == checkpoints.path(1000)
    # A run that goes on from an earlier one leaves the later ones behind.
    checkpoints.save(50, model, [], {})
    assert checkpoints.steps() == [10, 50]
    checkpoints.remove_after(10)
    assert checkpoints.steps() == [10]
    with pytest.raises(ValueError, match="keep: expected at least 1 checkpoint, got 0"):
        TrainingCheckpoints(tmp_path, 0)


def test_a_checkpoint_of_the_same_step_is_replaced(saved):
    checkpoints, model, optimizers = saved
    checkpoints.save(5, model, optimizers, {"progress": "other"})
    assert checkpoints.load().state["progress"] == "other"
    assert checkpoints.steps() == [3, 5]


def test_a_step_that_is_not_there(saved):
    checkpoints, _, _ = saved
    assert checkpoints.load(3).state["progress"] == {"step": 3}
    with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint of step 4: there are 3, 5$"):
        checkpoints.load(4)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4: there are none"):
        TrainingCheckpoints(checkpoints.folder).load(4)


class Killed(BaseException):
    """Nothing of the program runs after it."""


@pytest.mark.parametrize("calls", range(3))
def test_killed_while_it_saves(saved, monkeypatch, calls):
    """At any of the files: what was there is as it was, and the next save goes well."""
    checkpoints, model, optimizers = saved
    before = {path: path.read_bytes() for path in checkpoints.folder.rglob("*.*")}
    assert len(before) == 6
    rmtree, flushed = shutil.rmtree, []

    def kill(path):
        flushed.append(path)
        if len(flushed) > calls:
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(robe_files, "flush", kill)
        with pytest.raises(Killed):
            checkpoints.save(9, model, optimizers, {})
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert (checkpoints.folder / "unfinished").exists()
    assert checkpoints.steps() == [3, 5]
    assert {path: path.read_bytes() for path in before} == before
    assert checkpoints.load().state["progress"] == {"step": 5}
    checkpoints.save(9, model, optimizers, {})
    assert checkpoints.steps() == [5, 9]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000000005", "step-000000009"]


def test_killed_while_a_checkpoint_is_replaced(saved):
    checkpoints, model, optimizers = saved
    checkpoints.path(5).rename(checkpoints.folder / "replaced-000000005")
    assert checkpoints.steps() == [3, 5]
    assert checkpoints.load().state["progress"] == {"step": 5}
    checkpoints.save(5, model, optimizers, {"progress": "other"})
    assert checkpoints.load().state["progress"] == "other"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000000003", "step-000000005"]


@pytest.mark.parametrize("file", FILES[:2])
def test_a_full_disk_is_named_and_leaves_the_others(saved, monkeypatch, file):
    checkpoints, model, optimizers = saved

    def fail(state, path, metadata=None):
        path.write_bytes(b"half")
        if path.name.startswith(file):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training_checkpoint, "save_file", fail)
        with pytest.raises(OSError, match="No space left") as error:
            checkpoints.save(9, model, optimizers, {})
    assert error.value.filename == str(checkpoints.folder / "unfinished" / file)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000000003", "step-000000005"]
    assert checkpoints.load().state["progress"] == {"step": 5}


@pytest.mark.parametrize("file", FILES)
def test_any_damaged_byte_is_refused(saved, file):
    checkpoints, _, _ = saved
    path = checkpoints.path(5) / file
    whole = path.read_bytes()
    meaning = [i for i, byte in enumerate(whole) if file != "state.json" or not chr(byte).isspace()]
    for place in meaning[:: len(meaning) // 60]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"step-000000005/.*; the one before it: --resume 3$"):
            checkpoints.load()
    path.write_bytes(whole)
    assert checkpoints.load().state["progress"] == {"step": 5}


def test_a_damaged_number_of_the_state_is_refused(saved):
    """What is still JSON of the right form."""
    checkpoints, _, _ = saved
    path = checkpoints.path(5) / "state.json"
    path.write_text(path.read_text().replace('"step": 5', '"step": 4'))
    with pytest.raises(CheckpointError, match=r"state.json: not the state of a training run: damaged"):
        checkpoints.load()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_damaged_files_are_named_and_the_checkpoint_before_offered(saved, file, damage):
    checkpoints, _, _ = saved
    path = checkpoints.path(5) / file
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(CheckpointError) as error:
        checkpoints.load()
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("; the one before it: --resume 3")
    shutil.rmtree(checkpoints.path(3))
    with pytest.raises(CheckpointError, match=r"; there is none before it$"):
        checkpoints.load()


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 2}', '{"version": 1, "model": {}}', "5", "\x00"])
def test_what_is_no_checkpoint_of_training_is_refused(saved, text):
    checkpoints, _, _ = saved
    foreign = checkpoints.folder / "step-000000008"
    foreign.mkdir()
    (checkpoints.folder / "step-9.old").mkdir()
    with pytest.raises(CheckpointError, match=r"step-000000008/state.json: No such file or directory; the one before"):
        checkpoints.load()
    (foreign / "state.json").write_text(text)
    message = "expected version 1, got 2" if "2" in text else ""
    with pytest.raises(CheckpointError, match=f"state.json: not the state of a training run: .*{message}.*resume 5$"):
        checkpoints.load()


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_best_weights_come_back(saved, tmp_path, monkeypatch, links):
    """Those of the time of the checkpoint, also when the run has found better ones since."""
    checkpoints, model, optimizers = saved
    if not links:

        def refuse(*_):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "model.safetensors"
    for step in (7, 8):
        checkpoint.save(tmp_path, build("robe"))
        checkpoints.save(step, model, optimizers, {}, file)
    later = file.read_bytes()
    best = (checkpoints.path(7) / "best.safetensors").read_bytes()
    assert best != later
    checkpoints.load().put_back_best(tmp_path)
    assert file.read_bytes() == later
    checkpoints.load(7).put_back_best(tmp_path)
    assert file.read_bytes() == best
    file.unlink()
    checkpoints.load(7).put_back_best(tmp_path)
    checkpoint.save(tmp_path, build("robe"))
    assert (checkpoints.path(7) / "best.safetensors").read_bytes() == best, "what is linked is not written to"
    (checkpoints.path(7) / "best.safetensors").write_bytes(best[:-1])
    with pytest.raises(CheckpointError, match=r"step-000000007/best.safetensors: damaged"):
        checkpoints.load(7)


def test_restored_tensors_are_copies_where_torch_puts_its_own(saved):
    checkpoints, model, optimizers = saved
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoints.save(9, model, optimizers, {}, averages=averages)
    restored = checkpoints.load()
    optimizers = OPTIMIZERS["robe Adagrad"][1](restored.model)
    restored.restore(optimizers)
    states = [
        x for o in optimizers for state in o.state.values() for x in state.values() if isinstance(x, torch.Tensor)
    ]
    for tensor in [*restored.averages.values(), *restored.model.parameters(), *states]:
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "not a view into the file"
    for name, average in restored.averages.items():
        assert torch.equal(average, averages[name])
