"""What the evaluation command takes; settings that are not given are the task's own, mostly the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from train.evaluation.annotations import AnnotationError
from train.evaluation.protocols import TASKS, check_settings

TaskName = Literal[
    "vqav2", "okvqa", "gqa", "coco-caption", "nocaps", "coco-retrieval", "flickr-retrieval",
    "scenes-vqa", "scenes-caption", "scenes-retrieval",
]  # fmt: skip
# of Options, what a task may set; None is the task's own
CHANGEABLE = (
    "prompt", "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty",
    "descriptions", "clean", "unseen", "tuned", "top_k", "text_length",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to evaluate on what. Settings that are not given are the paper's."""

    task: tyro.conf.Positional[TaskName]
    """What to do, and on which data."""
    model: str
    """An embedded or released checkpoint's name, a folder, or a Hub id."""
    questions: Path | None = None
    """vqav2, okvqa, gqa: the questions' file."""
    annotations: Path | None = None
    """The answers' (vqav2, okvqa) or captions' file."""
    images: Path | None = None
    """Folder of the pictures; subfolders are searched, too."""
    split: str | None = None
    """Of the data: vqav2 val or test-dev, Karpathy's test or val, drawn test or validation."""
    scenes: int = 500
    """How many scenes are drawn, for the tasks on them."""
    limit: int | None = None
    """Take the first examples only."""
    output: Path | None = None
    """Results folder; by default runs/evaluate/TASK-SPLIT-MODEL."""
    adapter: Path | None = None
    """Folder of a LoRA adapter to put on the model."""
    precision: str = "auto"
    """float32, bfloat16, float16, int8, nf4; auto as `blip2.load` has it."""
    device: str = "auto"
    """auto, cpu, mps, cuda, cuda:1; several processes take a GPU each."""
    batch_size: int | None = None
    """Pictures at a time."""
    keep_gb: float = 8.0
    """Retrieval: image tokens kept in memory, GB a process; the rest is encoded twice."""
    skip_missing: bool = False
    """Do without pictures that are missing or cannot be opened, and say so in the scores."""
    spice: bool = False
    """Captions: SPICE, too; it needs a download."""

    prompt: str | None = None
    """Frame of a question, {} where it goes, or the beginning of a caption."""
    num_beams: int | None = None
    """1 is greedy."""
    max_new_tokens: int | None = None
    """Longest text."""
    min_new_tokens: int | None = None
    """Shortest text."""
    length_penalty: float | None = None
    """Of beam search; below 0 favors short texts."""
    repetition_penalty: float | None = None
    """Above 1 discourages tokens already said."""
    descriptions: int | None = None
    """Captions of its own that the model reads before it answers."""
    clean: bool | None = None
    """Questions, and captions to retrieve, in lower case and without most signs."""
    unseen: bool | None = None
    """scenes-vqa: wordings that the embedded language models were not trained on."""
    tuned: bool | None = None
    """scenes-caption, scenes-retrieval: the texts of `train.finetune`: all in one caption; keywords."""
    top_k: int | None = None
    """Retrieval: how many of ITC's best ITM looks at."""
    text_length: int | None = None
    """Retrieval: word pieces of a text at most."""

    def check(self) -> None:
        """Refuse what the task could not use.

        Raises:
            AnnotationError: a value, or a setting that the task does not have.
        """
        for name in ("scenes", "limit", "batch_size", "top_k", "text_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AnnotationError(f"--{name.replace('_', '-')} is {value}; it has to be 1 or more")
        if self.split is not None and self.split not in TASKS[self.task].splits:
            splits = ", ".join(TASKS[self.task].splits)
            raise AnnotationError(f"--split is {self.split}; {self.task} has {splits}")
        check_settings(self.task, self.changes)

    @property
    def changes(self) -> dict[str, Any]:
        """The task's settings that were given."""
        given = {name: getattr(self, name) for name in CHANGEABLE}
        return {name: value for name, value in given.items() if value is not None}
