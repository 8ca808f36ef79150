"""The drawn world as data sets: drawn on the fly, nothing to download; pictures are named split-seed."""

from __future__ import annotations

import random

from PIL import Image

from train.evaluation import Figures
from train.evaluation.annotations import DataSet, Example
from train.evaluation.predictions import Record
from train.scenes.evaluate import NAMED, gallery
from train.scenes.text import captions as true_captions
from train.scenes.text import full_caption, keywords
from train.scenes.text import questions as true_questions
from train.scenes.world import SEEDS_PER_SPLIT, Scene, render, sample


def _scene(name: str) -> Scene:
    split, seed = name.split("-")
    return sample(int(seed), split)


def picture(name: str, size: int) -> Image.Image:
    """Draw the scene of that name, `size` pixels a side."""
    return Image.fromarray(render(_scene(name), size))


def _name(scene: Scene, split: str) -> str:
    return f"{split}-{scene.seed % SEEDS_PER_SPLIT}"


def questions(count: int, split: str, *, unseen: bool = False) -> DataSet:
    """One question of every kind about each of the first scenes of a split.

    Args:
        count: scenes.
        split: "validation" or "test".
        unseen: in wordings that the embedded language models were not trained on.
    """
    examples = []
    for seed in range(count):
        scene = sample(seed, split)
        name = _name(scene, split)
        for text, answer, kind in true_questions(scene, random.Random(scene.seed), unseen=unseen):
            examples.append(Example(f"{name}-{kind}", name, (answer,), text, {"answer_type": kind}))
    return DataSet(examples, picture)


def captions(count: int, split: str, *, tuned: bool = False) -> DataSet:
    """The first scenes of a split with a true caption of every kind.

    Args:
        count: scenes.
        split: "validation" or "test".
        tuned: with captions that tell everything instead, as the recipe scenes-caption-opt trains them.
    """
    examples = []
    for seed in range(count):
        scene = sample(seed, split)
        name, words = _name(scene, split), random.Random(scene.seed)
        if tuned:
            told = tuple(dict.fromkeys(full_caption(scene, words) for _ in range(5)))
        else:
            told = tuple(true_captions(scene, words))
        examples.append(Example(name, name, told))
    return DataSet(examples, picture)


def pairs(count: int, split: str, *, tuned: bool = False) -> DataSet:
    """The first scenes of a split of which no two are told alike, with the caption that tells each.

    Args:
        count: scenes.
        split: "validation" or "test".
        tuned: with keywords instead, as the recipe scenes-retrieval trains them.
    """
    drawn, told = gallery(count, split, in_order=not tuned)
    if tuned:
        told = [keywords(scene, random.Random(scene.seed)) for scene in drawn]
    names = [(_name(scene, split), text) for scene, text in zip(drawn, told, strict=True)]
    return DataSet([Example(name, name, (text,)) for name, text in names], picture)


def object_figures(records: list[Record]) -> Figures:
    """Of captions, in percent: objects (color and shape) that are named, and named ones that are there."""
    named: list[float] = []
    right: list[float] = []
    for record in records:
        scene = _scene(record["image"])
        there = {(thing.color, thing.shape) for thing in scene.things}
        said = set(NAMED.findall(record["prediction"]))
        named.append(len(there & said) / len(there))
        right.append(len(there & said) / len(said) if said else 0.0)
    found = {"object recall": named, "object precision": right}
    return {name: 100 * sum(values) / len(values) for name, values in found.items()}
