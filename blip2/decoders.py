"""Language models read a token at a time: keys and values kept, copied for beams, and given up row by row.

N rows (images times copies), Q queries, T text tokens, S tokens read so far, L LLM width, H heads. OPT and
Flan-T5 are read here, from transformers' modules but without what its `forward` does anew for every token
(masks, positions, caches that are concatenated); any other language model by its own `forward`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cache import KeyValues
from .language import Bridge
from .packed import PackedLinear, activated
from .static import StaticStep, static_step, wanted
from .threads import one_thread, short

ALIKE = 1.25  # prompts up to so many times as long as the shortest are encoded together


class Decoder:
    """A language model and what it has read of N rows.

    `logits`: float32 (N, vocabulary), of the token that comes next.
    """

    logits: Tensor

    def read(self, token: Tensor) -> None:
        """Read one more token of every row, int (N,)."""
        raise NotImplementedError

    def repeat(self, copies: int) -> None:
        """Go on with each row that often, one copy behind the other."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int; they keep their order, all copies of an image or none."""
        raise NotImplementedError

    def reorder(self, rows: Tensor) -> None:
        """Go on with row rows[i], int (N,), a copy of the same image, in the place of row i."""
        raise NotImplementedError

    def close(self) -> None:
        """Call it when done: a cache that was given then holds all that was read."""


