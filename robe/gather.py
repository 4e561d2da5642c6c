"""Gathers tensors of several processes in every one of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather(tensors: Sequence[Tensor], group: "dist.ProcessGroup") -> list[list[Tensor]]:
    """Gather the tensors of each process of a group. All of them call this together.

    Args:
        tensors: (n, ...) each, on one device. Between processes, only the first dimensions may differ.
        group: the process group.

    Returns:
        The tensors of each process, in the order of ranks; the caller's own are the same objects.
    """
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    counts_of = counts.new_empty(processes, len(tensors))
    dist.all_gather(list(counts_of), counts, group=group)
    shapes = [[(n, *tensor.shape[1:]) for n, tensor in zip(of_process, tensors)] for of_process in counts_of.tolist()]
    # One message, of the same length from everyone: the bytes of all tensors, each from a multiple of 8 on.
    lengths = [
        [-(-tensor.element_size() * _numel(shape) // 8) * 8 for tensor, shape in zip(tensors, of_process)]
        for of_process in shapes
    ]
    longest = max(8, *(sum(of_process) for of_process in lengths))  # with 0, messages would lie 1 byte apart
    message = torch.empty(longest, dtype=torch.uint8, device=counts.device)
    for part, tensor in zip(message.split([*lengths[rank], longest - sum(lengths[rank])]), tensors):
        own = tensor.contiguous().view(-1).view(torch.uint8)
        part[: len(own)] = own
    messages = message.new_empty(processes, longest)
    dist.all_gather(list(messages), message, group=group)

    gathered = []
    for process, of_process in enumerate(messages):
        if process == rank:
            gathered.append(list(tensors))
            continue
        parts = of_process.split([*lengths[process], longest - sum(lengths[process])])
        gathered.append(
            [
                part[: tensor.element_size() * _numel(shape)].view(tensor.dtype).view(shape)
                for part, tensor, shape in zip(parts, tensors, shapes[process])
            ]
        )
    return gathered


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
