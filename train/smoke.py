"""`--smoke`: any recipe end to end on drawn scenes, with small parts in place of its large ones.

What the recipe says of the stage, the losses, the optimizer, the precisions and the machines stays; the
data, the sizes and the length are those of a few minutes on two cores. The small parts are taken out of the
embedded checkpoints, so nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from blip2 import checkpoint
from blip2.presets import PRESETS
from train import distributed
from train.datasets import Scenes
from train.recipes import RECIPES, Recipe

STEPS, MINUTES, PAIRS, SCENES = 600, 3.5, 48, 20_000


def smoke(recipe: Recipe, name: str, folder: Path = Path("runs/smoke")) -> Recipe:
    """The small run of a recipe; writes the parts that it starts from.

    Args:
        recipe: any.
        name: its own, under which the run goes into `folder`.
        folder: for the parts and the run.
    """
    parts = folder / "parts"
    if not parts.exists():
        _extract(parts)
    execution = recipe.execution
    micro = None if execution.micro_batch_size is None else PAIRS // 2
    execution = dataclasses.replace(execution, micro_batch_size=micro, workers=0, threads=None)
    if distributed.promised() == 1:
        execution = dataclasses.replace(execution, shard_language_model=False)
    fit = dataclasses.replace(
        recipe.fit, steps=STEPS, warmup_steps=STEPS // 20, max_minutes=MINUTES, learning_rate=8e-4,
        clip_norm=1.0, log_every=20, eval_every=STEPS // 4, save_every=STEPS // 4,
    )  # fmt: skip
    small = RECIPES["scenes-stage1"]()
    stage2 = {
        "start_from": str(PRESETS["scenes-itm"].folder),
        "language_model": str(parts / ("t5" if "t5" in str(recipe.language_model) else "opt")),
        "whole_captions": 0.5,
    }
    stage1 = {
        "start_from": str(parts / "encoder"),
        "qformer": dataclasses.replace(small.qformer, dropout=recipe.qformer.dropout),
        "language_model": None,
    }
    changes: dict[str, Any] = stage1 if recipe.stage == 1 else stage2
    return dataclasses.replace(
        recipe,
        data=Scenes(num_scenes=SCENES, num_validation=192, telling=recipe.stage == 1),
        tokenizer=None, bert=None, encoder=None, max_text_length=26, batch_size=PAIRS,
        fit=fit, execution=execution, output=str(folder / name), **changes,
    )  # fmt: skip


def _extract(parts: Path) -> None:
    """Write the embedded checkpoints' image encoder and language models as folders that recipes start from.

    Several processes may do so at once: the first to be ready wins.
    """
    temporary = parts.with_name(f".parts.{os.getpid()}")
    (temporary / "encoder").mkdir(parents=True)
    encoder = checkpoint.load("scenes-itm", precision="float32", device="cpu").model.vision_model
    encoder.post_layernorm.reset_parameters()  # trained in stage 1
    save_file(encoder.state_dict(), temporary / "encoder" / "model.safetensors")
    encoder.config.to_json_file(temporary / "encoder" / "config.json")
    for family, embedded in (("opt", "scenes-opt"), ("t5", "scenes-flan-t5")):
        loaded = checkpoint.load(embedded, precision="float32", device="cpu")
        language_model: Any = loaded.model.language_model
        language_model.save_pretrained(temporary / family)
        loaded.processor.tokenizer.save_pretrained(temporary / family)
    try:
        temporary.rename(parts)
    except OSError:
        shutil.rmtree(temporary)
