"""The paper's Figure 5 in the small: what representation learning (stage 1) is worth to stage 2.

    python -m train.scenes.experiment run       what is not done yet; then writes docs/experiment.*

Three seeds with stage 1 and three without (a Q-Former of random weights), equal steps of stage 2 on the same
captions; each of ITC, ITM and ITG left out of stage 1 once; and once the longer stage 1 of the embedded
checkpoints. Everything trains on cached features of one frozen encoder, with a budget fixed beforehand, about
an hour of two cores. Questions are about validation scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
import torch

from blip2 import checkpoint
from train import distributed, pretrain
from train.recipes import RECIPES
from train.scenes.build import Phase, run_phases
from train.scenes.encoder import batch, load_encoder, normalize
from train.scenes.text import KINDS

ROOT = Path("runs/experiment")
BUILT = Path("runs/scenes")
SEEDS = (0, 1, 2)
OBJECTIVES = ("itc", "itm", "itg")
NUM_SCENES = 32_000
STEPS_1, STEPS_2, EVERY = 300, 600, 100
NUM_ASKED = 150
NAMES = {
    "with": f"with stage 1, {STEPS_1} steps",
    "without": "without stage 1",
    "built": "with stage 1 of the embedded checkpoints",
    **{o: f"without {o.upper()}" for o in OBJECTIVES},
}


def phases() -> dict[str, Phase]:
    """Every run by its name: ARM-SEED/stage1 and ARM-SEED/stage2 after the features they share."""
    data = ("--features", str(ROOT / "features" / "hidden.npy"), "--num-scenes", str(NUM_SCENES))
    found = {"features": Phase(("train.scenes.experiment", "features"), (), "hidden.npy")}
    runs = [("with", seed) for seed in SEEDS] + [("without", seed) for seed in SEEDS]
    for arm, seed in [*runs, *((arm, 0) for arm in (*OBJECTIVES, "built"))]:
        name = f"{arm}-{seed}"
        common = (*data, "--seed", str(seed), "--max-minutes", "None")
        command: tuple[str, ...]
        if arm in ("without", "built"):
            start = "random" if arm == "without" else "built"
            command = ("train.scenes.experiment", start, "--seed", str(seed))
        else:
            kept = [objective for objective in OBJECTIVES if objective != arm]
            command = ("train.pretrain", "scenes-stage1", *common, "--steps", str(STEPS_1))
            command += ("--eval-every", "0", "--objectives", *kept)
        found[f"{name}-stage1"] = Phase(command, ("features",), "model/model.safetensors")
        command = ("train.pretrain", "scenes-stage2-opt", *common, "--steps", str(STEPS_2))
        command += ("--eval-every", str(EVERY), "--num-asked", str(NUM_ASKED), "--num-validation", "128")
        command += ("--start-from", str(ROOT / f"{name}-stage1" / "model"))
        found[f"{name}-stage2"] = Phase(command, (f"{name}-stage1",), "model/model.safetensors")
    return found


def cache_features(out: Path) -> None:
    """Write what the frozen encoder makes of the training scenes: float16 (N, P, V), no `post_layernorm`."""
    model = load_encoder(BUILT / "encoder")
    first = model.encode(normalize(batch(range(2), "train")["pixels"]))
    partial = out / "hidden.part"
    shape = (NUM_SCENES, *first.shape[1:])
    hidden = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, NUM_SCENES, 200):
        pixels = batch(range(start, start + 200), "train")["pixels"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden[start : start + 200] = model.encode(normalize(pixels)).half().numpy()
    hidden.flush()
    os.replace(partial, out / "hidden.npy")


def random_start(out: Path, seed: int) -> None:
    """Write a stage-1 model that was never trained, for stage 2 to start from."""
    distributed.seed_everything(seed)
    objective, processor = pretrain.start(RECIPES["scenes-stage1"]())
    checkpoint.save(objective.model, processor, out / "model")


def built_start(out: Path) -> None:
    """Copy the stage-1 model of the embedded checkpoints, for stage 2 to start from."""
    shutil.copytree(BUILT / "stage1" / "model", out / "model")


def curves() -> dict[str, dict[str, list[dict[str, float]]]]:
    """By arm and seed: the evaluations along stage 2, each with `step`, `loss_lm`, kinds and their `mean`."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in phases():
        if not name.endswith("-stage2"):
            continue
        arm, seed, _ = name.split("-")
        points = []
        for line in (ROOT / name / "log.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            values = {
                key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")
            }
            if values:
                mean = statistics.mean(values[kind] for kind in KINDS)
                points.append({"step": row["step"], **values, "mean": mean})
        found.setdefault(arm, {})[seed] = points
    return found


def report(folder: Path) -> None:
    """Write experiment.json, experiment.png and experiment.md."""
    from matplotlib import pyplot

    found = curves()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in (
        (axes[0], "mean", "zero-shot answers, exact match"),
        (axes[1], "loss_lm", "caption loss"),
    ):
        for arm, color in (("with", "#2563eb"), ("without", "#dc2626"), ("built", "#16a34a")):
            runs = list(found[arm].values())
            steps = [point["step"] for point in runs[0]]
            values = np.array([[point[key] for point in run] for run in runs])
            axis.plot(steps, values.mean(0), color=color, marker="o", label=NAMES[arm])
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel="steps of stage 2", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(folder / "experiment.png", dpi=110)
    pyplot.close(figure)
    rows = []
    for arm, seeds in found.items():
        last = [run[-1] for run in seeds.values()]
        cells = [_spread([point[key] for point in last]) for key in ("mean", *KINDS, "loss_lm")]
        rows.append(f"| {NAMES[arm]} | {len(last)} | " + " | ".join(cells) + " |")
    head = " | ".join(["mean", *(kind.replace("_", " ") for kind in KINDS), "caption loss"])
    table = [f"| | seeds | {head} |", "|---" * (len(KINDS) + 4) + "|", *rows]
    (folder / "experiment.md").write_text("\n".join(table) + "\n", "utf-8")
    print("\n".join(table))


def _spread(values: list[float]) -> str:
    """The mean, and the smallest and largest where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def main() -> None:
    """The parts that are no training run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("features", "random", "built", "run"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "features":
        cache_features(given.out)
    elif given.part == "random":
        random_start(given.out, given.seed)
    elif given.part == "built":
        built_start(given.out)
    else:
        run_phases(phases(), ROOT, given.jobs)
        report(given.out)


if __name__ == "__main__":
    main()
