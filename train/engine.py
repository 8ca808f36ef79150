"""fit(): one visible loop for every objective, from a laptop's core to many GPUs.

An objective is a module whose `forward(batch)` returns named scalars; those named `loss*` are summed and
minimized, the others are logged. The loop knows nothing else of it. `accelerate` brings the launch, the
precision, the distributed wrapper and the trackers; the training state is ours (`train/state.py`). There are
no callbacks: logging, evaluation, saving and stopping are the `if`s of the loop.

Within a step nothing here waits for the device; transformers' language models do so twice, over their
attention masks. A step whose loss or gradient norm is not finite is cancelled on the device, and the host,
which reads the flag one step later, stops and names the samples.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from train import distributed, optim, state
from train.best import Best
from train.loader import Batch, Loader
from train.log import Log, Window
from train.stop import Flags, NonFiniteError, stop_signals

Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class FitConfig:
    """How long, how fast and in what precision; defaults are the paper's where it has one (section 3.4)."""

    steps: int
    """Optimizer steps, and the length of the schedule unless `max_minutes` shortens it."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 1e-5
    """Where the cosine ends."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Of parameters with two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    layer_decay: float = 1.0
    """Learning-rate factor per image-encoder layer, from the last down; 1 means equal rates."""
    clip_norm: float | None = None
    """Scale gradients above this global norm down to it; the paper does not clip."""
    precision: Precision = "bf16"
    """bf16 and fp16 run under autocast over float32 weights; fp16 scales the loss and needs a GPU."""
    seed: int = 42
    """Rank r uses seed + r."""
    max_minutes: float | None = None
    """End within this time, resumed parts included: at log steps the schedule is fitted to the measured
    speed. The evaluation at the end comes on top."""
    log_every: int = 50
    """Steps between log lines, each the mean since the last."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: int = 1000
    """Steps between saved states; one is saved at the end and on SIGTERM in any case."""
    keep_states: int = 2
    """Saved states that remain."""
    probe: str | None = None
    """Metric of the evaluation by which the best weights are kept, in best/; the higher the better."""
    collapse: float = 0.0
    """Stop when the probe stays below this share of its best: what was learned is being unlearned."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others before it gives up."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """accelerate trackers beside log.jsonl: tensorboard, trackio or wandb."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1:
            raise ValueError(f"steps ({self.steps}) and log_every ({self.log_every}) must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be below steps ({self.steps})")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}; "
                f"it must lie in 0 .. learning_rate ({self.learning_rate})"
            )
        if not 0 <= self.collapse < 1:
            raise ValueError(f"collapse is {self.collapse}; it is a share of the best, 0 (never) to below 1")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}; give a positive number, or leave it out")


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    step: int
    """Optimizer steps of the run so far."""
    finished: bool
    """False when a signal stopped it; the same call goes on."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last log line and the last evaluation."""


