"""Visual question answering (Sec. 4.1): a question in its frame, beam search, VQA accuracy.

Zero-shot, five beams, at most 10 tokens, length penalty -1, "Question: {} Answer:" for OPT and "Question: {}
Short answer:" for Flan-T5. Questions are cleaned as the reference code does: lower case, most signs gone. It
cuts prompts for OPT after 32 tokens, the end first; here nothing is cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2.checkpoint import Loaded
from blip2.generation import describe, generate
from blip2.model import Blip2
from blip2.processing import Processor
from blip2.settings import FRAMES
from train.data.transforms import clean_question
from train.evaluation import Figures, MetricError
from train.evaluation.annotations import AnnotationError
from train.evaluation.metrics import Lemmatizer, lemmatizer, vqa_accuracy, vqa_figures
from train.evaluation.predictions import Record, Unit, Work, decoding

CHAT = "chat"  # in place of a frame: the tokenizer's own chat template


def frame(processor: Processor, prompt: str | None) -> str:
    """The frame of a question: as given, as the model was fine-tuned, or the paper's for its family.

    Raises:
        AnnotationError: it has no place for the question, or more than one.
    """
    if prompt is None:
        if processor.has_chat_frame:
            return CHAT
        return processor.question_prompt or FRAMES[processor.question_style]
    if prompt.count("{}") != 1:
        raise AnnotationError(f"--prompt is {prompt!r}; it has to hold {{}} once, where the question goes")
    return prompt


def framed(processor: Processor, template: str, question: str, description: str = "") -> str:
    """What the model is sent."""
    if template == CHAT:
        return processor.prompt(question, "question", description=description)
    text = template.replace("{}", question)
    return f"{description.strip().rstrip('.')}. {text}" if description else text


def by_length(lengths: Sequence[Any], most: int) -> list[list[int]]:
    """Indices in groups of equal length, of at most so many: what is decoded together needs no padding."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        alike[length].append(index)
    return [
        alike[length][start : start + most]
        for length in sorted(alike)
        for start in range(0, len(alike[length]), most)
    ]


def answering(loaded: Loaded, settings: Mapping[str, Any], batch_size: int) -> Work:
    """Answers the questions of a unit; a picture is encoded once for all that are asked about it.

    Args:
        loaded: stage 2.
        settings: the resolved ones of a task.
        batch_size: questions decoded together at most.
    """
    model, processor = loaded.model, loaded.processor
    assert isinstance(model, Blip2)
    generation = decoding(settings)

    def lengths(prompt: str, question: str) -> tuple[int, ...]:
        texts = [(processor.tokenizer, prompt), (processor.qformer_tokenizer, question)]
        return tuple(len(words(text)["input_ids"]) for words, text in texts if words is not None)

    def work(unit: Unit, pixel_values: Tensor, rows: dict[str, int]) -> list[Record]:
        image = model.encode_image(pixel_values.to(loaded.device))
        described = describe(model, processor, image, settings["descriptions"])
        clean = clean_question if settings["clean"] else str
        asked = [clean(example.question) for example in unit]
        of = [rows[example.image] for example in unit]
        prompts = [
            framed(processor, settings["prompt"], question, described[row])
            for question, row in zip(asked, of, strict=True)
        ]
        answers = [""] * len(unit)
        for group in by_length(list(map(lengths, prompts, asked)), batch_size):
            said = generate(
                model, processor, image[torch.tensor([of[i] for i in group], device=loaded.device)],
                [prompts[i] for i in group], generation, questions=[asked[i] for i in group],
            )  # fmt: skip
            for index, [text] in zip(group, said, strict=True):
                answers[index] = text.strip()
        return [
            {
                "id": example.id,
                "image": example.image,
                "question": example.question,
                "prediction": answer,
                "references": list(example.references),
                **example.facts,
            }
            for example, answer in zip(unit, answers, strict=True)
        ]

    return work


def score(records: Sequence[Record], *, lemmatize: bool = False) -> tuple[Figures, list[str]]:
    """VQA accuracy in percent, by answer and question type too; each record gets its "score", 0 to 1.

    A single reference, as GQA and the drawn world have it, has to be met after normalization.

    Args:
        records: with references.
        lemmatize: predictions too, as OK-VQA is scored; without spaCy there is the "raw accuracy" alone.

    Returns:
        The figures, and notes.
    """
    for record in records:
        record["score"] = vqa_accuracy(record["prediction"], record["references"])
    figures = vqa_figures(records)
    if not lemmatize:
        return figures, []
    figures = {f"raw {name}": value for name, value in figures.items()}
    try:
        base_form: Lemmatizer = lemmatizer()
    except MetricError as error:
        return figures, [f"accuracy is left out, raw accuracy is without lemmatization: {error}"]
    for record in records:
        record["lemmatized"] = base_form(record["prediction"])
        record["score"] = vqa_accuracy(record["lemmatized"], record["references"])
    return vqa_figures(records) | {"raw accuracy": figures["raw accuracy"]}, []


def submission(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the VQA challenge's server takes."""
    return [{"question_id": record["id"], "answer": record["prediction"]} for record in records]
