"""The tasks that `train.evaluate` knows: what each reads, its settings as in the paper, its place in a table.

Paper: Sec. 4.1 (zero-shot VQA), 4.2 (captioning), 4.4 (retrieval). Where it is silent the reference code
decides: cleaned questions and captions, at least 8 tokens in a caption, 35 word pieces in retrieval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blip2.checkpoint import Loaded
from blip2.generation import num_descriptions
from blip2.model import Blip2
from blip2.presets import ORGANIZATION, find_preset
from train.data import published
from train.evaluation import Figures, scenes
from train.evaluation import annotations as files
from train.evaluation.annotations import AnnotationError, DataSet, with_pictures
from train.evaluation.tables import columns, paper
from train.evaluation.vqa import frame

Kind = Literal["vqa", "caption", "retrieval"]

DECODING = {"num_beams": 5, "min_new_tokens": 1, "length_penalty": 1.0, "repetition_penalty": 1.0}
ANSWER = DECODING | {
    "prompt": None, "max_new_tokens": 10, "length_penalty": -1.0, "descriptions": 0, "clean": True,
}  # fmt: skip
CAPTION = DECODING | {"prompt": "a photo of", "max_new_tokens": 30, "min_new_tokens": 8}
RETRIEVAL = {"top_k": 128, "text_length": 35, "clean": True}
TUNED = {"tuned": False}
GREEDY = {"num_beams": 1, "min_new_tokens": 1, "length_penalty": 1.0}
KARPATHY = {"annotations": "dataset_coco.json"}
RECALLS = [f"{way}R@{k}" for way in "TI" for k in (1, 5, 10)]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: what a model has to do.
        splits: the first is the default.
        files: the annotations that it reads, an example of each by its option.
        settings: what can be set, and the default.
        columns: of the paper's tables, and the figure for each; of the first split alone.
        size: examples of the first split, pictures in retrieval.
        pictures: at a time.
    """

    kind: Kind
    splits: tuple[str, ...]
    files: Mapping[str, str]
    settings: Mapping[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    pictures: int = 32

    @property
    def drawn(self) -> bool:
        """Whether the data is drawn, and needs no files."""
        return not self.files


TASKS: dict[str, Task] = {
    "vqav2": Task(
        "vqa", ("val", "test-dev", "test"),
        {"questions": "v2_OpenEnded_mscoco_val2014_questions.json",
         "annotations": "v2_mscoco_val2014_annotations.json"},
        ANSWER, {"VQAv2 val": "accuracy"}, 214_354,
    ),
    "okvqa": Task(
        "vqa", ("val",),
        {"questions": "OpenEnded_mscoco_val2014_questions.json",
         "annotations": "mscoco_val2014_annotations.json"},
        ANSWER, {"OK-VQA test": "accuracy"}, 5_046,
    ),
    "gqa": Task(
        "vqa", ("testdev",), {"questions": "testdev_balanced_questions.json"},
        ANSWER, {"GQA test-dev": "accuracy"}, 12_578,
    ),
    "coco-caption": Task(
        "caption", ("test", "val"), KARPATHY, CAPTION,
        {f"COCO {name}": name for name in ("BLEU-4", "CIDEr")}, 5_000,
    ),
    "nocaps": Task(
        "caption", ("val",), {"annotations": "nocaps_val_4500_captions.json"}, CAPTION,
        {f"NoCaps {domain} {name}": f"{name} {domain}".removesuffix(" all")
         for domain in ("in", "near", "out", "all") for name in ("CIDEr", "SPICE")}, 4_500,
    ),
    "coco-retrieval": Task(
        "retrieval", ("test", "val"), KARPATHY, RETRIEVAL,
        {f"COCO {name}": name for name in RECALLS}, 5_000,
    ),
    "flickr-retrieval": Task(
        "retrieval", ("test", "val"), {"annotations": "dataset_flickr30k.json"}, RETRIEVAL,
        {f"Flickr30k {name}": name for name in RECALLS}, 1_000,
    ),
    "scenes-vqa": Task(
        "vqa", ("test", "validation"), {},
        ANSWER | GREEDY | {"max_new_tokens": 6, "descriptions": None, "unseen": False}, pictures=64,
    ),
    "scenes-caption": Task("caption", ("test", "validation"), {}, CAPTION | GREEDY | TUNED, pictures=64),
    "scenes-retrieval": Task(
        "retrieval", ("test", "validation"), {}, RETRIEVAL | {"top_k": 16} | TUNED, pictures=64
    ),
}  # fmt: skip


def read_data(
    name: str,
    split: str,
    *,
    questions: Path | None,
    annotations_file: Path | None,
    images: Path | None,
    num_scenes: int,
    unseen: bool = False,
    tuned: bool = False,
    limit: int | None = None,
    skip_missing: bool = False,
) -> DataSet:
    """The examples of a task, the first `limit` of them; see `train.evaluation.options`.

    Raises:
        AnnotationError: a file is not given, is of another kind, or pictures are missing.
    """
    task = TASKS[name]
    given = {"questions": questions, "annotations": annotations_file}
    if task.drawn:
        if images is not None or any(given.values()):
            raise AnnotationError(f"{name} draws its pictures and reads no files; leave them out")
        if task.kind == "vqa":
            data = scenes.questions(num_scenes, split, unseen=unseen)
        else:
            draw = scenes.captions if task.kind == "caption" else scenes.pairs
            data = draw(num_scenes, split, tuned=tuned)
        return DataSet(data.examples[:limit], data.picture)
    secret = name == "vqav2" and split != "val"  # the server keeps the answers
    for option, such_as in task.files.items():
        if given[option] is None and not (secret and option == "annotations"):
            raise AnnotationError(f"{name} needs --{option}, such as {such_as}")
    for option, path in given.items():
        if path is not None and (option not in task.files or (secret and option == "annotations")):
            raise AnnotationError(f"{name} of split {split} reads no --{option}; leave it out")
    if images is None:
        raise AnnotationError(f"{name} needs --images, the folder of its pictures")
    notes: list[str] = []
    if questions is not None and name != "gqa":
        subtype = f"{split}20" if name == "vqav2" else ""
        examples = files.vqa(questions, annotations_file, subtype=subtype)
    elif questions is not None:
        examples = files.gqa(questions)
    else:
        assert annotations_file is not None
        examples, notes = _captions(name, split, annotations_file)
    data = with_pictures(examples[:limit], images, skip_missing=skip_missing)
    return DataSet(data.examples, data.picture, data.missing, tuple(notes))


def _captions(name: str, split: str, path: Path) -> tuple[list[files.Example], list[str]]:
    if name == "nocaps":
        return files.captions(path, published.NOCAPS), []
    kind = published.kind_of(published.read_json(path))
    if kind == published.CAPTIONS and name.startswith("coco-"):
        examples = files.captions(path)
        note = f"of all {len(examples)} pictures of {path.name}: the paper's are of Karpathy's test split"
        return examples, [note]
    return files.karpathy(path, split, "flickr30k" if name.startswith("flickr") else "coco"), []


def resolve(name: str, changes: Mapping[str, Any], loaded: Loaded) -> dict[str, Any]:
    """The settings of a task for a model: the paper's, and what was changed.

    Raises:
        AnnotationError: the model is of the other stage, or the task has no such setting.
    """
    task = TASKS[name]
    check_settings(name, changes)
    answers = isinstance(loaded.model, Blip2)
    if answers != (task.kind != "retrieval"):
        wanted = "a stage-1 checkpoint, such as blip2-itm-vit-g-coco or scenes-itm"
        if task.kind != "retrieval":
            wanted = "a checkpoint with a language model, such as blip2-flan-t5-xl or scenes-opt"
        raise AnnotationError(f"{name} takes {wanted}; {loaded.name} is of the other stage")
    settings = {**task.settings, **changes}
    if task.kind == "vqa":
        assert isinstance(loaded.model, Blip2)
        settings["prompt"] = frame(loaded.processor, settings["prompt"])
        settings["descriptions"] = num_descriptions(loaded.model, settings["descriptions"])
    return settings


def own_prompt(name: str, settings: Mapping[str, Any], loaded: Loaded) -> bool:
    """Whether the prompt is another than the paper's for this model."""
    return "prompt" in settings and settings["prompt"] != resolve(name, {}, loaded)["prompt"]


def check_settings(name: str, changes: Mapping[str, Any]) -> None:
    """Refuse settings that a task does not have.

    Raises:
        AnnotationError: one of them.
    """
    task = TASKS[name]
    if odd := sorted(changes.keys() - task.settings.keys()):
        shown = ", ".join(f"--{one.replace('_', '-')}" for one in odd)
        has = ", ".join(f"--{one.replace('_', '-')}" for one in task.settings)
        raise AnnotationError(f"{name} has no setting {shown}; it has {has}")


def table_rows(
    table: int, results: Mapping[Path, tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> dict[str, Figures]:
    """Figures of results folders by the rows and columns of one of the paper's tables.

    A row is the paper's if the model is its released checkpoint, evaluated as the paper does it; else it is
    named after the model, and after what is different.

    Args:
        table: 2 to 5.
        results: settings.json and scores.json of each folder.
    """
    known = {row.checkpoint.lower(): row.name for row in paper(table) if row.checkpoint}
    found: dict[str, Figures] = {}
    for folder, (made_of, scores) in results.items():
        task = TASKS[made_of["task"]]
        figures = {
            column: scores["figures"][figure]
            for column, figure in task.columns.items()
            if column in columns(table) and figure in scores["figures"]
        }
        if not figures or made_of["split"] != task.splits[0]:
            continue
        preset = find_preset(made_of["model"])
        model = preset.name if preset else made_of["model"]
        row = known.get(f"{ORGANIZATION}/{model}".lower(), "") if preset else ""
        different = _differences(task, made_of, scores)
        name = row if row and not different else f"{row or model}{different}"
        if figures.keys() & found.get(name, {}).keys():
            name = f"{name} ({folder})"
        found.setdefault(name, {}).update(figures)
    return found


def changes(made_of: Mapping[str, Any]) -> list[str]:
    """The settings of an evaluation that are not its task's own, in words."""
    usual = TASKS[made_of["task"]].settings
    return [
        f"{name} {value}"
        for name, value in made_of["settings"].items()
        if (made_of["own_prompt"] if name == "prompt" else value != usual[name])
    ]


def _differences(task: Task, made_of: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """What keeps an evaluation from being the paper's, in brackets."""
    parts = changes(made_of)
    if made_of["adapter"]:
        parts.append(f"adapter {made_of['adapter']['name']}")
    if scores["examples"] != task.size:
        parts.append(f"of {scores['examples']:,} examples, not {task.size:,}")
    return f" ({', '.join(parts)})" if parts else ""
