"""All of the drawn world from nothing, by one command: `python -m train.scenes build`.

    encoder ----------> stage1 --+--> stage2-opt -------> blip2/assets/scenes-itm, scenes-opt, scenes-flan-t5
    opt, t5 (text only) ---------+--> stage2-flan-t5

Every phase is a command of its own that uses one thread (the last: two processes), goes on where it was
stopped, and ends in a folder; two run side by side. Stage 1 and 2 are `train.pretrain`'s, the same code that
trains BLIP-2 at full size.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from blip2 import checkpoint
from blip2.values import write_digests
from train.scenes import evaluate, novelty
from train.scenes.text import KINDS

RUNS = Path("runs/scenes")
ASSETS = Path("blip2/assets")
DESCRIPTIONS = (0, 1, 4, 12)  # how many captions a model may read before a question
EMBEDDED = {"scenes-itm": "stage1", "scenes-opt": "stage2-opt", "scenes-flan-t5": "stage2-flan-t5"}


@dataclass(frozen=True)
class Phase:
    """A command, the phases it starts from, the file that tells it is done, and how many run it."""

    command: tuple[str, ...]
    needs: tuple[str, ...]
    product: str
    processes: int = 1


PHASES = {
    "encoder": Phase(("train.scenes", "encoder"), (), "model.safetensors"),
    "opt": Phase(("train.scenes.language", "opt"), (), "model.safetensors"),
    "t5": Phase(("train.scenes.language", "t5"), (), "model.safetensors"),
    "stage1": Phase(("train.pretrain", "scenes-stage1"), ("encoder",), "model/model.safetensors"),
    "stage2-opt": Phase(
        ("train.pretrain", "scenes-stage2-opt"), ("stage1", "opt"), "model/model.safetensors"
    ),
    "stage2-flan-t5": Phase(
        ("train.pretrain", "scenes-stage2-flan-t5"), ("stage1", "t5"), "model/model.safetensors", processes=2
    ),
}


class PhaseError(RuntimeError):
    """A phase failed; its log says why."""


def run_phase(name: str, phase: Phase, root: Path) -> float:
    """Run one phase to its end; returns the minutes it took. Its output goes to ROOT/NAME.log."""
    folder, log = root / name, root / f"{name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    flag = "--output" if phase.command[0] == "train.pretrain" else "--out"
    many = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(phase.processes), "-m")
    command = (*(many if phase.processes > 1 else ()), *phase.command, flag, str(folder))
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-u", "-m", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
    if code or not (folder / phase.product).exists():
        raise PhaseError(
            f"phase {name} ended with exit code {code}; see {log}. The same command goes on from there"
        )
    return (time.monotonic() - started) / 60


def run_phases(phases: dict[str, Phase] | None = None, root: Path | None = None, jobs: int = 2) -> None:
    """Run what is not done yet, `jobs` phases at a time, in their order where they do not depend.

    Args:
        phases: by default the build's.
        root: where each has a folder; by default RUNS.
        jobs: how many processes at a time, a thread each; a phase that has more of them runs alone.

    Raises:
        PhaseError: one failed; those under way are waited for.
    """
    phases, root = phases or PHASES, root or RUNS
    done = {name for name, phase in phases.items() if (root / name / phase.product).exists()}
    for name in sorted(done):
        print(f"{name}: done before, in {root / name}", flush=True)
    running: dict[Future[float], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while len(done) < len(phases):
            for name, phase in phases.items():
                busy = sum(phases[other].processes for other in running.values())
                free = (not busy or busy + phase.processes <= jobs) and name not in {*done, *running.values()}
                if free and done.issuperset(phase.needs):
                    print(f"{name}: started, log in {root / name}.log", flush=True)
                    running[pool.submit(run_phase, name, phase, root)] = name
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                print(f"{name}: done in {future.result():.0f} minutes", flush=True)
                done.add(name)


def pack(scenes: int) -> None:
    """Write the finished models into the package as float16 files; settle what each knows and how it answers.

    How many of its own captions a model reads before it answers is chosen here, by the mean over the kinds
    of questions on validation scenes.
    """
    torch.set_num_threads(1)
    for name, phase in EMBEDDED.items():
        trained = checkpoint.load(RUNS / phase / "model", precision="float32", device="cpu")
        folder = checkpoint.save(trained.model, trained.processor, ASSETS / name, weights_dtype="float16")
        packed = checkpoint.load(folder, precision="float32", device="cpu")  # as users get it, rounded
        if packed.processor.family != "bert":
            means = {
                count: statistics.mean(found[kind] for kind in KINDS)
                for count in DESCRIPTIONS
                for found in [evaluate.answers(packed, scenes, "validation", described=count)]
            }
            packed.model.config.num_descriptions = max(means, key=lambda count: means[count])
            checkpoint.save(packed.model, packed.processor, folder, weights_dtype="float16")
        novelty.fit(packed, folder)
        write_digests(folder)
        (folder / "training.json").write_text(json.dumps(training(phase), indent=2) + "\n", "utf-8")
        (folder / "figures.json").unlink(missing_ok=True)  # those of the weights before
        record(folder, {"validation": evaluate.figures(packed, scenes, "validation")})


def record(folder: Path, found: dict[str, dict[str, evaluate.Figures]]) -> None:
    """Put figures, by split and suite, into a packed checkpoint's figures.json and model card."""
    file = folder / "figures.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps(known | found, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(card(folder), "utf-8")


