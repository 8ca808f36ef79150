"""Drawn scenes as image-text shards, for what trains from shards: the same path as the web's pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from train.data.shards import add_sample, write_atomically, write_metadata, write_tar
from train.datasets import Scenes, Source
from train.scenes.text import telling_caption
from train.scenes.world import render, sample

PER_SHARD = 1000
SOURCE = Source(clean=False, flip=0.0, crop=1.0)  # captions say left and right, count, and are clean already


def write(folder: Path, scenes: int, validation: int, captions: int = 8, size: int = 0) -> None:
    """Write shards, whole ones only; the same call goes on where a stopped one left off.

    Args:
        folder: for them.
        scenes: to train on.
        validation: held out.
        captions: of each scene, different ones.
        size: pixels a side; 0 takes that of `Scenes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Path]] = {"train": [], "val": []}
    for part, split, number in (("train", "train", scenes), ("val", "validation", validation)):
        for start in tqdm(range(0, number, PER_SHARD), unit="shard", desc=part, disable=None):
            path = folder / f"{part}-{start // PER_SHARD:05d}.tar"
            found[part].append(path)
            if path.exists():
                continue
            with write_tar(path) as tar:
                for index in range(start, min(number, start + PER_SHARD)):
                    scene, words = sample(index, split), random.Random(index)
                    picture = io.BytesIO()
                    Image.fromarray(render(scene, size or Scenes.image_size)).save(picture, "PNG")
                    said = sorted({telling_caption(scene, words) for _ in range(captions)})
                    record = json.dumps({"captions": said}).encode()
                    add_sample(tar, f"{index:08d}", {"png": picture.getvalue(), "json": record})
    write_atomically(folder / "source.json", json.dumps(dataclasses.asdict(SOURCE), indent=2).encode())
    write_metadata(folder, {part: paths for part, paths in found.items() if paths})
