"""What fine-tuning reads: captions of shards or drawn scenes, and questions with answers.

An answer is drawn each time its question comes up, from the ten that people gave: an answer that five of them
gave comes up half of the time. In expectation that is the loss of BLIP's loaders, which decode every
different answer and weight its loss by its frequency; here a question costs the language model one pass.

Legend: B rows.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2.errors import ImageError
from blip2.images import open_image, preprocess
from blip2.processing import Processor
from train import distributed
from train.captions import Tokenize, representation_tokens
from train.data import records
from train.data.records import AnnotationError, Record
from train.data.transforms import TrainTransform, clean_question, decode
from train.datasets import RecipeError, Scenes, Shards
from train.loader import Batch, DataError, IndexLoader, Loader
from train.pretrain import EVALUATED, EVALUATED_BATCHES
from train.scenes.encoder import normalize
from train.scenes.text import KINDS, caption, full_caption, question, telling_caption
from train.scenes.world import Scene, render, sample
from train.tuning.recipes import Questions, Tuning
from train.tuning.tokens import asked, prompted

CAPTIONS_EACH = 5  # of a drawn scene, in an epoch of retrieval; COCO's pictures have as many


def loaders(recipe: Tuning, processor: Processor) -> tuple[Callable[..., Loader], int]:
    """Makes loaders of a split, of this process's rows or of all (`shared`); how many batches to evaluate.

    Batches hold what the objective takes, and for the probes `captions`, or `prompts`, `questions` and
    `answers`, a list of all that was answered to each.

    Args:
        recipe: as resolved.
        processor: of the model that it trains.

    Raises:
        RecipeError: files of questions that are none.
    """
    data = recipe.data
    if isinstance(data, Scenes):
        rows = min(recipe.batch_size, data.num_validation)
        return partial(_scenes, recipe, data, processor), data.num_validation // rows
    if isinstance(data, Questions):
        train, held_out, genome = read_questions(data)
        made = partial(_questions, recipe, data, processor, train, held_out, genome)
        return made, min(EVALUATED_BATCHES, len(held_out) // _evaluated(recipe, len(held_out)))
    load = partial(_shards, recipe, data, processor)
    return load, min(len(load("validation")), EVALUATED_BATCHES)


def _evaluated(recipe: Tuning, examples: int) -> int:
    """Rows of a batch of the evaluation, over all processes."""
    rows = min(recipe.batch_size, EVALUATED, examples)
    return max(1, rows - rows % distributed.world_size())


def tokenize_for(recipe: Tuning, processor: Processor) -> Tokenize:
    """What a caption becomes: stage 1's tokens for retrieval, else tokens after the prompt."""
    if recipe.task == "retrieval":
        return lambda captions, generator: representation_tokens(
            processor.tokenizer, captions, recipe.max_text_length
        )
    return lambda captions, generator: prompted(
        processor, [recipe.prompt] * len(captions), captions, recipe.max_text_length
    )


# --- drawn scenes ---


