"""Where the captions of a folder's pictures go: a text file beside each, or one table of all.

What is written is on the disk at once and whole; a stop at any moment leaves files that can be read, and
gone on from.
"""

import csv
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Literal, Self

SIDECARS = (".txt", ".caption")
TABLES = (".csv", ".jsonl")
IfExists = Literal["skip", "overwrite", "append"]


class FolderError(ValueError):
    """A folder or a table that cannot be worked with; the message is one sentence for a user."""


@dataclass(frozen=True)
class Entry:
    """What is said of one picture.

    Attributes:
        image: the picture's path within the folder, with forward slashes.
        captions: one or more.
        match: probability of each that it fits the picture (ITM), NaN where there is none; empty where there
            is none at all.
        answers: by question.
    """

    image: str
    captions: tuple[str, ...]
    match: tuple[float, ...] = ()
    answers: dict[str, str] = field(default_factory=dict)


def sidecar_text(entry: Entry) -> str:
    """A caption a line, with the answers after it."""
    return "".join(f"{', '.join([caption, *entry.answers.values()])}\n" for caption in entry.captions)


def worst_match(match: Iterable[float]) -> float:
    """What pictures are ordered by: their worst caption's score; those without any come last."""
    return min((score for score in match if score == score), default=2.0)


class Sidecars:
    """A text file beside each picture, UTF-8, a caption a line, with answers after the caption.

    Args:
        folder: of the pictures.
        ending: of the text files.
        if_exists: what becomes of a picture that has one: "skip" it, "overwrite" the file, or "append" lines.
    """

    def __init__(self, folder: str | Path, ending: str = ".txt", if_exists: IfExists = "skip"):
        self.folder, self.ending, self.if_exists = Path(folder), ending, if_exists
        self._before: dict[Path, str] = {}  # what an appended file held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""

    def path(self, image: str) -> Path:
        """The text file of a picture."""
        return (self.folder / image).with_suffix(self.ending)

    def missing(self, pictures: Sequence[str]) -> list[str]:
        """Those of the pictures that are to be captioned.

        Raises:
            FolderError: two pictures would share a text file.
        """
        owners: dict[Path, str] = {}
        for image in pictures:
            other = owners.setdefault(self.path(image), image)
            if other != image:
                raise FolderError(
                    f"{other} and {image} would share {self.path(image).name}: rename one, or use a table"
                )
        if self.if_exists != "skip":
            return list(pictures)
        return [image for image in pictures if not self.path(image).exists()]

    def write(self, entry: Entry) -> None:
        """Write the text file; written again, an entry replaces itself.

        Raises:
            FolderError: the file cannot be written.
        """
        path = self.path(entry.image)
        text = sidecar_text(entry)
        try:
            if self.if_exists == "append":
                if path not in self._before:
                    there = path.read_text("utf-8-sig", errors="surrogateescape") if path.exists() else ""
                    self._before[path] = there + "\n" * (bool(there) and not there.endswith("\n"))
                text = self._before[path] + text
            replace_text(path, text)
        except OSError as error:
            raise FolderError(f"cannot write {path}: {error.strerror or error}") from error


def zip_sidecars(entries: Sequence[Entry], ending: str, path: Path) -> None:
    """Write text files into a new .zip, named after their pictures; after their whole names where need be."""
    names = [PurePosixPath(entry.image).with_suffix(ending).as_posix() for entry in entries]
    counts = Counter(name.lower() for name in names)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, entry in zip(names, entries, strict=True):
            own = entry.image + ending if counts[name.lower()] > 1 else name
            file.writestr(own, sidecar_text(entry))


