"""The configuration of models that transformers' `blip-2` cannot express.

Everything else uses `transformers.Blip2Config` as it is. `Blip2AnyConfig` has a model type of its own, so
that transformers refuses such a folder instead of reading it with random weights.
"""

from transformers import AutoConfig, Blip2Config
from transformers.configuration_utils import SubConfigSpec
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig


class Blip2AnyConfig(Blip2Config):
    """BLIP-2 around an image encoder other than EVA-CLIP: CLIP ViT-L/14, or any `AutoModel` that sees pixels.

    `vision_config` of type `blip_2_vision_model` with the extra fields `pre_layernorm` (bool) and
    `patch_bias`
    (bool) describes CLIP; any other type is built by `transformers.AutoModel`.
    """

    model_type = "blip2-any"
    sub_configs_defaults = {  # noqa: RUF012 - the peer's class attribute, never changed
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_vision_model"),
        "qformer_config": Blip2QFormerConfig,
    }


AutoConfig.register("blip2-any", Blip2AnyConfig)
