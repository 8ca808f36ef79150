"""What both stages share: an image encoder, the queries and the Q-Former that reads images (Fig. 1).

The names of parameters are transformers', so that sharded loading, quantisation, device maps, offload and
adapters come from that library.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, PreTrainedModel
from transformers import initialization as init

from .encoders import build_image_encoder
from .qformer import QFormer, TextEmbeddings
from .vision import ImageFeatures, PatchEmbeddings


class Blip2Base(PreTrainedModel):
    """Image encoder, query tokens and Q-Former; the base class of `Blip2Representation` and `Blip2`."""

    config: Blip2Config
    config_class = Blip2Config
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ["Block", "Layer", "PatchEmbeddings", "TextEmbeddings"]  # noqa: RUF012
    _skip_keys_device_placement = "past_key_values"  # spread over devices, each layer has its own
    _keep_in_fp32_modules = ["query_tokens", "qformer"]  # noqa: RUF012 - under float16 only
    _heads: tuple[str, ...] = ()  # linear layers that start from torch's own initialization

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.vision_model = build_image_encoder(config.vision_config)
        self.qformer = QFormer(config.qformer_config)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size)
        )
        if config.qformer_config.use_qformer_text_input:
            self.embeddings = TextEmbeddings(config.qformer_config)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; under float16 the Q-Former and the queries stay in float32."""
        return self.vision_model.post_layernorm.weight.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) for all but the heads, as BERT and the paper's queries (Sec. 3.1) start."""
        super()._init_weights(module)
        if isinstance(module, Blip2Base):
            init.normal_(module.query_tokens, std=0.02)
        elif isinstance(module, PatchEmbeddings):
            init.trunc_normal_(module.class_embedding, std=0.02)
            init.trunc_normal_(module.position_embedding, std=0.02)
        elif any(module is getattr(self, name) for name in self._heads) and isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: float (B, 3, S, S), normalized -> float (B, P, V), in the encoder's dtype."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (images, 3, size, size), not {tuple(pixel_values.shape)}")
        return self.vision_model(pixel_values)

    @torch.no_grad()
    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        """Encode B images for repeated use: every other method takes the result in place of pixels.

        Args:
            pixel_values: float (B, 3, S, S), normalized.
        """
        return self.read_image(self.image_embeds(pixel_values))

    def read_image(self, image_embeds: Tensor) -> ImageFeatures:
        """Let the queries read image_embeds: float (B, P, V)."""
        return ImageFeatures(image_embeds, self.qformer(self.query_tokens, image=image_embeds).query_output)

    @property
    def wears_adapter(self) -> bool:
        """Whether peft has put an adapter on this model (`blip2.adapters`), as transformers marks it."""
        return bool(getattr(self, "_hf_peft_config_loaded", False))

    def freeze_vision(self) -> None:
        """Freeze the image encoder but for `post_layernorm`, as both stages do (Sec. 3.2, 3.3).

        Under an adapter all of it is frozen, and stays so.
        """
        if not self.wears_adapter:
            self.vision_model.freeze()

    def num_trainable(self) -> int:
        """How many parameters an optimizer would see."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def expect_features(image: Any, images: int | None = None) -> ImageFeatures:
    """Check what a caller passed as `image`; `images` is how many rows the text has."""
    if not isinstance(image, ImageFeatures):
        raise ValueError(
            f"image must come from encode_image(), not {type(image).__name__}: pass pixel_values instead"
        )
    if images is not None and len(image) not in (1, images):
        raise ValueError(
            f"{len(image)} images with {images} texts: give one image, or as many images as texts"
        )
    return image
