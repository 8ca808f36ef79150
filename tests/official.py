"""A small set in the layout of every official data set, of drawn scenes: `python tests/official.py FOLDER`.

    coco/        VQAv2's questions and annotations (val and test-dev), captions_val2014.json,
                 instances_val2014.json, dataset_coco.json, and val2014/, test2015/ with JPEG files
    okvqa/       questions and annotations about coco/val2014
    gqa/         testdev_balanced_questions.json, images/
    nocaps/      nocaps_val_4500_captions.json, images/ (PNG; the file says .jpg)
    flickr30k/   dataset_flickr30k.json, images/

Keys and names are those of the published files; texts and answers are the drawn world's.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image

from train.scenes.text import caption, questions
from train.scenes.world import render, sample

IMAGES = 6
DOMAINS = ("in-domain", "near-domain", "out-domain")
TYPES = {"exist": "yes/no", "relation_yesno": "yes/no", "count": "number"}


def _picture(seed: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = render(sample(seed, "test"), 64)
    Image.fromarray(pixels).resize((64 + seed % 3 * 8, 64)).save(path)  # of several shapes


def _captions(seed: int, count: int = 5) -> list[str]:
    """As people write them: a capital, a stop, now and then a blank at the end."""
    scene = sample(seed, "test")
    rng = random.Random(seed)
    return [caption(scene, rng).capitalize() + rng.choice([".", "", ". "]) for _ in range(count)]


def _asked(seed: int, count: int = 3) -> list[tuple[str, str, str]]:
    found = questions(sample(seed, "test"), random.Random(seed))
    return [(text.capitalize(), answer, kind) for text, answer, kind in found[:count]]


def _write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _answers(answer: str, rng: random.Random) -> list[dict]:
    """Ten people, some of whom differ."""
    said = [answer] * rng.choice([10, 8, 3])
    said += [rng.choice(["red", "two things", "I don't know", "a ring."]) for _ in range(10 - len(said))]
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": number}
        for number, text in enumerate(said, 1)
    ]


def coco_numbers() -> list[int]:
    """Image ids as COCO's: of up to six digits."""
    return [42, 73, 581929, 1000, 99999, 100][:IMAGES]


def vqa(folder: Path, prefix: str, subtype: str, numbers: list[int]) -> None:
    """Questions and annotations of VQA or OK-VQA."""
    rng = random.Random(0)
    asked, answered = [], []
    for seed, number in enumerate(numbers):
        for place, (text, answer, kind) in enumerate(_asked(seed)):
            question_id = number * 1000 + place
            asked.append({"image_id": number, "question": text, "question_id": question_id})
            answered.append(
                {
                    "image_id": number,
                    "question_id": question_id,
                    "question_type": " ".join(text.lower().split()[:2]),
                    "answer_type": TYPES.get(kind, "other"),
                    "multiple_choice_answer": answer,
                    "answers": _answers(answer, rng),
                }
            )
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subtype}
    kind = {"task_type": "Open-Ended", "questions": asked}
    _write(folder / f"{prefix}OpenEnded_mscoco_{subtype}_questions.json", head | kind)
    if not subtype.startswith("test"):
        _write(folder / f"{prefix}mscoco_{subtype}_annotations.json", head | {"annotations": answered})