class OPTDecoder(Decoder):
    """OPT with layer norms before each sub-layer: all released sizes but 350M.

    Args:
        model: OPTForCausalLM.
        inputs_embeds: float (N, T, L), what the cache does not hold yet.
        mask: int (N, S), 1 for real tokens, the cache's included.
        past: cache to go on from; it is changed.
        room: tokens that will be read on at most.
    """

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether a language model can be read here."""
        config: Any = model.config
        return (
            config.model_type == "opt"
            and config.do_layer_norm_before
            and not config._remove_final_layer_norm
            and config.word_embed_proj_dim == config.hidden_size
            and not _has_hooks(model)
        )

    def __init__(self, model: Any, inputs_embeds: Tensor, mask: Tensor, past: KeyValues, room: int):
        self.model, self.past, self.room = model, past, room
        padded = not bool(mask.all())
        self.mask = mask.bool() if padded else None  # (N, S)
        self.places = mask.sum(1) if padded else None  # (N,), the next token's position
        self.step: StaticStep | None = None
        self.looked = not wanted(model)  # for a step, which is asked for once
        length = inputs_embeds.shape[1]
        self.prompt = past.length + length
        positions = (mask.cumsum(1) * mask - 1)[:, past.length :]
        seen = None
        if padded or past.length:
            seen = torch.ones(length, self.prompt, dtype=torch.bool, device=mask.device).tril(past.length)
            if self.mask is not None:
                seen = seen & self.mask[:, None, None, :]
                seen = seen | ~seen.any(-1, keepdim=True)  # padding is never read, but must see something
        self.logits = read_opt(model, inputs_embeds, positions, past, seen)
        past.length = self.prompt

    def read(self, token: Tensor) -> None:
        """Read one more token of every row, int (N,)."""
        if not self.looked and len(token) == 1 and self.mask is None:
            self.looked = True
            self.step = static_step(read_opt, self.model, self.past.layers[0], self.past.length + self.room)
            if self.step is not None:
                self.step.load(self.past.layers, self.past.length)
                self.read_since = self.past.length
        if self.step is not None:
            self.logits = self.step(token)
        else:
            places = self.places
            if places is None or self.mask is None:
                places = torch.full_like(token, self.past.length)
            else:
                self.mask = F.pad(self.mask, (0, 1), value=True)
                self.places = places + 1
            mask = None if self.mask is None else self.mask[:, None, None, :]
            embeds = self.model.model.decoder.embed_tokens(token)[:, None]
            self.logits = read_opt(self.model, embeds, places[:, None], self.past, mask)
        self.past.length += 1

    def close(self) -> None:
        """Give the static step back, and what it has read to the cache."""
        if self.step is None:
            return
        end, self.past.length = self.past.length, self.read_since
        self.past.grow(end)
        self.step.store(self.past.layers, self.read_since, end)
        self.past.length = end
        self.step.lock.release()
        self.step = None

    def repeat(self, copies: int) -> None:
        """See `Decoder.repeat`."""
        self.past.repeat(copies)
        self._map(lambda part: part.repeat_interleave(copies, dim=0))

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        self.past.keep(rows)
        self._map(lambda part: part[rows])

    def reorder(self, rows: Tensor) -> None:
        """See `Decoder.reorder`."""
        self.past.reorder(rows, self.prompt)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.logits = change(self.logits)
        if self.mask is not None and self.places is not None:
            self.mask, self.places = change(self.mask), change(self.places)


def read_opt(model: Any, embeds: Tensor, positions: Tensor, past: Any, mask: Tensor | None) -> Tensor:
    """OPT's arithmetic.

    Args:
        model: OPTForCausalLM.
        embeds: float (N, T, L).
        positions: int (N, T).
        past: what has been read, with `write` as `KeyValues` has it, and `length` of 0 if that is nothing.
        mask: bool, broadcastable to (N, 1, T, S); None if each token sees those before it.

    Returns:
        Logits after the last token, float32 (N, vocabulary).
    """
    decoder, heads = model.model.decoder, model.config.num_attention_heads
    causal = mask is None and not past.length
    first = decoder.layers[0].self_attn.out_proj.weight
    alone = embeds.shape[:2] == (1, 1) and embeds.device.type == "cpu" and short(first.numel())
    # transformers adds OPT's offset of 2 to the positions
    hidden = embeds + decoder.embed_positions(None, 0, position_ids=positions)
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in _together(
                layer.self_attn_layer_norm(hidden), attention.q_proj, attention.k_proj, attention.v_proj
            )
        )
        keys, values = past.write(index, k, v)
        with one_thread(alone):
            attended = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, mask, is_causal=causal)
            hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2).to(hidden.dtype))
        wide = activated(layer.fc1, layer.activation_fn, layer.final_layer_norm(hidden))
        hidden = hidden + layer.fc2(wide)
    return model.lm_head(decoder.final_layer_norm(hidden[:, -1])).float()


class T5Decoder(Decoder):
    """Flan-T5: the decoder, after the encoder has read queries and prompt.

    Args:
        model: T5ForConditionalGeneration.
        encoded: float (N, S, L), the encoder's output.
        mask: int (N, S), 1 for real tokens.
        start: id of the token that the decoder starts from.
        room: tokens that it will say at most.
    """

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether a language model can be read here; float16 needs transformers' clamps."""
        return model.config.model_type == "t5" and model.dtype != torch.float16 and not _has_hooks(model)

    def __init__(self, model: Any, encoded: Tensor, mask: Tensor, start: int, room: int):
        self.model, self.blocks = model, list(model.decoder.block)
        first = self.blocks[0].layer[0].SelfAttention
        self.width = first.key_value_proj_dim
        # how much each distance weighs, for the token furthest behind: (1, H, 1, room)
        self.bias = first.compute_bias(1, room, device=encoded.device, past_seen_tokens=room - 1)
        self.past = KeyValues()
        self.copies = 1
        self.mask = None if bool(mask.all()) else mask.bool()[:, None, None, :]
        self.cross = []
        for block in self.blocks:
            attention = block.layer[1].EncDecAttention
            keys, values = _together(encoded, attention.k, attention.v)
            self.cross.append((self._heads(keys), self._heads(values)))
        self.read(torch.full((len(encoded),), start, device=encoded.device))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def read(self, token: Tensor) -> None:
        """Read one more token of every row, int (N,)."""
        model, past = self.model, self.past
        hidden = model.shared(token)[:, None]
        bias = self.bias[..., self.bias.shape[-1] - past.length - 1 :]
        for index, block in enumerate(self.blocks):
            own, cross, wide = block.layer
            attention = own.SelfAttention
            q, k, v = _together(own.layer_norm(hidden), attention.q, attention.k, attention.v)
            keys, values = past.write(index, self._heads(k), self._heads(v))
            q, bias = self._heads(q).to(keys.dtype), bias.to(keys.dtype)
            attended = F.scaled_dot_product_attention(q, keys, values, bias, scale=1.0)
            hidden = hidden + attention.o(attended.transpose(1, 2).flatten(2).to(hidden.dtype))

            attention = cross.EncDecAttention
            q = attention.q(cross.layer_norm(hidden))  # (N, 1, inner); copies of an image are its queries
            q = self._heads(q.view(-1, self.copies, q.shape[-1]))
            attended = F.scaled_dot_product_attention(q, *self.cross[index], self.mask, scale=1.0)
            hidden = hidden + attention.o(attended.transpose(1, 2).flatten(2).view(len(hidden), 1, -1))
            hidden = wide(hidden)
        past.length += 1
        hidden = model.decoder.final_layer_norm(hidden[:, -1])
        if model.config.scale_decoder_outputs:
            hidden = hidden * model.model_dim**-0.5
        self.logits = model.lm_head(hidden).float()

    def repeat(self, copies: int) -> None:
        """See `Decoder.repeat`; the encoder's output is not copied."""
        self.copies *= copies
        self.past.repeat(copies)
        self.logits = self.logits.repeat_interleave(copies, dim=0)

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        images = rows[:: self.copies] // self.copies
        self.past.keep(rows)
        self.cross = [(keys[images], values[images]) for keys, values in self.cross]
        self.mask = None if self.mask is None else self.mask[images]
        self.logits = self.logits[rows]

    def reorder(self, rows: Tensor) -> None:
        """See `Decoder.reorder`."""
        self.past.reorder(rows, 1)


