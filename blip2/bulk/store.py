"""A folder, on this machine or in a store that fsspec reads, of which files are read and written whole."""

import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


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
