"""Small shards for the tests of the loader."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.data.shards import add_sample, write_metadata, write_tar


def picture(number, size=12, kind="PNG"):
    """A small picture that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(path: Path, samples):
    """`samples`: [{"__key__": ..., "png": bytes, ...}]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_tar(path) as tar:
        for sample in samples:
            add_sample(tar, sample.pop("__key__"), sample)


def make(folder: Path, count, *, shards=2, broken=(), wordless=(), part="train", start=0, size=12):
    """A prepared folder of `count` samples; `broken` ones have no image, `wordless` ones no caption."""
    samples = []
    for i in range(start, start + count):
        words = [] if i in wordless else [f"{folder.name} number {i}", f"{folder.name} again {i}"]
        image = b"\x89PNG broken" if i in broken else picture(i, size)
        samples.append(
            {"__key__": f"{i:05d}", "png": image, "json": json.dumps({"captions": words}).encode()}
        )
    paths = [folder / f"{part}-{shard:05d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        write(path, samples[shard * count // shards : (shard + 1) * count // shards])
    found = {}
    for path in sorted(folder.glob("*.tar")):
        found.setdefault(path.name.split("-")[0], []).append(path)
    write_metadata(folder, found)
    return str(folder)


def tokenize(captions, generator):
    """Code points, and a draw, of captions of different lengths."""
    draw = int(generator.integers(1000))
    rows = [torch.tensor([draw, *map(ord, caption)]) for caption in captions]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
