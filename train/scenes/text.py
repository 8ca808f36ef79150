"""The language of the drawn world: captions, questions with answers, and word-level tokenizers.

    caption(scene, rng) -> str                     one true sentence, lower-case, without a final stop
    captions(scene, rng) -> list[str]              one per kind of caption
    questions(scene, rng) -> [(question, answer, kind)]      kinds: KINDS
    build_tokenizer(family) -> PreTrainedTokenizerFast       "opt", "t5" or "bert"; AutoTokenizer reloads it

"Left of", "above" and so on are `world.relation`: said and asked only where one direction clearly dominates.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from itertools import permutations

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from train.scenes.world import COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing, relation

KINDS = ("color", "shape", "size", "count", "exist", "relation", "relation_yesno")
NUMBERS = ("zero", "one", "two", "three", "four")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# A line break, a place, a word, or one punctuation mark. A place is one token: with "left of" as long as
# "above" everything else stands at a fixed distance.
TOKEN = r"\n|left of|right of|\w+|[^\w\s]"

# The noun mostly comes last: at a fixed distance from "Answer:", which is where a small language model looks
# it up. The last three wordings of every kind are for tests only; all their words occur elsewhere.
WORDINGS: dict[str, tuple[str, ...]] = {
    "color": (
        "what color is the {x}?",
        "what is the color of the {x}?",
        "which color is the {x}?",
        "tell me the color of the {x}?",
        "what color does the picture show for the {x}?",
        "what color has the {x}?",
        "can you see what color is the {x}?",
        "name the color of the {x}?",
        "which is the color of the {x}?",
        "what color do you see for the {x}?",
        "say what color is the {x}?",
    ),
    "shape": (
        "what shape is the {x}?",
        "what is the shape of the {x}?",
        "which shape is the {x}?",
        "tell me the shape of the {x}?",
        "what shape has the {x}?",
        "what shape does the picture show for the {x}?",
        "what is the {x}?",
        "name the shape of the {x}?",
        "which is the shape of the {x}?",
        "what shape do you see for the {x}?",
        "say what shape is the {x}?",
    ),
    "size": (
        "what size is the {x}?",
        "what is the size of the {x}?",
        "how big is the {x}?",
        "which size is the {x}?",
        "tell me the size of the {x}?",
        "what size has the {x}?",
        "what size does the picture show for the {x}?",
        "can you see what size is the {x}?",
        "name the size of the {x}?",
        "which is the size of the {x}?",
        "what size do you see for the {x}?",
        "say how big is the {x}?",
    ),
    "count": (
        "how many {x} are there?",
        "how many {x} are there?",  # twice: what people ask, and the one that does not end in the noun
        "how many {x}?",
        "count the {x}?",
        "what is the number of {x}?",
        "can you see how many {x}?",
        "tell me the number of {x}?",
        "name the number of {x}?",
        "say how many {x}?",
        "which is the number of {x}?",
    ),
    "exist": (
        "is there {x}?",
        "do you see {x}?",
        "can you see {x}?",
        "does the {image} show {x}?",
        "does the {image} have {x}?",
        "tell me is there {x}?",
        "say, is there {x}?",
        "in the {image}, is there {x}?",
        "which is it, do you see {x}?",
    ),
    "relation": (
        "what is {r} the {x}?",
        "which thing is {r} the {x}?",
        "what do you see {r} the {x}?",
        "what can you see {r} the {x}?",
        "tell me what is {r} the {x}?",
        "name the thing {r} the {x}?",
        "say what is {r} the {x}?",
        "which is the thing {r} the {x}?",
        "in the {image}, what is {r} the {x}?",
    ),
    "relation_yesno": (
        "is the {y} {r} the {x}?",
        "do you see the {y} {r} the {x}?",
        "can you see the {y} {r} the {x}?",
        "tell me, is the {y} {r} the {x}?",
        "does the {image} show the {y} {r} the {x}?",
        "say, is the {y} {r} the {x}?",
        "in the {image}, is the {y} {r} the {x}?",
        "which is it, is the {y} {r} the {x}?",
    ),
}
UNSEEN = 3
IMAGES = ("picture", "image", "photo")

_FUNCTION_WORDS = """
above below left right of to the a an and no yes there is are thing things shapes in , . ? :
question short answer picture image photo color colour shape size number
what which how many big does do you see can tell me name has have for count show say it
"""
WORDS = (
    *COLORS, *RELATIONS[:2], *SHAPES, *(shape + "s" for shape in SHAPES if shape != "cross"), "crosses",
    *SIZES, *NUMBERS, *_FUNCTION_WORDS.split(),
)  # fmt: skip


def _an(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(noun: str) -> str:
    """The plural of a shape or of "thing"."""
    return noun + ("es" if noun.endswith("s") else "s")


def join(parts: Sequence[str]) -> str:
    """Parts as a list in words: "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# ---------------------------------------------------------------- captions


