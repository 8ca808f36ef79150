"""`python -m train.data bench`: images a second of the loader against plain Pillow, decode and transform.

Both read the same JPEGs in the same process, in turns, so that whatever else the machine does meets both; the
medians are told, per second of CPU time, which is what a core gives. Then the loader alone with more workers,
by the clock.
"""

from __future__ import annotations

import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tyro.conf import Positional

from train.data.loader import shards_loader
from train.data.records import IMAGES
from train.data.shards import add_sample, write_metadata, write_tar
from train.data.transforms import TrainTransform, normalize
from train.datasets import Shards

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@dataclass(frozen=True)
class Bench:
    """Loader benchmark; one process is one core."""

    folder: Positional[Path | None] = None
    """Prepared shards; by default 500-pixel JPEGs made of the photos in examples/."""
    image_size: int = 224
    """Pixels."""
    batch_size: int = 32
    """Images."""
    batches: int = 8
    """Of each turn."""
    turns: int = 9
    """For the loader and for plain Pillow each."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to try after that."""


def make_photos(folder: Path, number: int = 512, side: int = 500) -> None:
    """Shards of JPEGs of `side` pixels, different crops of real photographs with a camera's noise."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    random = np.random.default_rng(0)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(number):
            photo = photos[i % len(photos)]
            left, upper = (random.uniform(0, 0.2) * length for length in photo.size)
            box = (left, upper, left + 0.8 * photo.width, upper + 0.8 * photo.height)
            size = (side, side * 3 // 4) if photo.width > photo.height else (side * 3 // 4, side)
            pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box=box), np.float32)
            noisy = pixels + random.normal(0, 4, pixels.shape[:2])[:, :, None]
            file = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
            yield f"{i:05d}", {"jpg": file.getvalue(), "txt": b"a photo"}

    path = folder / "00000.tar"
    with write_tar(path) as tar:
        for key, members in samples():
            add_sample(tar, key, members)
    write_metadata(folder, {"train": [path]})


def no_tokens(captions: Sequence[str], generator: np.random.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(len(captions), 1, dtype=torch.long)}


def plain(files: Sequence[bytes], transform: TrainTransform, random: np.random.Generator) -> Tensor:
    """What a short script would do: open, crop, resize, flip, normalize, stack."""
    rows = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        crop = image.crop(transform.box(*image.size, random))
        crop = crop.resize((transform.image_size,) * 2, Image.Resampling.BICUBIC)
        rows.append(normalize(crop, mirror=random.random() < 0.5))
    return torch.stack(rows)


def run(bench: Bench) -> dict[str, float]:
    """Print the figures.

    Returns:
        Images a second: "plain", "loader", and "workers N".
    """
    with tempfile.TemporaryDirectory() as temporary:
        if bench.folder is None:
            make_photos(Path(temporary))
        folder = bench.folder or Path(temporary)
        files = list(itertools.islice(_images(folder), 512))
        torch.set_num_threads(1)
        shards = Shards({str(folder): 1.0})

        def loader(workers: int) -> Iterator[object]:
            return iter(
                shards_loader(
                    shards, no_tokens, bench.batch_size, image_size=bench.image_size, seed=0, workers=workers
                )
            )

        number = bench.batch_size * bench.batches
        transform, ours = TrainTransform(bench.image_size), loader(0)
        order, random = itertools.cycle(files), np.random.default_rng(0)
        times: dict[str, list[float]] = {"plain": [], "loader": []}
        next(ours)  # opens the shards and fills the shuffle buffer
        for turn in range(bench.turns + 1):
            began = time.process_time()
            for _ in range(bench.batches):
                plain([next(order) for _ in range(bench.batch_size)], transform, random)
            between = time.process_time()
            for _ in range(bench.batches):
                next(ours)
            ended = time.process_time()
            if turn:  # the first warms up
                times["plain"].append(between - began)
                times["loader"].append(ended - between)
        rates = {name: number / statistics.median(found) for name, found in times.items()}
        size = Image.open(io.BytesIO(files[0])).size
        kilobytes = statistics.mean(map(len, files)) / 1e3
        print(f"{len(files)} images such as {size[0]} x {size[1]}, {kilobytes:.0f} kB, to {bench.image_size}")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for name, rate in rates.items():
            print(f"  {name:9} {rate:7.0f} images/s of one core")
        shares = [p / t for p, t in zip(times["plain"], times["loader"], strict=True)]
        print(f"  the loader reaches {statistics.median(shares):.1%} of it (median of {bench.turns} turns)")
        for workers in bench.workers:
            source = loader(workers)
            for _ in range(4 + 2 * workers):  # what the workers had ready
                next(source)
            found = []
            for _ in range(max(3, bench.turns // 3)):
                began = time.perf_counter()
                for _ in range(bench.batches * max(1, workers)):
                    next(source)
                found.append(number * max(1, workers) / (time.perf_counter() - began))
            rates[f"workers {workers}"] = statistics.median(found)
            print(f"  {workers} workers {rates[f'workers {workers}']:7.0f} images/s by the clock")
            del source
        return rates


def _images(folder: Path) -> Iterator[bytes]:
    import tarfile

    for path in sorted(folder.glob("**/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.rsplit(".", 1)[-1] in IMAGES and (file := tar.extractfile(member)):
                    yield file.read()


def main(arguments: Sequence[str]) -> int:
    """The command."""
    run(tyro.cli(Bench, prog="python -m train.data bench", args=arguments, description=__doc__))
    return 0
