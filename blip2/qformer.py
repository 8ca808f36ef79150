"""The Querying Transformer (Fig. 2, Sec. 3.1): queries that read an image and share layers with text.

B batch, Q queries (32), T text tokens, P image tokens, D width (768), V image width, H heads.
A BERT-base whose layers have two feed-forwards, one for query positions and one for text positions, and in
every `cross_attention_frequency`-th layer a cross-attention from query positions to the image.

One forward serves the four passes of stage 1; what may attend to what is the caller's mask:

    (a) queries alone         reads the image; no mask
    (b) text alone            `text_mask`: padding is hidden. No image, text feed-forward only
    (c) queries and text      `multimodal_mask`: everything sees everything but padding (ITM)
    (d) text after queries    `causal_mask`, with the keys and values cached in (a): text sees all queries and
                              the text before it, queries never see text (ITG)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.activations import ACT2FN

from .packed import activated

KeyValues = tuple[Tensor, Tensor]  # each (B, H, tokens, D/H)


@dataclass
class QFormerOutput:
    """query_output: float (B, Q, D); text_output: float (B, T, D); cache: keys and values of every layer."""

    query_output: Tensor
    text_output: Tensor
    cache: list[KeyValues]


def text_mask(attention_mask: Tensor) -> Tensor:
    """Mask of pass (b): bool (B, 1, 1, T), every text token sees every token that is not padding.

    Args:
        attention_mask: int or bool (B, T), 1 for real tokens.
    """
    return attention_mask.bool()[:, None, None, :]


def multimodal_mask(num_queries: int, attention_mask: Tensor) -> Tensor:
    """Mask of pass (c), ITM: bool (B, 1, 1, Q + T).

            queries  text
    queries    1      1
    text       1      1      (padding hidden from all)
    """
    queries = attention_mask.new_ones(len(attention_mask), num_queries)
    return text_mask(torch.cat([queries, attention_mask], dim=1))


def causal_mask(num_queries: int, attention_mask: Tensor) -> Tensor:
    """Mask of pass (d), ITG: bool (B, 1, T, Q + T); rows are text positions, the queries are cached.

            queries  w1 w2 w3
    w1         1      1  0  0
    w2         1      1  1  0
    w3         1      1  1  1      (padding hidden from all)
    """
    length = attention_mask.shape[1]
    causal = attention_mask.new_ones(length, num_queries + length, dtype=torch.bool).tril(num_queries)
    return multimodal_mask(num_queries, attention_mask) & causal


class TextEmbeddings(nn.Module):
    """Word plus position embeddings, from position 0 also behind queries; their norm is the Q-Former's."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int (B, T) -> float (B, T, D)."""
        length = input_ids.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"text of {length} tokens, at most {self.position_embeddings.num_embeddings} fit: shorten it"
            )
        return self.word_embeddings(input_ids) + self.position_embeddings.weight[:length]


class Projections(nn.Module):
    """Query, key and value projections of one attention, and the attention itself."""

    def __init__(self, config: Blip2QFormerConfig, source_size: int):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"qformer hidden_size {config.hidden_size} for {config.num_attention_heads} heads: not whole"
            )
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_size, config.hidden_size)
        self.value = nn.Linear(source_size, config.hidden_size)

    def split(self, states: Tensor) -> Tensor:
        """(B, tokens, D) -> (B, H, tokens, D/H)."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def key_values(self, source: Tensor) -> KeyValues:
        """Keys and values of source: float (B, tokens, source size)."""
        return self.split(self.key(source)), self.split(self.value(source))

    def forward(self, hidden: Tensor, key_values: KeyValues, mask: Tensor | None = None) -> Tensor:
        """hidden: float (B, tokens, D) -> what it attends to, the same shape."""
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            self.split(self.query(hidden)), *key_values, attn_mask=mask, dropout_p=dropout
        )
        return attended.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Linear, dropout, residual, layer norm: the end of every sub-layer of a post-norm transformer."""

    def __init__(self, in_size: int, config: Blip2QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """hidden: float (B, tokens, input size); residual: float (B, tokens, D), the result's shape."""
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Attention and its AddNorm."""

    def __init__(self, config: Blip2QFormerConfig, source_size: int):
        super().__init__()
        self.attention = Projections(config, source_size)
        self.output = AddNorm(config.hidden_size, config)

    def forward(self, hidden: Tensor, key_values: KeyValues, mask: Tensor | None = None) -> Tensor:
        """hidden: float (B, tokens, D), to the same."""
        return self.output(self.attention(hidden, key_values, mask), hidden)


class Intermediate(nn.Module):
    """The widening half of a feed-forward."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float (B, tokens, D) -> float (B, tokens, intermediate size)."""
        return activated(self.dense, self.activation, hidden)


class Layer(nn.Module):
    """Joint self-attention, cross-attention of the queries, and a feed-forward for each kind of token."""

    def __init__(self, config: Blip2QFormerConfig, index: int):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention: Attention | None = None
        if index % config.cross_attention_frequency == 0:
            self.crossattention = Attention(config, config.encoder_hidden_size)
        self.intermediate_query = Intermediate(config)
        self.output_query = AddNorm(config.intermediate_size, config)
        if config.use_qformer_text_input:
            self.intermediate = Intermediate(config)
            self.output = AddNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        image: KeyValues | None,
        mask: Tensor | None,
        past: KeyValues | None,
        queries_only: bool = False,
    ) -> tuple[Tensor, KeyValues]:
        """hidden: float (B, Q + T, D), to the same, and the layer's keys and values for a cache.

        With `queries_only` the text is read and not passed on: the result is (B, Q, D).
        """
        key_values = self.attention.attention.key_values(hidden)
        if past is not None:
            key_values = (torch.cat([past[0], key_values[0]], 2), torch.cat([past[1], key_values[1]], 2))
        if queries_only:
            hidden = hidden[:, :num_queries]
        hidden = self.attention(hidden, key_values, mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if num_queries:
            if self.crossattention is not None and image is not None:
                queries = self.crossattention(queries, image)
            queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1]:
            text = self.output(self.intermediate(text), text)
        return torch.cat([queries, text], dim=1), key_values