def full_name(thing: Thing, size: bool = True) -> str:
    """Color and shape of a thing, after its size if that is wanted: "small red ring"."""
    return f"{thing.size} {thing.color} {thing.shape}" if size else f"{thing.color} {thing.shape}"


def list_caption(
    things: Sequence[Thing], rng: random.Random, size_chance: float = 0.7, photo_chance: float = 0.12
) -> str:
    """All the things from left to right; now and then without sizes, or after "a photo of"."""
    size = rng.random() < size_chance
    text = join([_an(full_name(thing, size)) for thing in things])
    return f"{_an(rng.choice(IMAGES))} of {text}" if rng.random() < photo_chance else text


def relation_caption(a: Thing, b: Thing) -> str:
    """Where `a` is, seen from `b`, which must be clear. One form, and questions end in the same one."""
    return f"{_an(full_name(a, False))} {relation(a, b)} {_an(full_name(b, False))}"


def attribute_caption(thing: Thing, things: Sequence[Thing], rng: random.Random) -> str:
    """One attribute of a thing that is named well enough to be the only one meant."""
    if rng.random() < 0.5 and sum(other.shape == thing.shape for other in things) == 1:
        return f"the {thing.shape} is {rng.choice((thing.color, thing.size))}"
    return f"the {thing.color} {thing.shape} is {thing.size}"


def count_caption(things: Sequence[Thing], rng: random.Random) -> str:
    """How many things of one shape, of one color, or in all, there are."""
    thing, chance = rng.choice(things), rng.random()
    noun, number = "thing", len(things)
    if chance < 0.55:
        noun, number = thing.shape, sum(other.shape == thing.shape for other in things)
    elif chance < 0.75:
        noun, number = f"{thing.color} thing", sum(other.color == thing.color for other in things)
    text = f"{NUMBERS[number]} {plural(noun) if number > 1 else noun}"
    return text if rng.random() < 0.6 else f"there {'are' if number > 1 else 'is'} {text}"


def exist_caption(things: Sequence[Thing], rng: random.Random) -> str:
    """That a thing is there."""
    thing = rng.choice(things)
    return f"there is {_an(rng.choice((thing.shape, full_name(thing, False), full_name(thing))))}"


def absence_caption(things: Sequence[Thing], rng: random.Random) -> str:
    """That something is not there: a shape, or a pair of a color and a shape."""
    return f"there is no {absent(things, rng)}"


def absent(things: Sequence[Thing], rng: random.Random) -> str:
    """The name of something that is not there, often made of a color and a shape that both are."""
    while True:
        kind = rng.random()
        color = rng.choice(things).color if rng.random() < 0.5 else rng.choice(COLORS)
        shape = rng.choice(things).shape if rng.random() < 0.5 else rng.choice(SHAPES)
        if kind < 0.4:
            if all(thing.shape != shape for thing in things):
                return shape
        elif kind < 0.85:
            if all((thing.color, thing.shape) != (color, shape) for thing in things):
                return f"{color} {shape}"
        elif all(thing.color != color for thing in things):
            return f"{color} thing"


