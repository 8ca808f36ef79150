"""One HTML page of an evaluation: figures, settings, and pictures with predictions beside references."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from blip2.errors import ImageError
from blip2.images import open_image
from blip2.sidecars import replace_text
from train.evaluation import Figures

SHOWN = 12  # examples of each kind
THUMBNAIL = 360  # pixels at most
TILES = 12  # figures that are seen at once; the rest, such as those by type of question, can be unfolded
NAME = "report.html"
PAGE = Path(__file__).with_name("report.html")

Record = Mapping[str, Any]
Picture = Image.Image | str | Path


def write_report(
    folder: Path,
    title: str,
    figures: Figures,
    records: Sequence[Record],
    picture_of: Callable[[Record], Picture],
    *,
    settings: Mapping[str, Any] | None = None,
    shown: int = SHOWN,
    seed: int = 0,
) -> Path:
    """Write report.html: one file that needs no other and asks nothing of a network.

    Records with a "score" give the best and the worst, any give some at random; none is shown twice. Equal
    scores are put in a random order, the same for a seed.

    Args:
        folder: gets the file; it is there or made.
        title: of the page.
        figures: by name; None or NaN is shown as "-".
        records: each with "prediction" (a text, or several), and where there are any with "references",
            "question", "score", "image" and "id".
        picture_of: gives a record's picture, or its path. One that cannot be opened is named instead.
        settings: shown as JSON.
        shown: examples of each kind.
        seed: of what is random.

    Returns:
        The file's path.
    """
    sections = []
    for name, chosen in choose(records, shown, seed).items():
        cards = "".join(_card(record, picture_of) for record in chosen)
        sections.append(f'<h2>{name}</h2>\n<div class="examples">{cards}</div>')
    parts = {
        "title": escape(title),
        "figures": _figures(figures),
        "settings": escape(json.dumps(settings or {}, indent=2, ensure_ascii=False, default=str)),
        "sections": "\n".join(sections),
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / NAME, Template(PAGE.read_text("utf-8")).substitute(parts))
    return folder / NAME


def choose(records: Sequence[Record], shown: int = SHOWN, seed: int = 0) -> dict[str, list[Record]]:
    """Examples for a page: "Best", "Worst" (worst first) and "Random"; kinds that have none are left out.

    Args:
        records: of an evaluation.
        shown: of each kind at most; where records are few, each kind gets a third of them.
        seed: of their order where scores are equal, and of those chosen at random.
    """
    mixed = list(records)
    random.Random(seed).shuffle(mixed)
    scored = sorted((record for record in mixed if _score(record) is not None), key=_order)
    count = min(shown, len(scored) // 3)
    worst, best = scored[:count], scored[count:][::-1][:count]
    taken = {id(record) for record in (*worst, *best)}
    rest = [record for record in mixed if id(record) not in taken][:shown]
    found = {"Best": best, "Worst": worst, "Random": rest}
    return {name: chosen for name, chosen in found.items() if chosen}


def _score(record: Record) -> float | None:
    score = record.get("score")
    return score if isinstance(score, (int, float)) and math.isfinite(score) else None


def _order(record: Record) -> float:
    return _score(record) or 0.0


def _figures(figures: Figures) -> str:
    tiles = [
        f"<div><dt>{escape(name)}</dt><dd>{_number(value)}</dd></div>" for name, value in figures.items()
    ]
    seen = f'<dl class="figures">{"".join(tiles[:TILES])}</dl>'
    if len(tiles) <= TILES:
        return seen
    more = f'<dl class="figures">{"".join(tiles[TILES:])}</dl>'
    return f"{seen}\n<details><summary>{len(tiles) - TILES} more figures</summary>{more}</details>"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _card(record: Record, picture_of: Callable[[Record], Picture]) -> str:
    question = record.get("question")
    parts = [f"<p>{escape(str(question))}</p>"] if question else []
    parts.append(f'<div class="prediction">{_texts(record.get("prediction", ""))}</div>')
    if record.get("references"):
        several = "s" * (len(record["references"]) > 1)
        parts.append(f'<div class="references">reference{several} {_texts(record["references"])}</div>')
    facts = [str(record[name]) for name in ("id", "image") if record.get(name) is not None]
    if len(facts) > 1 and facts[1] in facts[0]:  # drawn scenes are named so
        facts.pop()
    if (score := _score(record)) is not None:
        facts.insert(0, f"score {score:.2f}")
    shown = _thumbnail(record, picture_of)
    return f"<article>{shown}<div>{''.join(parts)}<small>{escape(', '.join(facts))}</small></div></article>"


def _texts(texts: str | Iterable[str]) -> str:
    """One text, or a list of them in which equal ones are counted, the commonest first."""
    given = [texts] if isinstance(texts, str) else [str(text) for text in texts]
    if len(given) == 1:
        return f"<p>{escape(given[0]) or '<em>nothing</em>'}</p>"
    counts = Counter(given).most_common()
    items = (f"{escape(text)}{f' ×{count}' if count > 1 else ''}" for text, count in counts)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _thumbnail(record: Record, picture_of: Callable[[Record], Picture]) -> str:
    name = escape(str(record.get("image", "")))
    try:
        picture = open_image(picture_of(record))
    except ImageError as error:
        return f'<div class="none">{escape(str(error))}</div>'
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{name}">'
