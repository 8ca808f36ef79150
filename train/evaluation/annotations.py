"""Annotation files as their publishers give them, and the folder of pictures they speak of.

    vqa(questions, annotations)      VQAv2, OK-VQA: questions, and the file with ten answers to each
    gqa(questions)                   GQA's balanced questions, a dictionary by question
    captions(annotations)            COCO's captions; NoCaps, with a domain for each picture
    karpathy(annotations, split)     dataset_coco.json, dataset_flickr30k.json

Each gives examples in the file's order. A file of another kind is named as what it is. Pictures are found by
file name, in subfolders too: with another ending, and COCO's as 42.jpg as well as
COCO_val2014_000000000042.jpg.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.images import open_image
from train.data import published
from train.data.published import CAPTIONS, GQA, KARPATHY, NOCAPS, AnnotationError, of, read
from train.data.records import IMAGES

_COCO = re.compile(r"(?:COCO_[A-Za-z0-9-]+_)?0*(\d+)$")


@dataclass(frozen=True)
class Example:
    """One question about a picture, or one picture to caption or to find.

    Attributes:
        id: the publisher's.
        image: name of its picture.
        references: answers, or captions; none where they are kept secret.
        question: "" for captions.
        facts: what figures are split by, such as answer_type or domain.
    """

    id: int | str
    image: str
    references: tuple[str, ...] = ()
    question: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """Examples, and `picture(name, size)`, which opens or draws one as RGB; drawn ones have that size.

    `missing`: pictures that examples were left out for. `notes`: what to know beside the figures.
    """

    examples: list[Example]
    picture: Callable[[str, int], Image.Image]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- reading


def vqa(questions: Path, annotations: Path | None, *, subtype: str = "") -> list[Example]:
    """Questions with ten answers each (VQAv2, OK-VQA); without `annotations` there are none.

    Args:
        questions: such as v2_OpenEnded_mscoco_val2014_questions.json.
        annotations: such as v2_mscoco_val2014_annotations.json.
        subtype: how the file's `data_subtype` has to begin, such as "val".

    Raises:
        AnnotationError: another kind of file; a question without answers; questions of another split.
    """
    given, asked = published.vqa(questions, annotations, subtype)
    return [
        Example(
            one.id,
            published.coco_name(given or "val2014", one.image),
            one.answers,
            one.text,
            {name: fact for name, fact in one.facts.items() if name in ("answer_type", "question_type")},
        )
        for one in asked
    ]


def gqa(questions: Path) -> list[Example]:
    """GQA's questions with one answer each, such as testdev_balanced_questions.json.

    Raises:
        AnnotationError: another kind of file.
    """
    found = []
    for number, entry in read(questions, GQA).items():
        types = entry.get("types") or {}
        facts = {"question_type": types["structural"]} if "structural" in types else {}
        references = (str(entry["answer"]),) if "answer" in entry else ()
        found.append(
            Example(number, f"{of(entry, 'imageId')}.jpg", references, str(of(entry, "question")), facts)
        )
    return found


def captions(annotations: Path, kind: str = CAPTIONS) -> list[Example]:
    """Pictures with their captions: COCO's format, as it is or with NoCaps's domains.

    Args:
        annotations: such as captions_val2014.json, or nocaps_val_4500_captions.json.
        kind: CAPTIONS or NOCAPS.

    Raises:
        AnnotationError: another kind of file; a picture without captions.
    """
    data = read(annotations, kind)
    said: dict[Any, list[str]] = {}
    for entry in data["annotations"]:
        said.setdefault(of(entry, "image_id"), []).append(str(of(entry, "caption")).strip())
    found = []
    for entry in data["images"]:
        number = of(entry, "id")
        facts = {"domain": str(entry["domain"])} if kind == NOCAPS else {}
        if number not in said:
            raise AnnotationError(f"{annotations} has no caption of image {number}, which it lists")
        found.append(Example(number, str(of(entry, "file_name")), tuple(said[number]), facts=facts))
    return found


def karpathy(annotations: Path, split: str = "test", dataset: str = "coco") -> list[Example]:
    """A split of Karpathy's with all its captions.

    Args:
        annotations: dataset_coco.json or dataset_flickr30k.json.
        split: "test" or "val".
        dataset: what the file's `dataset` must be.

    Raises:
        AnnotationError: another kind of file, another data set, or an empty split.
    """
    data = read(annotations, KARPATHY)
    if data.get("dataset", dataset) != dataset:
        raise AnnotationError(
            f"{annotations} is Karpathy's split of {data['dataset']}; this takes dataset_{dataset}.json"
        )
    found = []
    for entry in data["images"]:
        if of(entry, "split") == split:
            name = os.path.join(str(entry.get("filepath", "")), str(of(entry, "filename")))
            number = entry.get("cocoid", entry.get("imgid"))
            said = tuple(str(of(one, "raw")).strip() for one in entry["sentences"])
            found.append(Example(name if number is None else number, name, said))
    if not found:
        splits = sorted({str(entry.get("split")) for entry in data["images"]})
        raise AnnotationError(f"{annotations} has no split {split}; it has {', '.join(splits)}")
    return found


# ---------------------------------------------------------------- pictures


class Pictures:
    """The pictures of a folder and its subfolders, by the names that annotations have for them.

    Raises:
        AnnotationError: there is no such folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise AnnotationError(f"there is no folder {folder}; give the folder of the pictures as --images")
        self.folder = folder
        self.by_path: dict[str, str] = {}
        self.by_name: dict[str, str] = {}
        self.by_stem: dict[str, str] = {}
        self.by_number: dict[str, str] = {}
        for root, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending[1:].lower() not in IMAGES:
                    continue
                path = os.path.relpath(os.path.join(root, name), folder)
                self.by_path[path] = path
                self.by_name.setdefault(name, path)
                self.by_stem.setdefault(stem, path)
                if number := _COCO.match(stem):
                    self.by_number.setdefault(number[1], path)

    def find(self, name: str) -> str | None:
        """The path in the folder of a picture: as it is called, elsewhere, in another format, by number."""
        base = os.path.basename(name)
        stem = os.path.splitext(base)[0]
        number = _COCO.match(stem)
        return (
            self.by_path.get(os.path.normpath(name))
            or self.by_name.get(base)
            or self.by_stem.get(stem)
            or (self.by_number.get(number[1]) if number else None)
        )

    def __call__(self, path: str, size: int) -> Image.Image:
        """The picture at a path that `find` gave."""
        return open_image(self.folder / path)


def with_pictures(examples: Sequence[Example], folder: Path, *, skip_missing: bool = False) -> DataSet:
    """Examples with the paths of their pictures.

    Args:
        examples: with the names that the annotations have for pictures.
        folder: of the pictures.
        skip_missing: leave out examples whose picture is not there, and say so in the data set.

    Raises:
        AnnotationError: pictures are missing.
    """
    pictures = Pictures(folder)
    paths = {name: pictures.find(name) for name in dict.fromkeys(one.image for one in examples)}
    missing = tuple(name for name, path in paths.items() if path is None)
    if missing and (not skip_missing or len(missing) == len(paths)):
        raise AnnotationError(
            f"{len(missing)} of {len(paths)} pictures are not in {folder}: {_some(missing)}. "
            + ("Is it the right folder?" if len(missing) == len(paths) else "--skip-missing does without")
        )
    kept = [replace(one, image=path) for one in examples if (path := paths[one.image]) is not None]
    return DataSet(kept, pictures, missing)


def _some(names: Iterable[str], shown: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (", ..." if len(listed) > shown else "")
