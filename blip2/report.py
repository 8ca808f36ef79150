"""Many questions to several models: read them from a CSV, lay the answers side by side on one HTML page."""

import base64
import csv
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import combinations
from pathlib import Path
from string import Template

from blip2.images import ImageError, open_image
from blip2.sidecars import replace_text

THUMBNAIL = 320  # pixels at most
ARTICLES = re.compile(r"\b(a|an|the)\b")


class ReportError(ValueError):
    """A list of questions that cannot be used; the message is one sentence for a user."""


@dataclass(frozen=True)
class Question:
    """A row of the list: a picture's path or URL, a question, and what would be right, or ""."""

    image: str
    question: str
    reference: str = ""


@dataclass(frozen=True)
class Answer:
    """What one model made of a question; `error` says why it did not answer."""

    model: str
    image: str
    question: str
    answer: str = ""
    prompt: str = ""
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""


def read_questions(path: Path) -> list[Question]:
    """Rows of a CSV with the columns image and question, and reference if there is one.

    Paths of pictures are taken from the CSV's folder on; URLs stay.

    Raises:
        ReportError: no such columns, an empty cell, or no row.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"))))
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not a CSV in UTF-8 ({error.reason}): save it as one") from error
    found = []
    for number, row in enumerate(rows, start=2):
        missing = [name for name in ("image", "question") if not (row.get(name) or "").strip()]
        if missing:
            raise ReportError(
                f"{path} has no {' and no '.join(missing)} in line {number}: its head must be image,question "
                "and, if answers are to be scored, reference"
            )
        image = row["image"].strip()
        if not re.match(r"https?://", image):
            image = str(path.parent / image)
        found.append(Question(image, row["question"].strip(), (row.get("reference") or "").strip()))
    if not found:
        raise ReportError(f"{path} has no rows: give lines of image,question below such a head")
    return found


def same(one: str, other: str) -> bool:
    """Whether two answers are equal but for case, articles, punctuation and space."""
    return _plain(one) == _plain(other)


def _plain(text: str) -> list[str]:
    return ARTICLES.sub(" ", re.sub(r"[^\w\s]", " ", text.lower())).split()


def summary(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> dict[str, dict[str, float]]:
    """Figures by model: seconds and tokens an answer, share that is right, share equal to each other model's.

    Args:
        questions: of the list.
        answers: for every model, one to each question.
    """
    found: dict[str, dict[str, float]] = {}
    for of_model in answers:
        given = [answer for answer in of_model if not answer.error]
        figures = {"answers": float(len(given))}
        if given:
            figures["seconds"] = statistics.mean(answer.seconds for answer in given)
            figures["tokens"] = statistics.mean(answer.tokens for answer in given)
        scored = [
            same(answer.answer, question.reference)
            for question, answer in zip(questions, of_model, strict=True)
            if question.reference
        ]
        if scored:
            figures["right"] = statistics.mean(scored)
        found[of_model[0].model] = figures
    for first, second in combinations(answers, 2):
        both = [
            same(a.answer, b.answer) for a, b in zip(first, second, strict=True) if not (a.error or b.error)
        ]
        if both:
            for one, other in ((first, second), (second, first)):
                found[one[0].model][f"same as {other[0].model}"] = statistics.mean(both)
    return found


def write_report(
    path: Path, questions: Sequence[Question], answers: Sequence[Sequence[Answer]], title: str
) -> None:
    """Write one HTML file that needs no other: figures, then a card for every question.

    Args:
        path: of the file.
        questions: of the list.
        answers: for every model, one to each question.
        title: of the page.
    """
    figures = summary(questions, answers)
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{escape(model)}</th>"
        + "".join(f"<td>{_number(name, found[name]) if name in found else ''}</td>" for name in names)
        + "</tr>"
        for model, found in figures.items()
    )
    cards = [
        _card(question, [of_model[row] for of_model in answers]) for row, question in enumerate(questions)
    ]
    page = Template((resources.files("blip2") / "report.html").read_text("utf-8"))
    parts = {"title": escape(title), "head": head, "rows": rows, "cards": "\n".join(cards)}
    replace_text(path, page.substitute(parts))


def _number(name: str, value: float) -> str:
    if name == "answers":
        return f"{value:.0f}"
    return f"{value:.1%}" if name == "right" or name.startswith("same") else f"{value:.2f}"


def _card(question: Question, answers: Sequence[Answer]) -> str:
    agree = len({tuple(_plain(answer.answer)) for answer in answers if not answer.error}) <= 1
    parts = []
    for answer in answers:
        verdict = ""
        if question.reference and not answer.error:
            right = same(answer.answer, question.reference)
            verdict = f'<span class="{"right" if right else "wrong"}">{"right" if right else "wrong"}</span>'
        said = (
            f'<p class="error">{escape(answer.error)}</p>'
            if answer.error
            else f"<p>{escape(answer.answer) or '<em>nothing</em>'} {verdict}</p>"
        )
        parts.append(
            f"<section><h3>{escape(answer.model)}</h3>{said}"
            f"<small>{answer.seconds:.2f} s, {answer.tokens} token{'s' * (answer.tokens != 1)}</small>"
            f"<details><summary>prompt</summary><pre>{escape(answer.prompt)}</pre></details></section>"
        )
    reference = f"<small>expected: {escape(question.reference)}</small>" if question.reference else ""
    return (
        f"<article{'' if agree else ' class=differ'}>{_thumbnail(question.image)}<div>"
        f"<h2>{escape(question.question)}</h2>{reference}"
        f'<div class="answers">{"".join(parts)}</div></div></article>'
    )


def _thumbnail(image: str) -> str:
    name = escape(Path(image).name)
    try:
        picture = open_image(image, allow_url=True)
    except ImageError:
        return f'<div class="none">{name}</div>'
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    shown = f'<img src="data:image/jpeg;base64,{data}" alt="{name}">'
    return f"<figure>{shown}<figcaption>{name}</figcaption></figure>"
