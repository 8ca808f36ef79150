"""Figures of the drawn world's checkpoints on scenes they never saw.

    answers     zero-shot: no visual question was trained; exact match by kind, and with another's picture
    captions    objects (color and shape) named after "a photo of": recall and precision
    retrieval   recall@1 among N pictures and N captions, by ITC, and with ITM on ITC's best

Everything is decoded greedily from the pictures alone.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from PIL import Image

from blip2.checkpoint import Loaded
from blip2.generation import Generation, generate
from blip2.representation import Blip2Representation
from blip2.vision import ImageFeatures
from train.scenes.text import list_caption, questions
from train.scenes.world import COLORS, SHAPES, Scene, render, sample

BATCH = 64
RERANKED = 16  # ITC's best that ITM looks at
NAMED = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")


def batches(loaded: Loaded, count: int, split: str) -> Iterator[tuple[list[Scene], ImageFeatures]]:
    """Scenes and their encoded pictures, BATCH at a time."""
    for start in range(0, count, BATCH):
        scenes = [sample(seed, split) for seed in range(start, min(start + BATCH, count))]
        pictures = [Image.fromarray(render(scene, loaded.processor.image_size)) for scene in scenes]
        yield scenes, loaded.model.encode_image(loaded.processor.images(pictures))


def answers(loaded: Loaded, count: int, split: str = "test", *, unseen: bool = False) -> dict[str, float]:
    """Exact match by kind of question over `count` scenes; "wrong picture ..." is a neighbor's picture."""
    right: dict[str, list[bool]] = defaultdict(list)
    processor, style = loaded.processor, loaded.processor.question_style
    for scenes, image in batches(loaded, count, split):
        asked = [
            (row, *item)
            for row, scene in enumerate(scenes)
            for item in questions(scene, random.Random(scene.seed), unseen=unseen)
        ]
        prompts = [processor.prompt(question, style) for _, question, _, _ in asked]
        for name, shift in (("", 0), ("wrong picture ", 1)):
            rows = torch.tensor([(row + shift) % len(scenes) for row, *_ in asked])
            said = generate(loaded.model, processor, image[rows], prompts, Generation(max_new_tokens=6))
            for (_, _, answer, kind), [text] in zip(asked, said, strict=True):
                right[name + kind].append(text.strip(" .") == answer)
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def captions(loaded: Loaded, count: int, split: str = "test") -> dict[str, float]:
    """Recall and precision of objects, by their number in the picture too."""
    found: dict[str, list[float]] = defaultdict(list)
    for scenes, image in batches(loaded, count, split):
        prompts = [loaded.processor.prompt("a photo of", "caption")] * len(scenes)
        said = generate(loaded.model, loaded.processor, image, prompts, Generation(max_new_tokens=30))
        for scene, [text] in zip(scenes, said, strict=True):
            true = {(thing.color, thing.shape) for thing in scene.things}
            named = set(NAMED.findall(text))
            hits = len(true & named)
            found["object recall"].append(hits / len(true))
            found[f"object recall of {len(true)}"].append(hits / len(true))
            found["object precision"].append(hits / len(named) if named else 0.0)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


@torch.no_grad()
def retrieval(loaded: Loaded, count: int = 500, split: str = "test") -> dict[str, float]:
    """recall@1 both ways among `count` pictures, each with one full list of its things as caption."""
    model, processor = loaded.model, loaded.processor
    assert isinstance(model, Blip2Representation)
    texts, features = [], []
    for scenes, image in batches(loaded, count, split):
        texts += [list_caption(scene.things, random.Random(scene.seed)) for scene in scenes]
        features.append(image)
    embeds = torch.cat([part.image_embeds for part in features])
    image = ImageFeatures(
        embeds, torch.cat([part.query_output for part in features if part.query_output is not None])
    )
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


def figures(loaded: Loaded, count: int, split: str = "test") -> dict[str, dict[str, float]]:
    """Every suite that a checkpoint has."""
    if isinstance(loaded.model, Blip2Representation):
        return {"retrieval": retrieval(loaded, min(count, 500), split)}
    return {"questions": answers(loaded, count, split), "captions": captions(loaded, count, split)}
