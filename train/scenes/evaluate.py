"""Figures of the drawn world's checkpoints on scenes they never saw: `python -m train.scenes evaluate`.

    answers     zero-shot: no visual question was trained; exact match by kind, in both ways of answering
    baselines   the same questions without a picture, with another's, and with the truth in words
    captions    objects (color and shape) named after "a photo of"; relations stated in the three captions
                that the app gives, by beam search
    retrieval   recall@1 among N pictures and N captions, by ITC, and with ITM on ITC's best
    speed       of an answer, in milliseconds
    another renderer's pictures, and pictures of another kind: train.scenes.svg, train.scenes.novelty

All but these three is decoded greedily; of the captions that a model reads before it answers, all but the
first are sampled.
"""

from __future__ import annotations

import itertools
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from blip2.chat import Chat
from blip2.checkpoint import Loaded
from blip2.generation import Generation, describe, generate, num_descriptions
from blip2.representation import Blip2Representation
from blip2.vision import ImageFeatures
from train.scenes.documents import describe as true_text
from train.scenes.text import join, questions
from train.scenes.world import COLORS, HELD_OUT, RELATIONS, SHAPES, Scene, relation, render, sample

BATCH = 64
RERANKED = 16  # ITC's best that ITM looks at
NAMED = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
STATED = re.compile(rf"{NAMED.pattern} (?:is )?({'|'.join(RELATIONS)}) (?:an?|the) {NAMED.pattern}")
Figures = dict[str, float]


@dataclass(frozen=True)
class Question:
    """One question about a scene; `row` is the scene's place in its batch."""

    row: int
    text: str
    answer: str
    kind: str
    held_out: bool


def batches(
    loaded: Loaded, count: int, split: str, *, held_out: bool = False
) -> Iterator[tuple[list[Scene], ImageFeatures]]:
    """The first scenes of a split, or the first with a HELD_OUT pair, and their pictures, BATCH at a time."""
    shown = (sample(seed, split) for seed in itertools.count())
    if held_out:
        shown = (scene for scene in shown if any((t.color, t.shape) in HELD_OUT for t in scene.things))
    for start in range(0, count, BATCH):
        scenes = list(itertools.islice(shown, min(BATCH, count - start)))
        pictures = [Image.fromarray(render(scene, loaded.processor.image_size)) for scene in scenes]
        yield scenes, loaded.model.encode_image(loaded.processor.images(pictures))


def asked_of(scenes: list[Scene], unseen: bool = False) -> list[Question]:
    """One question of every kind about every scene, where it gives one; the same every time."""
    found = []
    for row, scene in enumerate(scenes):
        for text, answer, kind in questions(scene, random.Random(scene.seed), unseen=unseen):
            words = {*re.findall(r"\w+", text), answer}
            meant = [thing for thing in scene.things if {thing.color, thing.shape} <= words]
            held_out = kind in ("color", "shape") and any((t.color, t.shape) in HELD_OUT for t in meant)
            found.append(Question(row, text, answer, kind, held_out))
    return found


def _shares(right: dict[str, list[bool]]) -> Figures:
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


# ---------------------------------------------------------------- questions


