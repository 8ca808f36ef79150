"""`python -m train.data check FOLDER`: what is wrong with one's own pictures and captions, before any use.

Every row of a table, or picture with its text, is looked at, and every picture opened; nothing is written.
Each finding names the row by its line, and why it is bad; of many, the first twenty, and counts by reason.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm
from tyro.conf import Positional

from blip2.errors import ImageError
from blip2.images import open_image
from blip2.pictures import find_pictures
from blip2.sidecars import FolderError
from train.data import records
from train.data.records import AnnotationError

SHOWN = 20
LONGEST = 200  # words; training cuts after 50, and what is longer is rarely one caption
IMAGE, CAPTION = {"image", "file"}, {"caption", "captions"}  # columns


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    where: str
    """A line of the table, or a picture."""
    reason: str
    """Its kind, such as "empty caption"."""
    what: str
    """What was seen there."""


@dataclass
class Checked:
    """What was looked at, and what is wrong with it."""

    captions: int = 0
    """Rows of a table, or lines beside pictures, that are whole."""
    pictures: int = 0
    """That are named, or there."""
    findings: list[Finding] = field(default_factory=list)
    """In the order of the rows, or of the pictures."""
    places: dict[str, int] = field(default_factory=dict)
    """Rows, or pictures, and their order."""

    def at(self, where: str) -> str:
        """Come to a row, or to a picture."""
        self.places.setdefault(where, len(self.places))
        return where

    def add(self, where: str, reason: str, what: str) -> None:
        """Note what is wrong somewhere."""
        self.findings.append(Finding(where, reason, what))

    def lines(self) -> Iterator[str]:
        """What to say: the first findings, and how many there are of each kind."""
        seen = f"{self.captions} captions of {self.pictures} pictures"
        if not self.findings:
            yield f"{seen}: nothing wrong"
            return
        for finding in self.findings[:SHOWN]:
            yield f"{finding.where}: {finding.reason}: {finding.what}"
        if len(self.findings) > SHOWN:
            yield f"... and {len(self.findings) - SHOWN} more"
        reasons = Counter(finding.reason for finding in self.findings)
        counts = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        yield f"{seen}; wrong: {counts}"


def check(path: Path, images: Path | None = None, *, longest: int = LONGEST, workers: int = 1) -> Checked:
    """Look at a table, or at a folder that holds one or pictures with texts.

    Args:
        path: the .csv or .jsonl, or the folder.
        images: what the names in a table start from; by default where the table lies.
        longest: words of a caption.
        workers: threads that open pictures.

    Raises:
        AnnotationError: there is nothing to look at.
    """
    if not path.exists():
        raise AnnotationError(f"there is no {path}: give a folder, or a .csv or .jsonl")
    table = records.find_table(path)
    found = Checked()
    if table is None:
        root, users = path, _read_texts(path, found, longest)
    else:
        root, users = images or table.parent, _read_table(table, found, longest)
    found.pictures = len(users)
    with ThreadPoolExecutor(workers) as pool:
        opened = pool.map(lambda name: _fault(root / name), users)
        for name, fault in tqdm(zip(users, opened, strict=True), "pictures", len(users), disable=None):
            if fault is not None:
                found.add(users[name], *fault)
    found.findings.sort(key=lambda finding: found.places[finding.where])
    return found


def _read_table(table: Path, found: Checked, longest: int) -> dict[str, str]:
    """Check rows; returns where each picture is named first."""
    users: dict[str, str] = {}
    parts: dict[str, str] = {}
    known: dict[tuple[str, str], str] = {}
    number = 0
    for line, row in records.read_rows(table):
        where, number = found.at(f"{table.name}, line {line}"), number + 1
        if number == 1 and table.suffix == ".csv" and not (row.keys() & IMAGE and row.keys() & CAPTION):
            what = f"they are {[*row]}; image (or file) and caption (or captions) are needed"
            found.add(found.at(f"{table.name}, line 1"), "wrong columns", what)
            return users
        try:
            name, captions, part = records.read_row(row)
        except AnnotationError as error:
            reason = "encoding" if "UTF-8" in str(error) else "wrong columns"
            found.add(where, reason, str(error))
            continue
        users.setdefault(name, where)
        if parts.setdefault(name, part) != part:
            found.add(where, "two splits", f"{name} is in {parts[name]} and in {part}")
        _check_captions(where, name, captions, found, longest, known)
    if not number:
        raise AnnotationError(f"{table} has no rows")
    return users


def _read_texts(folder: Path, found: Checked, longest: int) -> dict[str, str]:
    """Check the texts beside pictures; returns the pictures."""
    try:
        pictures = find_pictures(folder, recursive=True)
    except FolderError as error:
        raise AnnotationError(f"{error}; nor has it a .csv or .jsonl") from error
    owners: dict[Path, str] = {}
    for picture in pictures:
        text = records.text_of(folder / found.at(picture))
        if text is None:
            found.add(picture, "no caption", "neither a .txt nor a .caption lies beside it")
            continue
        other = owners.setdefault(text, picture)
        if other != picture:
            found.add(picture, "shared text", f"{other} has {text.name}, too: rename one of them")
        try:
            captions = records.read_captions(text)
        except UnicodeDecodeError as error:
            found.add(picture, "encoding", f"{text.name} is not UTF-8 ({error.reason}): save it as UTF-8")
            continue
        _check_captions(picture, picture, list(captions) or [""], found, longest, {})
    return {picture: picture for picture in pictures}


def _check_captions(
    where: str,
    name: str,
    captions: list[str],
    found: Checked,
    longest: int,
    known: dict[tuple[str, str], str],
) -> None:
    for caption in captions or [""]:
        words = caption.split()
        if not words:
            found.add(where, "empty caption", f"nothing is said of {name}")
            continue
        found.captions += 1
        if len(words) > longest:
            start = " ".join(words[:6])
            found.add(where, "long caption", f"{len(words)} words, above {longest}: {start} ...")
        before = known.setdefault((name, " ".join(words)), where)
        if before != where or captions.count(caption) > 1:
            at = f"as in {before.rpartition(', ')[2]}" if before != where else "twice here"
            found.add(where, "duplicate", f"{name} with the same caption, {at}")


def _fault(path: Path) -> tuple[str, str] | None:
    """What is wrong with a picture, if anything."""
    if not path.is_file():
        return "missing picture", f"there is no {path}"
    try:
        open_image(path)
    except ImageError as error:
        return "unreadable picture", str(error)
    return None


def command(
    path: Positional[Path],
    images: Path | None = None,
    longest: int = LONGEST,
    workers: int = os.cpu_count() or 1,
) -> int:
    """Name the bad rows of one's own data: a .csv or .jsonl, or a folder with one, or with a .txt a picture.

    Exit codes: 0 nothing is wrong, 1 something is, 2 there is nothing to look at.

    Args:
        path: the file, or the folder.
        images: folder that the names in a table start from, by default the table's.
        longest: words that a caption may have.
        workers: threads that open pictures.
    """
    try:
        found = check(path, images, longest=longest, workers=workers)
    except (AnnotationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(found.lines()))
    return int(bool(found.findings))


def main(arguments: list[str]) -> int:
    """The command."""
    return tyro.cli(command, prog="python -m train.data check", args=arguments)