def _scenes(
    recipe: Tuning, data: Scenes, processor: Processor, split: str = "train", shared: bool = False
) -> Loader:
    training = split == "train"
    repeats = CAPTIONS_EACH if training and recipe.task == "retrieval" else 1
    tokenize = tokenize_for(recipe, processor)

    def fetch(indices: list[int], generator: np.random.Generator) -> Batch:
        drawn = [sample(index // repeats, split) for index in indices]
        words = random.Random(int(generator.integers(2**63)))
        pixels = np.stack([render(scene, processor.image_size) for scene in drawn])
        if recipe.task == "vqa":
            pairs = [_question(scene, words) for scene in drawn]
            text = _answering(recipe, processor, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
            text["answers"] = [[answer] for _, answer in pairs]
        else:
            said = [_caption(recipe, data, scene, words) for scene in drawn]
            text = {**tokenize(said, generator), "captions": said}
        names = [f"{split}/{index // repeats}" for index in indices]
        shown = normalize(torch.from_numpy(pixels), processor.mean, processor.std)
        return {"pixel_values": shown, **text, "images": names, "keys": names}

    world, rank = (1, 0) if shared else (distributed.world_size(), distributed.rank())
    number = data.num_scenes * repeats if training else data.num_validation
    rows = recipe.batch_size if training else min(recipe.batch_size, data.num_validation)
    seed = recipe.fit.seed if training else 0
    return IndexLoader(number, rows // world, fetch, seed=seed, rank=rank, world_size=world)


def _caption(recipe: Tuning, data: Scenes, scene: Scene, words: random.Random) -> str:
    if recipe.task == "caption":
        return full_caption(scene, words)
    return telling_caption(scene, words) if data.telling else caption(scene, words)


def _question(scene: Scene, words: random.Random) -> tuple[str, str]:
    """A question of any kind that the scene gives one of, and its answer."""
    while True:
        found = question(scene, words.choice(KINDS), words)
        if found is not None:
            return found


def _answering(
    recipe: Tuning, processor: Processor, questions: Sequence[str], answers: Sequence[str]
) -> dict[str, Any]:
    prompts, in_qformer = asked(processor, questions, recipe.prompt)
    tokens = prompted(processor, prompts, answers, recipe.max_text_length)
    return {**tokens, **in_qformer, "prompts": prompts, "questions": list(questions)}


# --- shards ---


def _shards(
    recipe: Tuning, data: Shards, processor: Processor, split: str = "train", shared: bool = False
) -> Any:
    from train.data.loader import shards_loader  # energon takes seconds to import

    rows, part = recipe.batch_size, dict[str, Any]()
    if split == "validation":
        part["workers"], rows = 0, min(rows, EVALUATED - EVALUATED % distributed.world_size())
    if shared:
        part |= {"rank": 0, "world_size": 1}
    return shards_loader(
        data, tokenize_for(recipe, processor), rows, image_size=processor.image_size, split=split,
        seed=recipe.fit.seed, mean=processor.mean, std=processor.std, pictures=recipe.task == "retrieval",
        **{"workers": recipe.execution.workers} | part,
    )  # fmt: skip


# --- questions ---


@dataclass(frozen=True)
class Asked:
    """One question about a picture."""

    image: tuple[Path, ...]
    """Where the picture may be; the first that exists is taken."""
    question: str
    """In lower case, without most signs [C]."""
    answers: tuple[str, ...]
    """All that people answered, repetitions included."""


def read_questions(data: Questions) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """Questions to train on, those held out (of pictures that training does not show), and Visual Genome's.

    Raises:
        RecipeError: a file is of another kind, or nothing is left to train on.
    """
    try:
        found = [
            record
            for questions, annotations in zip(data.questions, data.annotations, strict=True)
            for record in records.vqa(Path(questions), Path(annotations), Path(data.images), "train")
        ]
        genome: list[Record] = []
        if data.visual_genome is not None and data.visual_genome_images is not None:
            genome = list(
                records.visual_genome_questions(Path(data.visual_genome), Path(data.visual_genome_images))
            )
    except AnnotationError as error:
        raise RecipeError(str(error)) from error
    except KeyError as error:
        raise RecipeError(f"an entry of the questions has no {error}: another kind of file") from error
    if not 0 < data.num_validation < len(found):
        raise RecipeError(
            f"num_validation is {data.num_validation} of {len(found)} pictures; hold out some, and leave some"
        )
    held = set(random.Random(0).sample(range(len(found)), data.num_validation))
    parts: list[list[Asked]] = [[], [], []]
    for number, record in enumerate([*found, *genome]):
        into = parts[2 if number >= len(found) else 1 if number in held else 0]
        for entry in record.extra["questions"]:
            answers = tuple(sys.intern(answer) for answer in entry["answers"])  # millions, mostly the same
            into.append(Asked(record.image, clean_question(entry["question"], data.max_words), answers))
    return parts[0], parts[1], parts[2]


def draw_answer(answers: Sequence[str], generator: np.random.Generator) -> str:
    """One of the answers, as likely as it is frequent among them."""
    return answers[int(generator.integers(len(answers)))]


def _questions(
    recipe: Tuning,
    data: Questions,
    processor: Processor,
    train: Sequence[Asked],
    held_out: Sequence[Asked],
    genome: Sequence[Asked],
    split: str = "train",
    shared: bool = False,
) -> Loader:
    training = split == "train"
    transform = TrainTransform(
        processor.image_size, (data.crop, 1.0) if data.crop < 1 else None, flip=data.flip,
        mean=processor.mean, std=processor.std,
    )  # fmt: skip
    picture = partial(_picture, transform, processor, training)
    every = max(1, round(1 / data.visual_genome_share))
    pool = ThreadPoolExecutor(max(1, recipe.execution.workers))

    def pick(index: int, generator: np.random.Generator) -> Asked:
        if not training:
            return held_out[index]
        if index < len(train):
            return train[index]
        first = every * (index - len(train))
        return genome[min(first + int(generator.integers(every)), len(genome) - 1)]

    def fetch(indices: list[int], generator: np.random.Generator) -> Batch:
        rows = [pick(index, generator) for index in indices]
        said = [draw_answer(row.answers, generator) for row in rows]
        chances = [np.random.default_rng(int(seed)) for seed in generator.integers(2**63, size=len(rows))]
        return {
            "pixel_values": torch.stack(list(pool.map(picture, rows, chances))),
            **_answering(recipe, processor, [row.question for row in rows], said),
            "answers": [list(row.answers) for row in rows],
            "keys": [f"{row.image[0].name}: {row.question}" for row in rows],
        }

    world, rank = (1, 0) if shared else (distributed.world_size(), distributed.rank())
    number = len(train) + len(genome) // every if training else len(held_out)
    rows = recipe.batch_size if training else _evaluated(recipe, len(held_out))
    seed = recipe.fit.seed if training else 0
    return IndexLoader(number, rows // world, fetch, seed=seed, rank=rank, world_size=world)


def _picture(
    transform: TrainTransform, processor: Processor, training: bool, row: Asked, random: np.random.Generator
) -> Tensor:
    """float (3, S, S); in training a random crop, else the whole picture."""
    path = next((path for path in row.image if path.is_file()), None)
    if path is None:
        places = " or ".join(str(path) for path in row.image)
        raise DataError(f"the picture of the question {row.question!r} is not there: {places}")
    try:
        if training:
            return transform(decode(path.read_bytes(), transform.wanted), random)
        return preprocess([open_image(path)], processor.image_size, processor.mean, processor.std)[0]
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error
