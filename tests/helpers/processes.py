"""Functions run in several processes of torch.distributed."""

import os
import pickle
import socket
from pathlib import Path

import torch
import torch.multiprocessing

from dlrm.distributed import World


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def in_processes(counts, function, folder):
    """What ``function(world)``, at the top of a module, returns in worlds of several sizes.

    Returns:
        for each size, a list in the order of ranks.
    """
    ports = [free_port() for _ in counts]
    torch.multiprocessing.spawn(_work, (counts, ports, function, str(folder)), nprocs=max(counts))
    return {n: [pickle.loads(Path(folder, f"{n}.{rank}").read_bytes()) for rank in range(n)] for n in counts}


def _work(rank, counts, ports, function, folder):
    torch.set_num_threads(1)
    for count, port in zip(counts, ports):  # one world after the other: starting a process takes longer
        if rank >= count:
            continue
        of_world = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in of_world.items()}
        world = World.join("cpu")
        try:
            Path(folder, f"{count}.{rank}").write_bytes(pickle.dumps(function(world)))
        finally:
            world.close()
    # All is written. Threads of torch may still let go of tensors, which crashes a process whose Python has ended.
    os._exit(0)
