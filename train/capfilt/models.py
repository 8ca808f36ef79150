"""The models that CapFilt works with: one captions an image, one says how well a text fits it.

Both may be this package's checkpoints (a stage-2 model captions, a stage-1 model compares by ITC) or
transformers' (BLIP, GIT or an encoder-decoder captions, CLIP or SigLIP compares). An image goes through
each encoder once, for all its captions. B images, N captions of each, S pixels a side, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    PreTrainedConfig,
    VisionEncoderDecoderModel,
)
from transformers.utils import logging

from blip2 import checkpoint
from blip2.devices import choose_device
from blip2.generation import Generation, TextCache, ending, read_prompt
from blip2.presets import PRESETS, resolve, suggestions
from train.capfilt.sampling import Sample, Sampling, options
from train.data.transforms import clean_caption

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
        if self.model.question_in_qformer:
            raise CapFiltError(f"{loaded.name} answers questions: choose a checkpoint that captions")
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
        text = self.processor.text([self.sampling.prompt] * images)
        text = {name: value.to(device) for name, value in text.items()}
        settings = Generation(max_new_tokens=self.sampling.max_new_tokens)
        decoder = read_prompt(self.model, image, text, settings, TextCache())
        decoder.repeat(len(chances) // images)
        sample = Sample(torch.from_numpy(chances).to(device), self.sampling.top_p)
        ends, pad = ending(self.model, device)
        decoder.logits[:, ends] = -torch.inf  # a caption has a token at least
        finished = torch.zeros(len(chances), dtype=torch.bool, device=device)
        said: list[Tensor] = []
        while True:
            token = sample(None, decoder.logits).argmax(-1).masked_fill(finished, pad)
            said.append(token)
            finished |= torch.isin(token, ends)
            if len(said) == settings.max_new_tokens or finished.all():
                return _grouped(self.processor.decode(torch.stack(said, dim=1)), images)
            decoder.read(token)


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
        settings = options(chances, images, self.sampling, device)
        ids = self.model.generate(pixel_values=pixel_values.to(device, self.model.dtype), **text, **settings)
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
