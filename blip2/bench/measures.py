"""What is measured, and how: pairs of runs, ours and theirs in turns, and the ratio within each pair.

Every measure first runs once on each side, to warm up and to hold the two results against each other: a
speed-up of something else is none.
"""

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2.bench.machine import wait
from blip2.bench.sides import Side, Theirs
from blip2.presets import BYTES

TOKENS = 20  # new ones of a caption or an answer
DECODED = 60  # of the measure of decoding alone
TEXTS = 100  # scored against one picture
FEW_PAIRS, PAIRS, MOST_PAIRS = 3, 7, 51  # of runs: of a long measure, of others, of one that is short
SHORT, ENOUGH = 5.0, 60.0  # seconds for all pairs
TRIAL = 3.0  # seconds; a batch size is tried up to five times within them, at least once
PROMPT = "a photo of a red circle and a blue square on a table near the cat in the street"
QUESTIONS = (  # framed, 12 tokens with a word-level tokenizer
    "what is the color of this cat?",
    "how many red stars are over there?",
    "who is sitting near the old table?",
    "is there a blue ring on top?",
    "what kind of house is on left?",
)
PROMPT_TOKENS = 12


@dataclass
class Inputs:
    """What both sides are given, the same for a seed."""

    pictures: list[Image.Image]
    prompt: str
    questions: tuple[str, ...]
    texts: list[str]


def make_inputs(tokenizer: Any, pictures: int = 8, seed: int = 0) -> Inputs:
    """Smooth random pictures (1024 x 768), a prompt of 12 tokens, questions, and texts of 4 to 12 words.

    Args:
        tokenizer: of a side's processor.
        pictures: in a batch.
        seed: the same seed gives the same inputs.
    """
    random = np.random.default_rng(seed)
    made = [
        Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (1024, 768), Image.Resampling.BICUBIC
        )
        for _ in range(pictures)
    ]
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    words = PROMPT.split()
    texts = [" ".join(random.choice(words, random.integers(4, 13))) for _ in range(TEXTS)]
    return Inputs(made, tokenizer.decode(ids), QUESTIONS, texts)


