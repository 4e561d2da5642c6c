"""The optimizers of a training run."""

import torch

import robe.optim
from dlrm.config import TrainingConfig
from dlrm.distributed import World
from dlrm.embeddings import Tables
from dlrm.model import DLRM
from robe import RobeArray

# Adam keeps moving a row by its momentum in the steps after it was read; SparseAdam does not, and needs larger steps to
# get as far: see docs/accuracy.md.
SPARSE_ADAM_RATE = 3
# Numbers that each optimizer keeps for a weight, the weight itself included.
NUMBERS_A_WEIGHT = {"sgd": 1, "adagrad": 2, "adam": 3}


def make_optimizers(model: DLRM, config: TrainingConfig, world: World | None = None) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a config.

    Tables have sparse gradients, which Adam takes in a class of its own (SparseAdam). ROBE arrays are updated by
    robe.optim, which never builds their dense gradient. There are two exceptions, in which torch's optimizers update
    them: with Adam, whose momentum also moves weights that were not read; and with several processes, where the dense
    gradient is less to send.

    Args:
        model: whose parameters they update.
        config: names the optimizer and its learning rate.
        world: the processes; None: this one alone.
    """
    world = world or World()
    tables = [p for module in model.modules() if isinstance(module, Tables) for p in module.parameters()]
    arrays = [m for m in model.modules() if isinstance(m, RobeArray)] if config.optimizer != "adam" else []
    if world.size > 1 and not sends_touched_slots(model, config.batch_size):
        arrays = []
    apart = tables + [array.weight for array in arrays]
    rest = [p for p in model.parameters() if all(p is not other for other in apart)]
    if tables:
        # torch warns until this is decided. Its optimizers build valid sparse tensors.
        torch.sparse.check_sparse_tensor_invariants.disable()
    lr = config.learning_rate
    if config.optimizer == "adam":
        dense: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=lr)]
        return dense + [torch.optim.SparseAdam(tables, lr=SPARSE_ADAM_RATE * lr)] if tables else dense
    if config.optimizer == "adagrad":
        eps = config.adagrad_eps
        dense = [torch.optim.Adagrad(rest + tables, lr=lr, eps=eps)]
        return dense + [robe.optim.Adagrad(arrays, lr=lr, eps=eps, process_group=world.group)] if arrays else dense
    dense = [torch.optim.SGD(rest + tables, lr=lr)]
    return dense + [robe.optim.SGD(arrays, lr=lr, process_group=world.group)] if arrays else dense


def sends_touched_slots(model: DLRM, batch_size: int) -> bool:
    """Return whether the gradients that a batch touches, with their ids, take fewer bytes than the dense gradient.

    Args:
        model: a DLRM.
        batch_size: rows of a step in all processes together.
    """
    config = model.config
    ids = sum(config.hots) if config.hots else len(config.table_rows)
    touched = batch_size * (len(config.table_rows) * config.embedding_dim + 2 * ids)  # in units of 4 bytes
    arrays = sum(m.size for m in model.modules() if isinstance(m, RobeArray))
    return touched < arrays
