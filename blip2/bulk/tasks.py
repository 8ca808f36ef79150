"""What the models make of a batch: captions, embeddings or scores, a record a row.

B pictures, N texts, Q queries, E contrastive width. A record is what a line of JSONL holds; embeddings are
arrays.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2.bulk.settings import BulkError, Model, Settings
from blip2.bulk.unit import Sample
from blip2.checkpoint import Loaded, load
from blip2.devices import in_halves
from blip2.folder import Picture, caption_batch, encode_pictures
from blip2.model import Blip2
from blip2.pictures import Captioning, Failure
from blip2.representation import Blip2Representation
from blip2.sidecars import Entry

Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A row, ready for the models.

    Attributes:
        picture: its name and pixels, or why it cannot be used.
        sample: what else is known of it.
    """

    picture: Picture
    sample: Sample


class Task(Protocol):
    """A loaded model and what it does."""

    def prepare(self, key: str, image: Image.Image | None) -> Picture:
        """A row's name and picture, RGB, None where there is none -> pixels; in whatever thread decodes."""

    def __call__(self, batch: Sequence[Item], chance: str) -> list[Record | Failure]:
        """What becomes of each row; `chance` names the batch, for what is drawn."""


def make_task(settings: Settings, device: str = "auto") -> Task:
    """Load what a run needs.

    Raises:
        BulkError: the model is made for something else.
        CheckpointError: it cannot be found or used.
    """
    kinds: dict[str, Callable[[Settings, str], Task]]
    kinds = {"caption": Caption, "embed": Embed, "score": Score}
    return kinds[settings.task](settings, device)


def _load(model: Model, device: str, kind: type, what: str) -> Loaded:
    loaded = load(model.name, device=device, **model.loading())
    if not isinstance(loaded.model, kind):
        fits = "scenes-opt or blip2-opt-2.7b" if kind is Blip2 else "scenes-itm or blip2-itm-vit-g"
        raise BulkError(f"{model.name} does not {what}: choose a checkpoint such as {fits}")
    return loaded


class Caption:
    """Captions, as `blip2 caption FOLDER` makes them."""

    def __init__(self, settings: Settings, device: str):
        self.loaded = _load(settings.model, device, Blip2, "make captions")
        self.scorer = None
        if settings.scorer:
            scoring = Model(settings.scorer, settings.model.precision, settings.model.quantize_vision)
            self.scorer = _load(scoring, device, Blip2Representation, "score captions")
        wanted = settings.captioning
        if not settings.prompted:
            wanted = replace(wanted, prompt=self.loaded.caption_prompt)
        self.wanted = replace(wanted, force=settings.force)

    def prepare(self, key: str, image: Image.Image | None) -> Picture:
        """See `Task`."""
        assert image is not None
        scored = None if self.scorer is None else self.scorer.processor.images(image)
        return Picture(key, self.loaded.processor.images(image), scored)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Item], chance: str) -> list[Record | Failure]:
        """See `Task`."""
        wanted = self.wanted
        if wanted.generation.method == "nucleus":  # else every batch would be drawn by the same numbers
            seed = int.from_bytes(hashlib.blake2b(f"{wanted.generation.seed} {chance}".encode()).digest()[:4])
            wanted = replace(wanted, generation=wanted.generation.with_(seed=seed >> 1))
        results = caption_batch(self.loaded, [item.picture for item in batch], wanted, self.scorer)
        return [_caption_record(one, wanted) if isinstance(one, Entry) else one for one in results]


def _caption_record(entry: Entry, wanted: Captioning) -> Record:
    record: Record = {"image": entry.image, "captions": list(entry.captions)}
    if len(wanted.prompts) > 1:
        each = len(entry.captions) // len(wanted.prompts)
        record["prompts"] = [prompt for prompt in wanted.prompts for _ in range(each)]
    if entry.match:
        record["match"] = [score if score == score else None for score in entry.match]
    if entry.answers:
        record["answers"] = entry.answers
    return record


