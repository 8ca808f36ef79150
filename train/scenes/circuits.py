"""Where the tiny language models start: stock transformers models whose heads are laid out to look words up.

From a random start such small models stay on a plateau for millions of tokens: asked for the color of the
ring they name some color that is there, never the right one. Reading a question takes a chain of attention
heads (look back at the noun, find it in the description, take the word before it), and no link pays before
the others stand. So the start lays such a chain, roughly, and training does the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from train.scenes import text
from train.scenes.world import COLORS, SHAPES, SIZES


def _rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T.contiguous()


@torch.no_grad()
def start_opt(model: OPTForCausalLM, seed: int) -> None:
    """Lay the chain of heads that looks words up.

    Positions are sinusoids in the first D dimensions (D = width of a head), words live in the rest. Layer 0:
    heads that copy the word 1, 2, 3, 4 places back ("ring ? answer :" has the noun 3 back, its color 4).
    Layer 1: heads that look for the copied word in the text and take the word before it, and their kin.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = model.model.decoder
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    dim = width // heads
    words, positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
    words.normal_(0, 0.08, generator=generator)
    words[:, :dim] = 0
    words[model.config.pad_token_id] = 0
    frequency = 1.5 * 0.75 ** torch.arange(dim // 2)
    angle = torch.arange(len(positions))[:, None] * frequency
    positions.zero_()
    positions[:, :dim] = 0.22 * torch.cat([angle.cos(), angle.sin()], dim=1)
    for layer in decoder.layers:
        for linear in (layer.self_attn.out_proj, layer.fc2):
            linear.weight.mul_(1 / math.sqrt(2 * len(decoder.layers)))

    room = dim * 3 // 4  # of a head for words; the rest of it compares positions
    basis = _rows(width - dim, width - dim, generator)

    def space(index: int) -> Tensor:
        """The index-th of the spaces that words are read from, orthogonal to each other while they last."""
        matrix = torch.zeros(dim, width)
        rows = basis[index * room : (index + 1) * room]
        matrix[:room, dim:] = rows if len(rows) == room else _rows(room, width - dim, generator)
        return matrix

    def lay(layer: int, head: int, *, query: Tensor, key: Tensor, value: Tensor, write: Tensor) -> None:
        attention = decoder.layers[layer].self_attn
        rows = slice(head * dim, (head + 1) * dim)
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query, key
        attention.v_proj.weight[rows], attention.out_proj.weight[:, rows] = value, write

    def turn(back: int) -> Tensor:
        cos, sin = torch.diag((frequency * back).cos()), torch.diag((frequency * back).sin())
        return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)], 0)

    eye = torch.zeros(dim, width)
    eye[:, :dim] = torch.eye(dim)
    read = space(0)  # how every head reads words, so that what they compare is comparable
    copy: dict[int, Tensor] = {}  # by places back: how the copied word is read where it was taken to
    for head, back in enumerate((1, 2, 3, 4)):
        copy[back] = space(head + 1)
        lay(0, head, query=1.7 * turn(back) @ eye, key=1.7 * eye, value=read, write=0.2 * copy[back].T)
    # The question's own noun would match best, and in vain: slow waves keep a head from its surroundings.
    waves = torch.tensor([4, 6, 8, 10, 20, 22, 24, 26])[: dim - room] % dim
    near = torch.zeros(dim, width)
    near[room:, :dim] = torch.eye(dim)[waves]
    away = torch.zeros(dim, width)
    away[room:, :dim] = -turn(3)[waves]
    sharp, shy = 2.4, 2.0
    noun, color = (
        sharp * copy[3] + shy * away,
        sharp * copy[4] + shy * away,
    )  # of the question, from "answer :"
    here, before = sharp * read + shy * near, sharp * copy[1] + shy * near
    write = [0.2 * space(-9).T for _ in range(heads)]
    lay(1, 0, query=noun, key=here, value=copy[1], write=write[0])  # the color of the noun
    lay(1, 1, query=noun, key=here, value=copy[2], write=write[1])  # its size
    lay(
        1, 2, query=noun + sharp * copy[4], key=here + sharp * copy[1], value=read, write=write[2]
    )  # the pair
    lay(1, 3, query=color, key=before, value=read, write=write[3])  # the noun of a color
    lay(1, 4, query=sharp * read, key=sharp * copy[1], value=read, write=write[4])  # what followed before


# The parts of a T5 that hold the chain, to be trained later and slowly: its scores are not divided by the
# root of the width of a head, and at the common rate they lose what they match before the rest learns it.
LAID_T5 = (
    "shared.",
    "encoder.embed",
    "encoder.block.0.",
    "encoder.block.1.",
    "decoder.block.0.layer.1.EncDecAttention.q.",
    "decoder.block.0.layer.1.EncDecAttention.k.",
)


