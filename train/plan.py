"""What a run will take, before any money is spent: memory per GPU, micro batches, speed, days, disk.

    python -m train.pretrain stage1-vitg --plan --gpus 8 --nodes 2 --gpu-memory 40
    python -m train.plan                          # the table of docs/pretraining.md

Everything here is computed, nothing measured. `train.count` takes one whole step of the full-size model
without numbers; time follows from its floating-point operations and an assumed share of the GPU's peak (MFU,
in which recomputed activations count as work). Memory per GPU is the sum of

    frozen weights in their precision (a sharded language model: its share, embeddings, two layers)
    trained weights, 4 bytes; AdamW's two states, 8 bytes; DistributedDataParallel's buckets, 4 bytes each
    the counted peak of the step: pixels, activations, gathered image embeddings, gradients
    10% of that peak for what the allocator wastes, and 2 GB for CUDA, NCCL and cuBLAS: rough allowances

Captions are taken to be as long as they may be: batches are padded to the longest. The counting itself was
held to the one published figure: see tests/test_plan.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.count import Counts, count
from train.datasets import Shards
from train.recipes import RECIPES, Execution, RecipeError, Run
from train.shapes import batch, build, parts, sizes

PEAK = {
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
}  # dense bf16, of data sheets
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.516}
RESERVED = 2e9
WASTE = 0.1
ENOUGH = 16  # pairs at a time that keep a GPU busy; with fewer, recomputing or sharding is tried
PAPER_DAYS = {"stage1-vitg": 6, "stage2-flan-t5-xxl": 3}  # at most, on 16 A100s of 40 GB [P 3.4]


@dataclass(frozen=True)
class Plan:
    """What `plan` found; times in seconds, memory in bytes, of one GPU.

    Attributes:
        execution: the recipe's, with micro batch, checkpointing and sharding chosen.
        options: of the command line beside the recipe's name, which made the recipe what it is.
        memory: what takes how much of a GPU's memory.
        counts: of one step of one process.
        seconds: of a step, at the assumed MFU.
    """

    name: str
    recipe: Run
    execution: Execution
    gpu: str
    gpus: int
    nodes: int
    gpu_memory: float
    mfu: float
    trained: int
    frozen: int
    memory: dict[str, float]
    counts: Counts
    seconds: float
    options: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        """GPUs on all nodes."""
        return self.gpus * self.nodes

    @property
    def total_memory(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory.values())

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.recipe.fit.steps * self.seconds / 86400

    @property
    def flops_per_pair(self) -> float:
        """Floating-point operations."""
        return self.counts.flops * self.processes / self.recipe.batch_size

    @property
    def command(self) -> str:
        """The line that starts the run."""
        words = [f"torchrun --nproc-per-node {self.gpus}"]
        words += [f"--nnodes {self.nodes} --rdzv-backend c10d --rdzv-endpoint $HOST:29500"] * (self.nodes > 1)
        words += ["--standalone"] * (self.nodes == 1)
        words += [shlex.join(["-m", self.recipe.program, self.name, *self.options])]
        chosen = [f"--micro-batch-size {self.execution.micro_batch_size}"]
        chosen += ["--checkpointing"] * self.execution.checkpointing
        chosen += ["--shard-language-model"] * self.execution.shard_language_model
        if self.execution.language_precision in ("int8", "nf4"):
            chosen.append(f"--language-precision {self.execution.language_precision}")
        given = {word.partition("=")[0].replace("_", "-") for word in self.options}
        return " ".join([*words, *(option for option in chosen if option.split()[0] not in given)])

    def __str__(self) -> str:
        recipe, local = self.recipe, self.recipe.batch_size // self.processes
        micro = self.execution.micro_batch_size or local
        pairs = recipe.batch_size * recipe.fit.steps
        lines = [
            f"{self.name}: computed, not measured",
            f"  machines       {self.nodes} x {self.gpus} {self.gpu.upper()}, {self.gpu_memory:.0f} GB each",
            f"  parameters     {self.trained:,} trained, {self.frozen:,} frozen",
            f"  batch          {recipe.batch_size} pairs = {self.processes} GPUs x {local // micro} x {micro}"
            f"; recomputing: {_yes(self.execution.checkpointing)}"
            f"; language model sharded: {_yes(self.execution.shard_language_model)}",
            f"  memory a GPU   {self.total_memory / 1e9:.1f} GB, of which",
            *(f"                 {size / 1e9:6.1f}  {what}" for what, size in self.memory.items() if size),
            f"  work           {self.flops_per_pair / 1e12:.2f} TFLOP a pair",
            f"  speed          {1 / self.seconds:.2f} steps/s at {self.mfu:.0%} of the peak; "
            f"{local / self.seconds:.0f} images/s have to be read for each GPU",
            f"  length         {recipe.fit.steps:,} steps, {pairs / 1e6:.0f} M pairs{_epochs(recipe)}, "
            f"{self.days:.1f} days, {24 * self.days * self.processes:,.0f} GPU-hours",
            f"  disk           {recipe.fit.keep_states + 1} states of {12 * self.trained / 1e9:.1f} GB each",
        ]
        if self.name in PAPER_DAYS:
            days = PAPER_DAYS[self.name]
            least = pairs * self.flops_per_pair / (days * 86400 * 16 * PEAK["a100"])
            lines.append(
                f"  the paper      under {days} days on 16 A100 of 40 GB: MFU above {least:.0%} for this work"
            )
        return "\n".join([*lines, "  start with", f"    {self.command}"])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _epochs(recipe: Run) -> str:
    if not isinstance(recipe.data, Shards):
        return ""
    images = sum(recipe.data.weights.values())
    return f" ({recipe.batch_size * recipe.fit.steps / images:.2f} times its images)" if images > 1e5 else ""


def plan(
    recipe: Run,
    name: str = "RECIPE",
    options: Sequence[str] = (),
    *,
    gpus: int = 8,
    nodes: int = 1,
    gpu_memory: float = 40,
    gpu: str = "a100",
    mfu: float = 0.30,
) -> Plan:
    """How a recipe runs on given machines: the largest micro batch that fits, and what follows from it.

    Args:
        recipe: a `micro_batch_size` that it states is kept, and so are checkpointing and sharding.
        name: as on the command line.
        options: the rest of the command line, for the plan's own.
        gpus: of a node.
        nodes: how many.
        gpu_memory: of one GPU, in 10^9 bytes.
        gpu: of `PEAK`.
        mfu: assumed share of the peak.

    Raises:
        RecipeError: it fits in no way, the batch cannot be divided so, or sizes are not known.
    """
    world = gpus * nodes
    if gpu not in PEAK or not 0 < mfu <= 1 or world < 1:
        raise RecipeError(f"a plan takes a gpu of {', '.join(PEAK)}, an mfu in (0, 1] and at least one GPU")
    if recipe.batch_size % world:
        raise RecipeError(f"batch_size {recipe.batch_size} is no multiple of {world} GPUs")
    local = recipe.batch_size // world
    best: tuple[Execution, Counts, dict[str, float]] | None = None
    for chosen in _variants(recipe, world):
        fitting = _largest(recipe, chosen, local, world, gpu_memory * 1e9)
        if fitting and (best is None or _micro(fitting) > _micro(best)):
            best = fitting
        if best and _micro(best) >= min(ENOUGH, local):
            break
    if best is None:
        raise RecipeError(
            f"{name} does not fit into {gpu_memory:.0f} GB: take GPUs with more memory"
            + (", or a smaller --micro-batch-size" if recipe.execution.micro_batch_size else "")
            + (", or --language-precision nf4" if recipe.stage == 2 else "")
        )
    chosen, counts, memory = best
    found = sizes(recipe)
    return Plan(
        name, recipe, chosen, gpu, gpus, nodes, gpu_memory, mfu, found["trained"],
        found["vision"] + found["language"], memory, counts, counts.flops / (PEAK[gpu] * mfu),
        tuple(options),
    )  # fmt: skip


def _micro(fitting: tuple[Execution, Counts, dict[str, float]]) -> int:
    return fitting[0].micro_batch_size or 0


def _variants(recipe: Run, world: int) -> list[Execution]:
    """Ways to run, the quickest first."""
    given = recipe.execution
    shards = [given.shard_language_model]
    if recipe.stage == 2 and world > 1 and not given.shard_language_model:
        shards.append(True)
    recompute = [given.checkpointing] + [True] * (not given.checkpointing)
    return [
        dataclasses.replace(given, checkpointing=again, shard_language_model=split)
        for split in shards
        for again in recompute
    ]


def _largest(
    recipe: Run, chosen: Execution, local: int, world: int, limit: float
) -> tuple[Execution, Counts, dict[str, float]] | None:
    """The largest micro batch that fits; memory grows evenly with it, so few have to be counted."""
    given = chosen.micro_batch_size
    if given is not None and local % given:
        raise RecipeError(f"micro_batch_size {given} does not divide the {local} pairs of a GPU")
    divisors = [size for size in range(local, 0, -1) if local % size == 0]
    guess = float(local)
    for micro in divisors if given is None else [given]:
        if given is None and micro > guess:
            continue
        tried = dataclasses.replace(chosen, micro_batch_size=micro)
        counts = _count(recipe, tried, local, world)
        memory = _memory(recipe, tried, counts, world)
        total = sum(memory.values())
        if total <= limit or given is not None:
            return (tried, counts, memory) if total <= limit else None
        rest = total - (1 + WASTE) * counts.peak
        guess = micro * max(0.0, limit - rest) / (total - rest) * 1.2  # on the safe side: it is counted, too
    return None


_known: dict[Any, Any] = {}  # what is the same on other machines is counted once


def _count(recipe: Run, chosen: Execution, local: int, world: int) -> Counts:
    same = dataclasses.replace(chosen, shard_language_model=False, workers=0)
    key = (*parts(recipe), recipe.max_text_length, recipe.fit.precision, str(same), local, world)
    if key not in _known:
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        _known[key] = count(
            build(recipe, chosen), batch(recipe, local),
            processes=world, precision=precision[recipe.fit.precision],
        )  # fmt: skip
    return _known[key]


def _memory(recipe: Run, chosen: Execution, counts: Counts, world: int) -> dict[str, float]:
    numbers = sizes(recipe)
    memory = {"image encoder, frozen": numbers["vision"] * BYTES[chosen.vision_precision]}
    if recipe.stage == 2:
        each = BYTES[chosen.language_precision]
        share: float = numbers["language"]
        if chosen.shard_language_model:
            share = (share - numbers["ends"]) / world + numbers["ends"] + 2 * numbers["layer"]
        memory["language model, frozen"] = each * share
    return memory | {
        "trained weights, AdamW, buckets": numbers["trained"] * (16.0 if world > 1 else 12.0),
        "the step, at its peak": counts.peak,
        "allowances": WASTE * counts.peak + RESERVED,
    }


def work_per_pair(recipe: Run, processes: int, device: torch.device) -> float | None:
    """Seconds that a pair would take this GPU at its peak; None where the peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
    local = recipe.batch_size // processes
    return None if peak is None else _count(recipe, recipe.execution, local, processes).flops / local / peak