def training(phase: str) -> dict[str, Any]:
    """What a model card says of a run: seed, steps, batch size, and the minutes it and its needs took."""
    config = json.loads((RUNS / phase / "config.json").read_text("utf-8"))
    last = json.loads((RUNS / phase / "log.jsonl").read_text("utf-8").splitlines()[-1])
    return {
        "seed": config["fit"]["seed"],
        "steps": last["step"],
        "batch_size": config["batch_size"],
        "minutes": minutes(phase),
    }


def minutes(phase: str) -> dict[str, float]:
    """How long a phase and those it needs took, in minutes of one core, as each wrote down."""
    folder = RUNS / phase
    if (folder / "log.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        seconds = max(row["seconds"] for row in rows if "seconds" in row)
    else:
        run = json.loads((folder / "figures.json").read_text("utf-8"))
        seconds = run["seconds"] if "seconds" in run else run["history"][-1]["seconds"]
    needed = [minutes(name) for name in PHASES[phase].needs]
    return {name: time for part in needed for name, time in part.items()} | {
        phase: seconds / 60 * PHASES[phase].processes
    }


def card(folder: Path) -> str:
    """A model card: what it is, how large, how it was trained, and its figures."""
    run = json.loads((folder / "training.json").read_text("utf-8"))
    state = load_file(folder / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in state.values())
    size = (folder / "model.safetensors").stat().st_size / 1e6
    rows = [
        f"| {split} | {suite} | {metric.replace('_', ' ')} | {value:.3f} |"
        for split, suites in json.loads((folder / "figures.json").read_text("utf-8")).items()
        for suite, metrics in suites.items()
        for metric, value in metrics.items()
    ]
    parts = ", ".join(f"{part} {time:.0f}" for part, time in run["minutes"].items())
    return "\n".join(
        [
            f"# {folder.name}",
            "",
            "A tiny BLIP-2 that knows drawn scenes only: 64-pixel pictures of one to four colored shapes.",
            f"{parameters:,} parameters, {size:.1f} MB in float16.",
            "",
            "Trained from nothing by the phases of `python -m train.scenes build`: "
            f"seed {run['seed']}, {run['steps']:,} steps of {run['batch_size']} at the end, "
            f"{sum(run['minutes'].values()):.0f} minutes of one CPU core in all ({parts}).",
            "No visual question was ever trained: answers are zero-shot, by the frozen language model.",
            "",
            "| split | suite | metric | value |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
