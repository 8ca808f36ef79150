"""Documents that language models of the drawn world read: text only, no picture anywhere.

A description of a scene stands where the queries of BLIP-2 will stand; then comes what a frozen language
model is asked for at use: the caption of a picture, or answers in the frames of the released models.

    OPT   description </s> caption "\\n"        description </s> Question: ... Answer: red "\\n"
    T5    description </s> -> caption </s>      description Question: ... Short answer: </s> -> red </s>
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from train.scenes import text
from train.scenes.text import KINDS, split
from train.scenes.world import COLORS, MAX_THINGS, SHAPES, SIZES, Background, Scene, Thing, relation

PLAIN = Background("plain", (0, 0, 0), (0, 0, 0), 0.0)
KIND_WEIGHTS = {"color": 3, "shape": 3, "size": 4, "count": 6, "exist": 6, "relation": 6, "relation_yesno": 6}
# How much a predicted token counts: free choices little, what follows from the description much.
DESCRIBED, CAPTION, ASKED, ANSWER = 0.1, 0.6, 0.02, 2.0


def draw_things(rng: random.Random, most: int = MAX_THINGS) -> Scene:
    """A scene as far as words go, cheap for no picture is drawn of it. All colors meet all shapes."""
    count = rng.choices(range(1, most + 1), weights=(3, 7, 6, 5)[:most])[0]
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        color, shape, chance = rng.choice(COLORS), rng.choice(SHAPES), rng.random()
        if kinds and chance < 0.3:
            shape = rng.choice(kinds)[1]
        elif kinds and chance < 0.45:
            color = rng.choice(kinds)[0]
        if (color, shape) not in kinds:
            kinds.append((color, shape))
    xs = sorted(rng.random() for _ in kinds)
    return Scene(
        0,
        tuple(
            Thing(shape, color, rng.choice(SIZES), x, rng.random(), 0.1, 0.0, "filled", (0, 0, 0))
            for (color, shape), x in zip(kinds, xs, strict=True)
        ),
        PLAIN,
        0.0,
    )


@dataclass
class Description:
    """What a text says of a scene, and thus what may be asked of its reader."""

    words: str
    pairs: list[tuple[Thing, Thing]]
    sizes: bool


def describe(scene: Scene, rng: random.Random, *, full: bool = False) -> Description:
    """All the things, some relations, some further facts; in many forms, sometimes twice.

    Args:
        full: with all sizes and all the clear relations, for evaluation.
    """
    things = scene.things
    sizes = full or rng.random() < 0.8
    names = [text.full_name(thing, sizes) for thing in things]
    form = 0.0 if full else rng.random()
    if form < 0.7:
        listed = [text.join([text._an(name) for name in names])]
    elif form < 0.85:
        listed = [" ".join(names) if rng.random() < 0.3 else ", ".join(names)]
    else:
        listed = [f"there is {text._an(name)}" for name in names]
    # A relation is stated from one side; the other follows from it.
    stated = [(a, b) for index, a in enumerate(things) for b in things[index + 1 :] if relation(a, b)]
    if not full:
        rng.shuffle(stated)
        stated = stated[: rng.choice((0, 1, 1, 2, 2, 3, 6))]
    stated = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in stated]
    facts = [text.relation_caption(a, b) for a, b in stated]
    for _ in range(0 if full else rng.choice((0, 0, 1, 2))):
        make = rng.choice((text.count_caption, text.exist_caption, text.absence_caption))
        facts.append(make(things, rng))
    if not full:
        rng.shuffle(facts)
    sentences = facts + listed if not full and rng.random() < 0.08 else listed + facts
    if not full and rng.random() < 0.2 and len(sentences) < 4:
        sentences = sentences * 2
    joint = ". " if rng.random() < 0.8 else ", "
    return Description(joint.join(sentences), stated + [(b, a) for a, b in stated], sizes)


def draw_questions(
    scene: Scene, about: Description, rng: random.Random, count: int, unseen: bool = False
) -> list[tuple[str, str]]:
    """Up to `count` questions of mixed kinds that the description answers."""
    asked = []
    for kind in rng.choices(KINDS, weights=[KIND_WEIGHTS[kind] for kind in KINDS], k=count):
        pair = text.question(scene, kind, rng, pairs=about.pairs, sizes=about.sizes, unseen=unseen)
        if pair is not None:
            asked.append(pair)
    return asked


Document = tuple[list[str], list[str], list[float]]  # words, the word to predict after each, its weight


def opt_document(rng: random.Random, most: int = MAX_THINGS, turns: int = 6) -> Document:
    """One document for a decoder: words, targets (one step ahead, mostly), and the weight of each target."""
    scene = draw_things(rng, most)
    about = describe(scene, rng)
    words: list[str] = []
    weights: list[float] = []

    def say(said: list[str], weight: float) -> None:
        words.extend(said)
        weights.extend([weight] * len(said))

    if rng.random() > 0.06:  # without any, for the blind baseline
        say(split(about.words), DESCRIBED)
    say(["</s>"], DESCRIBED)
    form = rng.random()
    ends: list[int] = []
    if form < 0.3:
        say([*split(text.caption(scene, rng)), "\n"], CAPTION)
    if form > 0.18:
        if 0.3 <= form < 0.4:  # describe first, then answer
            say([*split(text.list_caption(scene.things, rng)), "."], CAPTION)
            ends.append(len(words) - 1)
        for asked, answer in draw_questions(scene, about, rng, turns):
            say(["question", ":", *split(asked), "answer", ":"], ASKED)
            say([*split(answer), "\n" if rng.random() < 0.3 else "."], ANSWER)
            ends.append(len(words) - 1)
    targets = [*words[1:], ""]
    for end in ends:  # captions and answers end with "\n" at use, though "." stands there before a question
        targets[end - 1] = "\n"
    return words, targets, [*weights[1:], 0.0]


def t5_question(asked: str, history: Sequence[tuple[str, str]]) -> list[str]:
    """The prompt of the released Flan-T5 models, after the turns of a conversation."""
    said: list[str] = []
    for question, answer in history:
        said += ["question", ":", *split(question), "short", "answer", ":", *split(answer), "."]
    return [*said, "question", ":", *split(asked), "short", "answer", ":"]


def t5_document(rng: random.Random, most: int = MAX_THINGS) -> Document:
    """One document for an encoder-decoder: encoder words, decoder words, the weight of each of the latter."""
    scene = draw_things(rng, most)
    about = describe(scene, rng)
    words = split(about.words) if rng.random() > 0.05 else []
    form = rng.random()
    if form < 0.45:  # the caption, or the rest of it after at most half (the prefix LM of the paper)
        if form < 0.13:  # ... as it is asked for at use
            said = split(text.list_caption(scene.things, rng, photo_chance=1))
            cut = 3
        else:
            said = split(text.caption(scene, rng))
            cut = rng.randint(1, max(1, len(said) // 2)) if rng.random() < 0.5 else 0
        if words and (cut or rng.random() < 0.5):  # or else it could not tell the prefix from the description
            words.append(".")
        answer = [*said[cut:], "</s>"]
        return [*words, *said[:cut], "</s>"], answer, [CAPTION] * len(answer)
    asked = draw_questions(scene, about, rng, rng.choice((2, 2, 2, 3, 4)))
    if not asked:
        asked = [("how many things?", text.NUMBERS[len(scene.things)])]
    history = asked[1:] if form < 0.51 else []
    if 0.51 <= form < 0.59:  # describe first, then answer
        words += [*split(text.list_caption(scene.things, rng)), "."]
    answer = [*split(asked[0][1]), "</s>"]
    return [*words, *t5_question(asked[0][0], history), "</s>"], answer, [ANSWER] * len(answer)