def make_accelerator(
    precision: Precision = "fp32",
    *,
    cpu: bool | None = None,
    trackers: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
    timeout_minutes: float = 30.0,
) -> Accelerator:
    """An Accelerator on the GPU if there is one, in which a lost rank is a time-out and no hang.

    accelerate keeps one precision per process: phases of different precision need processes of their own.

    Args:
        precision: "fp32", "bf16" or "fp16".
        cpu: stay on the CPU; by default only where there is no GPU.
        trackers: of accelerate, such as "tensorboard".
        folder: where they write.
        timeout_minutes: how long a process waits for the others before it gives up.

    Raises:
        RuntimeError: the launcher announced another number of processes than take part.
    """
    if cpu is None:
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    mixed = "no" if precision == "fp32" else precision
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))
    accelerator = Accelerator(
        mixed_precision=mixed,
        cpu=cpu,
        kwargs_handlers=[timeout],
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    distributed.check_launch(accelerator.num_processes)
    return accelerator


def fit(
    objective: nn.Module,
    loader: Loader,
    config: FitConfig,
    folder: str | os.PathLike[str],
    *,
    run: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    accelerator: Accelerator | None = None,
    stop_requested: Callable[[], bool] | None = None,
    work: float | None = None,
) -> Result:
    """Train `objective` on `loader`, in place; go on from the newest state in `folder` if there is one.

    Args:
        objective: `forward(batch)` returns a dict of scalar tensors; `loss*` are summed. Its parameters that
            require a gradient are trained. Its method `split(batch, step, seed)`, if it has one, cuts a batch
            into parts, over which losses and values are summed.
        loader: this rank's batches.
        config: see `FitConfig`.
        folder: of this run alone; gets config.json, log.jsonl and states/.
        run: the run's whole resolved configuration, by default `config`; a folder that holds another is
            refused.
        evaluate: (objective in eval mode, without gradients; step) -> metrics. Every rank calls it, rank 0's
            values are logged, and the run's random generators do not notice.
        accelerator: from `make_accelerator`, which the default calls.
        work: seconds that a row would take this device at its peak; with it, `mfu` is logged, the share of
            the peak that is used.
        stop_requested: whether to end early; by default of `stop_signals`, which lasts as long as this call.

    Returns:
        See `Result`.

    Raises:
        NonFiniteError: a loss or a gradient norm was not finite. The step was not applied, nothing is saved.
        CollapseError: the probe stayed below `config.collapse` of its best.
        SaveError: a state could not be written.
        StateError: `folder` or its state belongs to another run.
    """
    if stop_requested is None:
        with stop_signals() as signalled:
            return fit(
                objective, loader, config, folder,
                run=run, evaluate=evaluate, accelerator=accelerator, stop_requested=signalled, work=work,
            )  # fmt: skip
    folder = Path(folder)
    if accelerator is None:
        accelerator = make_accelerator(
            config.precision,
            trackers=config.trackers,
            folder=folder,
            timeout_minutes=config.timeout_minutes,
        )
    expected = "no" if config.precision == "fp32" else config.precision
    if accelerator.mixed_precision != expected:
        raise ValueError(f"precision is {config.precision}, the accelerator's {accelerator.mixed_precision}")
    state.claim(folder, run or dataclasses.asdict(config))
    device, scaler = accelerator.device, accelerator.scaler
    distributed.seed_everything(config.seed)
    objective.to(device).train()
    optimizer = optim.adamw(
        objective, weight_decay=config.weight_decay, betas=config.betas, layer_decay=config.layer_decay
    )
    parameters = list(state.trainable(objective).values())

    step, seconds, total = 0, 0.0, config.steps
    if (found := state.latest(folder)) is not None:
        restored = state.load(found, objective, optimizer)
        step, progress = restored["step"], restored["progress"]
        seconds, total = progress["seconds"], progress["total_steps"]
        loader.load_state_dict(restored["loader"])
        if scaler is not None:
            scaler.load_state_dict(progress["scaler"])
    first, began, batches = step, time.perf_counter() - seconds, iter(loader)
    model = accelerator.prepare_model(objective)
    split = getattr(objective, "split", lambda batch, step, seed: [batch])
    log = Log(folder, step, total, accelerator, config.trackers)
    log.say(
        f"{folder}: step {step} of {total}; {sum(p.numel() for p in parameters):,} parameters to train, "
        f"{distributed.world_size()} process(es), {device}, {config.precision}"
    )
    window, flags, metrics, rate, stop = Window(), Flags(), dict[str, float](), 0.0, False
    best = Best(folder, config.probe, config.collapse, step, log.say) if config.probe else None

    def due(every: int) -> bool:
        return step > first and (step >= total or stop or (every > 0 and step % every == 0))

    while True:
        if due(config.log_every):
            stop |= flags.read(everything=True)
            elapsed = torch.tensor(time.perf_counter() - began, device=device, dtype=torch.float32)
            seconds = distributed.all_reduce_(elapsed, "max").item()
            if config.max_minutes is not None:  # every rank has the same seconds, so the same schedule
                total = min(config.steps, step + max(0, int((config.max_minutes * 60 / seconds - 1) * step)))
            means = window.close() | _skipped(loader, device)
            if work is not None:
                means["mfu"] = means["samples_per_second"] / distributed.world_size() * work
            metrics |= log.step(step, total, seconds, rate, means)
            if scaler is not None and scaler.get_scale() < 2**-20:
                raise NonFiniteError(
                    f"step {step}: fp16 gradients overflow at any loss scale; use bf16 or fp32"
                )

        last = stop or step >= total
        if evaluate is not None and due(config.eval_every) and not stop:
            flags.read(everything=True)
            with window.paused():
                metrics |= log.evaluation(step, _evaluate(evaluate, objective, step, accelerator))
                if best is not None:
                    best.judge(step, metrics[f"eval/{best.metric}"], objective)

        if due(config.save_every):
            flags.read(everything=True)
            progress = {"seconds": time.perf_counter() - began, "total_steps": total}
            if scaler is not None:
                progress["scaler"] = scaler.state_dict()
            with window.paused():
                state.save(
                    folder, step, objective, optimizer,
                    loader=loader.state_dict(), progress=progress, keep=config.keep_states,
                )  # fmt: skip

        if last:
            break

        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        rate = optim.learning_rate(
            step,
            total=total,
            peak=config.learning_rate,
            floor=config.min_learning_rate,
            warmup=config.warmup_steps,
        )
        optim.set_learning_rate(optimizer, rate)

        with accelerator.autocast():
            parts = split(_to(batch, device), step, config.seed)
        values = _backward(model, parts, accelerator)
        loss = values["loss"]
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = optim.gradient_norm(parameters, config.clip_norm)
        finite = torch.isfinite(loss)
        if scaler is None:  # fp16's scaler handles an infinite norm: it skips the step, lowers the scale
            finite = finite & torch.isfinite(norm)
        bad = (~finite).float()
        flag = torch.stack([bad, torch.full_like(bad, float(stop_requested()))])
        distributed.all_reduce_(flag, "max")  # what one rank sees, all ranks act on
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = flag[0]  # type: ignore[attr-defined]  # AdamW's fused step does nothing where it is 1
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log.progress(step, total)

        window.add({**values, "grad_norm": norm}, _rows(batch), waited)
        flags.put(flag, step, values, batch.get("keys"))
        stop |= flags.read()
    log.close()
    if stop and step < total:
        log.say(
            f"stopped by a signal after step {step}; the state is saved, the same command goes on from there"
        )
    return Result(step, step >= total, metrics)


def _backward(model: nn.Module, parts: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
    """Accumulate the parts' gradients; returns "loss" and the other values, summed over the parts."""
    values: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(model):  # processes exchange gradients once
            outputs: dict[str, Tensor] = model(part)
            loss = torch.stack([value for name, value in outputs.items() if name.startswith("loss")]).sum()
            accelerator.backward(loss)
        for name, value in {"loss": loss, **outputs}.items():
            values[name] = values[name] + value.detach() if name in values else value.detach()
    return values


def _skipped(loader: Loader, device: torch.device) -> dict[str, float]:
    """How many samples all processes have left out, where the loader counts them."""
    if (skipped := getattr(loader, "skipped", None)) is None:
        return {}
    number = torch.tensor(float(sum(skipped.values())), device=device)
    return {"skipped": distributed.all_reduce_(number).item()}


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _rows(batch: Batch) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)


def _evaluate(
    evaluate: Evaluate, objective: nn.Module, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Rank 0's metrics, on every rank."""
    generators = state.rng_state()
    objective.eval()
    with torch.no_grad(), accelerator.autocast():
        metrics = {name: float(value) for name, value in evaluate(objective, step).items()}
    metrics = distributed.all_gather_object(metrics)[0]
    objective.train()
    state.set_rng_state(generators)
    return metrics
