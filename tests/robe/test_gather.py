"""Tensors of several processes, brought together in every one of them."""

import pytest
import torch

from robe.gather import gather
from tests.helpers.processes import in_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes((2, 3), gathered, tmp_path_factory.mktemp("found"))


def tensors_of(rank):
    torch.manual_seed(rank)
    return [
        torch.randn(3 * rank + 1, 4),
        torch.arange(rank) + 2**40 * rank,
        torch.randint(0, 2, (5 - rank, 3)).bool(),
        torch.randn(rank + 1).bfloat16(),
        torch.empty(0, 2, dtype=torch.float64),
        torch.randn(4, 3 + rank, dtype=torch.float64).T,
        torch.randint(-128, 128, (7 * (rank == 1), 2, 1), dtype=torch.int8),
    ]


def gathered(world):
    own = tensors_of(world.rank)
    found = gather(own, world.group)
    assert all(mine is given for mine, given in zip(found[world.rank], own))
    nothing = gather([torch.empty(0, 3), torch.empty(0, dtype=torch.int64)], world.group)
    return [[x.clone() for x in of_rank] for of_rank in found], nothing


@pytest.mark.parametrize("processes", [2, 3], ids="{} processes".format)
def test_gather_brings_every_tensor_everywhere(processes, found):
    for tensors, nothing in found[processes]:
        assert len(tensors) == len(nothing) == processes
        for rank, of_rank in enumerate(tensors):
            for got, expected in zip(of_rank, tensors_of(rank), strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)
        assert all([x.shape for x in of_rank] == [(0, 3), (0,)] for of_rank in nothing)
