"""Optimizer groups, layer-wise learning-rate decay, and the schedule.

Paper, section 3.4: AdamW with betas (0.9, 0.98), weight decay 0.05, linear warm-up, cosine decay.
Differs from LAVIS, which lets the warm-up end with the first epoch, steps its cosine once per epoch, and
stores layer-decay factors that its schedulers never read: here every step has its own rate, and the factors
apply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate(step: int, *, total: int, peak: float, floor: float = 0.0, warmup: int = 0) -> float:
    """Rate of optimizer step `step`, counted from 0.

    Rises linearly to `peak`, which step `warmup - 1` uses, then falls along half a cosine that reaches
    `floor` at `total`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_scale(name: str, num_layers: int, decay: float) -> float:
    """Factor on the learning rate of an image-encoder parameter; 1 for every other parameter.

    The embeddings, and the norm that CLIP has behind them, get decay^(num_layers + 1), block i gets
    decay^(num_layers - i), so the last block gets decay^1. `post_layernorm` is trained from nothing in both
    stages and is not scaled.
    """
    if re.search(r"(^|\.)vision_model\.(embeddings|pre_layernorm)\.", name):
        return decay ** (num_layers + 1)
    block = re.search(r"(^|\.)vision_model\.encoder\.layers\.(\d+)\.", name)
    return decay ** (num_layers - int(block[2])) if block else 1.0


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and by `lr_scale`.

    Only tensors of two or more dimensions decay: biases, norms and the scalar temperature do not; query
    tokens, embeddings and matrices do.

    Args:
        named_parameters: frozen ones are skipped.
        weight_decay: of the decaying groups.
        layer_decay: factor per image-encoder layer, in (0, 1]; 1 means equal rates.

    Returns:
        Groups for a torch optimizer; `params` holds (name, parameter) pairs, `lr_scale` multiplies the
        schedule's rate.

    Raises:
        ValueError: nothing is trainable, or `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must lie in (0, 1], where 1 means equal rates")
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter has requires_grad: nothing to train; unfreeze a part of the model")
    blocks = [re.search(r"(?:^|\.)vision_model\.encoder\.layers\.(\d+)\.", name) for name, _ in trainable]
    num_layers = 1 + max((int(match[1]) for match in blocks if match), default=-1)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in trainable:
        decays, scale = parameter.ndim >= 2, layer_scale(name, num_layers, layer_decay)
        group = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        groups.setdefault((decays, scale), group)["params"].append((name, parameter))
    return list(groups.values())


def adamw(
    module: nn.Module,
    *,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.98),
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`; the defaults are the paper's.

    Fused, because the fused step takes a `found_inf` tensor that cancels it on the device, without asking the
    host.
    """
    groups = param_groups(module.named_parameters(), weight_decay=weight_decay, layer_decay=layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def gradient_norm(parameters: Iterable[nn.Parameter], clip: float | None = None) -> Tensor:
    """Global 2-norm of the gradients, a device scalar; with `clip`, gradients are scaled down to it."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm
