"""Training steps timed: samples a second, share of the GPU's peak, memory, and where the time goes.

    python -m train.throughput stage1-vitg --batch 128
    python -m train.throughput stage2-opt-2-7b --batch 128 --profile trace.json
    python -m train.throughput stage1-vitg --batch 4 --layers 2 --steps 3   # a CPU: less depth

A recipe's full-size model is made with random weights from its sizes alone, so nothing is downloaded, and
takes steps on random pictures and captions by the parts that `fit` puts together: the objective's `split` and
`forward`, its backward pass, the fused optimizer. Reading of data is not in it. Steps with the image encoder
as written and compiled alternate, and medians are given. Operations and expected memory are those that
`train.count` and `train.plan` find for the same step, so memory computed stands beside memory measured.
One process; what more of them take shows in the log of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from train import distributed, objectives, plan, shapes
from train.count import count
from train.engine import make_accelerator
from train.execution import prepare
from train.objectives import Stage1
from train.recipes import RECIPES, Recipe, RecipeError
from train.trial import Clock, Trainer, batch, build, expected, materialize, parameters

WARM_UP, LABELED = 3, 3  # steps before the clock starts; steps in which parts are told apart
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIBRARIES = 1.5e9  # bytes that torch and what it loads take on a CPU, about


@contextlib.contextmanager
def labeled(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Tell the parts of a step apart, from outside; no part is inside of another."""
    objective, model = trainer.objective, trainer.objective.model
    where: list[tuple[Any, str, str]] = [
        (model.vision_model, "encode", "image encoder"),
        (trainer.accelerator, "backward", "backward"),
        (trainer, "update", "optimizer"),
    ]
    if isinstance(objective, Stage1):
        where += [
            (model, "read_pairs", "Q-Former: queries and texts"),
            (objective, "_itc", "ITC"),
            (objective, "_pool", "gather"),
            (objectives, "sample_hard_negatives", "hard negatives"),
            (model, "itm", "ITM"),
            (model, "itg", "ITG"),
        ]
    else:
        where += [
            (model, "read_image", "Q-Former, projection"),
            (model.language_model, "forward", "language model"),
        ]
    with contextlib.ExitStack() as stack:
        for owner, name, label in where:
            stack.enter_context(mock.patch.object(owner, name, clock.around(label, getattr(owner, name))))
        yield


# --- the measurement ---


def measure(
    recipe: Recipe, rows: int, *, steps: int = 20, layers: int | None = None, trace: Path | None = None
) -> dict[str, Any]:
    """Build, warm up, time, tell apart, profile.

    Args:
        recipe: its execution says how.
        rows: pairs of the one process's batch.
        steps: timed, of each kind.
        layers: see `build`.
        trace: file for a chrome trace of one step.

    Raises:
        RecipeError: this machine has too little memory.
    """
    precision = PRECISION[recipe.fit.precision]
    meta = build(recipe, layers)
    prepare(meta, dataclasses.replace(recipe.execution, compile=False), torch.device("meta"))
    counts = count(meta, shapes.batch(recipe, rows), precision=precision)
    memory = expected(recipe, meta, counts)
    accelerator = make_accelerator(recipe.fit.precision)
    device = accelerator.device
    if device.type == "cpu":
        _check_room(sum(memory.values()) - plan.RESERVED + LIBRARIES)
    distributed.seed_everything(recipe.fit.seed)
    objective = build(recipe, layers)
    materialize(objective, device)
    trainer = Trainer(recipe, objective, accelerator)
    batches = [batch(recipe, objective, rows, seed) for seed in range(2)]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__, "stage": recipe.stage, "batch": rows, "layers": layers, "steps": steps,
        "execution": dataclasses.asdict(recipe.execution), "precision": recipe.fit.precision,
        "parameters": {"trained": parameters(objective, True), "frozen": parameters(objective, False)},
        "text_tokens": {n: list(v.shape) for n, v in batches[0].items() if n in ("input_ids", "labels")},
        "real_tokens": int(batches[0]["attention_mask"].sum()),
        "flops": counts.flops, "computed_memory": memory, "sides": {},
    }  # fmt: skip
    peak = plan.PEAK.get(next((gpu for gpu in plan.PEAK if gpu in result["device"].lower()), ""))

    def once(number: int = 0) -> None:
        trainer.step(batches[number % 2])

    sides = list(trainer.encoders)
    for side in sides:
        trainer.use(side)
        began = time.perf_counter()
        once()
        trainer.finish()
        result["sides"][side] = {"first_step_seconds": time.perf_counter() - began}
        for number in range(WARM_UP - 1):
            once(number)
        result["sides"][side] |= _memory_of(trainer, once)
    clock = Clock(device)
    for number in range(steps):
        for side in sides if number % 2 == 0 else reversed(sides):
            trainer.use(side)
            with clock.span(side):
                once(number)
    trainer.finish()
    for side, seconds in clock.read().items():
        median = statistics.median(seconds)
        found = result["sides"][side]
        found |= {
            "seconds": median,
            "samples_per_second": rows / median,
            "flops_per_second": counts.flops / median,
        }
        found |= {"fastest": min(seconds), "slowest": max(seconds)}
        if peak is not None:
            found["mfu"] = counts.flops / median / peak
        trainer.use(side)
        found["parts"] = _parts(trainer, once)
    result["waits"] = _waits(trainer, once)
    result["operations"] = _operations(trainer, once, trace)
    return result


def _check_room(needed: float) -> None:
    free = psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise RecipeError(
            f"this takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: make it "
            "smaller, such as with --layers 2 --batch 4"
        )


def _memory_of(trainer: Trainer, once: Callable[[], None]) -> dict[str, float]:
    """Bytes at the peak of a step; on a CPU of the process so far, libraries and all."""
    if trainer.device.type != "cuda":
        once()
        return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    trainer.finish()
    torch.cuda.reset_peak_memory_stats(trainer.device)
    once()
    trainer.finish()
    return {
        "allocated": float(torch.cuda.max_memory_allocated(trainer.device)),
        "reserved": float(torch.cuda.max_memory_reserved(trainer.device)),
    }


def _parts(trainer: Trainer, once: Callable[[int], None]) -> dict[str, float]:
    """Share of a step's time by part."""
    clock = Clock(trainer.device)
    with labeled(trainer, clock):
        for number in range(LABELED):
            with clock.span("step"):
                once(number)
    trainer.finish()
    sums = {name: sum(seconds) for name, seconds in clock.read().items()}
    whole = sums.pop("step")
    shares = {name: seconds / whole for name, seconds in sums.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


def _waits(trainer: Trainer, once: Callable[[], None]) -> list[str] | None:
    """Where the host waits for the GPU within a step, by torch's own account; None without a GPU."""
    if trainer.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            once()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def _operations(
    trainer: Trainer, once: Callable[[], None], trace: Path | None
) -> list[tuple[str, float, int]]:
    """The ten operations that take most of a step: name, share of all, calls."""
    on_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    clock = Clock(trainer.device)
    with profile(activities=activities) as profiled, labeled(trainer, clock):
        once()
        trainer.finish()
    if trace is not None:
        profiled.export_chrome_trace(str(trace))
    labels = {name for name, *_ in clock.spans}
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiled.key_averages()
        if event.key not in labels and event.device_type == torch.autograd.DeviceType.CPU
    }
    whole = sum(spent for spent, _ in times.values()) or 1
    first = sorted(times, key=lambda name: -times[name][0])[:10]
    return [(name, times[name][0] / whole, times[name][1]) for name in first]


# --- the command ---


def report(name: str, found: dict[str, Any]) -> str:
    """What was measured, to read."""
    cut = found["layers"] is not None
    computed = sum(found["computed_memory"].values())
    lines = [
        f"{name}: {found['device']}, batch {found['batch']}, one process, random weights and data"
        + (f"; REDUCED to {found['layers']} layers of each stack, at full width" if cut else ""),
        f"  parameters   {found['parameters']['trained']:,} trained, "
        f"{found['parameters']['frozen']:,} frozen",
        f"  work         {found['flops'] / found['batch'] / 1e12:.3f} TFLOP a pair; "
        f"text {found['text_tokens']}, {found['real_tokens']} real tokens",
        f"  memory       {computed / 1e9:.1f} GB computed for a GPU: "
        + ", ".join(f"{size / 1e9:.2f} {what}" for what, size in found["computed_memory"].items()),
    ]
    for side, of in found["sides"].items():
        share = f"{of['mfu']:.1%} of the peak" if "mfu" in of else "peak of this device not known"
        bytes_ = ", ".join(
            f"{of[n] / 1e9:.1f} GB {n}" for n in ("allocated", "reserved", "resident") if n in of
        )
        lines += [
            f"  encoder {side}: {of['samples_per_second']:.2f} samples/s, "
            f"{1000 * of['seconds']:.0f} ms a step "
            f"(median of {found['steps']}, {1000 * of['fastest']:.0f} to {1000 * of['slowest']:.0f}), "
            f"{of['flops_per_second'] / 1e12:.2f} TFLOP/s, {share}; {bytes_} at the peak",
            *(f"    {part:6.1%}  {what}" for what, part in of["parts"].items()),
        ]
    lines += ["  operations of one step"]
    lines += [f"    {share:6.1%}  {calls:6d} x {what}" for what, share, calls in found["operations"]]
    if found["waits"] is not None:
        lines.append(
            f"  the host waits {len(found['waits'])} times a step: {', '.join(found['waits']) or '-'}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: measured; 1: out of memory; 2: it could not start."""
    parser = argparse.ArgumentParser(prog="python -m train.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=[name for name in RECIPES if not name.startswith("scenes")])
    parser.add_argument("--batch", type=int, default=128, help="pairs of this process")
    parser.add_argument("--micro-batch-size", type=int, help="pairs at a time; all by default")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the encoder compiled, too; default: on GPUs",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed, of each kind")
    parser.add_argument("--layers", type=int, help="cut every stack of layers to so many")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a chrome trace of one step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    given = parser.parse_args(arguments)
    micro = given.micro_batch_size
    sizes = [given.batch, given.steps, *(size for size in (given.layers, micro) if size is not None)]
    if min(sizes) < 1 or given.batch % (micro or 1):
        parser.error("sizes are at least 1, and --micro-batch-size divides --batch")
    if distributed.promised() > 1:
        parser.error("one process measures one GPU: start it without torchrun")
    recipe = RECIPES[given.recipe]()
    changes = {"micro_batch_size": micro, "checkpointing": given.checkpointing, "compile": given.compile}
    recipe = dataclasses.replace(recipe, execution=dataclasses.replace(recipe.execution, **changes))
    plain = contextlib.nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)
    try:
        with plain:
            found = measure(recipe, given.batch, steps=given.steps, layers=given.layers, trace=given.profile)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        half = max(1, (micro or given.batch) // 2)
        print(
            f"error: out of memory with {micro or given.batch} pairs at a time: try "
            f"--micro-batch-size {half}, or --checkpointing ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    print(report(given.recipe, found))
    if given.json is not None:
        temporary = given.json.with_name(f".{given.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"recipe": given.recipe, **found}, indent=1) + "\n")
        temporary.rename(given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
