"""The configuration of models that transformers' `blip-2` cannot express.

Everything else uses `transformers.Blip2Config` as it is. `Blip2AnyConfig` has a model type of its own, so
that transformers refuses such a folder instead of reading it with random weights.
"""

from typing import Any

from transformers import AutoConfig, Blip2Config, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig


class Blip2AnyConfig(Blip2Config):
    """BLIP-2 around an image encoder other than EVA-CLIP: CLIP ViT-L/14, or any that maps pixels to tokens.

    `vision_config` of type `blip_2_vision_model` with the extra fields `pre_layernorm` (bool) and
    `patch_bias` (bool) describes CLIP, one of type `blip2_callable` a `blip2.vision.ExternalEncoder`; any
    other type is built by `transformers.AutoModel`.
    """

    model_type = "blip2-any"
    sub_configs_defaults = {  # noqa: RUF012 - the peer's class attribute, never changed
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_vision_model"),
        "qformer_config": Blip2QFormerConfig,
    }


class CallableVisionConfig(PreTrainedConfig):
    """An image encoder that only the name of the Python function that makes it describes.

    Attributes:
        source: that name, "module:function". It is never imported because a folder names it.
        hidden_size: V, width of its tokens.
        image_size: S, pixels a side.
    """

    model_type = "blip2_callable"

    source: str = ""
    hidden_size: int = 0
    image_size: int = 0


def config_class(
    vision: PreTrainedConfig, text: PreTrainedConfig | None = None, image_token: int | None = None
) -> type[Any]:
    """The class, and with it the model type, for an image encoder and a language model.

    `Blip2Config` where transformers' BLIP-2 computes the same: its encoder is EVA-CLIP's, and it puts the
    queries in the place of image tokens, for which the embedding table must have a row.

    Args:
        vision: of the image encoder.
        text: of the language model; None for stage 1.
        image_token: id of <image>; None if there is none.
    """
    eva = vision.model_type == "blip_2_vision_model"
    eva = eva and not getattr(vision, "pre_layernorm", False) and getattr(vision, "patch_bias", True)
    rows: Any = getattr(text, "vocab_size", 0)
    readable = text is None or (image_token is not None and image_token < rows)
    return Blip2Config if eva and readable else Blip2AnyConfig


AutoConfig.register("blip2-any", Blip2AnyConfig)
AutoConfig.register("blip2_callable", CallableVisionConfig)
