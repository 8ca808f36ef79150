"""Image encoders other than the paper's (`blip2.vision`): any of transformers, or any callable.

B images, P tokens, V image width, S image size in pixels. They are taken whole, and get a trainable
`post_layernorm` behind them as EVA-CLIP does.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, Blip2VisionConfig, PreTrainedConfig, PreTrainedModel

from .config import CallableVisionConfig
from .vision import ImageEncoder, VisionTransformer


class AutoVisionEncoder(ImageEncoder):
    """Any `transformers.AutoModel` that maps pixel values to a last hidden state: SigLIP, DINO, CLIP, ViT.

    Args:
        config: of the vision tower alone; `post_layernorm_eps` as above.
        model: that model; built with random weights if None.
    """

    def __init__(self, config: PreTrainedConfig, model: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = AutoModel.from_config(config) if model is None else model
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # not read, and in many checkpoints not there
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters

    def tokens(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values: float (B, 3, S, S) -> float (B, P, V), before `post_layernorm`."""
        interpolate |= pixel_values.shape[-1] != getattr(self.config, "image_size", None)
        options = {"interpolate_pos_encoding": True} if interpolate and self.interpolates else {}
        return self.model(pixel_values=pixel_values.to(self.model.dtype), **options).last_hidden_state


@dataclass(frozen=True)
class ExternalEncoder:
    """An image encoder from elsewhere, such as timm.

    Attributes:
        encode: float pixel_values (B, 3, S, S) -> float (B, P, V). The weights of an `nn.Module` are frozen,
            moved and saved with the model; of any other callable nothing is known.
        width: V.
        image_size: S, pixels a side.
        mean: of each channel, in [0, 1]; None for CLIP's.
        std: likewise.
    """

    encode: Callable[[Tensor], Tensor]
    width: int
    image_size: int
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


_EXTERNAL: dict[str, Callable[[], ExternalEncoder]] = {}


def register_encoder(source: str, make: Callable[[], ExternalEncoder]) -> None:
    """Say what `source` means in the checkpoints that name it as their image encoder.

    Args:
        source: "module:function", or any other name under which a model was trained.
        make: gives the encoder; its weights are replaced by the checkpoint's.
    """
    _EXTERNAL[source] = make


def registered() -> Mapping[str, Callable[[], ExternalEncoder]]:
    """What was registered, by name."""
    return _EXTERNAL


def import_encoder(source: str) -> Callable[[], ExternalEncoder]:
    """Import and register the function that "module:function" names. It runs that module's code.

    The module may lie in the folder that the process was started in.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the image encoder {source!r} cannot be imported ({error}): give module:function, and start in "
            "the folder of the module or have it on PYTHONPATH"
        ) from error
    register_encoder(source, make)
    return make


class CallableEncoder(ImageEncoder):
    """An `ExternalEncoder` as part of a model: empty until `attach` brings the callable.

    Args:
        config: its name and sizes.
    """

    def __init__(self, config: CallableVisionConfig):
        super().__init__(config)
        self.external: Any = None

    def attach(self, external: ExternalEncoder | None = None) -> None:
        """Take a callable in; by default the registered one.

        Raises:
            ValueError: none is registered under the configuration's name, or its width or image size differ.
        """
        source = self.config.source
        if external is None and source not in _EXTERNAL:
            raise ValueError(
                f"its image encoder is the function {source!r}, and code that a checkpoint names is not run "
                f"unasked: pass --encoder {source}, or call blip2.register_encoder({source!r}, function)"
            )
        external = external or _EXTERNAL[source]()
        expected = (self.config.hidden_size, self.config.image_size)
        if (external.width, external.image_size) != expected:
            raise ValueError(
                f"{source} gives tokens of width {external.width} for images of "
                f"{external.image_size} pixels; the model was trained with {expected[0]} and {expected[1]}"
            )
        self.external = external.encode

    def tokens(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values: float (B, 3, S, S) -> float (B, P, V), before `post_layernorm`."""
        if isinstance(self.external, nn.Module):
            numbers = (p for p in self.external.parameters() if p.is_floating_point())
            pixel_values = pixel_values.to(next((p.dtype for p in numbers), pixel_values.dtype))
        tokens: Tensor = self.external(pixel_values)
        expected = (len(pixel_values), self.config.hidden_size)
        if tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != expected:
            raise ValueError(
                f"{self.config.source} gave {tuple(tokens.shape)}; expected (images, tokens, width) = "
                f"({expected[0]}, any, {expected[1]})"
            )
        return tokens


def build_image_encoder(config: PreTrainedConfig) -> ImageEncoder:
    """The image encoder that a `vision_config` describes."""
    if isinstance(config, CallableVisionConfig):
        return CallableEncoder(config)
    return VisionTransformer(config) if isinstance(config, Blip2VisionConfig) else AutoVisionEncoder(config)
