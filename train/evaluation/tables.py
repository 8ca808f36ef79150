"""The paper's Tables 2 to 5 beside LAVIS's figures and one's own, with every known disagreement.

    2  zero-shot visual question answering      3  captioning, fine-tuned on COCO
    4  visual question answering, fine-tuned    5  image-text retrieval

"LAVIS" is what the reference code's configurations say that they give; it says nothing of most figures. A
figure that nobody measured is "-", never 0. The figures lie in `paper_tables`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from train.evaluation import Figures, MetricError
from train.evaluation.paper_tables import CHECKPOINTS, COLUMNS, DECIMALS, LAVIS, NOTES, PAPER, TITLES

WIDTH = 100  # columns of text
OURS = "BLIP-2"


@dataclass(frozen=True)
class Row:
    """One model of a table.

    Attributes:
        name: as the paper calls it.
        trained: parameters that were trained, such as "107M".
        total: of all parameters, where the table tells.
        paper: the paper's figures by column; none where it has none.
        lavis: LAVIS's.
        notes: numbers of the footnotes that touch a column, from 1.
        checkpoint: the released one, or "".
    """

    name: str
    trained: str = ""
    total: str = ""
    paper: Figures = field(default_factory=dict)
    lavis: Figures = field(default_factory=dict)
    notes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    checkpoint: str = ""


def columns(table: int) -> list[str]:
    """Names of a table's figures: data and figure, such as "VQAv2 val" or "COCO TR@1".

    Raises:
        MetricError: the paper has no such table, or it is not one of results.
    """
    if table not in COLUMNS:
        raise MetricError(f"table {table} is not among {', '.join(map(str, COLUMNS))}")
    return [" ".join(column) for column in COLUMNS[table]]


def notes(table: int) -> list[str]:
    """What is known to disagree; `Row.notes` has their numbers, from 1."""
    columns(table)
    return [text for text, _, _ in NOTES[table]]


def paper(table: int) -> list[Row]:
    """The rows of one of the paper's tables 2 to 5.

    Raises:
        MetricError: another table.
    """
    names = columns(table)
    rows = []
    for line in PAPER[table].strip().splitlines():
        name, trained, total, figures = (part.strip() for part in line.split("|"))
        found = {
            column: float(figure)
            for column, figure in zip(names, figures.split(), strict=True)
            if figure != "-"
        }
        touched = {column: _touching(table, name, column) for column in found if name.startswith(OURS)}
        checkpoint = CHECKPOINTS[table].get(name, "")
        rows.append(Row(name, trained, total, found, LAVIS[table].get(name, {}), touched, checkpoint))
    return rows


def _touching(table: int, row: str, column: str) -> tuple[int, ...]:
    return tuple(
        number
        for number, (_, rows, beginnings) in enumerate(NOTES[table], start=1)
        if rows in row and column.startswith(beginnings)
    )


def show(table: int, found: Mapping[str, Figures]) -> str:
    """A table as text: the paper's figure, LAVIS's, yours, and yours less the paper's.

    Args:
        table: 2 to 5.
        found: your figures, in percent, by the name of the row and of the column (see `columns`); what was
            not measured is left out. A row that the paper has not is put below its own.

    Raises:
        MetricError: another table, or a figure that it does not have.
    """
    names = columns(table)
    for name, figures in found.items():
        odd = sorted(figures.keys() - set(names))
        if odd:
            raise MetricError(f"{name}: table {table} has no {', '.join(odd)}; it has {', '.join(names)}")
    rows = paper(table)
    ours = [row for row in rows if row.name.startswith(OURS)]
    others = [row for row in rows if not row.name.startswith(OURS)]
    ours += [Row(name) for name in found if name not in {row.name for row in rows}]
    cells = [["model", "figure", "paper", "LAVIS", "yours", "difference", "notes"]]
    for row in ours:
        cells += [
            [row.name, column, *_figures(row, column, found.get(row.name, {}), DECIMALS[table])]
            for column in names
        ]
    lines = [f"Table {table}. {TITLES[table]}", "", *_aligned(cells, left=(0, 1, 6)), ""]
    lines += ["Others, from the paper", "", *_aligned(_compact(table, others), left=(0,)), ""]
    for number, text in enumerate(notes(table), start=1):
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"[{number}] ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def _figures(row: Row, column: str, found: Figures, decimals: int) -> list[str]:
    expected, yours = row.paper.get(column), found.get(column)
    known = expected is not None and yours is not None and math.isfinite(yours)
    difference = f"{(yours or 0) - (expected or 0):+.{decimals}f}" if known else "-"
    marks = " ".join(f"[{number}]" for number in row.notes.get(column, ()))
    shown = [_figure(value, decimals) for value in (expected, row.lavis.get(column), yours)]
    return [*shown, difference, marks]


def _figure(value: float | None, decimals: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def _compact(table: int, rows: Sequence[Row]) -> list[list[str]]:
    """Rows of the paper's figures alone, under two lines of heads: data, then figure."""
    data = [name for name, _ in COLUMNS[table]]
    starts = ["" if index and data[index - 1] == name else name for index, name in enumerate(data)]
    heads = [["", *starts], ["", *(figure for _, figure in COLUMNS[table])]]
    names = columns(table)
    return heads + [
        [row.name, *(_figure(row.paper.get(column), DECIMALS[table]) for column in names)] for row in rows
    ]


def _aligned(cells: list[list[str]], left: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