def clear_pairs(things: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    """Ordered pairs whose relation is clear."""
    return [(a, b) for a, b in permutations(things, 2) if relation(a, b)]


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """One caption per kind: list, attribute, count, existence, absence, and relation where one is clear."""
    things = scene.things
    found = [list_caption(things, rng), attribute_caption(rng.choice(things), things, rng)]
    found += [make(things, rng) for make in (count_caption, exist_caption, absence_caption)]
    if pairs := clear_pairs(things):
        found.append(relation_caption(*rng.choice(pairs)))
    return found


def telling_caption(scene: Scene, rng: random.Random) -> str:
    """A list or a relation: what fits few other scenes, so that a batch holds hardly any false negatives."""
    pairs = clear_pairs(scene.things) if rng.random() < 0.4 else []
    if pairs:
        return relation_caption(*rng.choice(pairs))
    return list_caption(scene.things, rng, size_chance=0.9, photo_chance=0.0)


def full_caption(scene: Scene, rng: random.Random) -> str:
    """All the things with their sizes, then where one is from another: a way of telling that no other has.

    Fine-tuning teaches it, as COCO's captions are of one kind; 29 tokens at most.
    """
    text = list_caption(scene.things, rng, size_chance=1.0, photo_chance=0.0)
    pairs = clear_pairs(scene.things)
    if not pairs:
        return text
    a, b = rng.choice(pairs)
    return f"{text}, the {full_name(a, False)} is {relation(a, b)} the {full_name(b, False)}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption: relations most often, then lists, then the rest."""
    things, chance = scene.things, rng.random()
    pairs = clear_pairs(things) if chance >= 0.6 else []
    if pairs:
        return relation_caption(*rng.choice(pairs))
    if chance < 0.3 or chance >= 0.6:
        return list_caption(things, rng)
    if chance < 0.38:
        return attribute_caption(rng.choice(things), things, rng)
    make = count_caption if chance < 0.48 else exist_caption if chance < 0.53 else absence_caption
    return make(things, rng)


# ---------------------------------------------------------------- questions


def _unique(things: Sequence[Thing], thing: Thing, *names: str) -> bool:
    """Whether these attributes single the thing out."""
    wanted = [getattr(thing, name) for name in names]
    return sum([getattr(other, name) for name in names] == wanted for other in things) == 1


def _name(things: Sequence[Thing], thing: Thing, rng: random.Random, short_chance: float = 0.5) -> str:
    """A name that fits only this thing: now and then its shape, where that will do, or color and shape."""
    short = rng.random() < short_chance and _unique(things, thing, "shape")
    return thing.shape if short else f"{thing.color} {thing.shape}"


def question(
    scene: Scene,
    kind: str,
    rng: random.Random,
    *,
    unseen: bool = False,
    pairs: Sequence[tuple[Thing, Thing]] | None = None,
    sizes: bool = True,
) -> tuple[str, str] | None:
    """A question of a kind and its answer; None where the scene gives none.

    Args:
        unseen: use the wordings that language models are not trained on.
        pairs: the ordered pairs that relations may be asked of (a description may state only some);
            default: all that are clear.
        sizes: whether sizes are known to whom is asked.
    """
    things = scene.things
    thing = rng.choice(things)
    fill = {"image": rng.choice(IMAGES)}
    if kind == "color":
        names = [["shape"]] + [["size", "shape"]] * sizes
        names = [name for name in names if _unique(things, thing, *name)]
        if not names:
            return None
        fill["x"] = " ".join(getattr(thing, name) for name in rng.choice(names))
        if len(things) == 1 and rng.random() < 0.3:
            fill["x"] = "thing"
        answer = thing.color
    elif kind == "shape":
        names = [["color"]] + [["size", "color"]] * sizes
        names = [name for name in names if _unique(things, thing, *name)]
        if not names:
            return None
        fill["x"] = " ".join(getattr(thing, name) for name in rng.choice(names)) + " thing"
        if len(things) == 1 and rng.random() < 0.3:
            fill["x"] = "thing"
        answer = thing.shape
    elif kind == "size":
        if not sizes:
            return None
        fill["x"], answer = _name(things, thing, rng), thing.size
        if len(things) == 1 and rng.random() < 0.3:
            fill["x"] = "thing"
    elif kind == "count":
        fill["x"], answer = _count(things, rng)
    elif kind == "exist":
        answer = rng.choice(("yes", "no"))
        present = [thing.shape, full_name(thing, False), full_name(thing, False), f"{thing.color} thing"]
        fill["x"] = _an(rng.choice(present) if answer == "yes" else absent(things, rng))
    elif kind in ("relation", "relation_yesno"):
        asked = _relation(things, kind, rng, clear_pairs(things) if pairs is None else pairs)
        if asked is None:
            return None
        names_asked, answer = asked
        fill |= names_asked
    else:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    wordings = WORDINGS[kind]
    text = rng.choice(wordings[-UNSEEN:] if unseen else wordings[:-UNSEEN]).format(**fill)
    return (text.replace("color", "colour") if rng.random() < 0.12 else text), answer


def _count(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    chance = rng.random()
    if chance < 0.35:
        return plural(rng.choice(("thing", "shape"))), NUMBERS[len(things)]
    if chance < 0.5:
        color = rng.choice(things).color if rng.random() < 0.7 else rng.choice(COLORS)
        return f"{color} things", NUMBERS[sum(thing.color == color for thing in things)]
    if chance < 0.7:
        shape = rng.choice(SHAPES)
    else:  # the shape there is most of, so that answers above one are not rare
        shapes = [thing.shape for thing in things]
        shape = max(shapes, key=shapes.count)
    return plural(shape), NUMBERS[sum(thing.shape == shape for thing in things)]


def _relation(
    things: Sequence[Thing], kind: str, rng: random.Random, pairs: Sequence[tuple[Thing, Thing]]
) -> tuple[dict[str, str], str] | None:
    if kind == "relation":  # only where one thing alone is there
        keys = [(id(b), relation(a, b)) for a, b in pairs]
        pairs = [pair for pair, key in zip(pairs, keys, strict=True) if keys.count(key) == 1]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    where, answer = relation(a, b), full_name(a, False)
    assert where is not None
    if kind == "relation_yesno":
        answer = "yes"
        if rng.random() < 0.5:
            others = [INVERSE[where]] * 3 + [other for other in RELATIONS if other != where]
            where, answer = rng.choice(others), "no"
    return {"x": _name(things, b, rng, 0.2), "y": _name(things, a, rng, 0.2), "r": where}, answer


def questions(scene: Scene, rng: random.Random, *, unseen: bool = False) -> list[tuple[str, str, str]]:
    """(question, answer, kind), one per kind that the scene gives a question of."""
    asked = [(question(scene, kind, rng, unseen=unseen), kind) for kind in KINDS]
    return [(*pair, kind) for pair, kind in asked if pair is not None]


# ---------------------------------------------------------------- tokenizers

# Ids of pad, </s> and so on as in the released models; "\n" ends what OPT says.
SPECIAL = {
    "opt": ("<s>", "<pad>", "</s>", "<unk>", "\n"),
    "t5": ("<pad>", "</s>", "<unk>"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
}


def split(text: str) -> list[str]:
    """Words and punctuation marks of a text, as the tokenizers cut it."""
    return re.findall(TOKEN, text.lower())


def vocabulary(family: str) -> dict[str, int]:
    """Token to id. "<image>" comes last; BERT's lies just outside the embedding table, [DEC] at its end."""
    if family not in SPECIAL:
        raise ValueError(f"family is {family!r}; it must be one of {', '.join(SPECIAL)}")
    words: Iterable[str] = dict.fromkeys((*SPECIAL[family], *WORDS, *(["[DEC]"] if family == "bert" else [])))
    return {word: index for index, word in enumerate((*words, "<image>"))}


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A word-level fast tokenizer of a family; `save_pretrained` it, AutoTokenizer reloads it."""
    vocab = vocabulary(family)
    unknown = "[UNK]" if family == "bert" else "<unk>"
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = TOKEN if family == "opt" else TOKEN.removeprefix(r"\n|")  # only OPT knows line breaks
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    # WordPiece without pieces: joins words by spaces, none before a punctuation mark.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##"),
            decoders.Fuse(),
            *(decoders.Replace(f" {c}", c) for c in (":", "\n")),
        ]
    )
    special: dict[str, str] = {"unk_token": unknown}
    if family == "bert":
        template = "[CLS] $A [SEP]"
        special |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    elif family == "opt":
        template = "</s> $A"
        special |= {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"}
    else:
        template = "$A </s>"
        special |= {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocab[word]) for word in template.split() if word != "$A"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        **special,
    )
