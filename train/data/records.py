"""Annotation files as their publishers lay them out -> one `Record` per image.

COCO, Flickr30k, NoCaps, VQAv2, Visual Genome, and tables of one's own. No image is opened here.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2.pictures import find_pictures
from blip2.sidecars import SIDECARS, FolderError
from train.data import published
from train.data.published import AnnotationError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")  # endings of a sample's image


@dataclass(frozen=True)
class Record:
    """One image with all that is said of it."""

    key: str
    """Unique; without dots, which end a sample's name in a shard."""
    image: tuple[Path, ...]
    """Where the image may be; the first that exists is taken."""
    captions: tuple[str, ...] = ()
    part: str = "train"
    """train, val or test."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries of the sample's json, such as questions."""


def _load(path: Path, *needed: str) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise AnnotationError(f"{path} is no JSON ({error}); download it again") from error
    if lacking := [name for name in needed if not isinstance(data, dict) or name not in data]:
        raise AnnotationError(f"{path} has no {' and no '.join(map(repr, lacking))}: another kind of file")
    return data


def karpathy(path: Path, images: Path) -> Iterator[Record]:
    """dataset_coco.json or dataset_flickr30k.json of Karpathy's splits; COCO's restval is train."""
    for image in _load(path, "images", "dataset")["images"]:
        name = image["filename"]
        yield Record(
            key=Path(name).stem,
            image=(images / image.get("filepath", "") / name, images / name),
            captions=tuple(sentence["raw"] for sentence in image["sentences"]),
            part="train" if image["split"] == "restval" else image["split"],
            extra={"image_id": image.get("cocoid", image["imgid"])},
        )


def coco_captions(path: Path, images: Path, part: str) -> Iterator[Record]:
    """captions_train2017.json and its like, and NoCaps, whose images also name their domain."""
    data = _load(path, "images", "annotations")
    captions = defaultdict(list)
    for annotation in sorted(data["annotations"], key=lambda a: a["id"]):
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in data["images"]:
        name = image["file_name"]
        extra = {k: image[k] for k in ("domain", "open_images_id") if k in image}
        yield Record(
            key=Path(name).stem,
            image=(images / name,),
            captions=tuple(captions[image["id"]]),
            part=part,
            extra={"image_id": image["id"], **extra},
        )


def vqa(questions: Path, annotations: Path | None, images: Path, part: str) -> Iterator[Record]:
    """v2_OpenEnded_mscoco_*_questions.json with its annotations; a test split has none.

    All questions of an image are in one record, under "questions": question_id, question and, where there are
    annotations, question_type, answer_type, multiple_choice_answer and the ten `answers`.
    """
    subtype, found = published.vqa(questions, annotations)
    if not subtype:
        raise AnnotationError(f"{questions} has no 'data_subtype', which names its pictures")
    asked = defaultdict(list)
    for one in found:
        entry: dict[str, Any] = {"question_id": one.id, "question": one.text, **one.facts}
        if annotations is not None:
            entry["answers"] = list(one.answers)
        asked[one.image].append(entry)
    folder = subtype.replace("test-dev2015", "test2015")
    for image, entries in asked.items():
        name = published.coco_name(subtype, image)
        yield Record(
            key=Path(name).stem,
            image=(images / folder / name, images / name),
            part=part,
            extra={"image_id": image, "questions": entries},
        )


def visual_genome(path: Path, images: Path, part: str = "train") -> Iterator[Record]:
    """region_descriptions.json: the phrases of all regions of an image are its captions."""
    data = _load(path)
    if not (isinstance(data, list) and data and "regions" in data[0]):
        raise AnnotationError(f"{path} is no list of images with regions: another kind of file")
    for image in data:
        number = image["id"] if "id" in image else image["image_id"]  # as the file has it, as its page says
        yield Record(
            key=str(number),
            image=tuple(images / folder / f"{number}.jpg" for folder in ("VG_100K", "VG_100K_2", "")),
            captions=tuple(dict.fromkeys(region["phrase"] for region in image["regions"])),
            part=part,
            extra={"image_id": number},
        )


def visual_genome_questions(path: Path, images: Path, part: str = "train") -> Iterator[Record]:
    """question_answers.json: an image's questions in one record, as `vqa` has them, with an answer each."""
    data = _load(path)
    if not (isinstance(data, list) and data and "qas" in data[0]):
        raise AnnotationError(f"{path} is no list of images with questions: another kind of file")
    for image in data:
        number = image["id"] if "id" in image else image["image_id"]
        entries = [
            {
                "question_id": qa["qa_id"],
                "question": qa["question"],
                "answers": [qa["answer"].rstrip(". ").lower()],  # "Yellow."
            }
            for qa in image["qas"]
        ]
        yield Record(
            key=str(number),
            image=tuple(images / folder / f"{number}.jpg" for folder in ("VG_100K", "VG_100K_2", "")),
            part=part,
            extra={"image_id": number, "questions": entries},
        )


def own(path: Path, images: Path | None = None) -> Iterator[Record]:
    """One's own pictures: a table or a folder with one (`pairs`), or pictures and texts (`sidecars`).

    Args:
        path: the table, or the folder.
        images: what the names in a table start from; by default where the table lies.
    """
    table = find_table(path)
    return sidecars(path) if table is None else pairs(table, images or table.parent)


