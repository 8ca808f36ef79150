"""Captioning (Sec. 4.2): "a photo of", five beams, 8 to 30 tokens; BLEU, METEOR, ROUGE-L, CIDEr, SPICE."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blip2.checkpoint import Loaded
from blip2.generation import generate
from blip2.model import Blip2
from train.evaluation import Figures
from train.evaluation.metrics import caption_figures
from train.evaluation.predictions import Record, Unit, Work, decoding

DOMAINS = ("in-domain", "near-domain", "out-domain")


def captioning(loaded: Loaded, settings: Mapping[str, Any]) -> Work:
    """Captions the pictures of a unit, all with one prompt, so that none is padded.

    Args:
        loaded: stage 2.
        settings: the resolved ones of a task.
    """
    model, processor = loaded.model, loaded.processor
    assert isinstance(model, Blip2)
    generation = decoding(settings)
    prompt = processor.prompt(settings["prompt"], "caption")

    def work(unit: Unit, pixel_values: Tensor, rows: dict[str, int]) -> list[Record]:
        image = model.encode_image(pixel_values.to(loaded.device))
        said = generate(model, processor, image, prompt, generation)
        return [
            {
                "id": example.id,
                "image": example.image,
                "prediction": said[rows[example.image]][0].strip(),
                "references": list(example.references),
                **example.facts,
            }
            for example in unit
        ]

    return work


def score(records: Sequence[Record], *, spice: bool = False) -> tuple[Figures, list[str]]:
    """The figures of all, and of every domain by itself, such as "CIDEr in"; each record gets its CIDEr.

    Args:
        records: with references.
        spice: compute SPICE, too.

    Returns:
        The figures, and notes on what is left out.

    Raises:
        MetricError: there is no Java.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figures, each = _figures(records, spice)
        for domain in DOMAINS:
            if part := [record for record in records if record.get("domain") == domain]:
                found, _ = _figures(part, spice)
                figures |= {f"{name} {domain.removesuffix('-domain')}": v for name, v in found.items()}
    for record in records:
        if str(record["id"]) in each:
            record["score"] = each[str(record["id"])]
    return figures, list(dict.fromkeys(str(one.message) for one in caught))


def _figures(records: Sequence[Record], spice: bool) -> tuple[Figures, dict[str, float]]:
    said = {str(record["id"]): record["prediction"] for record in records}
    return caption_figures(said, {str(r["id"]): r["references"] for r in records}, spice=spice)


def submission(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the servers of COCO and NoCaps take."""
    return [{"image_id": record["id"], "caption": record["prediction"]} for record in records]
