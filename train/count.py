"""What one training step computes and keeps in memory, counted on the real modules without any data.

The full-size modules are built on torch's meta device and run, forward and backward, on fake tensors: shapes
and types are real, numbers are not, so this takes seconds and next to no memory. Every operation is seen as it
passes: `torch.utils.flop_counter` adds up products, `Live` the bytes that exist at any moment. `AsOnGpu` makes
the CPU's fake tensors take the path of a GPU under autocast: memory-efficient attention, and layer norms,
softmaxes and losses in float32.

Not seen: the optimizer's own memory and the allocator's waste, which `train.plan` adds.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blip2.model import Blip2
from blip2.representation import Blip2Representation

FLOAT32 = (F.layer_norm, F.cross_entropy, F.softmax, torch.softmax, F.normalize)  # of autocast on CUDA


@dataclass(frozen=True)
class Counts:
    """One process's share of a step.

    Attributes:
        forward: floating-point operations forward, all pairs.
        total: forward and backward, recomputation included.
        kept: bytes alive between forward and backward, weights apart.
        peak: the most bytes alive at a time, weights apart, gradients included.
    """

    forward: float
    total: float
    kept: float
    peak: float


class AsOnGpu(TorchFunctionMode):
    """Lets fake CPU tensors under autocast behave as on a GPU.

    Args:
        fused: memory-efficient attention; False multiplies out every attention matrix, as before torch 2.
    """

    def __init__(self, fused: bool = True):
        super().__init__()
        self.fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return (_fused if self.fused else _plain)(*args, **kwargs)
        if func in FLOAT32:
            args = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **kwargs)


def _sixteen_bits(x: Tensor) -> Tensor:
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
    query, key, value = (_sixteen_bits(x) for x in (query, key, value))
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
    scores = torch.matmul(query, key.transpose(-1, -2)) / 8.0  # the number does not matter
    if attn_mask is not None:
        scores = scores + torch.zeros_like(attn_mask, dtype=scores.dtype)
    weights = F.dropout(F.softmax(scores, -1), dropout_p)
    return torch.matmul(_sixteen_bits(weights), value)


class Live(TorchDispatchMode):
    """The bytes that tensors hold, now and at most; a view holds none of its own.

    Args:
        known: tensors that do not count, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = self._seen[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class _Gather(torch.autograd.Function):
    """The shapes of a gather over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty(rows, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[: ctx.rows].clone(), None


def as_fake(model: nn.Module) -> FakeTensorMode:
    """Give a model of the meta device fake weights; the mode to use it under."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype))
    return mode


def checkpoint_layers(model: nn.Module) -> None:
    """Let Q-Former and language model compute every layer again in the backward pass.

    In place, layer by layer and whether in training mode or not: a frozen language model stays in eval mode, in
    which transformers' own switch does nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.startswith(("qformer.", "language_model.")):
            for layer in module:
                if any(True for _ in layer.children()) and not isinstance(layer, nn.ModuleList):
                    layer.forward = functools.partial(  # type: ignore[method-assign]
                        checkpoint,
                        layer.forward,
                        use_reentrant=False,
                        context_fn=_recomputing,
                    )


def _recomputing() -> tuple[Any, Any]:
    return nullcontext(), _Recomputing()


class _Recomputing(AsOnGpu):
    """Backward runs outside of the outer mode; and on fake tensors a layer's ends are freed by gc alone."""

    def __enter__(self) -> _Recomputing:
        gc.collect()
        super().__enter__()
        return self


def count(
    model: nn.Module,
    mode: FakeTensorMode,
    run: Callable[[], Tensor],
    *,
    precision: torch.dtype = torch.bfloat16,
    fused: bool = True,
) -> Counts:
    """Run a computation on fake tensors, and backward from the scalar that it returns if it has a gradient.

    Args:
        model: whose weights do not count as memory.
        mode: of `as_fake`.
        run: the computation.
        precision: of autocast; float32 does without.
        fused: see `AsOnGpu`.
    """
    model.zero_grad(set_to_none=True)
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    weights = [*model.parameters(), *model.buffers()]
    gc.collect()
    gc.freeze()  # what is here already is not looked through again, which makes `_Recomputing` quick
    with mode, AsOnGpu(fused), autocast, FlopCounterMode(display=False) as flops, Live(weights) as live:
        loss = run()
        forward, kept = flops.get_total_flops(), live.now
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        counts = Counts(forward, flops.get_total_flops(), kept, live.peak)
        del loss
    gc.unfreeze()
    model.zero_grad(set_to_none=True)
    return counts


def encode(model: Blip2Representation | Blip2, pairs: int) -> Callable[[], Tensor]:
    """The frozen image encoder on `pairs` images."""
    size = model.config.vision_config.image_size

    def run() -> Tensor:
        with torch.no_grad():
            return model.vision_model.encode(torch.empty(pairs, 3, size, size)).sum()

    return run


def hidden(model: Blip2Representation | Blip2, pairs: int, precision: torch.dtype) -> Tensor:
    """What the encoder hands on: float (pairs, P, V)."""
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    return torch.empty(pairs, tokens, vision.hidden_size, dtype=precision)


def stage1(
    model: Blip2Representation,
    pairs: int,
    *,
    global_pairs: int,
    text_length: int,
    precision: torch.dtype = torch.bfloat16,
) -> Callable[[], Tensor]:
    """ITC + ITM + ITG of `pairs` of the `global_pairs`, from the encoder's output on."""

    def run() -> Tensor:
        ids = torch.zeros(pairs, text_length, dtype=torch.long)
        first = torch.zeros(pairs, dtype=torch.long)
        losses = model(
            image_embeds=model.vision_model.post_layernorm(hidden(model, pairs, precision)),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            gather=lambda x: x.new_empty(global_pairs, *x.shape[1:]),
            gather_with_grad=lambda x: _Gather.apply(x, global_pairs),
            sample_negatives=lambda i2t, t2i, positive: (first, first),
        )
        return torch.stack(list(losses.values())).sum()

    return run


def features(
    model: Blip2Representation, pairs: int, *, text_length: int, precision: torch.dtype = torch.bfloat16
) -> Callable[[], Tensor]:
    """The features of `pairs` without gradients: the extra pass of a step in several micro batches."""

    def run() -> Tensor:
        ids = torch.zeros(pairs, text_length, dtype=torch.long)
        with torch.no_grad():
            image = model.read_image(model.vision_model.post_layernorm(hidden(model, pairs, precision)))
            assert image.query_output is not None
            text = model.text_feats(ids, torch.ones_like(ids))
            return model.image_feats(image.query_output).sum() + text.sum()

    return run


def stage2(
    model: Blip2,
    pairs: int,
    *,
    text_length: int,
    target_length: int | None = None,
    precision: torch.dtype = torch.bfloat16,
) -> Callable[[], Tensor]:
    """The frozen language model's loss, from the encoder's output on.

    Args:
        model: with both frozen parts frozen.
        pairs: of one micro batch.
        text_length: tokens behind the queries.
        target_length: tokens of the decoder, where the language model has an encoder too.
        precision: of the encoder's output.
    """

    def run() -> Tensor:
        ids = torch.zeros(pairs, text_length, dtype=torch.long)
        labels = torch.zeros(pairs, target_length or text_length, dtype=torch.long)
        image = model.read_image(model.vision_model.post_layernorm(hidden(model, pairs, precision)))
        mask = torch.ones_like(ids)
        options = {"check_image_tokens": False, "use_cache": False}
        return model(image=image, input_ids=ids, attention_mask=mask, labels=labels, **options).loss

    return run
