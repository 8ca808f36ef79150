"""Where words go: results to stdout, as text or as one JSON document, everything else to stderr."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


class UsageError(Exception):
    """A command was given words that cannot work, whatever the files hold: exit code 2."""


@dataclass(frozen=True)
class Console:
    """The terminal, or whatever stands in its place.

    Attributes:
        json: print one JSON document instead of text.
        quiet: keep notes and progress bars to oneself; errors are always said.
    """

    json: bool = False
    quiet: bool = False

    @property
    def bars(self) -> bool:
        """Whether progress bars are welcome."""
        return sys.stderr.isatty() and not self.quiet

    def note(self, text: str) -> None:
        """Say something worth knowing."""
        if not self.quiet:
            self.error(text)

    def error(self, text: str) -> None:
        """Say one sentence on stderr, whatever line breaks it came with."""
        print(f"blip2: {' '.join(text.split())}", file=sys.stderr, flush=True)

    def fail(self, text: str, **facts: Any) -> None:
        """Say why the command ends; a JSON reader gets it, and the facts, as its document."""
        self.error(text)
        if self.json:
            self.show({"error": text} | facts, ())

    def show(self, document: dict[str, Any], lines: Iterable[str]) -> None:
        """Print a result: the document for machines, the lines for people."""
        if self.json:
            lines = [json.dumps(document, indent=2)]
        for line in lines:
            print(line, flush=True)

    def progress(self, items: Sequence[Item], unit: str) -> Iterator[Item]:
        """Go through items, with a bar if there are several and the terminal shows no results yet."""
        from huggingface_hub.utils import tqdm  # its own, with types

        shown = sys.stdout.isatty() and not self.json
        yield from tqdm(items, unit=unit, disable=not self.bars or shown or len(items) < 2, leave=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with columns two spaces apart, all but the first aligned to the right if they hold numbers."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = [
        all(row[column][:1].isdigit() or row[column][:1] in ("-", "") for row in cells[1:])
        for column in range(len(head))
    ]
    return [
        "  ".join(
            cell.rjust(width) if aligned else cell.ljust(width)
            for cell, width, aligned in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
