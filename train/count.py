"""What one training step computes and keeps in memory, counted on the real objectives without any data.

The full-size model is built on torch's meta device, and a whole step of a stage's objective, its accumulation
and its gathers included, runs on fake tensors: shapes and types are real, numbers are not, so this takes
seconds and next to no memory. `Meter` sees every operation as it passes, and adds up products, by the
formulas of `torch.utils.flop_counter`, and the bytes that exist at any moment; that counter itself keeps the
graphs of recomputed layers, and with them their memory, alive. `_as_on_gpu` makes the CPU's fake tensors take
the path of a GPU under autocast: memory-efficient attention, and layer norms, softmaxes and losses in
float32.

Not seen: the optimizer, what libraries set aside, and the allocator's waste, which `train.plan` adds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from train import distributed
from train.objectives import Objective

FLOAT32 = ("layer_norm", "cross_entropy", "softmax", "normalize")  # by autocast on CUDA


@dataclass(frozen=True)
class Counts:
    """One process's share of a step.

    Attributes:
        parts: micro batches.
        before: floating-point operations before the first of them: the image encoder, and the features of all
            pairs where there are several.
        each: of a micro batch, forward and backward, recomputation included.
        peak: the most bytes alive at a time: pixels, activations, gradients, temporary values; no weights.
    """

    parts: int
    before: float
    each: float
    peak: float

    @property
    def flops(self) -> float:
        """Floating-point operations of the step on this process."""
        return self.before + self.parts * self.each


def count(
    objective: Objective,
    batch: dict[str, Tensor],
    *,
    processes: int = 1,
    precision: torch.dtype = torch.bfloat16,
    fused: bool = True,
) -> Counts:
    """Take one step without numbers.

    Args:
        objective: on the meta device; its weights become fake ones, so it can be counted once.
        batch: one process's, of the meta device, as a loader gives it.
        processes: of the run.
        precision: of autocast; float32 does without.
        fused: memory-efficient attention; False multiplies out every attention matrix, as was done before.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        objective._apply(_fake)
        batch = {name: _fake(value) for name, value in batch.items()}
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    weights = [*objective.parameters(), *objective.buffers()]
    with (
        _processes(processes),
        _as_on_gpu(fused),
        mode,
        Meter(weights) as meter,
    ):
        for value in batch.values():
            meter.add(value)
        with autocast:
            parts = objective.split(batch, step=0)
        number, before = len(parts), meter.flops
        for part in parts[:2]:  # the second meets the first one's gradients; the rest are like it
            with autocast:
                values = objective(part)
                loss = torch.stack([v for name, v in values.items() if name.startswith("loss")]).sum()
            loss.backward()
            del loss, values
        each = (meter.flops - before) / len(parts[:2])
        del parts, part
    objective.zero_grad(set_to_none=True)
    return Counts(number, before, each, meter.peak)


class Meter(TorchDispatchMode):
    """Sees every operation: adds up products, and the bytes that tensors hold, now and at most.

    Args:
        known: tensors that do not count, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once, until it is freed; a view has none of its own."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = self._seen[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@contextmanager
def _processes(number: int) -> Iterator[None]:
    """Gathers as if there were so many processes, whatever group this one belongs to."""

    def gather(x: Tensor) -> Tensor:
        return x.detach() if number == 1 else x.new_empty(number * len(x), *x.shape[1:])

    with mock.patch.multiple(
        distributed,
        is_distributed=lambda: number > 1,
        rank=lambda: 0,
        world_size=lambda: number,
        gather=gather,
        gather_with_grad=lambda x: torch.cat([x] * number),
        all_reduce_=lambda x, op="sum": x,
    ):
        yield


@contextmanager
def _as_on_gpu(fused: bool) -> Iterator[None]:
    changed: dict[str, Any] = {name: _in_float32(getattr(F, name)) for name in FLOAT32}
    changed["scaled_dot_product_attention"] = _fused if fused else _plain
    # Dropout's seed: there is no number to be had, and the process's own generators stay as they are.
    seeds: dict[str, Any] = {"randint": lambda *args, **options: 0, "manual_seed": lambda seed: None}
    with mock.patch.multiple(F, **changed), mock.patch.multiple(torch, **seeds):
        yield


def _in_float32(function: Any) -> Any:
    def computed(*args: Any, **options: Any) -> Any:
        wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        return function(*wide, **options)

    return computed


def _narrow(x: Tensor) -> Tensor:
    """What autocast makes of an operand."""
    lower = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype("cpu")) if lower else x


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    query, key, value = (_narrow(x) for x in (query, key, value))
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale
    )[0]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) / 8.0  # any number will do
    if attn_mask is not None:
        scores = scores + torch.zeros_like(attn_mask, dtype=scores.dtype)
    weights = F.dropout(F.softmax(scores, -1), dropout_p)
    return torch.matmul(_narrow(weights), value)
