"""Where a run's image encoder comes from: a name, a folder, a Hub id, or a function of one's own.

Whatever it is, it brings the size, mean and deviation that its pictures are to have. Nothing is downloaded
here: what a run needs and does not find is said before it starts (`Recipe.missing`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, Blip2VisionConfig, PreTrainedConfig

from blip2.checkpoint import quiet
from blip2.config import CallableVisionConfig
from blip2.encoders import AutoVisionEncoder, CallableEncoder, import_encoder, registered
from blip2.images import CLIP_MEAN, CLIP_STD
from blip2.processing import pixel_size
from blip2.shards import read_json
from blip2.vision import ImageEncoder, VisionTransformer
from train.recipes import RecipeError

# The paper's two, as the recipes name their folders, and encoders that came after it, on the Hub.
ENCODERS = {
    "eva-vit-g": "weights/vitg",
    "clip-vit-l": "weights/vitl",
    "siglip-so400m": "google/siglip-so400m-patch14-224",
    "siglip2-so400m": "google/siglip2-so400m-patch14-224",
    "dinov2-l": "facebook/dinov2-large",
    "dinov2-g": "facebook/dinov2-giant",
    "dinov3-l": "facebook/dinov3-vitl16-pretrain-lvd1689m",  # gated: its license has to be accepted
}

OURS = "blip_2_vision_model"


@dataclass(frozen=True)
class Pretrained:
    """An image encoder in float32, and how its pictures are made.

    Attributes:
        encoder: with a `post_layernorm`, new unless the folder has one.
        image_size: S, pixels a side.
        mean: of each channel, in [0, 1].
        std: likewise.
    """

    encoder: ImageEncoder
    image_size: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD


def is_function(source: str) -> bool:
    """Whether a source is a registered name, or "module:function"."""
    return source in registered() or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) is not None


def find(source: str) -> Path | None:
    """The folder of a source that is no function: its own, or a Hub id's in the cache; None if not here."""
    source = ENCODERS.get(source, source)
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def advice(source: str) -> str:
    """How to get a source that is not here, where it is on the Hub; else ""."""
    repo_id = ENCODERS.get(source, source)
    folder = repo_id.startswith(("weights/", "runs/")) or not re.fullmatch(r"[\w-]+/[\w.-]+", repo_id)
    return "" if folder else f"; if this is a Hub id: hf download {repo_id}"


def load_encoder(source: str) -> Pretrained:
    """A pretrained image encoder.

    Args:
        source: one of ENCODERS; a folder or Hub id of `VisionTransformer` weights, or of any model of
            transformers whose image encoder gives a last hidden state (the text half is left out); or
            "module:function", see `blip2.encoders.ExternalEncoder`.

    Raises:
        RecipeError: it is not there, incomplete, or gives something else than tokens.
    """
    if is_function(source):
        found = _external(source)
    else:
        folder = find(source)
        if folder is None:
            raise RecipeError(f"there is no image encoder in {source}{advice(source)}")
        if read_json(folder / "config.json").get("model_type", OURS) == OURS:
            return _vision_transformer(folder)
        found = _auto(folder)
    _probe(found, source)
    return found


def _external(source: str) -> Pretrained:
    try:
        external = registered().get(source, None) or import_encoder(source)
        made = external()
    except ValueError as error:
        raise RecipeError(str(error)) from error
    config = CallableVisionConfig(source=source, hidden_size=made.width, image_size=made.image_size)
    encoder = CallableEncoder(config)
    encoder.attach(made)
    if isinstance(made.encode, torch.nn.Module):
        made.encode.float()
    return Pretrained(encoder, made.image_size, made.mean or CLIP_MEAN, made.std or CLIP_STD)


def _vision_transformer(folder: Path) -> Pretrained:
    config = Blip2VisionConfig.from_json_file(folder / "config.json")
    with torch.device("meta"):  # no random weights: the run's seed is for what starts from them
        encoder = VisionTransformer(config)
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    if not (folder / "preprocessor_config.json").exists():
        return Pretrained(encoder, encoder.embeddings.image_size)
    return Pretrained(encoder, encoder.embeddings.image_size, *_normalization(_settings(folder), folder))


def _auto(folder: Path) -> Pretrained:
    settings = _settings(folder)
    try:
        with quiet():
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config = _tower(config)
            model, info = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
        size = pixel_size(settings)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder}: {' '.join(str(error).split())}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise RecipeError(
            f"{folder}: {len(missing)} weights of its image encoder are missing: {', '.join(missing[:5])}"
        )
    return Pretrained(AutoVisionEncoder(config, model), size, *_normalization(settings, folder))


def _tower(config: Any) -> PreTrainedConfig:
    """The image half of a model's configuration, without what only a pooled output needs.

    CLIP's last block is left out, as in the paper (Sec. 3.1): it serves the class token alone.
    """
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's
    if config.model_type == "clip_vision_model" and config.num_hidden_layers > 1:
        config.num_hidden_layers -= 1
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(f"model_type {config.model_type!r} has no single hidden_size, so it gives no tokens")
    return config


def _settings(folder: Path) -> Any:
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{folder}: its preprocessor_config.json, which says how pictures are sized and normalized, is "
            f"missing or unknown ({' '.join(str(error).split())[:200]})"
        ) from error


def _normalization(settings: Any, folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    if getattr(settings, "do_normalize", True) is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = getattr(settings, "rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-3:
        raise RecipeError(f"{folder}: its rescale_factor is {factor}; only 1/255 is known here")
    return tuple(settings.image_mean), tuple(settings.image_std)


@torch.no_grad()
def _probe(found: Pretrained, source: str) -> None:
    """Encode one gray picture, so that an encoder that gives no tokens stops the run here."""
    size, width = found.image_size, found.encoder.config.hidden_size
    try:
        tokens = found.encoder.eval().tokens(torch.zeros(1, 3, size, size))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{source} does not encode pixel_values (1, 3, {size}, {size}): {' '.join(str(error).split())}"
        ) from error
    if tokens is None or tokens.ndim != 3 or tokens.shape[2] != width:
        shape = None if tokens is None else tuple(tokens.shape)
        raise RecipeError(f"{source} gives {shape}; expected (images, tokens, {width})")