class Embed:
    """ITC embeddings: of a picture one a query, of a text one; float (Q, E) and (E,), unit length."""

    def __init__(self, settings: Settings, device: str):
        self.loaded = _load(settings.model, device, Blip2Representation, "embed")
        self.texts, self.force = settings.texts_only, settings.force
        self.dtype = np.dtype(settings.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an embedding."""
        model: Any = self.loaded.model
        width = int(model.config.image_text_hidden_size)
        return (width,) if self.texts else (int(model.query_tokens.shape[1]), width)

    def prepare(self, key: str, image: Image.Image | None) -> Picture:
        """See `Task`."""
        return Picture(key, None if image is None else self.loaded.processor.images(image))

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Item], chance: str) -> list[Record | Failure]:
        """See `Task`."""
        return in_halves(self._texts if self.texts else self._images, batch)

    def _texts(self, batch: Sequence[Item]) -> list[Record | Failure]:
        model: Any = self.loaded.model
        texts = [item.sample.texts[0] for item in batch]
        feats = model.text_feats(**tokens(self.loaded, texts)).cpu().numpy().astype(self.dtype)
        return [
            {"key": item.picture.image, "text": text, "embedding": own}
            for item, text, own in zip(batch, texts, feats, strict=True)
        ]

    def _images(self, batch: Sequence[Item]) -> list[Record | Failure]:
        model: Any = self.loaded.model
        seen = encode_pictures(self.loaded, [item.picture.pixel_values for item in batch])
        reasons = [""] * len(batch) if self.force else self.loaded.unknown(seen)
        feats = model.image_feats(seen.query_output).cpu().numpy().astype(self.dtype)
        return [
            Failure(item.picture.image, reason, unknown=True)
            if reason
            else {"image": item.picture.image, "embedding": own}
            for item, reason, own in zip(batch, reasons, feats, strict=True)
        ]


class Score:
    """How well each picture fits its texts, or the same few: ITM's probability, ITC's cosine similarity."""

    def __init__(self, settings: Settings, device: str):
        self.loaded = _load(settings.model, device, Blip2Representation, "score texts")
        self.texts, self.heads, self.force = settings.texts, settings.heads, settings.force
        self.same = tokens(self.loaded, list(self.texts)) if self.texts else {}

    def prepare(self, key: str, image: Image.Image | None) -> Picture:
        """See `Task`."""
        assert image is not None
        return Picture(key, self.loaded.processor.images(image))

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Item], chance: str) -> list[Record | Failure]:
        """See `Task`."""
        return in_halves(self._score, batch)

    def _score(self, batch: Sequence[Item]) -> list[Record | Failure]:
        seen = encode_pictures(self.loaded, [item.picture.pixel_values for item in batch])
        reasons = [""] * len(batch) if self.force else self.loaded.unknown(seen)
        texts = [list(self.texts or item.sample.texts) for item in batch]
        rows = torch.tensor([row for row, own in enumerate(texts) for _ in own], device=self.loaded.device)
        if self.same:
            text = {name: value.repeat(len(batch), 1) for name, value in self.same.items()}
        else:
            text = tokens(self.loaded, [one for own in texts for one in own])
        scores = {head: getattr(self, f"_{head}")(seen, rows, text).tolist() for head in self.heads}
        results: list[Record | Failure] = []
        start = 0
        for item, reason, own in zip(batch, reasons, texts, strict=True):
            record = {"image": item.picture.image, "texts": own}
            for head, values in scores.items():
                record[head] = [round(value, 6) for value in values[start : start + len(own)]]
            start += len(own)
            results.append(Failure(item.picture.image, reason, unknown=True) if reason else record)
        return results

    def _itm(self, seen: Any, rows: Tensor, text: dict[str, Tensor]) -> Tensor:
        model: Any = self.loaded.model
        return model.match_pairs(seen, rows, **text).float().softmax(-1)[:, 1]

    def _itc(self, seen: Any, rows: Tensor, text: dict[str, Tensor]) -> Tensor:
        model: Any = self.loaded.model
        image_feats, text_feats = model.image_feats(seen.query_output), model.text_feats(**text)
        return torch.einsum("nqe,ne->nq", image_feats[rows], text_feats).amax(-1)


def tokens(loaded: Loaded, texts: list[str]) -> dict[str, Tensor]:
    """Texts for a stage-1 model, int (N, T); what is longer than it reads is cut."""
    processor = loaded.processor
    room = None if processor.context is None else processor.context - processor.num_query_tokens - 1
    found = processor.text(texts, max_length=room)
    return {name: value.to(loaded.device) for name, value in found.items()}