@torch.no_grad()
def start_t5(model: T5ForConditionalGeneration, seed: int) -> None:
    """Lay the same chain in an encoder-decoder, ending in the </s> that follows "ring ? short answer :".

    The relative bias serves all layers of the encoder, so some heads look at a fixed place in every layer and
    the others look for words, neither at themselves nor at the question's own noun. The decoder's first token
    reads what they brought to </s>; later ones find the encoder's token that follows the word just said.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width, dim, heads = config.d_model, config.d_kv, config.num_heads
    words = model.shared.weight.normal_(0, 1 / math.sqrt(width), generator=generator)
    room = dim // 2  # nine orthogonal spaces: to read words from, for four copies, for four findings
    basis = _rows(width, width, generator)
    spaces = 0.02 * torch.randn(9, dim, width, generator=generator)  # not zero: zeros would never learn
    for index, space in enumerate(spaces):
        space[:room] = basis[index * room : (index + 1) * room]
    read, found = spaces[0], spaces[5:]
    # What is looked up must not be taken for anything else: shapes and colors get codes of their own there,
    # sizes a mixture of them, plurals that of their shape, all other words next to nothing.
    vocab = text.vocabulary("t5")
    codes = 0.05 * torch.randn(len(words), room, generator=generator)
    for index, word in enumerate((*SHAPES, *COLORS)):
        codes[vocab[word]] = torch.eye(room)[index] if index < room else -torch.ones(room) / math.sqrt(room)
    for index, word in enumerate(SIZES):
        codes[vocab[word]] = (-1.0) ** (torch.arange(room) // (index + 1)) / math.sqrt(room)
    for shape in SHAPES:
        codes[vocab[text.plural(shape)]] = 0.9 * codes[vocab[shape]]
    words -= words @ basis[:room].T @ basis[:room]
    words.mul_(0.7).add_(0.7 * codes @ basis[:room])
    start, end = (words[token] / words[token].norm() for token in (config.pad_token_id, config.eos_token_id))
    words -= words @ torch.outer(end, end)  # nothing else looks like </s>, where the answer is collected
    words[config.eos_token_id] = 1.5 * end
    model.lm_head.weight.copy_(words)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            parameter.mul_(0.1)
    # Long words and long writes, as T5's own start has them: short ones would be overwritten in a few steps.
    long = math.sqrt(width)
    words *= long
    places = {0: -1, 1: -2, 2: -5, 3: -6}
    encoder, decoder = model.encoder.block, model.decoder.block
    first, second = encoder[0].layer[0].SelfAttention, encoder[1].layer[0].SelfAttention
    bias = first.relative_attention_bias.weight.zero_()  # row: places back, up to 7
    for head, place in places.items():
        bias[-place, head] = 10.0
    for head in range(len(places), heads):
        bias[0, head], bias[5, head], bias[6, head] = -4.0, -30.0, -30.0
    for block in encoder:
        block.layer[0].SelfAttention.q.weight[: len(places) * dim] *= 0.1

    def lay(
        attention: Any,
        head: int,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor,
        write: Tensor,
    ) -> None:
        rows = slice(head * dim, (head + 1) * dim)
        if query is not None and key is not None:
            attention.q.weight[rows], attention.k.weight[rows] = query, key
        attention.v.weight[rows], attention.o.weight[:, rows] = value, long * write

    copy = dict(zip(places.values(), spaces[1:5], strict=True))
    own = 0.7  # the length of a code; what a head writes is to be of length 1
    for head, place in places.items():
        lay(first, head, None, None, read, copy[place].T / (own * math.sqrt(width)))
    sharp, gain = 0.9, 0.2
    noun, color, here, before = sharp * copy[-5], sharp * copy[-6], sharp * read, sharp * own * copy[-1]
    lay(second, 4, noun, here, copy[-1], gain * found[0].T)  # the color of the noun
    lay(second, 5, noun, here, copy[-2], gain * found[1].T)  # its size
    pair, there = noun + color.roll(room, 0), here + before.roll(room, 0)
    lay(second, 6, pair, there, read, gain * found[2].T)  # both of them, or else itself
    # Against itself: how often there is the noun, and whether there is the pair.
    bias[0, 5], bias[0, 6] = 19.0, 26.0
    lay(second, 7, color, before, read, gain * found[3].T)  # the noun of the color
    cross = decoder[0].layer[1].EncDecAttention
    for head, code in enumerate(found):
        lay(cross, head, None, None, code, gain * read.T)
        cross.q.weight[head * dim], cross.k.weight[head * dim] = 0.7 * start, end
    for head in (4, 5):
        lay(cross, head, 1.2 * read, copy[-1], 2 * read, gain * read.T)  # what follows the word just said
