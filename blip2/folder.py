"""Caption every picture of a folder: into text files beside the pictures, or into one table.

    pictures = find_pictures(folder)
    with Sidecars(folder) as out:               # or Table(folder / "captions.csv")
        for result in caption_folder(loaded, folder, out.missing(pictures), out, Captioning()): ...

What is done is on the disk before the next picture begins, whole, so that a stop at any moment loses at most
the pictures under way, and the same call goes on from there.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint import Loaded
from blip2.devices import in_halves
from blip2.generation import StopSignal, describe, generate, num_descriptions
from blip2.images import ImageError
from blip2.model import Blip2
from blip2.pictures import Captioning, Failure, open_picture, read_ahead
from blip2.representation import Blip2Representation
from blip2.sidecars import Entry, Sidecars, Table
from blip2.vision import ImageFeatures


def caption_folder(
    loaded: Loaded,
    folder: str | Path,
    pictures: Sequence[str],
    out: Sidecars | Table | None,
    wanted: Captioning,
    scorer: Loaded | None = None,
) -> Iterator[Entry | Failure]:
    """Caption pictures of a folder, given as paths within it; otherwise as `caption_pictures`."""
    paths = {image: Path(folder) / image for image in pictures}
    return caption_pictures(loaded, paths, out, wanted, scorer)


def caption_pictures(
    loaded: Loaded,
    pictures: Mapping[str, Path],
    out: Sidecars | Table | None,
    wanted: Captioning,
    scorer: Loaded | None = None,
    stop: StopSignal | None = None,
) -> Iterator[Entry | Failure]:
    """Caption pictures, a batch at a time, while the next batch is read.

    Args:
        loaded: a stage-2 checkpoint.
        pictures: files, by the names that entries are to have.
        out: where every entry goes before it is yielded; None for a preview.
        wanted: of each.
        scorer: a checkpoint with an ITM head, for a match score of every caption.
        stop: once set, decoding ends within a token, and the batch under way is given up.

    Yields:
        An entry or a failure for every picture, in order.
    """
    stop = stop or threading.Event()
    names = list(pictures)
    batches = [names[start : start + wanted.batch_size] for start in range(0, len(names), wanted.batch_size)]

    def read(batch: Sequence[str]) -> list[Picture]:
        return [_read(image, pictures[image], loaded, scorer) for image in batch]

    for batch in read_ahead(batches, read):
        results = caption_batch(loaded, batch, wanted, scorer, stop)
        if stop.is_set():
            return  # the batch's texts may be cut short
        for result in results:
            if isinstance(result, Entry) and out is not None:
                out.write(result)
            yield result


@dataclass(frozen=True)
class Picture:
    """A picture as the models take it, or why it cannot be used.

    Attributes:
        image: what it goes by.
        pixel_values: float (1, 3, S, S), as the captioning model takes it.
        scored: likewise as the scoring model does.
        reason: why it cannot be used; "" for a sound one.
    """

    image: str
    pixel_values: Tensor | None = None
    scored: Tensor | None = None
    reason: str = ""


def _read(image: str, path: Path, loaded: Loaded, scorer: Loaded | None) -> Picture:
    try:
        opened = open_picture(image, path)
    except ImageError as error:
        return Picture(image, reason=str(error))
    scored = None if scorer is None else scorer.processor.images(opened)
    return Picture(image, loaded.processor.images(opened), scored)


def caption_batch(
    loaded: Loaded,
    batch: Sequence[Picture],
    wanted: Captioning,
    scorer: Loaded | None = None,
    stop: StopSignal | None = None,
) -> list[Entry | Failure]:
    """Caption pictures at once, as `caption_pictures` does; in order, each with its failure."""
    usable = [one for one in batch if not one.reason]
    caption = partial(_caption, loaded, wanted, scorer, stop or threading.Event())
    done = iter(in_halves(caption, usable))
    return [Failure(one.image, one.reason) if one.reason else next(done) for one in batch]


@torch.no_grad()
def _caption(
    loaded: Loaded, wanted: Captioning, scorer: Loaded | None, stop: StopSignal, batch: Sequence[Picture]
) -> list[Entry | Failure]:
    features = encode_pictures(loaded, [one.pixel_values for one in batch])
    reasons = [""] * len(batch) if wanted.force else loaded.unknown(features)
    rows = [row for row, reason in enumerate(reasons) if not reason]
    captioned = _entries(loaded, [batch[row] for row in rows], features[rows], wanted, scorer, stop)
    entries = dict(zip(rows, captioned, strict=True))
    return [
        entries.get(row) or Failure(one.image, reasons[row], unknown=True) for row, one in enumerate(batch)
    ]


def encode_pictures(loaded: Loaded, pixel_values: Iterable[Tensor | None]) -> ImageFeatures:
    """pixel_values: float (1, 3, S, S) each, or None, which is left out -> features of all of them."""
    stacked = torch.cat([one for one in pixel_values if one is not None])
    return loaded.model.encode_image(stacked.to(loaded.device))


def _entries(
    loaded: Loaded,
    batch: list[Picture],
    features: ImageFeatures,
    wanted: Captioning,
    scorer: Loaded | None,
    stop: StopSignal,
) -> list[Entry]:
    model, processor = loaded.model, loaded.processor
    assert isinstance(model, Blip2)
    if not batch:
        return []
    captions: list[list[str]] = [[] for _ in batch]
    for text in wanted.prompts or (wanted.prompt,):
        prompt = processor.prompt(text, "caption")
        said = generate(model, processor, features, prompt, wanted.generation, stop)
        for own, texts in zip(captions, said, strict=True):
            own += wanted.worded(texts, text)
    answers: list[dict[str, str]] = [{} for _ in batch]
    if wanted.questions:
        style = wanted.style or processor.question_style
        count = 0 if style == "raw" else num_descriptions(model)
        described = describe(model, processor, features, count, stop)
        for question in wanted.questions:
            if stop.is_set():
                break
            prompts = [processor.prompt(question, style, description=text) for text in described]
            replies = generate(
                model, processor, features, prompts, wanted.answers, stop, [question] * len(batch)
            )
            for found, texts in zip(answers, replies, strict=True):
                found[question] = texts[0]
    match: list[tuple[float, ...]] = [()] * len(batch)
    if scorer is not None:
        assert isinstance(scorer.model, Blip2Representation)
        seen = encode_pictures(scorer, [one.scored for one in batch])
        unknown = [""] * len(batch) if wanted.force else scorer.unknown(seen)
        for row, texts in enumerate(captions):
            if unknown[row]:
                continue  # a score that means nothing is worse than none
            tokens = scorer.processor.text(texts)
            ids, mask = (tokens[name].to(scorer.device) for name in ("input_ids", "attention_mask"))
            match[row] = tuple(scorer.model.score(seen[row], ids, mask)[0].tolist())
    return [
        Entry(one.image, tuple(texts), scores, found)
        for one, texts, scores, found in zip(batch, captions, match, answers, strict=True)
    ]