def answers(
    loaded: Loaded, count: int, split: str = "test", *, unseen: bool = False, described: int = 0
) -> Figures:
    """Exact match by kind of question over `count` scenes.

    Args:
        unseen: in wordings that the language model was not trained on.
        described: with so many of the model's own captions between picture and question.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for scenes, image in batches(loaded, count, split):
        asked = asked_of(scenes, unseen)
        captions = describe(loaded.model, loaded.processor, image, described)
        for question, good in zip(asked, _answered(loaded, image, asked, captions), strict=True):
            right[question.kind].append(good)
    return _shares(right)


def held_out(loaded: Loaded, count: int, split: str = "test", described: int = 0) -> Figures:
    """Color and shape by whether their pair was held out of training, over `count` scenes that show one."""
    right: dict[str, list[bool]] = defaultdict(list)
    for scenes, image in batches(loaded, count, split, held_out=True):
        asked = [question for question in asked_of(scenes) if question.kind in ("color", "shape")]
        captions = describe(loaded.model, loaded.processor, image, described)
        for question, good in zip(asked, _answered(loaded, image, asked, captions), strict=True):
            part = "held-out" if question.held_out else "seen"
            right[f"{question.kind} of {part} pairs"].append(good)
    return _shares(right)


def _answered(
    loaded: Loaded, image: ImageFeatures, asked: list[Question], captions: list[str], shift: int = 0
) -> list[bool]:
    """Whether each question is answered rightly from the picture `shift` places on."""
    processor = loaded.processor
    prompts = [
        processor.prompt(question.text, processor.question_style, description=captions[question.row])
        for question in asked
    ]
    rows = torch.tensor([(question.row + shift) % len(image) for question in asked])
    bare = [question.text for question in asked]  # for a Q-Former that reads it
    short = Generation(max_new_tokens=6)
    said = generate(loaded.model, processor, image[rows], prompts, short, questions=bare)
    return [text.strip(" .") == q.answer for q, [text] in zip(asked, said, strict=True)]


def baselines(loaded: Loaded, count: int, split: str = "test") -> dict[str, Figures]:
    """The questions of `answers` with less than the picture, or more.

    `wrong picture`: a neighbor's; `blind`: the language model alone; `majority`: the commonest answer to each
    kind; `true text`: the language model with the truth in words, the ceiling of what it can be asked.
    """
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    all_asked: list[Question] = []
    for scenes, image in batches(loaded, count, split):
        asked = asked_of(scenes)
        all_asked += asked
        texts = [true_text(scene, random.Random(scene.seed), full=True).words for scene in scenes]
        rows = {
            "wrong picture": _answered(loaded, image, asked, [""] * len(scenes), shift=1),
            "blind": _read(loaded, asked, [""] * len(scenes)),
            "true text": _read(loaded, asked, texts),
        }
        for name, good in rows.items():
            for question, value in zip(asked, good, strict=True):
                found[name][question.kind].append(value)
    for kind in {question.kind for question in all_asked}:
        said = [question.answer for question in all_asked if question.kind == kind]
        [(commonest, _)] = Counter(said).most_common(1)
        found["majority"][kind] = [answer == commonest for answer in said]
    return {name: _shares(right) for name, right in sorted(found.items())}


@torch.no_grad()
def _read(loaded: Loaded, asked: list[Question], texts: list[str]) -> list[bool]:
    """Whether the language model alone answers rightly, a text standing where the picture would."""
    processor = loaded.processor
    model: Any = loaded.model
    decoder = processor.family == "opt"
    prompts = []
    for question in asked:
        text = texts[question.row]
        between = "</s> " if text and decoder else " "  # as its training documents have it
        framed = processor.prompt(question.text, processor.question_style)
        prompts.append(f"{text}{between}{framed}".strip())
    tokens: Any = processor.tokenizer(
        prompts, padding=True, return_tensors="pt", add_special_tokens=not decoder
    )
    if decoder and not any(texts):
        tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    said = model.language_model.generate(**tokens, max_new_tokens=6, do_sample=False)
    said = said[:, tokens["input_ids"].shape[1] :] if decoder else said
    return [text.strip(" .") == q.answer for q, text in zip(asked, processor.decode(said), strict=True)]


# ---------------------------------------------------------------- captions


def captions(loaded: Loaded, count: int, split: str = "test") -> Figures:
    """Recall and precision of objects, by their number too; the share of stated relations that are true."""
    found: dict[str, list[float]] = defaultdict(list)
    three = Generation.caption(num_captions=3)
    for scenes, image in batches(loaded, count, split):
        for scene, text in zip(scenes, describe(loaded.model, loaded.processor, image), strict=True):
            true = {(thing.color, thing.shape) for thing in scene.things}
            named = set(NAMED.findall(text))
            hits = len(true & named)
            found["object recall"].append(hits / len(true))
            found[f"object recall of {len(true)}"].append(hits / len(true))
            found["object precision"].append(hits / len(named) if named else 0.0)
        said = generate(loaded.model, loaded.processor, image, [""] * len(scenes), three)
        for scene, texts in zip(scenes, said, strict=True):
            found["relations true"] += [true for text in texts for true in _relations(scene, text)]
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _relations(scene: Scene, text: str) -> list[bool]:
    """For every relation that a text states whether it is so."""
    things = {(thing.color, thing.shape): thing for thing in scene.things}
    verdicts = []
    for color, shape, where, other_color, other_shape in STATED.findall(text):
        a, b = things.get((color, shape)), things.get((other_color, other_shape))
        verdicts.append(a is not None and b is not None and a is not b and relation(a, b) == where)
    return verdicts


# ---------------------------------------------------------------- retrieval


def gallery(count: int, split: str, in_order: bool = True) -> tuple[list[Scene], list[str]]:
    """The first `count` scenes of which no two are told alike, and their captions: all things, with sizes.

    `in_order`: from left to right; else in one order for all, so that no two hold the same things either.
    """
    told: dict[str, Scene] = {}
    seed = 0
    while len(told) < count:
        scene = sample(seed, split)
        names = [f"{thing.size} {thing.color} {thing.shape}" for thing in scene.things]
        if not in_order:
            names.sort()
        told.setdefault(join([f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in names]), scene)
        seed += 1
    return list(told.values()), list(told)


@torch.no_grad()
def retrieval(loaded: Loaded, count: int = 500, split: str = "test") -> Figures:
    """recall@1 both ways among `count` pictures and as many captions."""
    model, processor = loaded.model, loaded.processor
    assert isinstance(model, Blip2Representation)
    scenes, texts = gallery(count, split)
    parts = []
    for start in range(0, count, BATCH):
        pictures = [Image.fromarray(render(s, processor.image_size)) for s in scenes[start : start + BATCH]]
        parts.append(model.encode_image(processor.images(pictures)))
    outputs = [part.query_output for part in parts if part.query_output is not None]
    image = ImageFeatures(torch.cat([part.image_embeds for part in parts]), torch.cat(outputs))
    tokens = processor.text(texts)
    itc = model.score(image, **tokens, head="itc")
    figures = {}
    for name, sim in (("image to text", itc), ("text to image", itc.T)):
        own = torch.arange(count)
        figures[f"ITC {name} R@1"] = (sim.argmax(1) == own).float().mean().item()
        right = []
        for row in range(count):
            best = sim[row].topk(min(RERANKED, count)).indices
            if name == "image to text":
                match = model.match_logits(image[row], **{k: v[best] for k, v in tokens.items()})[0, :, 1]
            else:
                text = {k: v[[row]] for k, v in tokens.items()}
                match = model.match_logits(image[best], **text)[:, 0, 1]
            right.append(int(best[(match + sim[row, best]).argmax()]) == row)  # the paper's sum (Sec. 4.4)
        figures[f"ITC + ITM {name} R@1"] = sum(right) / count
    return figures


def speed(loaded: Loaded, split: str = "test", tries: int = 20) -> Figures:
    """Milliseconds from a picture to the greedy answer about it, its own captions included: the median."""
    taken = []
    for seed in range(tries + 1):
        picture = Image.fromarray(render(sample(seed, split), loaded.processor.image_size))
        started = time.perf_counter()
        chat = Chat(loaded.model, loaded.processor)
        chat.set_image(picture)
        chat.ask("how many things are there?", Generation())
        taken.append(1000 * (time.perf_counter() - started))
    return {f"milliseconds, {torch.get_num_threads()} threads": statistics.median(taken[1:])}


def figures(loaded: Loaded, count: int, split: str = "test") -> dict[str, Figures]:
    """Every suite that a checkpoint has; needs what the `dev` extra installs."""
    from train.scenes import novelty, svg  # they use this module

    unknown = {"unknown pictures": novelty.figures(loaded, count, split)}
    if isinstance(loaded.model, Blip2Representation):
        return {"retrieval": retrieval(loaded, min(count, 500), split), **unknown}
    best = num_descriptions(loaded.model)
    return {
        **{
            f"answers after {n} captions": answers(loaded, count, split, described=n)
            for n in sorted({0, 1, best})
        },
        "answers about held-out pairs": held_out(loaded, count, split, best),
        "answers to unseen wordings": answers(loaded, count, split, unseen=True, described=best),
        **{f"answers, {name}": found for name, found in baselines(loaded, count, split).items()},
        "captions": captions(loaded, count, split),
        "another renderer": svg.figures(loaded),
        **unknown,
        "speed": speed(loaded, split),
    }
