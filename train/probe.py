"""What a model can do while it trains, on held-out pairs: find captions (stage 1), say and answer (stage 2).

Losses tell whether a run learns, not whether it works: a language model's loss keeps falling slowly while its
captions have stopped being about the image. So every evaluation also retrieves or captions, and writes down
what it said of a few pictures.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocoevalcap.cider.cider import Cider
from torch import Tensor, nn

from blip2.generation import generate
from blip2.model import Blip2
from blip2.processing import Processor
from blip2.representation import Blip2Representation
from blip2.settings import Generation
from train import distributed
from train.loader import Batch, Loader

SAMPLES = 8  # pictures that are shown
Say = Callable[[str, int], None]


class Probe:
    """An evaluation for `fit`; every process does the same, so that a split language model can take part.

    Stage 1 gives `retrieval`, the mean recall@1 of texts by images and images by texts among all held-out
    pairs, by ITC. Stage 2 gives `cider`, of greedy captions against the pictures' own, each weighing words by
    how rare they are among these captions.

    Args:
        processor: of the model.
        loader: gives the held-out pairs from their start; batches hold `captions`, a text each.
        batches: how many to take.
        folder: gets samples/step-N.md and the pictures it shows.
        question: asked about the pictures of stage 2.
        say: told the page in Markdown, and the step.
        prompt: what captions of stage 2 go on from.
    """

    def __init__(
        self,
        processor: Processor,
        loader: Callable[[], Loader],
        batches: int,
        folder: Path,
        question: str = "what is in the picture?",
        say: Say | None = None,
        prompt: str = "",
    ):
        self.processor, self.loader, self.batches = processor, loader, batches
        self.folder, self.question, self.say, self.prompt = folder / "samples", question, say, prompt

    def __call__(self, objective: nn.Module, step: int) -> dict[str, float]:
        """See `Probe`."""
        model: Any = objective.model
        device = next(objective.parameters()).device
        batches = (
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            for batch in itertools.islice(self.loader(), self.batches)
        )
        if isinstance(model, Blip2Representation):
            return self._retrieve(model, batches, step)
        return self._caption(model, batches, step)

    def _retrieve(self, model: Blip2Representation, batches: Iterable[Batch], step: int) -> dict[str, float]:
        images, texts, captions, pictures = [], [], list[str](), list[Tensor]()
        for batch in batches:
            queries = model.encode_image(batch["pixel_values"]).query_output
            assert queries is not None
            images.append(model.image_feats(queries).float())
            texts.append(model.text_feats(batch["input_ids"], batch["attention_mask"]).float())
            captions += batch["captions"]
            pictures += batch["pixel_values"][: SAMPLES - len(pictures)]
        closeness = torch.einsum("iqe,te->itq", torch.cat(images), torch.cat(texts)).amax(-1)
        found = closeness.argmax(1).tolist()  # a text for every image
        shown = closeness.argmax(0).tolist()  # an image for every text
        of_images = [captions[text] == caption for text, caption in zip(found, captions, strict=True)]
        of_texts = [captions[image] == caption for image, caption in zip(shown, captions, strict=True)]
        recall = (sum(of_images) + sum(of_texts)) / (2 * len(captions))
        rows = [(captions[i], captions[text]) for i, text in enumerate(found[: len(pictures)])]
        self._show(pictures, ("its caption", "the closest caption"), rows, step)
        return {"retrieval": recall}

    def _caption(self, model: Blip2, batches: Iterable[Batch], step: int) -> dict[str, float]:
        said, captions, answers, pictures = list[str](), list[str](), list[str](), list[Tensor]()
        for batch in batches:
            image = model.encode_image(batch["pixel_values"])
            said += [text for [text] in generate(model, self.processor, image, self.prompt, Generation())]
            captions += batch["captions"]
            more = batch["pixel_values"][: SAMPLES - len(pictures)]
            if len(more):
                prompt = self.processor.prompt(self.question)
                first = image[: len(more)]
                answers += [text for [text] in generate(model, self.processor, first, prompt, Generation())]
                pictures += more
        references = {i: [caption.lower()] for i, caption in enumerate(captions)}
        score, _ = Cider().compute_score(references, {i: [text.lower()] for i, text in enumerate(said)})
        rows = list(zip(captions, said, answers, strict=False))
        self._show(pictures, ("its caption", "what it says", self.question), rows, step)
        return {"cider": float(score)}

    def _show(
        self, pictures: list[Tensor], titles: tuple[str, ...], rows: Sequence[tuple[str, ...]], step: int
    ) -> None:
        """Write the page of this step, and the pictures once."""
        if distributed.rank() != 0:
            return
        lines = [f"# Step {step}", "", "| picture | " + " | ".join(titles) + " |"]
        lines.append("|---" * (len(titles) + 1) + "|")
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, (pixels, row) in enumerate(zip(pictures, rows, strict=True)):
            path = self.folder / f"{number}.png"
            if not path.exists():
                self._picture(pixels).save(path)
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            lines.append(f"| ![]({path.name}) | " + " | ".join(cells) + " |")
        page = "\n".join(lines) + "\n"
        temporary = self.folder / ".page.tmp"
        temporary.write_text(page)
        os.replace(temporary, self.folder / f"step-{step:08d}.md")
        if self.say is not None:
            self.say(page, step)

    def _picture(self, pixels: Tensor) -> Image.Image:
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.processor.mean, self.processor.std))
        shown = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        return Image.fromarray(shown.permute(1, 2, 0).numpy())
