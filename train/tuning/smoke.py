"""`--smoke`: any fine-tuning recipe end to end on drawn scenes, from the embedded checkpoints, in minutes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train import distributed
from train.datasets import Scenes
from train.tuning.recipes import Tuning

STEPS, MINUTES, ROWS, SCENES = 200, 2.0, 32, 4_000
PIXELS = 80  # not the 64 that the embedded checkpoints were trained with: positions are interpolated


def smoke(recipe: Tuning, name: str, folder: Path = Path("runs/smoke")) -> Tuning:
    """The small run of a recipe; its task, losses, layer decay and precisions stay.

    Args:
        recipe: any.
        name: its own, under which the run goes into `folder`.
        folder: for the run.
    """
    small = "scenes-flan-t5" if "t5" in recipe.start_from else "scenes-opt"
    micro = None if recipe.execution.micro_batch_size is None else ROWS // 2
    execution = dataclasses.replace(recipe.execution, micro_batch_size=micro, workers=0, threads=None)
    if distributed.promised() == 1:
        execution = dataclasses.replace(execution, shard_language_model=False)
    fit = dataclasses.replace(
        recipe.fit, steps=STEPS, warmup_steps=STEPS // 20, max_minutes=MINUTES, learning_rate=3e-4,
        clip_norm=1.0, log_every=20, eval_every=STEPS // 2, save_every=STEPS // 2,
    )  # fmt: skip
    return dataclasses.replace(
        recipe,
        start_from="scenes-itm" if recipe.stage == 1 else small,
        stage1=None if recipe.stage1 is None else "scenes-itm",
        resolution=None if recipe.resolution is None else PIXELS,
        data=Scenes(num_scenes=SCENES, num_validation=96, telling=recipe.stage == 1),
        batch_size=ROWS, max_text_length=30, fit=fit, execution=execution, output=str(folder / name),
    )  # fmt: skip
