"""Bytes of samples out of tar shards: prepared folders as energon data sets, with a reader that never raises.

energon decides which sample comes next; it is then read with a single request, on a disk as from a remote
store, and what cannot be read becomes a sample that says so.
"""

from __future__ import annotations

import bisect
import functools
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import DefaultDecoderWebdatasetFactory
from megatron.energon.flavors.webdataset.config import split_name_re
from megatron.energon.flavors.webdataset.structs import ShardInfo
from multistorageclient.types import Range

from train.datasets import Shards
from train.loader import DataError

BLOCK = 512  # bytes; all of a tar archive comes in them


class Reader:
    """Samples by their number, as an energon reader gives them; those that cannot be read have an "error"."""

    def __init__(self, shards: Sequence[ShardInfo], open_files: int = 16, indices: int = 256):
        self.shards = shards
        self.local = shards[0].path.is_local()
        self.starts = np.cumsum([0, *(shard.count for shard in shards)]).tolist()
        self._file = functools.lru_cache(open_files)(_open)  # a file closes when it leaves the cache
        self._offsets = functools.lru_cache(indices)(_offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect.bisect_right(self.starts, index) - 1
        shard, place = self.shards[number], index - self.starts[number]
        sample: dict[str, Any] = {
            "__key__": str(place),
            "__shard__": shard.name,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (),
        }
        try:
            start, end = map(int, self._offsets(shard.path)[place : place + 2])
            data = self._read(shard.path, start, end - start)
            if len(data) < end - start:
                raise tarfile.ReadError("the shard is truncated")
            for name, content in members(data):
                if (parts := split_name_re.match(name)) is not None:
                    sample["__key__"], extension = parts.groups()
                    sample[extension] = content
        except (OSError, tarfile.TarError, ValueError, RuntimeError) as error:
            # missing, truncated, no tar; RuntimeError is a store's
            sample["error"] = str(error)
        return sample

    def _read(self, path: EPath, start: int, length: int) -> bytes:
        if self.local:
            return os.pread(self._file(path).fileno(), length, start)
        # A file object of the store's client would fetch the whole shard.
        return bytes(path.fs.read(str(path.internal_path), byte_range=Range(offset=start, size=length)))


def address(folder: str) -> EPath:
    """A folder; or a remote one: msc://profile/path, or s3:// and gs:// with the machine's credentials."""
    return EPath(re.sub(r"^(s3|gs)://([^/]+)", r"msc://_\1-\2", folder))


def _open(path: EPath) -> io.FileIO:
    return open(str(path.local_path()), "rb", buffering=0)


def _offsets(path: EPath) -> np.ndarray:
    return np.frombuffer(EPath(f"{path}.idx").read_bytes(), dtype="<u8")


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files in a stretch of a tar archive.

    A reading of plain headers, which is what shards are made of; the standard library, which takes ten times
    as long, reads all others.

    Raises:
        tarfile.ReadError: that is no tar archive.
    """
    found, at = [], 0
    while at + BLOCK <= len(data) and data[at]:
        header = data[at : at + BLOCK]
        if header[257:262] != b"ustar":
            raise tarfile.ReadError("no tar header where a sample begins")
        size = int(header[124:136].rstrip(b" \0") or b"0", 8)
        content, kind = data[at + BLOCK : at + BLOCK + size], header[156:157]
        at += BLOCK + -(-size // BLOCK) * BLOCK
        if kind in (b"0", b"\0") and not header[345]:
            found.append((header[:100].rstrip(b"\0").decode(), content))
        elif kind != b"x" or b" path=" in content or b" size=" in content:  # webdataset writes only an mtime
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                found = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]
            break
    yield from found


class ImageTextFolder(DefaultDecoderWebdatasetFactory[dict]):
    """A prepared folder as energon reads it: raw bytes, and no exception for a shard that cannot be read."""

    __sample_type__ = dict

    def __init__(self, path: Any, **options: Any):
        super().__init__(path, decoder=None, sample_loader=dict, part_filter=lambda part: True, **options)

    def build(self, worker_rotation_offset: int = 0) -> Any:
        dataset: Any = super().build(worker_rotation_offset)
        dataset.dataset.join_readers = [Reader(self.shards)]
        return dataset

    def load_sample(self, sample: Any) -> Any:
        sample["__subflavors__"] = self.subflavors
        return sample


def open_folders(
    shards: Shards, split: str, workers: WorkerConfig, reading: Mapping[str, int]
) -> dict[str, ImageTextFolder]:
    """The folders that a split, "train" or "validation", reads.

    Args:
        shards: names them.
        split: of `shards_loader`.
        workers: how many read.
        reading: options of energon's for training.

    Raises:
        DataError: one is not prepared, has no such split, or has fewer samples than there are workers.
    """
    train = split == "train"
    names = list(shards.weights) if train else list(shards.validation or shards.weights)
    part, streams = "train" if train else "val", workers.world_size * max(1, workers.num_workers)
    folders = {}
    for name in names:
        try:
            folder = ImageTextFolder(
                address(name), split_part=part, training=train, worker_config=workers,
                subflavors={"folder": name}, **(reading if train else {}),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{name} is not prepared ({error}); see `python -m train.data prepare -h`"
            ) from error
        except ImportError as error:
            raise DataError(
                f"{name} takes a package that is not there ({error}); for s3:// that is boto3"
            ) from error
        except (AssertionError, LookupError) as error:  # energon: no such part, or an empty one
            if train or shards.validation:
                raise DataError(f"{name} has no {part} split; it was prepared without one") from error
            continue
        if len(folder) < streams:
            raise DataError(
                f"{name} has {len(folder)} samples to {'train' if train else 'evaluate'} on, fewer than the "
                f"{streams} processes x workers; use fewer workers"
            )
        folders[name] = folder
    if not folders:
        raise DataError(
            f"none of {', '.join(names)} has a val split; prepare one with --validation, or name a folder in "
            "`validation`"
        )
    return folders
