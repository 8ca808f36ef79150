"""The paper's "Image Encoder": EVA-CLIP ViT-g/14 or CLIP ViT-L/14 (Fig. 1, Sec. 3.1).

B images, P patches + 1 (the class token comes first), V vision width, H heads, S image size in pixels.
Both encoders stop one block before their end (39 of 40 and 23 of 24) and hand on every token; the layer norm
after them (`post_layernorm`, LAVIS's `ln_vision`) is not part of the frozen encoder: it trains in both
stages. Other encoders are in `blip2.encoders`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2VisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .packed import activated


@dataclass
class ImageFeatures:
    """What is known of B images after encoding, so that no image is encoded twice.

    Attributes:
        image_embeds: float (B, P, V), the encoder's tokens after `post_layernorm`.
        query_output: float (B, Q, D), what the queries read from them; None where a question enters the
            Q-Former.
        language_inputs: float (B, Q, L), the queries as soft tokens for the LLM; None without an LLM.
    """

    image_embeds: Tensor
    query_output: Tensor | None = None
    language_inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_embeds)

    def _map(self, function: Any) -> "ImageFeatures":
        rest = (self.query_output, self.language_inputs)
        return ImageFeatures(function(self.image_embeds), *(None if x is None else function(x) for x in rest))

    def __getitem__(self, rows: Any) -> "ImageFeatures":
        """The features of one image (an int keeps the batch axis), a slice, or an index tensor of images."""
        index = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        return self._map(lambda part: part[index])

    def to(self, *args: Any, **kwargs: Any) -> "ImageFeatures":
        """As `Tensor.to`, for every part."""
        return self._map(lambda part: part.to(*args, **kwargs))

    @staticmethod
    def join(many: Sequence["ImageFeatures"]) -> "ImageFeatures":
        """The features of all images in one; each of `many` has the same parts."""
        soft = [(one.query_output, one.language_inputs) for one in many]
        rest = (None if part[0] is None else torch.cat(part) for part in zip(*soft, strict=True))
        return ImageFeatures(torch.cat([one.image_embeds for one in many]), *rest)


class PatchEmbeddings(nn.Module):
    """Pixels to tokens: a patch convolution, the class token in front, learned absolute positions."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
            raise ValueError(
                f"image_size and patch_size are single numbers, not {config.image_size} and more"
            )
        self.image_size, self.patch_size = config.image_size, config.patch_size
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        self.align_corners = getattr(config, "pre_layernorm", False)  # LAVIS: with CLIP, not with EVA-CLIP
        width, num_patches = config.hidden_size, (self.image_size // self.patch_size) ** 2
        self.class_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.position_embedding = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, num_patches + 1, width), std=0.02)
        )
        self.patch_embedding = nn.Conv2d(
            3, width, self.patch_size, self.patch_size, bias=getattr(config, "patch_bias", True)
        )

    @torch.no_grad()
    def resize(self, image_size: int) -> None:
        """Take images of another size, pixels; the positions are interpolated once and then learned anew.

        Raises:
            ValueError: the size is no multiple of the patches'.
        """
        if image_size < self.patch_size or image_size % self.patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {self.patch_size}")
        if image_size == self.image_size:
            return
        side = image_size // self.patch_size
        positions = interpolate_positions(self.position_embedding, side, side, self.align_corners)
        self.position_embedding = nn.Parameter(positions.contiguous())
        self.image_size = image_size

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values: float (B, 3, S, S) -> float (B, P, V)."""
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.image_size, self.image_size) and not interpolate:
            raise ValueError(
                f"pixel_values are {height}x{width}, this encoder takes {self.image_size}x{self.image_size}: "
                "resize the image, or pass interpolate=True"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        rows, columns = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.to(patches).expand(len(patches), -1, -1), patches], dim=1)
        positions: Tensor = self.position_embedding
        if tokens.shape[1] != positions.shape[1]:
            positions = interpolate_positions(positions, rows, columns, self.align_corners)
        return tokens + positions.to(tokens)


def interpolate_positions(
    position_embedding: Tensor, rows: int, columns: int, align_corners: bool = False
) -> Tensor:
    """Learned positions (1, 1 + old patches, V) resized to rows x columns; the class token keeps its own.

    Bicubic in float32, as LAVIS's loaders do it; the old grid is square.
    """
    old = int((position_embedding.shape[1] - 1) ** 0.5)
    grid = position_embedding[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=align_corners)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(position_embedding.dtype)
    return torch.cat([position_embedding[:, :1], grid], dim=1)


class Attention(nn.Module):
    """Self-attention with one qkv projection; EVA-CLIP's key bias is zero in every released checkpoint."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {config.hidden_size} for {config.num_attention_heads} heads: not whole"
            )
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float (B, P, V), to the same."""
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, P, V/H) each
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.projection(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float (B, P, V), to the same."""
        return self.fc2(activated(self.fc1, self.activation, hidden))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop_path = 0.0  # see `VisionTransformer.set_drop_path`

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float (B, P, V), to the same."""
        hidden = hidden + self._branch(self.self_attn(self.layer_norm1(hidden)))
        return hidden + self._branch(self.mlp(self.layer_norm2(hidden)))

    def _branch(self, added: Tensor) -> Tensor:
        """What a branch adds; in training with stochastic depth, to some of the pictures only."""
        if not self.training or self.drop_path == 0:
            return added
        kept = added.new_empty(len(added), 1, 1).bernoulli_(1 - self.drop_path)
        return added * kept / (1 - self.drop_path)


class Encoder(nn.Module):
    """The stack of blocks; a module of its own because the checkpoints' names have it."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float (B, P, V), to the same."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class ImageEncoder(nn.Module):
    """What every image encoder here has: `encode`, a trainable `post_layernorm` behind it, and freezing."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.frozen = False
        eps: Any = getattr(config, "post_layernorm_eps", None) or getattr(config, "layer_norm_eps", 1e-6)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=eps)

    def tokens(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values: float (B, 3, S, S) -> float (B, P, V), by the encoder proper."""
        raise NotImplementedError

    def encode(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """The encoder without `post_layernorm`, and without gradients while it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.tokens(pixel_values, interpolate)

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values: float (B, 3, S, S), normalized -> image_embeds: float (B, P, V)."""
        hidden = self.encode(pixel_values, interpolate)
        return self.post_layernorm(hidden.to(self.post_layernorm.weight.dtype))

    def set_frozen_precision(self, dtype: torch.dtype) -> None:
        """Hold the encoder in `dtype`, and what trains, `post_layernorm`, in float32."""
        self.to(dtype)
        self.post_layernorm.float()

    def freeze(self) -> None:
        """Freeze all but `post_layernorm`: no gradients, eval mode for good. Paper: Sec. 3.1."""
        self.frozen = True
        self.requires_grad_(False)
        self.post_layernorm.requires_grad_(True)
        self.eval()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """As `nn.Module.train`, except that a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)


class VisionTransformer(ImageEncoder):
    """EVA-CLIP ViT-g/14 by default; CLIP ViT-L/14 with `pre_layernorm` and without `patch_bias`.

    Args:
        config: sizes. Beyond transformers' fields it may hold `post_layernorm_eps` (default:
            `layer_norm_eps`), `pre_layernorm` (default False) and `patch_bias` (default True).
    """

    def __init__(self, config: Blip2VisionConfig):
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config)
        if getattr(config, "pre_layernorm", False):
            self.pre_layernorm: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.pre_layernorm = nn.Identity()
        self.encoder = Encoder(config)

    def tokens(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """pixel_values: float (B, 3, S, S) -> float (B, P, V), before `post_layernorm`."""
        return self.encoder(self.pre_layernorm(self.embeddings(pixel_values, interpolate)))

    def resize(self, image_size: int) -> None:
        """Take images of `image_size` pixels a side from now on, as fine-tuning does. Paper: Tables 7 to 9.

        Raises:
            ValueError: the size is no multiple of the patches'.
        """
        self.embeddings.resize(image_size)
        self.config.image_size = image_size

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth (arXiv 1603.09382) in training: the chance that a block leaves a picture alone.

        It rises evenly from 0 at the first block to `rate` at the last; the paper's settings are all 0.
        """
        for number, layer in enumerate(self.encoder.layers):
            assert isinstance(layer, Block)
            layer.drop_path = rate * number / max(1, len(self.encoder.layers) - 1)
