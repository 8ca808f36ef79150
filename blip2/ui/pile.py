"""One visitor's pile of pictures: what was said of each, what the visitor made of it, and the files for it.

A `Pile` lives in a `gr.State`, one for each open page. No gradio in this file, and no model.
"""

import base64
import io
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from blip2.errors import ImageError
from blip2.pictures import Captioning, Failure, find_pictures, open_picture
from blip2.sidecars import SIDECARS, Entry, FolderError, IfExists, Sidecars, Table, worst_match, zip_sidecars
from blip2.ui.stop import Answering

MAX_PICTURES = 500  # that a visitor of a public server may drop
MAX_BYTES = 1_000_000_000  # of them all
PER_PAGE = 20
RECURSIVE = "The folders in it, too"
THUMBNAIL = 96  # pixels, the longer side


@dataclass(eq=False)
class Row:
    """A picture of the pile.

    Attributes:
        id: the page's name for it.
        image: the visitor's name for it, another for every picture.
        path: its file.
        made: counts what the model said of it; 0 before the first time.
        result: the last of that, with the visitor's edits.
        settings: that it was made with.
        edited: the visitor changed it.
        out: where it was written to.
    """

    id: int
    image: str
    path: Path
    made: int = 0
    result: Entry | Failure | None = None
    settings: Any = None
    edited: bool = False
    out: Sidecars | None = None

    @property
    def unknown(self) -> bool:
        """The model did not know the picture's kind."""
        return isinstance(self.result, Failure) and self.result.unknown


@dataclass(frozen=True)
class Settings:
    """What a row was made with; the same again need not be made again."""

    model: str
    scorer: str | None
    wanted: Captioning

    def __post_init__(self) -> None:
        """Leave out what changes no text."""
        object.__setattr__(self, "wanted", replace(self.wanted, batch_size=1, force=False))