class Encoder(nn.Module):
    """The stack of layers; a module of its own because the checkpoints' names have it."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))

    @property
    def layers(self) -> list[Layer]:
        """The layers, first to last."""
        return list(self.layer)  # type: ignore[arg-type]


class QFormer(nn.Module):
    """The Q-Former. Text needs `config.use_qformer_text_input`, or the text feed-forwards do not exist."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.config = config
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Encoder(config)

    def project_image(self, image_embeds: Tensor) -> list[KeyValues | None]:
        """Cross-attention keys and values of image_embeds: float (B, P, V), one entry a layer.

        A third of the query pass is spent here, so passes that look at the same image share the result.
        """
        source = image_embeds.to(self.layernorm.weight.dtype)
        cross = [layer.crossattention for layer in self.encoder.layers]
        return [None if attention is None else attention.attention.key_values(source) for attention in cross]

    def forward(
        self,
        query_tokens: Tensor | None = None,
        text_embeds: Tensor | None = None,
        image: Tensor | list[KeyValues | None] | None = None,
        mask: Tensor | None = None,
        past: list[KeyValues] | None = None,
        queries_only: bool = False,
    ) -> QFormerOutput:
        """Run one pass.

        Args:
            query_tokens: float (B or 1, Q, D); a single row serves every image.
            text_embeds: float (B, T, D), of `TextEmbeddings`.
            image: float (B, P, V), or what `project_image` made of it. Required with queries.
            mask: bool, broadcastable to (B, H, Q + T, cached + Q + T), True where attention is allowed.
            past: a cache to attend to in front, as pass (d) does.
            queries_only: the last layer spares itself the text, whose mask must be the same for all
                positions, (B, 1, 1, Q + T).

        Raises:
            ValueError: queries without an image, or text on a Q-Former without text feed-forwards.
        """
        if query_tokens is not None and image is None:
            raise ValueError("queries need an image to read: pass image_embeds as `image`")
        if text_embeds is not None and not self.config.use_qformer_text_input:
            raise ValueError(
                "this Q-Former has no text feed-forwards: use a stage-1 checkpoint, or a config with "
                "qformer_config.use_qformer_text_input=True"
            )
        images = self.project_image(image) if isinstance(image, Tensor) else image
        parts = []
        if query_tokens is not None and images is not None:
            batch = next(kv[0].shape[0] for kv in images if kv is not None)
            parts.append(query_tokens.expand(batch, -1, -1))
        if text_embeds is not None:
            parts.append(text_embeds)
        num_queries = 0 if query_tokens is None else query_tokens.shape[1]
        hidden = torch.cat([part.to(self.layernorm.weight.dtype) for part in parts], dim=1)
        hidden = self.dropout(self.layernorm(hidden))
        cache = []
        layers = self.encoder.layers
        for index, layer in enumerate(layers):
            hidden, key_values = layer(
                hidden,
                num_queries,
                images[index] if images else None,
                mask,
                past[index] if past else None,
                queries_only and layer is layers[-1],
            )
            cache.append(key_values)
        return QFormerOutput(hidden[:, :num_queries], hidden[:, num_queries:], cache)