class Table:
    """One CSV (a row a caption) or JSONL (a line a picture) of all captions.

    Rows are added while it is open, and a later row of a picture replaces its earlier ones; on closing, the
    file is put in order: the captions that match worst first where there are scores, else by name.

    Args:
        path: a .csv or .jsonl file, new or of an earlier call; anything else is refused.
        if_exists: what becomes of a picture that is in it: "skip" it, "overwrite" its rows, or "append" to
            them.
        questions: that will be answered, for the head of a CSV.

    Raises:
        FolderError: a file that is no such table.
    """

    def __init__(self, path: str | Path, if_exists: IfExists = "skip", questions: Sequence[str] = ()):
        self.path, self.if_exists = Path(path), if_exists
        self.entries = _read_table(self.path) if self.path.exists() else {}
        asked = [question for entry in self.entries.values() for question in entry.answers]
        self.questions = list(dict.fromkeys([*asked, *questions]))

    def __enter__(self) -> Self:
        """Write the head: a new question is a new column, and a row cut off by a crash is dropped."""
        self._tidy()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the file in order, also after a stop."""
        self._tidy()

    def missing(self, pictures: Sequence[str]) -> list[str]:
        """Those of the pictures that are to be captioned."""
        return [image for image in pictures if self.if_exists != "skip" or image not in self.entries]

    def write(self, entry: Entry) -> None:
        """Add an entry to the file."""
        before = self.entries.get(entry.image)
        if before is not None and self.if_exists == "append":
            padding = (float("nan"),) * (len(before.captions) - len(before.match)) if entry.match else ()
            match = before.match + padding + entry.match
            entry = Entry(
                entry.image, before.captions + entry.captions, match, before.answers | entry.answers
            )
        self.entries[entry.image] = entry
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._lines([entry]))

    def _tidy(self) -> None:
        entries = list(self.entries.values())
        if any(entry.match for entry in entries):
            entries.sort(key=lambda entry: worst_match(entry.match))
        else:
            entries.sort(key=lambda entry: (entry.image.lower(), entry.image))
        head = [] if self.path.suffix == ".jsonl" else [["image", "caption", "match", *self.questions]]
        replace_text(self.path, _csv(head) + self._lines(entries))

    def _lines(self, entries: Iterable[Entry]) -> str:
        if self.path.suffix == ".jsonl":
            return "".join(_json(entry) for entry in entries)
        rows = []
        for entry in entries:
            answers = [entry.answers.get(question, "") for question in self.questions]
            scores = [f"{match:.4f}" if match == match else "" for match in entry.match]
            scores += [""] * (len(entry.captions) - len(scores))
            rows += [
                [entry.image, text, score, *answers]
                for text, score in zip(entry.captions, scores, strict=True)
            ]
        return _csv(rows)


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read_table(path: Path) -> dict[str, Entry]:
    """Entries by image, the last of each; a last line without its end was cut off and is left out."""
    try:
        whole = path.read_text("utf-8-sig")
        text = whole[: whole.rfind("\n") + 1]
        if path.suffix == ".jsonl":
            return {entry.image: entry for entry in map(_from_json, text.splitlines())}
        head, *rows = list(csv.reader(io.StringIO(text))) or [["image", "caption", "match"]]
        if head[:3] != ["image", "caption", "match"]:
            raise ValueError(f"its columns are {', '.join(head[:4])}")
        found = {}
        for image, group in groupby((row for row in rows if row), key=lambda row: row[0]):
            many = list(group)
            match = tuple(float(row[2] or "nan") for row in many) if any(row[2] for row in many) else ()
            answers = {name: cell for name, cell in zip(head[3:], many[-1][3:], strict=True) if cell}
            found[image] = Entry(image, tuple(row[1] for row in many), match, answers)
        return found
    except (ValueError, LookupError, TypeError) as error:
        raise FolderError(
            f"{path} is not a table of captions that an earlier call wrote ({error}): choose another name"
        ) from error


def _json(entry: Entry) -> str:
    match = [score if score == score else None for score in entry.match]  # JSON has no NaN
    return json.dumps(asdict(entry) | {"match": match}, ensure_ascii=False) + "\n"


def _from_json(line: str) -> Entry:
    value = json.loads(line)
    match = tuple(float("nan") if score is None else score for score in value["match"])
    return Entry(value["image"], tuple(value["captions"]), match, dict(value["answers"]))


def replace_text(path: Path, text: str) -> None:
    """Write a file so that either the old one or the new one is there, whole."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, "utf-8", errors="surrogateescape", newline="")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
