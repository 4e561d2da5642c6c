"""Data-parallel training: several processes train one model, each on its part of every batch.

    torchrun --nproc-per-node 2 train.py ...

ROBE's array is small, so every process holds the whole model. After the backward pass gradients are averaged, and all
processes make the same step. Without torchrun the world is one process, and nothing here has an effect.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robe.gather import gather
from robe.gradient import SlotGradient

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """The first process failed, and has reported the error itself.

    Args:
        exit_code: with which that process ends, and so should this one.
    """

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


class World:
    """The processes of a run.

    Args:
        device: where this process has its model.
        rank: the number of this process, from 0.
        size: the number of processes.
        group: for collectives; None in a world of one.
    """

    def __init__(self, device: str = "cpu", rank: int = 0, size: int = 1, group: "dist.ProcessGroup | None" = None):
        self.device, self.rank, self.size, self.group = torch.device(device), rank, size, group

    @staticmethod
    def join(device: str | None = None) -> "World":
        """Return the world in which torchrun started this process, or a world of one.

        Args:
            device: "cpu" or "cuda"; None: CUDA if available. A process gets the CUDA device of its local rank.

        Raises:
            ValueError: there is no such device.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: expected cpu, since torch finds no CUDA device; got cuda")
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(kind)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return World(kind)
        dist.init_process_group("gloo" if kind == "cpu" else "nccl")
        return World(kind, dist.get_rank(), size, dist.group.WORLD)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if self.group is not None:
            dist.destroy_process_group()
            self.group = None

    def first(self, make: Callable[[], T]) -> T:
        """Call a function in the first process, and return its result in all of them.

        Args:
            make: the function; the result is pickled.

        Raises:
            PeerFailed: in the other processes, if it failed. The first one raises the error itself.
        """
        if self.group is None:
            return make()
        result: list[Any] = [None, None]
        try:
            if self.is_first:
                result[0] = make()
        except Exception as error:
            dist.broadcast_object_list([None, getattr(error, "exit_code", 2)])
            raise
        dist.broadcast_object_list(result)
        if result[1] is not None:
            raise PeerFailed(result[1])
        return result[0]

    def each(self, make: Callable[[], T]) -> T:
        """Call a function in every process, in the others once it has succeeded in the first; return its result.

        Args:
            make: the function; results stay in their processes.

        Raises:
            PeerFailed: as in ``first``.
        """
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if made else make()

    def gather_in_first(self, tensor: Tensor) -> Tensor | None:
        """Concatenate the tensors (n, ...) of all processes, in the first one.

        Args:
            tensor: of this process; n may differ between processes.

        Returns:
            all of them in the order of ranks; None in the other processes.
        """
        if self.group is None:
            return tensor
        own = torch.tensor([len(tensor)], device=self.device)
        rows = own.new_empty(self.size, 1)
        dist.all_gather(list(rows), own)
        padded = tensor.new_zeros(int(rows.max()), *tensor.shape[1:], device=self.device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.is_first else None
        dist.gather(padded, parts)
        return None if parts is None else torch.cat([part[:n] for part, n in zip(parts, rows.flatten().tolist())])

    def same_weights(self, model: nn.Module) -> None:
        """Copy the parameters and buffers of the first process to all others.

        Args:
            model: the same in all processes but for its values.
        """
        if self.group is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def average_gradients(self, parameters: Iterable[nn.Parameter], numbers: Tensor) -> Tensor:
        """Average gradients over the processes, and sum a few numbers in the same message.

        Dense gradients are reduced in one message. Of sparse gradients, each process gets the rows of all. Optimizers
        of robe.optim exchange the gradients of their arrays themselves.

        Args:
            parameters: the same in all processes, with gradients of the same ones.
            numbers: (n,), to be summed.

        Returns:
            (n,): the sums.
        """
        if self.group is None:
            return numbers
        with_gradient = [p for p in parameters if p.grad is not None and not isinstance(p.grad, SlotGradient)]
        for p in with_gradient:
            if p.grad is not None and p.grad.is_sparse:
                parts = gather([p.grad._indices().T.contiguous(), p.grad._values()], self.group)
                rows, values = (torch.cat(part) for part in zip(*parts))
                p.grad = torch.sparse_coo_tensor(rows.T, values / self.size, p.grad.shape, check_invariants=False)
        dense = [p for p in with_gradient if p.grad is not None and not p.grad.is_sparse]
        message = torch.cat([*(p.grad.flatten() for p in dense if p.grad is not None), numbers.to(torch.float32)])
        dist.all_reduce(message)
        sums = message[len(message) - len(numbers) :].clone()
        message /= self.size
        for p, part in zip(dense, message.split([*(p.numel() for p in dense), len(numbers)])):
            p.grad = part.view_as(p)
        return sums


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    A process of several ends at once, without Python's own end. DistributedDataParallel keeps gloo's threads alive, and
    a thread that lets go of a tensor while Python ends aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
