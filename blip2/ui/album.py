"""One visitor's pictures to be searched: dropped ones, kept in memory, or a folder of this machine.

An `Album` lives in a `gr.State`, one for each open page. No gradio here, no model; torch only to search.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.ui.pile import dropped, unused
from blip2.ui.stop import Answering

if TYPE_CHECKING:
    import numpy as np

    from blip2.search.encode import Picture
    from blip2.search.query import Collection, Found
    from blip2.search.vectors import Vectors


class Album(Answering):
    """Pictures, and what a model made of them.

    Attributes:
        found: what the last search came to; the page shows it.
        by_picture: the last search was for a picture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Found] = []
        self.by_picture = False
        self._paths: dict[str, Path] = {}  # by the visitor's names, another for every picture
        self._known: dict[Path, tuple[Picture, Vectors | None]] = {}  # what a model said of dropped files
        self._model = ""
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Album:
        """Gradio copies the initial state for every visitor: each starts afresh."""
        return Album()

    def drop(self, files: Sequence[tuple[str, str]], *, limited: bool) -> None:
        """Take the files that the visitor dropped, (path, name) each; what is known of them stays.

        Raises:
            ValueError: more than a public server takes.
        """
        names: set[str] = set()
        paths = {}
        for path, name in dropped(files, limited=limited).items():
            own = unused(name, names)
            names.add(own)
            paths[own] = path
        there = set(paths.values())
        with self._lock:
            self._paths = paths
            self._known = {path: known for path, known in self._known.items() if path in there}

    def left(self, model: str, force: bool) -> dict[str, Path]:
        """Dropped pictures that are to be encoded with a model: all of them if it is another than before.

        Args:
            model: its name.
            force: those, too, whose kind it did not know.
        """
        with self._lock:
            if self._model != model:
                self._known, self._model = {}, model
            if force:
                self._known = {path: one for path, one in self._known.items() if not one[0].unknown}
            return {name: path for name, path in self._paths.items() if path not in self._known}

    def add(self, pictures: Sequence[Picture], vectors: Vectors | None) -> None:
        """Keep what was made of pictures; the last of them are those that have vectors."""
        first = len(pictures) - (0 if vectors is None else len(vectors))
        with self._lock:
            for place, picture in enumerate(pictures):
                row = None if vectors is None or place < first else vectors[place - first : place - first + 1]
                if picture.image in self._paths:  # not taken away meanwhile
                    self._known[self._paths[picture.image]] = (picture, row)

    def bad(self) -> list[Picture]:
        """Dropped pictures that cannot be found, and why."""
        with self._lock:
            known = dict(self._known)
        return [picture for picture, vectors in known.values() if vectors is None]

    def collection(self) -> Collection:
        """What can be searched of the dropped pictures."""
        with self._lock:
            there = [
                (name, self._known[path][1]) for name, path in self._paths.items() if path in self._known
            ]
            usable = {name: vectors for name, vectors in there if vectors is not None}
            return Dropped(usable, {name: self._paths[name] for name in usable})


class Dropped:
    """Pictures in memory, as `blip2.search.query.search` takes them."""

    def __init__(self, vectors: Mapping[str, Vectors], paths: Mapping[str, Path]):
        import numpy as np

        from blip2.search.vectors import Vectors

        empty = Vectors(np.empty((0, 1, 1), np.float16), np.empty((0, 1), np.float16))
        self.vectors = Vectors.join(list(vectors.values())) if vectors else empty
        self.alive: np.ndarray = np.ones(len(vectors), bool)
        self.images = {row: [name] for row, name in enumerate(vectors)}
        self._paths = paths

    def path(self, image: str) -> Path:
        """A picture's file."""
        return self._paths[image]
