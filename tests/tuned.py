"""Tiny models and rows to fine-tune, for tests."""

import json
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image

from blip2.processing import Processor
from train.loader import IndexLoader
from train.tuning.data import tokenize_for
from train.tuning.recipes import RECIPES
from train.tuning.tokens import asked, prompted

FRAME = "Question: {} Answer:"
QUESTIONS = ["what color is the circle?", "how many dog?", "what is there?", "is the star left?"]
ANSWERS = ["red", "two", "a blue star", "yes"]
CAPTIONS = ["a red circle", "two blue star on the left", "a dog", "green ring", "one cat", "the square"]


def processor(family: str) -> Processor:
    words = tiny.language_family(family)
    return Processor(
        tiny.tokenizer(words), family=words, image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES,
        qformer_tokenizer=tiny.tokenizer("bert") if family == "instruct" else None,
    )  # fmt: skip


def rows(family: str, indices: list[int], generator=None) -> dict:
    """A batch: pictures 0, 1, 2 with two captions each for retrieval; questions for "instruct"."""
    pictures = [index % 3 for index in indices] if family == "retrieval" else indices
    batch = {
        "pixel_values": torch.cat([tiny.pixels(1, seed=picture) for picture in pictures]),
        "images": [f"picture {picture}" for picture in pictures],
        "keys": [str(index) for index in indices],
    }
    made = processor(family)
    if family == "instruct":
        questions = [QUESTIONS[index % 4] for index in indices]
        prompts, in_qformer = asked(made, questions, FRAME)
        return {**batch, **prompted(made, prompts, [ANSWERS[i % 4] for i in indices]), **in_qformer}
    recipe = RECIPES["scenes-retrieval" if family == "retrieval" else "scenes-caption-opt"]()
    return {**batch, **tokenize_for(recipe, made)([CAPTIONS[i % 6] for i in indices], generator)}


def loader(family: str, rank: int = 0, world: int = 1, number: int = 4) -> IndexLoader:
    """Rows of 12, drawn in an order of their own."""
    fetch = lambda indices, generator: rows(family, indices, generator)  # noqa: E731
    return IndexLoader(12, number // world, fetch, seed=7, rank=rank, world_size=world)


def write_vqa(folder: Path, part: str = "train", pictures: int = 6, answers=("red",) * 7 + ("dark red",) * 3):
    """Questions and answers as VQAv2 publishes them, two to a picture, and the pictures."""
    asked, answered = [], []
    (folder / f"{part}2014").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for picture in range(pictures):
        name = f"COCO_{part}2014_{picture:012d}.jpg"
        pixels = generator.integers(0, 255, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{part}2014" / name)
        for number in range(2):
            key = {"question_id": 10 * picture + number, "image_id": picture}
            asked.append({**key, "question": f"What color is dog {picture * 2 + number}?"})
            answered.append(
                {
                    **key, "question_type": "what color", "answer_type": "other",
                    "multiple_choice_answer": answers[0],
                    "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)],
                }
            )  # fmt: skip
    questions = {"questions": asked, "data_subtype": f"{part}2014", "task_type": "Open-Ended"}
    paths = [folder / f"{part}_questions.json", folder / f"{part}_annotations.json"]
    paths[0].write_text(json.dumps(questions))
    paths[1].write_text(json.dumps({"annotations": answered, "data_subtype": f"{part}2014"}))
    return paths


def write_genome(folder: Path, pictures: int = 5) -> Path:
    """Visual Genome's questions, two to a picture, and the pictures."""
    (folder / "VG_100K").mkdir(exist_ok=True)
    for picture in range(pictures):
        Image.new("RGB", (30, 40), (40 * picture, 0, 90)).save(folder / "VG_100K" / f"{picture}.jpg")
    found = [
        {
            "id": picture,
            "qas": [
                {"qa_id": 2 * picture + i, "question": f"What is it {i}?", "answer": "A Dog."}
                for i in range(2)
            ],
        }
        for picture in range(pictures)
    ]
    path = folder / "question_answers.json"
    path.write_text(json.dumps(found))
    return path
