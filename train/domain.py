"""Your own pictures: a recipe of the paper's, fitted to a folder of images and captions.

    python -m train.pretrain stage1-vitg --folder my/pictures
    python -m train.pretrain stage2-opt-2-7b --folder my/pictures --start-from runs/stage1-vitg-pictures/model

The folder holds shards (docs/data.md), or images and a .csv, a .jsonl or texts of their names, which are made
into shards once.
A `source.json` in it says how it is read: the fields of `train.datasets.Source`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from train import distributed
from train.datasets import Shards, Source
from train.recipes import RecipeError, Run

R = TypeVar("R", bound=Run)
EPOCHS = 10  # as LAVIS's public configurations on COCO and Visual Genome
BATCHES = 40  # at least in an epoch: smaller data sets get smaller batches
LEAST = 32  # pairs in a batch; ITC has as many candidates
HELD_OUT = 0.05  # of the pairs, for the probe, where the folder has no val split of its own
AT_MOST = 1000


def domain(recipe: R, folder: str | Path, source: Source | None = None) -> R:
    """A recipe for the data in a folder, its steps and learning rate scaled to how much there is.

    Ten epochs, but no more steps than the recipe has; batches that an epoch has at least 40 of; the learning
    rate by the square root of the batch, as Adam wants it; at most a tenth of the steps to warm up. The best
    weights by the probe are saved. These rules are ours.

    Args:
        recipe: of a stage, or of fine-tuning; what it starts from, its losses and its machines stay.
        folder: shards; or images, and a .csv or .jsonl with `image` and `caption` or a .txt beside each.
        source: how pictures and captions are read, by default as source.json in the folder says. Captions
            that tell left from right want `flip=0`; that count things or say where they are, `crop=1`.

    Raises:
        RecipeError: the folder holds neither, or its shards are not prepared.
    """
    folder = Path(folder)
    shards = _shards(folder)
    source = source or read_source(shards) or read_source(folder) or Source()
    data = Shards({str(shards): 1.0}, settings={str(shards): source})
    if lacking := data.missing():
        raise RecipeError("\n".join(lacking))
    pairs = count(shards, "train")
    if not count(shards, "val"):
        raise RecipeError(f"{shards} has no val split for the probe; prepare it again with --validation 500")
    fit, world = recipe.fit, distributed.promised()
    batch = min(recipe.batch_size, max(LEAST, 2 ** int(math.log2(max(1, pairs // BATCHES)))))
    batch -= batch % world
    if not world <= batch <= pairs:
        raise RecipeError(f"{shards} holds {pairs} pairs to train on, too few for {world} process(es)")
    steps = min(fit.steps, max(100, EPOCHS * pairs // batch))
    scale = math.sqrt(batch / recipe.batch_size)
    often = max(10, steps // 20)
    made: Any = recipe
    return dataclasses.replace(
        made,
        data=data,
        batch_size=batch,
        save="best",
        output=f"{recipe.output}-{folder.name}",
        fit=dataclasses.replace(
            fit, steps=steps, warmup_steps=min(fit.warmup_steps, steps // 10),
            learning_rate=fit.learning_rate * scale, min_learning_rate=fit.min_learning_rate * scale,
            eval_every=often, save_every=often, log_every=max(1, often // 5),
            probe="retrieval" if recipe.stage == 1 else "cider", collapse=0.0 if recipe.stage == 1 else 2 / 3,
        ),
    )  # fmt: skip


def _shards(folder: Path) -> Path:
    """The folder itself, or the shards made of its table or texts."""
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}")
    made = folder / "shards"
    if not made.exists() and any(folder.glob("**/*.tar")):
        return folder
    if not (made / ".nv-meta" / "dataset.yaml").exists():
        if distributed.promised() > 1:
            raise RecipeError(f"run `python -m train.data prepare pairs {folder} {made}` first, once")
        from train.data import prepare  # energon takes seconds to import
        from train.data.records import AnnotationError

        try:
            prepare.own(folder, made, HELD_OUT, AT_MOST)
        except AnnotationError as error:
            raise RecipeError(f"no shards (.tar), nor what they are made of: {error}") from error
    return made


def read_source(folder: Path) -> Source | None:
    """What source.json of a folder says, if it has one.

    Raises:
        RecipeError: it says something else.
    """
    path = folder / "source.json"
    if not path.exists():
        return None
    try:
        return Source(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Source))
        raise RecipeError(f"{path}: {error}; its fields are {fields}") from error


def count(folder: Path, part: str) -> int:
    """Samples of a prepared folder's split."""
    meta = folder / ".nv-meta"
    split = json.loads((meta / "split.yaml").read_text())["split_parts"]
    sizes = json.loads((meta / ".info.json").read_text())["shard_counts"]
    return sum(sizes[name] for name in split.get(part, []))