# --- the command ---

MACHINES = [(nodes, memory) for nodes in (1, 2) for memory in (40, 80)]
PAPER = [name for name in RECIPES if not name.startswith("scenes")]


def table() -> str:
    """All of the paper's recipes on 8 and 16 A100s, as Markdown."""
    lines = [
        "| recipe | A100s | pairs at a time | GB a GPU | steps/s | days | GPU-hours |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(name, nodes, memory) for name in PAPER for nodes, memory in MACHINES])


def row(name: str, nodes: int, memory: int) -> str:
    """One line of the table."""
    found = plan(RECIPES[name](), name, nodes=nodes, gpu_memory=memory)
    chosen, local = found.execution, found.recipe.batch_size // found.processes
    how = f"{chosen.micro_batch_size} of {local}"
    how += ", recomputing" * chosen.checkpointing + ", LLM sharded" * chosen.shard_language_model
    return (
        f"| `{name}` | {found.processes} x {memory} GB | {how} | {found.total_memory / 1e9:.0f} "
        f"| {1 / found.seconds:.2f} | {found.days:.1f} | {24 * found.days * found.processes:,.0f} |"
    )


def take_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the arguments of `plan` and the rest, which is the recipe's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu-memory", type=float, default=40)
    parser.add_argument("--gpu", choices=list(PEAK), default="a100")
    parser.add_argument("--mfu", type=float, default=0.30)
    options, rest = parser.parse_known_args(list(arguments))
    return vars(options), [word for word in rest if word != "--plan"]


if __name__ == "__main__":
    print(table())
