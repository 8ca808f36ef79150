"""The models that CapFilt works with: one captions an image, one says how well a text fits it.

Both may be this package's checkpoints (a stage-2 model captions, a stage-1 model compares by ITC) or
transformers' (BLIP, GIT or an encoder-decoder captions, CLIP or SigLIP compares). An image goes through
each encoder once, for all its captions. B images, N captions of each, S pixels a side, E contrastive width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    TopPLogitsWarper,
    VisionEncoderDecoderModel,
)
from transformers.utils import logging

from blip2 import checkpoint
from blip2.devices import choose_device
from blip2.presets import PRESETS, resolve, suggestions
from train.transforms import clean_caption

OURS = ("blip-2", "instructblip", "blip2-any")  # model types that `blip2.load` reads
MATCHING = "Blip2ForImageTextRetrieval"  # the architecture of stage 1
CAPTIONERS = ("blip", "git", "vision-encoder-decoder")
SCORERS = ("clip", "siglip")
ITC_LENGTH = 32  # word pieces of a text, as in stage 1

Preprocess = Callable[[Image.Image], np.ndarray]


class CapFiltError(ValueError):
    """What CapFilt cannot work with: a setting, a model, a folder. The message says what to change."""


class Captioner(Protocol):
    """Writes captions; `preprocess` makes an RGB image float32 (3, S, S), in whatever process decodes."""

    @property
    def preprocess(self) -> Preprocess: ...

    def captions(self, pixel_values: Tensor, chances: np.ndarray) -> list[list[str]]:
        """pixel_values: float (B, 3, S, S); chances: see `Sample` -> N texts of each image."""


class Scorer(Protocol):
    """Compares images with texts; `preprocess` as a captioner's."""

    @property
    def preprocess(self) -> Preprocess: ...

    def similarities(self, pixel_values: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """pixel_values: float (B, 3, S, S); the texts of each image -> the similarity of each, a cosine."""


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn: nucleus sampling, as BLIP's CapFilt (arXiv 2201.12086, Sec. 4.2).

    Attributes:
        top_p: probability mass to draw from.
        max_new_tokens: length of a caption at most, tokens.
        prompt: what a caption goes on from; it is no part of the caption.
    """

    top_p: float
    max_new_tokens: int
    prompt: str


# ---------------------------------------------------------------- sampling


def chances(seed: int, keys: Sequence[str], captions: int, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 (len(keys) * captions, steps), that depend on seed and key alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        rows.append(generator.random((captions, steps), dtype=np.float32))
    return np.concatenate(rows)


class Sample(LogitsProcessor):
    """Nucleus sampling from given chances, so that an image's captions do not depend on its batch.

    At each step only the token drawn keeps a finite score; a sampling `generate` then has no other choice.

    Args:
        chances: float (rows, steps), uniform in [0, 1): one token of one row each.
        top_p: probability mass to draw from.
    """

    def __init__(self, chances: Tensor, top_p: float):
        self.chances = chances
        self.warp = TopPLogitsWarper(top_p)
        self.step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores: float (rows, vocabulary) -> the same, 0 at one token of each row and -inf elsewhere."""
        below = self.warp(input_ids, scores.float()).softmax(-1).cumsum(-1)
        drawn = self.chances[:, self.step, None].to(below) * below[:, -1:]
        token = torch.searchsorted(below, drawn, right=True).clamp_max(scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _options(drawn: np.ndarray, images: int, sampling: Sampling, device: torch.device) -> dict[str, Any]:
    """Settings for transformers' `generate` that leave every choice to `Sample`."""
    sample = Sample(torch.from_numpy(drawn).to(device), sampling.top_p)
    return {
        "do_sample": True,
        "num_beams": 1,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "num_return_sequences": len(drawn) // images,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": 1,
        "logits_processor": LogitsProcessorList([sample]),
    }


def _grouped(texts: Sequence[str], images: int) -> list[list[str]]:
    each = len(texts) // images
    return [list(texts[start : start + each]) for start in range(0, len(texts), each)]


# ---------------------------------------------------------------- this package's checkpoints


class Blip2Captioner:
    """Captions by a stage-2 checkpoint."""

    def __init__(self, loaded: checkpoint.Loaded, sampling: Sampling):
        self.model: Any = loaded.model
        self.processor, self.sampling = loaded.processor, sampling
        self.preprocess = Pixels(loaded.processor.images)
        if (context := loaded.processor.context) is not None:
            prompt = loaded.processor.text([sampling.prompt])["input_ids"].shape[1]
            room = context - loaded.processor.num_query_tokens - prompt
            if sampling.max_new_tokens > room:
                raise CapFiltError(
                    f"max_new_tokens is {sampling.max_new_tokens}; beside the image and the prompt "
                    f"{loaded.name} has room for {room}"
                )

    @torch.inference_mode()
    def captions(self, pixel_values: Tensor, chances: np.ndarray) -> list[list[str]]:
        """See `Captioner`."""
        device, images = self.model.device, len(pixel_values)
        image = self.model.encode_image(pixel_values.to(device))
        prompts = [self.sampling.prompt] * images
        text = {**self.processor.text(prompts), **self.processor.question(prompts)}
        text = {name: value.to(device) for name, value in text.items()}
        new = self.model.generate(image=image, **text, **_options(chances, images, self.sampling, device))
        return _grouped(self.processor.decode(new), images)


class ITCScorer:
    """Cosine similarity by a stage-1 checkpoint: of a text and the query nearest to it (Sec. 3.2).

    Texts are cleaned first: stage 1 was trained on cleaned captions.
    """

    def __init__(self, loaded: checkpoint.Loaded):
        self.model: Any = loaded.model
        self.processor = loaded.processor
        self.preprocess = Pixels(loaded.processor.images)

    @torch.inference_mode()
    def similarities(self, pixel_values: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """See `Scorer`."""
        device = self.model.device
        cleaned = [clean_caption(text) for own in texts for text in own]
        tokens = self.processor.text(cleaned, max_length=ITC_LENGTH)
        image = self.model.encode_image(pixel_values.to(device))
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        return _own_columns(self.model.score(image, ids, mask, head="itc"), texts)


# ---------------------------------------------------------------- transformers' models


class LibraryCaptioner:
    """Captions by a model of transformers that needs no chat frame."""

    def __init__(self, name: str, kind: str, device: torch.device, precision: str, sampling: Sampling):
        if sampling.prompt and kind != "blip":
            raise CapFiltError(f"{name} ({kind}) captions without a prompt: leave out {sampling.prompt!r}")
        family = VisionEncoderDecoderModel if kind == CAPTIONERS[2] else AutoModelForImageTextToText
        self.model: Any = _pretrained(family, name, device, precision)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.preprocess = Pixels(AutoImageProcessor.from_pretrained(name))
        self.kind, self.sampling = kind, sampling

    @torch.inference_mode()
    def captions(self, pixel_values: Tensor, chances: np.ndarray) -> list[list[str]]:
        """See `Captioner`."""
        device, images = self.model.device, len(pixel_values)
        text: dict[str, Tensor] = {}
        if self.sampling.prompt:
            text = dict(self.tokenizer([self.sampling.prompt] * images, return_tensors="pt").to(device))
            text.pop("token_type_ids", None)
        options = _options(chances, images, self.sampling, device)
        ids = self.model.generate(pixel_values=pixel_values.to(device, self.model.dtype), **text, **options)
        if text:  # BLIP repeats the prompt without its [SEP]
            ids = ids[:, text["input_ids"].shape[1] - 1 :]
        return _grouped(self.tokenizer.batch_decode(ids, skip_special_tokens=True), images)


class CLIPScorer:
    """Cosine similarity by CLIP or SigLIP; texts as they are, for these models were trained on alt texts."""

    def __init__(self, name: str, kind: str, device: torch.device, precision: str):
        self.model: Any = _pretrained(AutoModel, name, device, precision)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.preprocess = Pixels(AutoImageProcessor.from_pretrained(name))
        self.length = self.model.config.text_config.max_position_embeddings
        self.padding = "max_length" if kind == "siglip" else True  # SigLIP was trained on full length alone

    @torch.inference_mode()
    def similarities(self, pixel_values: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """See `Scorer`."""
        flat = [text for own in texts for text in own]
        tokens = self.tokenizer(
            flat, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        given = ("input_ids",) if self.padding == "max_length" else ("input_ids", "attention_mask")
        inputs = {key: tokens[key].to(self.model.device) for key in given}
        pixels = pixel_values.to(self.model.device, self.model.dtype)
        image_feats = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        text_feats = self.model.get_text_features(**inputs).pooler_output.float()
        similarity = F.normalize(image_feats, dim=-1) @ F.normalize(text_feats, dim=-1).T
        return _own_columns(similarity, texts)


def _own_columns(similarity: Tensor, texts: list[list[str]]) -> list[list[float]]:
    """Of (B, all texts) the columns of each image's own texts."""
    ends = np.cumsum([len(own) for own in texts]).tolist()
    rows = similarity.float().tolist()
    return [row[end - len(own) : end] for row, own, end in zip(rows, texts, ends, strict=True)]


class Pixels:
    """An RGB image as a model takes it, float32 (3, S, S); can be pickled into the decoding processes.

    Args:
        processor: `Processor.images`, or an image processor of transformers.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Image.Image) -> np.ndarray:
        """image: RGB."""
        if hasattr(self.processor, "image_mean"):
            return self.processor(images=[image], return_tensors="np")["pixel_values"][0].astype(np.float32)
        return self.processor([image])[0].numpy()


# ---------------------------------------------------------------- choosing


def model_kind(name: str, task: str) -> str:
    """The model type of a name, folder or Hub id that fits a task; only its configuration is read.

    Args:
        name: as `blip2.load` takes it, or a transformers model.
        task: "captioner" or "scorer".

    Raises:
        CapFiltError: there is no such model, or it is of another kind.
    """
    where = name
    try:
        preset = resolve(name)
        where = str(preset.folder or preset.repo_id)
    except ValueError:
        if (folder := Path(name).expanduser()).is_dir():
            where = str(folder)
    try:
        config, _ = PreTrainedConfig.get_config_dict(where)
    except OSError as error:
        raise CapFiltError(f"{task}: cannot read a model {name!r}. {suggestions(name)} ({error})") from error
    kind = config.get("model_type")
    matching = config.get("architectures") == [MATCHING]
    if task == "captioner" and kind in (*OURS, *CAPTIONERS) and not matching:
        return kind
    if task == "scorer" and ((kind in OURS and matching) or kind in SCORERS):
        return kind
    found = "a stage-1 checkpoint" if matching else f"of type {kind}"
    fitting = {
        "captioner": f"a stage-2 checkpoint such as scenes-opt, or {', '.join(CAPTIONERS)} of transformers",
        "scorer": f"a stage-1 checkpoint such as scenes-itm, or {', '.join(SCORERS)} of transformers",
    }
    raise CapFiltError(f"{task}: {name} is {found}; choose {fitting[task]}")


def load_captioner(name: str, device: str, precision: str, sampling: Sampling) -> Captioner:
    """The captioner of that name, on a device as `blip2.load` names them, in a precision as it does."""
    kind = model_kind(name, "captioner")
    if kind in OURS:
        return Blip2Captioner(checkpoint.load(name, device=device, precision=precision), sampling)
    return LibraryCaptioner(name, kind, choose_device(device), precision, sampling)


def load_scorer(name: str, device: str, precision: str) -> Scorer:
    """Likewise the scorer; in bfloat16 too many similarities would be equal, so "auto" avoids it."""
    kind = model_kind(name, "scorer")
    if precision == "auto" and choose_device(device).type == "cuda":
        precision = "float16"
    if kind in OURS:
        return ITCScorer(checkpoint.load(name, device=device, precision=precision))
    return CLIPScorer(name, kind, choose_device(device), precision)


def preset_prompt(name: str) -> str:
    """What captions of a checkpoint go on from: the released COCO models were tuned on "a photo of"."""
    return next((preset.prompt for preset in PRESETS.values() if name in (preset.name, preset.repo_id)), "")


def _pretrained(family: Any, name: str, device: torch.device, precision: str) -> Any:
    """A model of transformers in eval mode; 16 bits by default where the device is an accelerator."""
    logging.disable_progress_bar()
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else checkpoint.half_precision(device)
    if precision not in checkpoint.DTYPES:
        raise CapFiltError(f"precision is {precision}; {name} loads in {', '.join(checkpoint.DTYPES)}")
    return family.from_pretrained(name, dtype=checkpoint.DTYPES[precision]).to(device).eval()