Run = Callable[[Any, Inputs], Any]


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        name: for `--only`.
        label: in the table.
        kind: of the model, "generate" or "match".
        run: what is timed, given a side and the inputs; returns what must be equal.
        count: how many things a run makes, for a figure a second; 0 for the time alone; None: a picture each.
        unit: of that figure.
        less: a run whose time is subtracted.
        batches: transformers' own batch size is sought first, for this action of its.
    """

    name: str
    label: str
    kind: Literal["generate", "match"]
    run: Run
    count: int | None = 0
    unit: str = ""
    less: Run | None = None
    batches: str = ""


def _caption(count: int | None, tokens: int, beams: int = 1) -> Run:
    return lambda side, inputs: side.caption(inputs.pictures[:count], inputs.prompt, tokens, beams)


MEASURES = (
    Measure("preprocess", "preprocess a picture", "generate", lambda s, i: s.preprocess(i.pictures[0])),
    Measure("encode", "encode a picture", "generate", lambda s, i: s.encode(s.preprocess(i.pictures[0]))),
    Measure("first-token", "first token", "generate", _caption(1, 1)),
    Measure("caption", f"caption, greedy, {TOKENS} tokens", "generate", _caption(1, TOKENS)),
    Measure("beam", f"caption, 5 beams, {TOKENS} tokens", "generate", _caption(1, TOKENS, 5)),
    Measure(
        "batch", "captions of {pictures} pictures, greedy", "generate", _caption(None, TOKENS),
        None, "images/s", batches="caption",
    ),
    Measure(
        "decode", "decoding alone, greedy", "generate", _caption(1, 1 + DECODED),
        DECODED, "tokens/s", less=_caption(1, 1),
    ),
    Measure(
        "chat", f"chat of {len(QUESTIONS)} turns, {TOKENS} tokens each", "generate",
        lambda s, i: s.chat(i.pictures[0], list(i.questions), TOKENS),
    ),
    Measure(
        "match", f"ITM, a picture against {TEXTS} texts", "match",
        lambda s, i: s.match(i.pictures[0], i.texts), batches="match",
    ),
    Measure(
        "contrast", f"ITC, a picture against {TEXTS} texts", "match",
        lambda s, i: s.contrast(i.pictures[0], i.texts), batches="contrast",
    ),
)  # fmt: skip
NAMES = ("load", *(measure.name for measure in MEASURES))


def measure(
    what: Measure, sides: dict[str, Side], inputs: Inputs, device: torch.device, repeats: int | None = None
) -> dict[str, Any]:
    """Time one thing on each side, in turns.

    Args:
        what: one of `MEASURES`.
        sides: "ours" and "theirs", or one of them.
        inputs: of `make_inputs`.
        device: what to wait for before a clock is read.
        repeats: pairs; None: 7, more (up to 51) within `SHORT` seconds, fewer (3) beyond `ENOUGH`.

    Returns:
        For the table and as JSON: medians (seconds), the ratio theirs / ours within pairs (median and
        quartiles), how far the results agree, and all times.
    """

    def seconds(name: str, run: Run) -> tuple[float, Any]:
        gc.collect()
        wait(device)
        start = time.perf_counter()
        result = run(sides[name], inputs)
        wait(device)
        return time.perf_counter() - start, result

    def timed(name: str) -> tuple[float, Any]:
        taken, result = seconds(name, what.run)
        return taken - (seconds(name, what.less)[0] if what.less else 0), result

    batch = None
    if what.batches and "theirs" in sides:
        batch = best_batch(what, cast(Theirs, sides["theirs"]), inputs, device)
    results = {name: timed(name)[1] for name in sides}
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.freeze()  # or each collection would look through the models
    start = time.perf_counter()
    for number in range(repeats or MOST_PAIRS):
        for name in sorted(sides, reverse=number % 2 == 1):
            times[name].append(timed(name)[0])
        taken = time.perf_counter() - start
        if repeats is None and taken > SHORT and number + 1 >= (PAIRS if taken <= ENOUGH else FEW_PAIRS):
            break
    gc.unfreeze()
    label = what.label.format(pictures=len(inputs.pictures))
    found: dict[str, Any] = {"name": what.name, "label": label, "times": times}
    found |= {name: statistics.median(values) for name, values in times.items()}
    if len(sides) == 2:
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
        lower, ratio, upper = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
        found |= {"ratio": ratio, "lower": lower, "upper": upper}
        found["agreement"] = agreement(results["ours"], results["theirs"])
    if what.unit:
        found |= {"count": what.count or len(inputs.pictures), "unit": what.unit}
    if batch:
        found["their_batch"] = batch
    return found


def best_batch(what: Measure, side: Theirs, inputs: Inputs, device: torch.device) -> int:
    """The batch size at which transformers is fastest a text or picture; set on the side."""
    total = len(inputs.pictures) if what.batches == "caption" else len(inputs.texts)
    rates: dict[int, float] = {}
    for size in sorted({1, 4, 8, 16, 32, 64, total}):
        if size > total:
            break
        some = replace(inputs, pictures=inputs.pictures[:size], texts=inputs.texts[:size])
        side.batch[what.batches] = size
        taken: list[float] = []
        while len(taken) < 5 and sum(taken) < TRIAL:  # the first one warms up
            wait(device)
            start = time.perf_counter()
            what.run(side, some)
            wait(device)
            taken.append(time.perf_counter() - start)
        rates[size] = min(taken) / size
        if rates[size] > 1.25 * min(rates.values()):
            break
    side.batch[what.batches] = min(rates, key=lambda size: rates[size])
    return side.batch[what.batches]


def bytes_per_token(shapes: dict[str, tuple[int, ...]], precision: str) -> int:
    """Bytes of weights that decoding one token reads: of the decoder's layers and the output matrix.

    Args:
        shapes: of a checkpoint's stored tensors, by name.
        precision: that is computed in.
    """
    head = next(
        (
            name
            for end in ("lm_head.weight", "embed_tokens.weight", "shared.weight")
            for name in shapes
            if name.startswith("language_model.") and name.endswith(end)
        ),
        None,
    )
    total = 0.0
    for name, shape in shapes.items():
        layer = name.startswith("language_model.") and re.search(r"\.(layers|block|h)\.\d", name)
        if not layer or ".encoder." in name or re.search(r"EncDecAttention\.[kv]\.", name):
            continue  # keys and values of the encoder's output are made once
        matrix = len(shape) == 2 or precision == "float32"
        item = BYTES[precision] if matrix else 2
        total += math.prod(shape) * item
    if head is not None:
        total += math.prod(shapes[head]) * (4 if precision == "float32" else 2)
    return int(total)


def agreement(ours: Any, theirs: Any) -> dict[str, Any]:
    """How far two results are the same: texts word by word up to the first difference, numbers as they are.

    Returns:
        `equal`; for texts `shared` of `words` words; for numbers `difference`, the largest, and `scale`, the
        largest number.
    """
    if isinstance(ours, Tensor):
        difference = float((ours.float().cpu() - theirs.float().cpu()).abs().max())
        scale = float(theirs.float().abs().max())
        return {"equal": difference <= 1e-4 * max(scale, 1), "difference": difference, "scale": scale}
    shared = total = 0
    for one, other in zip(ours, theirs, strict=True):
        first, second = one.split(), other.split()
        total += max(len(first), len(second))
        shared += next(
            (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
    return {"equal": list(ours) == list(theirs), "shared": shared, "words": total}


def wanted(only: Iterable[str] | None, kind: str) -> list[Measure]:
    """The measures of a kind of model, all of them or those that are named."""
    names = set(NAMES if only is None else only)
    return [measure for measure in MEASURES if measure.kind == kind and measure.name in names]
