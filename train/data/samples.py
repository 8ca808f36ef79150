"""What a worker of the loader makes of one sample of a shard: pixels, a caption, a name; or a reason to skip.

A sample is the members of a tar shard that share a name, as img2dataset writes them: an image, and its
caption as .txt or in a .json record. Nothing in them is trusted. What cannot be used is skipped and counted
by kind; the counts travel to the training process with the next batch, so that they survive a resumed run.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from megatron.energon import SkipSample, TaskEncoder, WorkerConfig
from megatron.energon.task_encoder.base import stateless
from PIL import Image
from torch import Tensor

from blip2.errors import ImageError
from blip2.images import open_image
from train.captions import Tokenize
from train.data.records import IMAGES
from train.data.transforms import TrainTransform, clean_caption, decode, normalize
from train.datasets import Source
from train.loader import Batch, DataError

KINDS = ("broken image", "empty caption", "broken record", "unreadable shard")
EXAMPLES = 3  # names of skipped samples that are kept for each kind
HOPELESS = 1000  # samples skipped in a row

Record = Mapping[str, Any]


class Unusable(Exception):
    """A sample that is skipped and counted; its argument is one of `KINDS`."""


# --- one sample ---


def captions_of(sample: Record) -> list[str]:
    """All captions of a sample: `captions` of its .json, else its .txt, else `caption` of its .json.

    Raises:
        Unusable: the record cannot be parsed.
    """
    try:
        record = json.loads(sample["json"]) if "json" in sample else {}
        if not isinstance(record, dict):
            raise ValueError("no object")
        captions = record.get("captions")
        if captions is None:
            captions = [sample["txt"].decode() if "txt" in sample else record.get("caption")]
        return [caption for caption in captions if isinstance(caption, str)]
    except (ValueError, RecursionError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise Unusable("broken record") from error


def picture_of(sample: Record) -> str:
    """What a picture that several samples show goes by: `image_id` of its .json, else the sample's name."""
    record = json.loads(sample["json"]) if "json" in sample else {}
    return str(record.get("image_id", sample["__key__"]))


def image_of(sample: Record, source: Source, wanted: int) -> Image.Image:
    """A sample's picture, RGB and upright; JPEGs much larger than `wanted` pixels may come smaller.

    Raises:
        Unusable: there is none, or it cannot be decoded.
    """
    if source.decoder is not None:
        data = next(
            (v for k, v in sample.items() if not k.startswith("__") and k not in ("txt", "json")), None
        )
    else:
        data = next((sample[extension] for extension in IMAGES if extension in sample), None)
    if data is None:
        raise Unusable("broken record")
    try:
        if source.decoder is not None:
            return open_image(_function(source.decoder)(data))
        return decode(data, wanted) if wanted else open_image(data)
    except (ImageError, ValueError) as error:
        raise Unusable("broken image") from error


@functools.cache
def _function(name: str) -> Callable[[bytes], Image.Image]:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


# --- a batch ---


class Encoder(TaskEncoder):
    """energon's hook into its workers: samples to tensors, tensors to batches.

    All chance comes from (seed, logical worker, index of the sample or batch in it), so it does not depend on
    how the workers are spread over processes, nor on where a run was interrupted.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        tokenize: Tokenize,
        *,
        image_size: int,
        seed: int,
        train: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pictures: bool = False,
    ):
        self.pictures = pictures  # whether batches name the picture of each row
        self.sources, self.tokenize, self.seed, self.train = sources, tokenize, seed, train
        self.transforms = {
            folder: TrainTransform(
                image_size,
                scale=(source.crop, 1.0) if source.crop < 1 else None,
                flip=source.flip,
                mean=source.mean or mean,
                std=source.std or std,
            )
            for folder, source in sources.items()
        }
        self._in_a_row = 0
        self._reset()

    def _reset(self) -> None:
        self._drawn = 0
        self._skipped: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def _generator(self) -> np.random.Generator:
        config = WorkerConfig.active_worker_config
        workers, worker = max(1, config.num_workers), config.rank_worker_id()
        index = (config.active_worker_sample_index - worker) // workers
        place = (config.rank * workers + worker, index)
        # half the time of default_rng, which would hash all three
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, *place]))

    @stateless
    def encode_sample(self, sample: Record) -> dict[str, Any]:
        """Draw a caption, a crop and a flip; or skip the sample."""
        folder = sample["__subflavors__"]["folder"]
        key = f"{folder}/{sample['__shard__']}/{sample['__key__']}"
        self._drawn += 1
        try:
            encoded = self._encode(sample, folder)
        except Unusable as error:
            kind = str(error)
            self._skipped[kind] = self._skipped.get(kind, 0) + 1
            examples = self._examples.setdefault(kind, [])
            if len(examples) < EXAMPLES:
                examples.append(f"{key} ({sample['error']})" if "error" in sample else key)
            self._in_a_row += 1
            if self._in_a_row >= HOPELESS:
                told = describe(self._skipped, self._examples)
                raise DataError(f"{HOPELESS} samples in a row could not be used: {told}") from error
            raise SkipSample from error
        self._in_a_row = 0
        named = {"image": f"{folder}/{picture_of(sample)}"} if self.pictures else {}
        return {"key": key, **encoded, **named}

    def _encode(self, sample: Record, folder: str) -> dict[str, Any]:
        if "error" in sample:
            raise Unusable("unreadable shard")
        source, transform, random = self.sources[folder], self.transforms[folder], self._generator()
        captions = captions_of(sample)
        cleaned = (
            clean_caption(caption, source.max_words)
            if source.clean
            else " ".join(caption.split()[: source.max_words])
            for caption in captions
        )
        usable = [caption for caption in cleaned if caption.strip()]
        if not usable:
            raise Unusable("empty caption")
        if not self.train:
            picture = image_of(sample, source, 0).resize(
                (transform.image_size,) * 2, Image.Resampling.BICUBIC
            )
            pixels, caption = normalize(picture, transform.mean, transform.std), usable[0]
        else:
            caption = usable[int(random.integers(len(usable)))]
            pixels = transform(image_of(sample, source, transform.wanted), random)
        return {"pixel_values": pixels, "caption": source.prefix + caption}

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        """Stack samples, tokenize their captions, and report what was skipped since the last batch."""
        batch = {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            **self.tokenize([sample["caption"] for sample in samples], self._generator()),
            "captions": [sample["caption"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            **({"images": [sample["image"] for sample in samples]} if self.pictures else {}),
            "worker": WorkerConfig.active_worker_config.rank_worker_id(),
            "report": (self._drawn, self._skipped, self._examples),
        }
        self._reset()
        return batch


def concatenate(batches: list[Batch]) -> Batch:
    """Batches one after the other; token tensors are padded on the right, labels with -100, others with 0."""
    if len(batches) == 1:
        return batches[0]

    def join(name: str, parts: list[Tensor]) -> Tensor:
        if name != "pixel_values":
            length, value = max(part.shape[1] for part in parts), -100 if name == "labels" else 0
            parts = [
                torch.nn.functional.pad(part, (0, length - part.shape[1]), value=value) for part in parts
            ]
        return torch.cat(parts)

    return {
        name: join(name, [batch[name] for batch in batches])
        if isinstance(value, Tensor)
        else [item for batch in batches for item in batch[name]]
        for name, value in batches[0].items()
    }


def describe(skipped: Mapping[str, int], examples: Mapping[str, list[str]]) -> str:
    """Counts by kind, with names."""
    return "; ".join(
        f"{count:,} {kind}{'' if count == 1 else 's'}, such as {', '.join(examples.get(kind, []))}"
        for kind, count in skipped.items()
    )
