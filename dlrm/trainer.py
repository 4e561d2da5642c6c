"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import robe.optim
from dlrm.config import TrainingConfig
from dlrm.embeddings import Tables
from robe import RobeArray

# Adam goes on moving a row by its momentum in the steps after it was read; SparseAdam does not, and needs larger steps
# to get as far: see docs/accuracy.md.
SPARSE_ADAM_RATE = 3
_STEPS_A_LOOK = 20  # steps between readings of the loss; each reading waits for the device


class TrainingError(RuntimeError):
    """Training can't go on; what was kept so far is still good."""

    exit_code = 3  # of a program that ends with it


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a config.

    Tables have sparse gradients, for which Adam is a class of its own (SparseAdam). ROBE arrays are updated by
    robe.optim, which never builds their dense gradient; but with Adam, whose moments go on moving weights that are not
    read, by torch's.
    """
    tables = [p for module in model.modules() if isinstance(module, Tables) for p in module.parameters()]
    arrays = [m for m in model.modules() if isinstance(m, RobeArray)] if config.optimizer != "adam" else []
    apart = tables + [array.weight for array in arrays]
    rest = [p for p in model.parameters() if all(p is not other for other in apart)]
    if tables:
        # torch asks for a decision before its optimizers build sparse tensors; they build valid ones.
        torch.sparse.check_sparse_tensor_invariants.disable()
    lr = config.learning_rate
    if config.optimizer == "adam":
        dense: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=lr)]
        return dense + [torch.optim.SparseAdam(tables, lr=SPARSE_ADAM_RATE * lr)] if tables else dense
    if config.optimizer == "adagrad":
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adagrad(rest + tables, lr=lr)]
        return optimizers + [robe.optim.Adagrad(arrays, lr=lr)] if arrays else optimizers
    optimizers = [torch.optim.SGD(rest + tables, lr=lr)]
    return optimizers + [robe.optim.SGD(arrays, lr=lr)] if arrays else optimizers


def train(
    model: nn.Module,
    config: TrainingConfig,
    make_batches: Callable[[int], Iterable],
    rows: int,
    evaluate: Callable[[], dict[str, float]],
    keep: Callable[[], None],
    progress: bool = True,
) -> dict[str, Any]:
    """Train, and keep the state with the best validation AUC.

    Args:
        model: (dense, sparse) -> logits.
        make_batches: epoch -> its batches (dense, sparse, labels as data.rows.Batch), of config.batch_size rows.
        rows: in an epoch.
        evaluate: the validation scores of the model as it is now, with "auc".
        keep: called when those are the best so far.

    Returns:
        history: the evaluations [{step, epoch, train_loss, auc, log_loss}], best: the best of them,
        samples_per_second of the training alone, and train_seconds.

    Raises:
        TrainingError: the loss is NaN or infinite.
    """
    optimizers = make_optimizers(model, config)
    steps = math.ceil(rows / config.batch_size)
    evaluate_at = {
        math.ceil(steps * k / config.evaluations_per_epoch) for k in range(1, config.evaluations_per_epoch + 1)
    }
    history: list[dict[str, float]] = []
    best: dict[str, float] = {"auc": -1.0}
    seconds, step = 0.0, 0
    for epoch in range(config.epochs):
        title = f"epoch {epoch + 1}/{config.epochs}"
        loss_sum, shown = torch.zeros(()), {}
        model.train()
        start = time.perf_counter()
        with tqdm(total=rows, unit="row", unit_scale=True, desc=title, disable=not progress) as bar:
            for step_of_epoch, batch in enumerate(make_batches(epoch), 1):
                loss_sum += train_step(model, optimizers, batch)
                step += 1
                bar.update(len(batch.labels))
                if step_of_epoch % _STEPS_A_LOOK and step_of_epoch not in evaluate_at:
                    continue
                train_loss = loss_sum.item() / step_of_epoch
                if not math.isfinite(train_loss):
                    raise TrainingError(
                        f"the loss is {train_loss} by step {step} (epoch {epoch + 1}); a lower learning rate than "
                        f"{config.learning_rate} may help"
                    )
                shown["loss"] = f"{train_loss:.4f}"
                if step_of_epoch in evaluate_at:
                    seconds += time.perf_counter() - start
                    scores = evaluate()
                    point = {"step": step, "epoch": epoch + step_of_epoch / steps, "train_loss": train_loss}
                    history.append(point | {name: scores[name] for name in ("auc", "log_loss")})
                    shown["validation_auc"] = f"{scores['auc']:.4f}"
                    if scores["auc"] > best["auc"]:
                        best = history[-1]
                        keep()
                    model.train()
                    start = time.perf_counter()
                bar.set_postfix(shown)
    return {
        "history": history,
        "best": best,
        "samples_per_second": rows * config.epochs / seconds,
        "train_seconds": seconds,
    }


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch) -> torch.Tensor:
    """One step of gradient descent on the mean binary cross-entropy, which it returns, detached."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    logits = model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse))
    loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels))
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()