def find_table(path: Path) -> Path | None:
    """The .csv or .jsonl of a folder, or the file itself; None if the folder has none."""
    if not path.is_dir():
        return path
    tables = sorted([*path.glob("*.csv"), *path.glob("*.jsonl")])
    if len(tables) > 1:
        found = ", ".join(table.name for table in tables)
        raise AnnotationError(f"{path} has {len(tables)} tables, {found}: keep one in it, or name the file")
    return tables[0] if tables else None


def pairs(path: Path, images: Path) -> Iterator[Record]:
    """One's own .csv or .jsonl: `image` (or `file`), `caption` or `captions`, and `split` if there is one.

    `captions` is a JSON list; in a csv, a cell that holds one. Rows of the same image become one record.
    `train.data.check` names every bad row; here the first ends it.
    """
    rows: dict[str, tuple[list[str], str]] = {}
    for line, row in read_rows(path):
        try:
            name, captions, part = read_row(row)
        except AnnotationError as error:
            raise AnnotationError(
                f"{path}, line {line}: {error}. `python -m train.data check {path}` names all"
            ) from error
        found, its = rows.setdefault(name, ([], part))
        if its != part:
            raise AnnotationError(f"{path}, line {line}: {name} is in two splits, {its} and {part}")
        found.extend(captions)
    for number, (name, (captions, part)) in enumerate(rows.items()):
        key = f"{number:08d}"
        yield Record(key, (images / name,), tuple(captions), part, {"file": name})


def sidecars(folder: Path) -> Iterator[Record]:
    """Pictures with a text file of the same name beside each, a caption a line, as `blip2 caption` writes.

    The folders in the folder are read, too. A picture without a text, or with an empty one, has no caption.
    """
    try:
        pictures = find_pictures(folder, recursive=True)
    except FolderError as error:
        raise AnnotationError(f"{error}; nor has it a .csv or .jsonl") from error
    texts = [text_of(folder / picture) for picture in pictures]
    if not any(texts):
        raise AnnotationError(
            f"{folder} has {len(pictures)} pictures, and neither a .csv or .jsonl nor a .txt beside any"
        )
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        try:
            captions = () if text is None else read_captions(text)
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{text} is not UTF-8 ({error.reason}): save it as UTF-8") from error
        yield Record(f"{number:08d}", (folder / picture,), captions, "train", {"file": picture})


def text_of(picture: Path) -> Path | None:
    """The text beside a picture, if there is one: its own name with .txt or .caption."""
    found = (picture.with_suffix(ending) for ending in SIDECARS)
    return next((text for text in found if text.is_file()), None)


def read_captions(text: Path) -> tuple[str, ...]:
    """The captions of a text file, a line each."""
    return tuple(filter(None, map(str.strip, text.read_text("utf-8-sig").splitlines())))


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a table; what is no UTF-8 stands in it as lone surrogates, what is no JSON as None."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix != ".csv":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, None
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {reader.line_num + 1} is no csv ({error})") from error


def read_row(row: Any) -> tuple[str, list[str], str]:
    """The image, the captions and the split that a row of a table names.

    Raises:
        AnnotationError: it names none, or is no row; the message says why.
    """
    if not isinstance(row, dict):
        raise AnnotationError("no JSON object")
    if more := row.get(None):  # as csv's reader calls what the header has no name for
        raise AnnotationError(
            f"{len(more)} more cells than the header has: a caption with a comma wants quotes"
        )
    if not isinstance(name := row.get("image") or row.get("file"), str):
        raise AnnotationError(f"no `image` (or `file`); its columns are {list(row)}")
    captions = row.get("captions") or None
    if isinstance(captions, str):
        try:
            captions = json.loads(captions)
        except ValueError:
            captions = ()
    if captions is None:
        captions = [row.get("caption") or ""]
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise AnnotationError("`caption` is no text, or `captions` no JSON list of texts")
    if any("\udc80" <= sign <= "\udcff" for value in (name, *captions) for sign in value):
        raise AnnotationError("not UTF-8: save the table as UTF-8")
    part = row.get("split") or "train"
    part = "val" if part == "validation" else part
    if part not in ("train", "val", "test"):
        raise AnnotationError(f"split is {part!r}; it is train, val or test")
    return name, captions, part


def hold_out(records: Iterable[Record], number: int, seed: int = 0) -> list[Record]:
    """Move `number` training records, drawn at random, to val."""
    records = list(records)
    train = [i for i, record in enumerate(records) if record.part == "train"]
    if number and number >= len(train):
        raise AnnotationError(f"--validation {number} leaves nothing of {len(train)} training images")
    for i in random.Random(seed).sample(train, number):
        r = records[i]
        records[i] = Record(r.key, r.image, r.captions, "val", r.extra)
    return records


def one_per_caption(records: Iterable[Record]) -> Iterator[Record]:
    """A record for each caption, as LAVIS counts COCO: the image recurs about five times in an epoch."""
    for r in records:
        for i, caption in enumerate(r.captions):
            yield Record(f"{r.key}_{i}", r.image, (caption,), r.part, r.extra)