class Pile(Answering):
    """Pictures, and what is known of them, in the order in which it became known.

    Attributes:
        rows: all pictures, by file.
        shown: those that the table has, by id, in its order.
        page: of the table, from 0.
        first: the last run was of so many; None: of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[Path, Row] = {}
        self.shown: dict[int, Row] = {}
        self.page = 0
        self.first: int | None = None
        self._source: Path | None = None  # the folder that they are of; None: dropped
        self._worst_first = False
        self._thumbnails: dict[int, str] = {}
        self._ids = count(1)
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> "Pile":
        """Gradio copies the initial state for every visitor: each starts afresh."""
        return Pile()

    # --- pictures ---

    def drop(self, files: Sequence[tuple[str, str]], *, limited: bool) -> None:
        """Take the files that the visitor dropped, (path, name) each; those known before keep their rows.

        Raises:
            ValueError: more than a public server takes.
        """
        self._take(dropped(files, limited=limited), None)

    def open(self, folder: str, recursive: bool) -> None:
        """Take the pictures of a folder of this machine.

        Raises:
            FolderError: no such folder, or no pictures in it.
        """
        root = Path(folder.strip()).expanduser().absolute()
        try:
            found = find_pictures(root, recursive)
        except FolderError as error:  # in the words of the page
            raise FolderError(str(error).replace("--recursive", f'"{RECURSIVE}"')) from error
        self._take({root / image: image for image in found}, root)

    def sidecars(self, ending: str, if_exists: IfExists) -> Sidecars | None:
        """Where captions go: beside the pictures of a folder; nowhere for dropped ones."""
        return Sidecars(self._source, ending, if_exists) if self._source else None

    def _take(self, paths: dict[Path, str], source: Path | None) -> None:
        before = self.rows if source == self._source else {}
        used = {row.image for path, row in before.items() if path in paths}
        rows = {}
        for path, name in paths.items():
            row = before.get(path)
            if row is None:
                name = unused(name, used)
                used.add(name)
                row = Row(next(self._ids), name, path)
            rows[path] = row
        self.rows, self._source = rows, source
        with self._lock:
            self.shown = {row.id: row for row in self.shown.values() if rows.get(row.path) is row}

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self._take({}, None)
        self._thumbnails = {}

    # --- captions ---

    def plan(
        self, settings: Settings, out: Sidecars | None, *, first: int | None = None, anyway: bool = False
    ) -> tuple[list[Row], int]:
        """What is left to do of the pile, and how many pictures had a caption where results go.

        What is done but not yet written there is written.

        Args:
            settings: that captions are to be made with.
            out: where they go, beside the pictures; None: nowhere.
            first: only of so many.
            anyway: do over what the model did not know.

        Raises:
            FolderError: two pictures would share a text file.
        """
        rows = list(self.rows.values())[:first]
        missing = set(out.missing([row.image for row in rows])) if out else {row.image for row in rows}
        left, skipped = [], 0
        for row in rows:
            done = row.result is not None and (row.edited or row.settings == settings)
            if row.unknown and anyway:
                done = False
            if not done and row.image in missing:
                left.append(row)
            elif not done:
                skipped += 1
            elif out and isinstance(row.result, Entry) and row.image in missing and not _written(row, out):
                out.write(row.result)
                row.out = out
        return left, skipped

    def add(self, row: Row, result: Entry | Failure, settings: Settings, out: Sidecars | None) -> None:
        """Keep what was said of a picture."""
        row.made, row.result, row.settings, row.edited = row.made + 1, result, settings, False
        row.out = out if isinstance(result, Entry) else None
        with self._lock:
            if self.rows.get(row.path) is row:  # not taken away meanwhile
                self.shown[row.id] = row

    def edit(self, edits: str) -> None:
        """Take over the visitor's edits, and write them where the captions were written.

        Args:
            edits: JSON of the page: [row's id, what of it was `made`, which caption, text] each.
        """
        rows = {row.id: row for row in self.rows.values()}
        for number, made, which, text in _edits(edits):
            row = rows.get(number)
            if row is None or row.made != made or not isinstance(row.result, Entry):
                continue  # of captions that are gone
            captions, match = list(row.result.captions), list(row.result.match)
            text = " ".join(text.split())  # a caption is a line
            if not 0 <= which < len(captions) or captions[which] == text:
                continue
            captions[which] = text
            if match:
                match[which] = float("nan")  # it was the old caption's
            row.result, row.edited = replace(row.result, captions=tuple(captions), match=tuple(match)), True
            if row.out is not None:
                row.out.write(row.result)

    # --- the table ---

    def order(self, worst_first: bool | None = None) -> None:
        """Order the table.

        Args:
            worst_first: by match, what came to nothing last; False: as taken; None: as before.
        """
        if worst_first is not None:
            self._worst_first, self.page = worst_first, 0
        places = {row.id: place for place, row in enumerate(self.rows.values())}

        def key(row: Row) -> tuple[float, int]:
            match = worst_match(getattr(row.result, "match", ())) if self._worst_first else 0
            return match, places.get(row.id, 0)

        with self._lock:
            self.shown = {row.id: row for row in sorted(self.shown.values(), key=key)}

    def turn(self, by: int) -> None:
        """Go to another page."""
        self.page += 1 if by == 1 else -1

    def view(self) -> dict[str, Any]:
        """The page of the table that is open, for the browser: all of it is text."""
        pages = max(1, -(-len(self.shown) // PER_PAGE))
        self.page = min(max(0, self.page), pages - 1)
        first = self.page * PER_PAGE
        with self._lock:
            rows = list(self.shown.values())[first : first + PER_PAGE]
        self._thumbnails = {
            row.id: self._thumbnails.get(row.id) or thumbnail(row.image, row.path) for row in rows
        }
        return {
            "rows": [_shown(row, self._thumbnails[row.id]) for row in rows],
            "first": first + 1,
            "total": len(self.shown),
            "pages": pages,
            "page": self.page + 1,
        }

    # --- files ---

    def save(self, ending: str, folder: Path) -> Path:
        """Write the captions to a file in `folder`: ".csv", ".jsonl", or a .zip of ".txt" or ".caption".

        Raises:
            ValueError: there are none.
        """
        entries = [
            replace(row.result, image=plain_name(row.image))
            for row in self.shown.values()
            if isinstance(row.result, Entry)
        ]
        if not entries:
            raise ValueError("There are no captions to download yet: caption the pictures first.")
        if ending in SIDECARS:
            path = folder / "captions.zip"
            zip_sidecars(entries, ending, path)
            return path
        path = folder / f"captions{ending}"
        asked = dict.fromkeys(question for entry in entries for question in entry.answers)
        with Table(path, questions=list(asked)) as table:
            for entry in entries:
                table.write(entry)
        return path


def dropped(files: Sequence[tuple[str, str]], *, limited: bool) -> dict[Path, str]:
    """Files that a visitor dropped, (path, name) each, with their bare names.

    Raises:
        ValueError: more than a public server takes.
    """
    paths = {Path(path): _base(name) for path, name in files}
    if limited and len(paths) > MAX_PICTURES:
        raise ValueError(
            f"These are {len(paths):,} pictures; at most {MAX_PICTURES} are taken here at a time: "
            "drop fewer, or start the app on a machine of your own, which takes any number."
        )
    size = sum(path.stat().st_size for path in paths if path.is_file())
    if limited and size > MAX_BYTES:
        raise ValueError(
            f"These pictures have {size / 1e6:,.0f} MB; at most {MAX_BYTES / 1e6:,.0f} MB are taken here "
            "at a time: drop fewer, or make them smaller."
        )
    return paths


def _written(row: Row, out: Sidecars) -> bool:
    return row.out is not None and row.out.ending == out.ending


def _base(name: str) -> str:
    """A name without folders, of whichever system."""
    return PurePosixPath(name.replace("\\", "/")).name or "picture"


def unused(name: str, used: set[str]) -> str:
    """The name, numbered if another picture has it."""
    path, number = PurePosixPath(name), count(2)
    while name in used:
        name = f"{path.stem}-{next(number)}{path.suffix}"
    return name


def plain_name(name: str) -> str:
    """A file name as text that can be sent and written: it may hold bytes that are none."""
    return os.fsencode(name).decode("utf-8", "replace")


def _edits(text: str) -> list[tuple[int, int, int, str]]:
    try:
        return [
            (int(row), int(made), int(which), str(said))
            for row, made, which, said in json.loads(text or "[]")
        ]
    except (TypeError, ValueError) as error:
        raise ValueError("The edits did not arrive whole: change the caption again.") from error


def thumbnail(image: str, path: Path, side: int = THUMBNAIL) -> str:
    """A data URL of a small JPEG; nothing for a picture that cannot be opened, or is gone."""
    try:
        opened = open_picture(image, path)
    except ImageError:
        return ""
    opened.thumbnail((side, side))
    data = io.BytesIO()
    opened.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _shown(row: Row, thumbnail: str) -> dict[str, Any]:
    value = {"id": row.id, "made": row.made, "name": plain_name(row.image), "thumbnail": thumbnail}
    if isinstance(row.result, Entry):
        match = [round(score, 4) if score == score else None for score in row.result.match]
        answers = [[asked, said] for asked, said in row.result.answers.items()]
        return value | {"captions": list(row.result.captions), "match": match, "answers": answers}
    return value | {"reason": row.result.reason if row.result else ""}
