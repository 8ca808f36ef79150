"""A recipe's training step without its weights and data: random numbers in their places, at full size.

Nothing is downloaded, and a language model is never held in more than its own precision. The step is that of
`fit`, without what that logs and saves; `train.throughput` times it.

Legend: B pairs of this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from train import optim, plan, shapes
from train.count import Counts
from train.engine import _backward, _to
from train.execution import prepare
from train.objectives import Objective
from train.recipes import Recipe
from train.stop import Flags

CAPTION = (13.0, 0.45)  # tokens: median and sigma of a log-normal; an assumption


def build(recipe: Recipe, layers: int | None = None) -> Objective:
    """A recipe's objective on the meta device, every stack of layers cut to its first ones.

    Args:
        recipe: its execution is not applied yet, but for precisions and micro batches.
        layers: of each stack; None: all.
    """
    objective = shapes.build(recipe, dataclasses.replace(recipe.execution, checkpointing=False))
    for name, module in list(objective.named_modules()):
        nested = any(word.isdigit() for word in name.split("."))  # T5's blocks hold lists of their own
        if layers is not None and isinstance(module, nn.ModuleList) and not nested:
            del module[layers:]
    return objective


@torch.no_grad()
def materialize(objective: Objective, device: torch.device) -> None:
    """Give a model on the meta device memory, in its precisions, and random numbers of the usual size."""
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in objective.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    objective.to_empty(device=device)
    for first, *others in tied.values():  # to_empty makes several of one
        for other in others:
            owner, _, name = other.rpartition(".")
            setattr(objective.get_submodule(owner), name, objective.get_parameter(first))
    for name, parameter in objective.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.07 if name.endswith("temperature") else float("norm" in name.lower()))
            if name.endswith("bias"):
                parameter.zero_()
    for buffer in objective.buffers():
        buffer.zero_()


def batch(recipe: Recipe, objective: Objective, rows: int, seed: int = 0) -> dict[str, Any]:
    """Random pictures and captions on the CPU, as a loader gives them.

    Args:
        recipe: of the pictures' and captions' sizes.
        objective: its vocabulary is drawn from.
        rows: pairs. The first has the longest caption, so that shapes are those of the plan.
        seed: of the numbers.
    """
    random = torch.Generator().manual_seed(seed)
    config = objective.model.config
    words = (config.qformer_config if recipe.stage == 1 else config.text_config).vocab_size
    made: dict[str, Any] = {}
    drawn = torch.randn(rows, generator=random).mul(CAPTION[1]).exp().mul(CAPTION[0]).round()
    for name, like in shapes.batch(recipe, rows).items():
        if name == "pixel_values":
            made[name] = torch.randn(like.shape, generator=random)
            continue
        longest = like.shape[1]
        lengths = (drawn * longest / recipe.max_text_length).round().clamp(3, longest)
        lengths[0] = longest
        real = torch.arange(longest) < lengths[:, None]
        ids = torch.randint(10, min(words, 30_000), like.shape, generator=random)
        if name == "attention_mask":
            made[name] = real.long()
        else:
            made[name] = ids.masked_fill(~real, -100 if name == "labels" else 1)
    if recipe.stage == 2 and config.use_decoder_only_language_model:
        made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    return made | {"keys": [f"random/{row}" for row in range(rows)]}


def parameters(module: nn.Module, trained: bool) -> int:
    """How many numbers a module trains, or keeps frozen."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)


def expected(recipe: Recipe, objective: Objective, counts: Counts) -> dict[str, float]:
    """Bytes of one GPU by `train.plan`'s sum, for an objective that may have been cut."""
    model: Any = objective.model
    execution, bytes_of = recipe.execution, plan.BYTES
    memory = {
        "image encoder, frozen": parameters(model.vision_model, False) * bytes_of[execution.vision_precision]
    }
    if recipe.stage == 2:
        each = bytes_of[execution.language_precision]
        memory["language model, frozen"] = parameters(model.language_model, False) * each
    return memory | {
        "trained weights, AdamW": parameters(model, True) * 12.0,
        "the step, at its peak": counts.peak,
        "allowances": plan.WASTE * counts.peak + plan.RESERVED,
    }


class Trainer:
    """What `fit` makes of an objective, and its step, without what it logs and saves.

    Args:
        recipe: of the optimizer, the precision and the execution.
        objective: with numbers.
        accelerator: of `make_accelerator`.
    """

    def __init__(self, recipe: Recipe, objective: Objective, accelerator: Accelerator):
        self.recipe, self.objective, self.accelerator = recipe, objective, accelerator
        self.device, fit = accelerator.device, recipe.fit
        encoder: Any = objective.model.vision_model
        eager = encoder.tokens
        prepare(objective, recipe.execution, self.device)
        self.encoders = {"eager": eager}
        if encoder.tokens != eager:
            self.encoders["compiled"] = encoder.tokens
        objective.to(self.device).train()
        self.optimizer = optim.adamw(objective, weight_decay=fit.weight_decay, betas=fit.betas)
        optim.set_learning_rate(self.optimizer, fit.learning_rate / max(1, fit.warmup_steps))
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.model = accelerator.prepare_model(objective)
        self.number, self.flags = 0, Flags()
        self.backward, self.update = accelerator.backward, self._update

    def use(self, side: str) -> None:
        """Take the "eager" or the "compiled" image encoder from now on."""
        encoder: Any = self.objective.model.vision_model
        encoder.tokens = self.encoders[side]

    def step(self, batch: dict[str, Any]) -> None:
        """As a step of `fit`: nothing here waits for the device but the last step's flag."""
        with self.accelerator.autocast():
            parts = self.objective.split(_to(batch, self.device), self.number, self.recipe.fit.seed)
        values = _backward(self.model, parts, self.accelerator)
        flag = self.update(values)
        self.number += 1
        self.flags.put(flag, self.number, values, batch["keys"])
        self.flags.read()

    def _update(self, values: dict[str, Tensor]) -> Tensor:
        scaler, optimizer = self.accelerator.scaler, self.optimizer
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = optim.gradient_norm(self.parameters, self.recipe.fit.clip_norm)
        bad = (~torch.isfinite(values["loss"] if scaler is not None else values["loss"] + norm)).float()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([bad, torch.zeros_like(bad)])

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Clock:
    """Times on the device's own clock, where it has one, read at the end: nothing waits in between.

    A GPU's queue does not run empty for being measured, and what other threads launch within a span, as the
    backward pass does, counts.
    """

    def __init__(self, device: torch.device):
        self.device, self.spans = device, list[tuple[str, Any, Any]]()

    def now(self) -> Any:
        """A point in time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        began = self.now()
        with record_function(name):
            yield
        self.spans.append((name, began, self.now()))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            with self.span(name):
                return function(*args, **options)

        return timed

    def read(self) -> dict[str, list[float]]:
        """Seconds of all spans by name; the device has to be done."""
        found: dict[str, list[float]] = {}
        for name, began, ended in self.spans:
            seconds = began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
            found.setdefault(name, []).append(seconds)
        return found
