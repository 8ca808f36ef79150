"""Samples of tar shards (see `blip2.bulk.tars`), decoded in worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from blip2.bulk.tars import Entry, captions_of
from blip2.errors import ImageError
from blip2.images import open_image
from train.capfilt.models import Preprocess


@dataclass
class Item:
    """One sample, decoded.

    Attributes:
        key: its name.
        dropped: why it cannot be used; "" for a sound one, and only such have the rest.
        extension: of the image file.
        image: the image file.
        metadata: the json file's content.
        originals: the texts that came with it.
        pixels: float32 (3, S, S) for each model.
    """

    key: str
    dropped: str = ""
    extension: str = ""
    image: bytes = b""
    metadata: dict[str, Any] = field(default_factory=dict)
    originals: list[str] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)


class Samples(Dataset):
    """A tar's samples, decoded one by one.

    Args:
        path: of the tar, local.
        entries: its `index`.
        preprocess: one for each model that sees the images.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], preprocess: Sequence[Preprocess]):
        self.path, self.entries, self.preprocess = path, entries, preprocess

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: int) -> Item:
        entry = self.entries[row]
        if (extension := entry.image) is None:
            return Item(entry.key, dropped="no image")
        data = entry.read(self.path, extension)
        if not data:
            return Item(entry.key, dropped="empty image file")
        try:
            image = open_image(data)
        except ImageError as error:
            return Item(entry.key, dropped=_kind(error))
        metadata = entry.metadata(self.path)
        if metadata is None:
            return Item(entry.key, dropped="damaged json")
        originals = captions_of(entry.read(self.path, "txt").decode(errors="replace"), metadata)
        pixels = [preprocess(image) for preprocess in self.preprocess]
        return Item(entry.key, "", extension, data, metadata, originals, pixels)


def _kind(error: ImageError) -> str:
    """Of what kind an image's fault is; the message itself names sizes and bytes."""
    if error.__cause__ is None or isinstance(error.__cause__, Image.DecompressionBombError):
        return "unusable size"
    return "not an image" if isinstance(error.__cause__, UnidentifiedImageError) else "damaged image"


def batches(samples: Samples, batch_size: int, workers: int) -> Iterator[list[Item]]:
    """Decoded samples in order, `batch_size` at a time, by that many worker processes (0: in this one).

    The processes come from a server process, for a process that runs Ray or CUDA should not be forked.
    """
    options: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train.capfilt.shards"])
        options = {"num_workers": workers, "multiprocessing_context": context, "prefetch_factor": 2}
    yield from DataLoader(samples, batch_size=batch_size, collate_fn=_as_they_are, **options)


def _as_they_are(items: list[Item]) -> list[Item]:
    return items
