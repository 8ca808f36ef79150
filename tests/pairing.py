"""Two processes (gloo) that do the same work and write down what they saw. Nothing relies on fork."""

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp

from train.engine import make_accelerator


def run_pair(work, folder):
    """What `work(rank, folder, accelerator)` returned in each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_begin, args=(work, Path(folder), port), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _begin(rank, work, folder, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.save(work(rank, folder, make_accelerator("fp32", cpu=True)), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
