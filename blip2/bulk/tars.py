"""Tar shards in img2dataset's layout: their samples found, and written.

    00000.tar: 000000000.jpg 000000000.txt 000000000.json 000000001.jpg ...

An image, its alt text (txt) and what else is known (json) share a key: the name up to the first dot of its
last part.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_NAME = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]*)")  # no hidden files: macOS adds ._ doubles


class ShardError(ValueError):
    """A shard that cannot be read."""


@dataclass
class Entry:
    """Where the files of one sample lie in a tar: extension to offset and length, bytes."""

    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """Extension of its image file; None if it has none."""
        return next((name for name in IMAGES if name in self.files), None)

    def read(self, path: Path, extension: str) -> bytes:
        """A file of it, from the tar at `path`; b"" if it has none such."""
        if extension not in self.files:
            return b""
        offset, size = self.files[extension]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def metadata(self, path: Path) -> dict[str, Any] | None:
        """What its json holds, {} if it has none; None if that is damaged."""
        try:
            found = json.loads(self.read(path, "json")) if "json" in self.files else {}
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


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


def captions_of(text: str, metadata: dict[str, Any]) -> list[str]:
    """What was said of an image: the json's captions, else its txt, else the json's caption."""
    found = metadata.get("captions") or text or metadata.get("caption") or []
    found = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return [" ".join(one.split()) for one in found if isinstance(one, str)]


class ShardWriter:
    """Writes a tar whose bytes depend on the samples alone."""

    def __init__(self, path: Path):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by close()

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """One sample: its files by extension, in their order."""
        for extension, content in files.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """End the file."""
        self.tar.close()
