"""JSON files of annotations as their publishers give them: which kind a file is, and VQA's questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class AnnotationError(ValueError):
    """An annotation file that is not laid out as expected."""


# kinds of files, and what a message calls them
QUESTIONS, ANSWERS, GQA = "VQA's questions", "VQA's annotations (the answers)", "GQA's questions"
CAPTIONS, NOCAPS, KARPATHY = "COCO captions", "NoCaps captions", "Karpathy's splits"
SUCH_AS = {
    QUESTIONS: "v2_OpenEnded_mscoco_val2014_questions.json",
    ANSWERS: "v2_mscoco_val2014_annotations.json",
    GQA: "testdev_balanced_questions.json",
    CAPTIONS: "captions_val2014.json",
    NOCAPS: "nocaps_val_4500_captions.json",
    KARPATHY: "dataset_coco.json",
}
OTHERS = {
    "image info": "a list of images without captions",
    "instances": "COCO's boxes (instances)",
    "results": "a list of results, not of annotations",
}


def kind_of(data: Any) -> str:
    """What a decoded JSON file is: one of the kinds above, or "" where that is not known."""
    if isinstance(data, list):
        first = data[0] if data and isinstance(data[0], dict) else {}
        return "results" if {"question_id", "image_id"} & first.keys() else ""
    if not isinstance(data, dict) or not data:
        return ""
    first = next(iter(data.values()))
    if isinstance(first, dict) and {"imageId", "question"} <= first.keys():
        return GQA
    if _entry(data, "questions").keys() >= {"question", "question_id"}:
        return QUESTIONS
    image, annotation = _entry(data, "images"), _entry(data, "annotations")
    if "sentences" in image:
        return KARPATHY
    if "answers" in annotation:
        return ANSWERS
    if "caption" in annotation:
        return NOCAPS if "domain" in image else CAPTIONS
    if "bbox" in annotation:
        return "instances"
    return "image info" if "file_name" in image else ""


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        AnnotationError: there is none, or it holds something else.
    """
    if path.is_dir():
        raise AnnotationError(f"{path} is a folder; give the .json file")
    if not path.is_file():
        raise AnnotationError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            raise AnnotationError(f"{path} is a zip archive: unpack it and give the .json file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AnnotationError(f"{path} is not JSON, or was cut short: {error}") from error


def read(path: Path, kind: str) -> Any:
    """A JSON file of one of the kinds above.

    Raises:
        AnnotationError: it is of another, which is named.
    """
    data = read_json(path)
    if (found := kind_of(data)) != kind:
        what = f"holds {OTHERS.get(found, found)}" if found else "holds something else"
        raise AnnotationError(f"{path} {what}, not {kind} (such as {SUCH_AS[kind]})")
    return data


def _entry(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The first of a list of entries, or nothing."""
    entries = data.get(name)
    return entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}


def of(entry: Mapping[str, Any], name: str) -> Any:
    """What an entry of a file says under a name.

    Raises:
        AnnotationError: nothing.
    """
    if name not in entry:
        raise AnnotationError(f"an entry lacks {name!r}: {json.dumps(entry)[:200]}")
    return entry[name]


@dataclass(frozen=True)
class Question:
    """One question of VQAv2 or OK-VQA.

    Attributes:
        id: the publisher's.
        image: the publisher's, a number in both.
        text: as it was asked.
        answers: the ten that people gave; none where they are kept secret.
        facts: what else the answers' file says of it, such as answer_type.
    """

    id: int | str
    image: int | str
    text: str
    answers: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


FACTS = ("answer_type", "question_type", "multiple_choice_answer")


def vqa(questions: Path, annotations: Path | None, subtype: str = "") -> tuple[str, list[Question]]:
    """The set of pictures that a file of questions is about, such as "val2014" or "", and its questions.

    Args:
        questions: such as v2_OpenEnded_mscoco_val2014_questions.json.
        annotations: the file with their answers; None: they have none.
        subtype: how the set has to begin, such as "val".

    Raises:
        AnnotationError: another kind of file; questions of another split; a question without answers.
    """
    asked = read(questions, QUESTIONS)
    given = str(asked.get("data_subtype", ""))
    if given and not given.startswith(subtype):
        raise AnnotationError(f"{questions} holds questions about {given}; this split is {subtype}")
    answers: dict[Any, Any] = {}
    if annotations is not None:
        answers = {of(entry, "question_id"): entry for entry in read(annotations, ANSWERS)["annotations"]}
    found, lacking = [], []
    for entry in asked["questions"]:
        number, answer = of(entry, "question_id"), answers.get(of(entry, "question_id"), {})
        if annotations is not None and not answer:
            lacking.append(number)
            continue
        said = tuple(str(of(one, "answer")) for one in answer.get("answers", ()))
        facts = {name: str(answer[name]) for name in FACTS if name in answer}
        found.append(Question(number, of(entry, "image_id"), str(of(entry, "question")), said, facts))
    if lacking:
        raise AnnotationError(
            f"{annotations} has no answers to {len(lacking)} of {len(asked['questions'])} questions of "
            f"{questions}, such as {lacking[0]}: the two files do not belong together"
        )
    return given, found


def coco_name(subtype: str, image: int | str) -> str:
    """The file name of a picture of COCO, such as COCO_val2014_000000000042.jpg."""
    shown = {"test-dev2015": "test2015"}.get(subtype, subtype)
    return f"COCO_{shown}_{image:012d}.jpg" if isinstance(image, int) else f"{image}.jpg"
