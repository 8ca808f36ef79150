"""The drawn world's suites as one Markdown table, such as the README's, from results folders.

python -m train.evaluate --table scenes runs/evaluate/scenes-*
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.evaluation import Figures, MetricError
from train.evaluation.protocols import TASKS, changes

Results = Mapping[Path, tuple[Mapping[str, Any], Mapping[str, Any]]]

COLUMNS = {  # head -> task, figure
    "color": ("scenes-vqa", "color"),
    "shape": ("scenes-vqa", "shape"),
    "size": ("scenes-vqa", "size"),
    "count": ("scenes-vqa", "count"),
    "exists?": ("scenes-vqa", "exist"),
    "what is left of ...?": ("scenes-vqa", "relation"),
    "left of ...?": ("scenes-vqa", "relation_yesno"),
    "all questions": ("scenes-vqa", "accuracy"),
    "objects in captions": ("scenes-caption", "object recall"),
    "CIDEr": ("scenes-caption", "CIDEr"),
    "TR@1": ("scenes-retrieval", "TR@1"),
    "IR@1": ("scenes-retrieval", "IR@1"),
}


def markdown(results: Results) -> str:
    """A row for each model, in percent (CIDEr x 100); what was not measured is left empty.

    A model is meant with as many captions of its own before a question as the most that it has results for,
    and with the tasks' own settings; what was evaluated otherwise gets a row that says so.

    Args:
        results: settings.json and scores.json of each folder; those of other tasks are passed over.

    Raises:
        MetricError: there are none of the drawn world, or of different scenes, or of two models of one name.
    """
    drawn = {folder: pair for folder, pair in results.items() if TASKS[pair[0]["task"]].drawn}
    shown = sorted({f"{made_of['scenes']} {made_of['split']} scenes" for made_of, _ in drawn.values()})
    if len(shown) != 1:
        raise MetricError(
            f"these are results of {' and of '.join(shown) or 'no drawn scenes'}; a table is of one set"
        )
    most: dict[str, int] = defaultdict(int)
    for made_of, _ in drawn.values():
        most[_model(made_of)] = max(most[_model(made_of)], made_of["settings"].get("descriptions", 0))
    rows: dict[str, Figures] = {}
    for folder, (made_of, scores) in drawn.items():
        row = rows.setdefault(_row(made_of, most[_model(made_of)]), {})
        for head, (task, figure) in COLUMNS.items():
            if task == made_of["task"] and figure in scores["figures"]:
                if head in row:
                    raise MetricError(f"{folder}: its row, {_row(made_of, 0)}, has its figures already")
                row[head] = scores["figures"][figure]
    heads = [head for head in COLUMNS if any(head in row for row in rows.values())]
    lines = [[shown[0], *heads], ["---", *(["--:"] * len(heads))]]
    lines += [
        [name, *(f"{row[head]:.1f}" if head in row else "" for head in heads)]
        for name, row in sorted(rows.items(), key=lambda pair: (*_place(pair[1]), pair[0]))
    ]
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines)


def _model(made_of: Mapping[str, Any]) -> str:
    return f"`{made_of['model']}`"


def _row(made_of: Mapping[str, Any], usual: int) -> str:
    parts = [change for change in changes(made_of) if not change.startswith("descriptions ")]
    described = made_of["settings"].get("descriptions", usual)
    if described != usual:
        parts.insert(0, f"after {described} captions" if described else "without captions")
    if made_of["limit"] is not None:
        parts.append(f"of the first {made_of['limit']} examples")
    return ", ".join([_model(made_of), *parts])


def _place(row: Figures) -> tuple[bool, float]:
    """Models that answer first, the best first."""
    return "all questions" not in row, -row.get("all questions", 0)