def encode(encoder: nn.Module, embeds: Tensor, mask: Tensor) -> Tensor:
    """A language model's encoder; a CPU reads prompts of about one length together: padding costs it time.

    Args:
        encoder: of a language model, such as T5's.
        embeds: float (N, S, L).
        mask: int (N, S), 1 for real tokens.

    Returns:
        Its output, float (N, S, L); behind a prompt's end it means nothing.
    """
    lengths = mask.sum(1).tolist()
    padded_behind = bool((mask.diff(dim=1) <= 0).all())
    if embeds.device.type != "cpu" or min(lengths) == max(lengths) or not padded_behind:
        return encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    encoded = torch.zeros_like(embeds)
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    while rows:
        alike = [row for row in rows if lengths[row] <= ALIKE * lengths[rows[0]]]
        rows, longest = rows[len(alike) :], lengths[alike[-1]]
        output = encoder(inputs_embeds=embeds[alike, :longest], attention_mask=mask[alike, :longest])
        encoded[alike, :longest] = output.last_hidden_state
    return encoded


class LibraryDecoder(Decoder):
    """Any language model, by transformers' `forward`.

    Args:
        bridge: to the language model.
        state: what `forward` gets first.
        mask: int (N, S), 1 for real tokens.
        past: cache to go on from; it is changed.
    """

    def __init__(self, bridge: Bridge, state: dict[str, Any], mask: Tensor, past: Any):
        self.bridge, self.mask, self.past = bridge, mask, past
        self.encoded = state.pop("encoder_outputs", None)
        if self.encoded is None:
            state |= {"logits_to_keep": 1}
        self._forward(**state)

    def _forward(self, **state: Any) -> None:
        if self.encoded is None:
            start = self.past.get_seq_length()
            positions = self.bridge.positions(self.mask)
            state |= {name: part[:, start:] for name, part in positions.items()}
        else:
            state |= {"encoder_outputs": self.encoded}
        output = self.bridge.language_model(
            **state, attention_mask=self.mask, past_key_values=self.past, use_cache=True, return_dict=True
        )
        self.logits = output.logits[:, -1].float()

    def read(self, token: Tensor) -> None:
        """Read one more token of every row, int (N,)."""
        if self.encoded is None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
            self._forward(input_ids=token[:, None])
        else:
            self._forward(decoder_input_ids=token[:, None])

    def repeat(self, copies: int) -> None:
        """See `Decoder.repeat`."""
        self.past.batch_repeat_interleave(copies)
        self._map(lambda part: part.repeat_interleave(copies, dim=0))

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        self.past.batch_select_indices(rows)
        self._map(lambda part: part[rows])

    def reorder(self, rows: Tensor) -> None:
        """See `Decoder.reorder`."""
        self.past.reorder_cache(rows)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.logits, self.mask = change(self.logits), change(self.mask)
        if self.encoded is not None:
            self.encoded.last_hidden_state = change(self.encoded.last_hidden_state)


def _together(input: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What layers make of one input, by one product where `blip2.packed` has fused them."""
    first = layers[0]
    if isinstance(first, PackedLinear) and len(first.product.sizes) == len(layers):
        return first.product(input).split(first.product.sizes, dim=-1)
    return tuple(layer(input) for layer in layers)


def _has_hooks(model: nn.Module) -> bool:
    """Whether accelerate moves its weights or inputs, which only its own modules' calls see to."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())
