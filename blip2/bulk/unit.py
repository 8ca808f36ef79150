"""What passes from one part of a run to the next: units of work, their rows, and what a row holds."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blip2.bulk.store import Store
from blip2.errors import ImageError


@dataclass(frozen=True)
class Unit:
    """A part of the source, done as a whole or not at all.

    Attributes:
        number: its place among all.
        name: of its result, without an ending.
        kind: "pictures", "tar", "parquet", "lines" or "dataset".
        root: folder of the files, absolute; or a data set's name.
        names: files within it.
        start: its first row, of all pictures or of the table.
        count: how many rows; 0 for a tar, which says so itself.
    """

    number: int
    name: str
    kind: str
    root: str
    names: tuple[str, ...] = ()
    start: int = 0
    count: int = 0

    def json(self) -> str:
        """The same as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Unit":
        """From such a line."""
        value = json.loads(line)
        return cls(**value | {"names": tuple(value["names"])})


@dataclass
class Sample:
    """What is known of a row, once it is read.

    Attributes:
        image: the picture's file; b"" where texts alone are wanted.
        extension: of that file.
        texts: what is said of the picture.
        metadata: of a tar's json.
        files: of a tar's sample, others that are kept with it, by extension.
    """

    image: bytes = b""
    extension: str = ""
    texts: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of a unit.

    Attributes:
        key: what it goes by in results: a picture's path, or where it stands in its file.
        read: gives the sample; raises ImageError where it cannot be used.
        sample_key: what it goes by in a tar.
    """

    key: str
    read: Callable[[], Sample]
    sample_key: str = ""


def read_file(store: Store, name: str) -> bytes:
    """A file's bytes.

    Raises:
        ImageError: it is not there, or may not be read.
        OSError: the store failed; another time it may not.
    """
    try:
        if not store.local:
            return bytes(store.fs.cat_file(store.path(name)))
        path = Path(store.path(name))
        if not path.is_file():  # a pipe could block for ever
            raise FileNotFoundError
        return path.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ImageError(f"{name} is not here any more, or cannot be read") from error
