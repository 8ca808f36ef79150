"""Tar shards in img2dataset's layout, in and out: samples decoded in worker processes, files written whole.

    00000.tar: 000000000.jpg 000000000.txt 000000000.json 000000001.jpg ...

An image, its alt text (txt) and what else is known (json) share a key: the name up to
the first dot of its last part. Places are folders or fsspec addresses (s3://bucket/folder).
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from blip2.errors import ImageError
from blip2.images import open_image
from train.capfilt.models import Preprocess

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_NAME = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]*)")  # no hidden files: macOS adds ._ doubles


class ShardError(ValueError):
    """A shard that cannot be read."""


# ---------------------------------------------------------------- places


class Store:
    """A folder, local or remote, of which files are read and written whole.

    A local file is written beside its place and renamed; a remote one is uploaded when it is complete.
    """

    def __init__(self, address: str):
        self.address = address
        self.fs, root = fsspec.core.url_to_fs(
            str(Path(address).expanduser()) if "://" not in address else address
        )
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The file system's own path of a file."""
        return f"{self.root}/{name}"

    def names(self, suffix: str) -> list[str]:
        """All files in it that end so, folders included, sorted; hidden ones are left out."""
        start = len(self.root) + 1
        found = (path[start:] for path in self.fs.find(self.root) if path.endswith(suffix))
        return sorted(name for name in found if not Path(name).name.startswith("."))

    def read_jsons(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """JSON files; remote ones several at a time."""
        found = self.fs.cat([self.path(name) for name in names]) if names else {}
        return [json.loads(found[self.path(name)]) for name in names]

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file."""
        with self.writing(name) as path:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A local copy of a file, for as long as the block lasts; a local file itself."""
        if self.local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            self.fs.get_file(self.path(name), str(path))
            yield path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; what is there when the block ends well appears under `name`, whole."""
        if not self.local:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / Path(name).name
                yield path
                self.fs.makedirs(self.fs._parent(self.path(name)), exist_ok=True)
                self.fs.put_file(str(path), self.path(name))
            return
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        path = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            yield path
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, final)
        finally:
            path.unlink(missing_ok=True)

    def remove_parts(self) -> None:
        """Remove what killed runs left half-written in a local folder."""
        if self.local:
            for path in Path(self.root).glob("**/.*.part"):
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------- reading


@dataclass
class Entry:
    """Where the files of one sample lie in a tar: extension to offset and length, bytes."""

    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def index(path: Path) -> list[Entry]:
    """The samples of a tar, in its order.

    Raises:
        ShardError: it is no plain tar, is truncated, or holds no samples.
    """
    entries: dict[str, Entry] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and (match := _NAME.fullmatch(member.name)):
                    entry = entries.setdefault(match[1], Entry(match[1]))
                    entry.files[match[2].lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ShardError(f"no readable tar file ({error})") from error
    except OSError as error:
        raise ShardError(f"cannot be read ({error})") from error
    if not entries:
        raise ShardError("holds no samples")
    return list(entries.values())


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
        extension = next((name for name in IMAGES if name in entry.files), None)
        if extension is None:
            return Item(entry.key, dropped="no image")
        data = self._read(entry, extension)
        if not data:
            return Item(entry.key, dropped="empty image file")
        try:
            image = open_image(data)
        except ImageError as error:
            return Item(entry.key, dropped=_kind(error))
        metadata: Any = {}
        if "json" in entry.files:
            try:
                metadata = json.loads(self._read(entry, "json"))
            except (ValueError, RecursionError):
                metadata = None
        if not isinstance(metadata, dict):
            return Item(entry.key, dropped="damaged json")
        text = self._read(entry, "txt").decode(errors="replace") if "txt" in entry.files else ""
        originals = _originals(text, metadata)
        pixels = [preprocess(image) for preprocess in self.preprocess]
        return Item(entry.key, "", extension, data, metadata, originals, pixels)

    def _read(self, entry: Entry, extension: str) -> bytes:
        offset, size = entry.files[extension]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _originals(text: str, metadata: dict[str, Any]) -> list[str]:
    """What was said of an image: the json's captions, else its txt, else the json's caption."""
    found = metadata.get("captions") or text or metadata.get("caption") or []
    found = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return [" ".join(one.split()) for one in found if isinstance(one, str)]


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


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Writes a tar whose bytes depend on the samples alone."""

    def __init__(self, path: Path):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by close()

    def add(self, key: str, extension: str, image: bytes, record: dict[str, Any]) -> None:
        """One sample: the image file as it was, and a json."""
        text = json.dumps(record, ensure_ascii=False).encode()
        for name, content in ((extension, image), ("json", text)):
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """End the file."""
        self.tar.close()
