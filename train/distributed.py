"""What training asks of `torch.distributed`: ranks, seeds, and gathers with and without gradient.

`blip2/` never imports `torch.distributed`; the stage modules pass these gathers into the model's losses.
Every function also works in a single process without a process group, where gathering is the identity.

Legend: B batch of one process, W processes, G = W * B global batch. Row r * B + i of a gathered tensor is row
i of rank r.
"""

from __future__ import annotations

import os
import random
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group with more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch with `seed + rank` (LAVIS: 42 + rank): dropout differs between ranks."""
    seed = seed + rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def promised() -> int:
    """How many processes the launcher says it starts."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(num_processes: int) -> None:
    """Refuse to train when the launcher promised another number of processes than there are.

    `accelerate launch --num_processes 2` on a machine without a GPU starts a single process, silently.
    """
    if promised() != num_processes:
        raise RuntimeError(
            f"the launcher announced WORLD_SIZE={promised()}, but {num_processes} process(es) take part; "
            "start with `torchrun --nproc-per-node N -m train.pretrain ...`"
        )


def gather(x: Tensor) -> Tensor:
    """Concatenate every rank's `x`, without gradient.

    The local slice carries no gradient either, in one process as in many: ITC's keys are constants, and its
    gradient flows through the local anchors only (as in LAVIS).

    Args:
        x: any dtype (B, ...), of the same shape on every rank.

    Returns:
        Detached (G, ...).
    """
    x = x.detach()
    return _all_gather(x) if is_distributed() else x


def gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate every rank's `x`; the backward pass sums the gradient over ranks.

    With DistributedDataParallel, which averages parameter gradients over ranks, the result is the exact
    gradient of the mean over ranks of the local losses: whoever used this rank's rows, on whatever rank,
    contributes.

    Args:
        x: float (B, ...), of the same shape on every rank.

    Returns:
        (G, ...), attached to this rank's graph through its own rows.
    """
    return _GatherWithGrad.apply(x) if is_distributed() else x


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather(list(out.chunk(world_size())), x.contiguous())
    return out


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = list(grad.contiguous().chunk(world_size()))
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts)  # sum over ranks, this rank's rows
        return mine


def all_reduce_(x: Tensor, op: str = "sum") -> Tensor:
    """Reduce `x` over ranks in place, "sum" or "max"; queued on the device, the host does not wait."""
    if is_distributed():
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def all_gather_object(value: T) -> list[T]:
    """Every rank's picklable `value`, in rank order. Meant for saving, not for the step."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another process has ended, or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return is_distributed() and any(part in str(error) for part in ("gloo", "closed by peer", "Timed out"))


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()
