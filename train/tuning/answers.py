"""How well a model answers while it is fine-tuned: VQA accuracy on questions held out."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from blip2.generation import generate
from blip2.settings import Generation
from train.evaluation.metrics import vqa_accuracy
from train.probe import SAMPLES, Probe


class Answers(Probe):
    """An evaluation for `fit`: `accuracy`, 0 to 1, of greedy answers, by the official rules.

    Batches hold `prompts`, `questions` and `answers`, as those of `train.tuning.data` do. A page of samples
    shows the first of them.
    """

    def __call__(self, objective: nn.Module, step: int) -> dict[str, float]:
        """See `Answers`."""
        model: Any = objective.model
        device = next(objective.parameters()).device
        scores, rows, pictures = list[float](), list[tuple[str, ...]](), list[Tensor]()
        for batch in itertools.islice(self.loader(), self.batches):
            image = model.encode_image(batch["pixel_values"].to(device))
            short = Generation(max_new_tokens=10)
            said = generate(
                model, self.processor, image, batch["prompts"], short, questions=batch["questions"]
            )
            for [text], question, references in zip(said, batch["questions"], batch["answers"], strict=True):
                text = text.rstrip(".")
                scores.append(vqa_accuracy(text, references))
                rows.append((question, ", ".join(dict.fromkeys(references)), text))
            pictures += batch["pixel_values"][: SAMPLES - len(pictures)]
        self._show(pictures, ("question", "answers of people", "its answer"), rows[: len(pictures)], step)
        return {"accuracy": sum(scores) / len(scores)}