def coco(folder: Path) -> None:
    """COCO's pictures, captions and boxes, Karpathy's splits, VQAv2 and OK-VQA."""
    numbers = coco_numbers()
    for seed, number in enumerate(numbers):
        _picture(seed, folder / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg")
        _picture(seed, folder / "coco" / "test2015" / f"COCO_test2015_{number + 7:012d}.jpg")
    vqa(folder / "coco", "v2_", "val2014", numbers)
    vqa(folder / "coco", "v2_", "test-dev2015", [number + 7 for number in numbers])
    vqa(folder / "okvqa", "", "val2014", numbers[:4])
    names = [f"COCO_val2014_{number:012d}.jpg" for number in numbers]
    images = [
        {"id": n, "file_name": name, "height": 64, "width": 64}
        for n, name in zip(numbers, names, strict=True)
    ]
    said = [
        {"id": 10 * number + place, "image_id": number, "caption": text}
        for seed, number in enumerate(numbers)
        for place, text in enumerate(_captions(seed))
    ]
    _write(folder / "coco" / "captions_val2014.json", {"info": {}, "images": images, "annotations": said})
    boxes = [{"id": n, "image_id": n, "bbox": [0, 0, 9, 9], "category_id": 1} for n in numbers]
    _write(
        folder / "coco" / "instances_val2014.json", {"images": images, "annotations": boxes, "categories": []}
    )
    _write(folder / "coco" / "dataset_coco.json", karpathy("coco", names, numbers, "val2014"))


def karpathy(dataset: str, names: list[str], numbers: list[int] | None, path: str = "") -> dict:
    """A file of Karpathy's: five of the pictures are the test split."""
    images = []
    for seed, name in enumerate(names):
        split = "test" if seed < 5 else "train"
        sentences = [
            {
                "tokens": text.lower().rstrip(". ").split(),
                "raw": text,
                "imgid": seed,
                "sentid": 5 * seed + place,
            }
            for place, text in enumerate(_captions(seed, 5 + seed % 2))
        ]
        entry = {"filename": name, "imgid": seed, "split": split, "sentences": sentences}
        entry |= {"sentids": [sentence["sentid"] for sentence in sentences]}
        if numbers is not None:
            entry |= {"cocoid": numbers[seed], "filepath": path}
        images.append(entry)
    return {"dataset": dataset, "images": images}


def gqa(folder: Path) -> None:
    """GQA's balanced questions, by id, with Visual Genome's and its own names of pictures."""
    asked = {}
    for seed in range(IMAGES):
        image = f"n{161313 + seed}" if seed % 2 else str(2354786 + seed)
        _picture(seed, folder / "gqa" / "images" / f"{image}.jpg")
        for place, (text, answer, _) in enumerate(_asked(seed)):
            asked[f"2019{seed}{place}"] = {
                "semantic": [], "entailed": [], "equivalent": [], "question": text, "imageId": image,
                "isBalanced": True, "groups": {"global": None, "local": "x"}, "answer": answer,
                "semanticStr": "", "annotations": {}, "fullAnswer": f"It is {answer}.",
                "types": {"structural": "query" if place else "verify", "semantic": "attr", "detailed": "x"},
            }  # fmt: skip
    _write(folder / "gqa" / "testdev_balanced_questions.json", asked)


def nocaps(folder: Path) -> None:
    """NoCaps validation: COCO's format, ten captions a picture, a domain for each."""
    images, said = [], []
    for seed in range(IMAGES):
        name = f"{0x0013EA2087020901 + seed:016x}"
        _picture(seed, folder / "nocaps" / "images" / f"{name}.png")
        images.append(
            {"id": seed, "open_images_id": name, "file_name": f"{name}.jpg", "domain": DOMAINS[seed % 3]}
        )
        said += [
            {"image_id": seed, "id": 10 * seed + place, "caption": text}
            for place, text in enumerate(_captions(seed, 10))
        ]
    content = {"licenses": [], "info": {}, "images": images, "annotations": said}
    _write(folder / "nocaps" / "nocaps_val_4500_captions.json", content)


def flickr30k(folder: Path) -> None:
    """Flickr30k's test split."""
    names = [f"{1007129816 + 1000 * seed}.jpg" for seed in range(IMAGES)]
    for seed, name in enumerate(names):
        _picture(seed, folder / "flickr30k" / "images" / name)
    _write(folder / "flickr30k" / "dataset_flickr30k.json", karpathy("flickr30k", names, None))


def make(folder: Path) -> Path:
    """All of them."""
    for part in (coco, gqa, nocaps, flickr30k):
        part(folder)
    return folder


# of each task the options that name its files, in the folder that `make` filled
FILES = {
    "vqav2": {
        "questions": "coco/v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": "coco/v2_mscoco_val2014_annotations.json",
        "images": "coco/val2014",
    },
    "okvqa": {
        "questions": "okvqa/OpenEnded_mscoco_val2014_questions.json",
        "annotations": "okvqa/mscoco_val2014_annotations.json",
        "images": "coco",
    },
    "gqa": {"questions": "gqa/testdev_balanced_questions.json", "images": "gqa/images"},
    "coco-caption": {"annotations": "coco/dataset_coco.json", "images": "coco"},
    "nocaps": {"annotations": "nocaps/nocaps_val_4500_captions.json", "images": "nocaps/images"},
    "coco-retrieval": {"annotations": "coco/dataset_coco.json", "images": "coco"},
    "flickr-retrieval": {"annotations": "flickr30k/dataset_flickr30k.json", "images": "flickr30k/images"},
}


def options(task: str, folder: Path) -> list[str]:
    """The options of a task, for the command line."""
    return [word for name, path in FILES.get(task, {}).items() for word in (f"--{name}", str(folder / path))]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
