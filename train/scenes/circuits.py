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
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from train.scenes import text
from train.scenes.world import COLORS, RELATIONS, SHAPES, SIZES


def _rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T.contiguous()


@torch.no_grad()
def start_opt(model: OPTForCausalLM, seed: int) -> None:
    """Lay the chain of heads that looks words up.

    Positions are sinusoids in the first D dimensions (D = width of a head), words live in the rest. Layer 0:
    heads that copy the word 1 to 5 places back ("ring ? answer :" has the noun 3 back, its color 4).
    Layer 1: heads that look for the copied word in the text and take the word before it, and their kin.
    Layer 2: from the noun that ends "left of the blue star", heads that look for a text that ends so, or
    begins with the star and turns the place around, and take the other thing. Layer 3: heads that bring it to
    ":".
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
    for head, back in enumerate((1, 2, 3, 4, 5)):
        copy[back] = space(head + 1)
        lay(0, head, query=1.7 * turn(back) @ eye, key=1.7 * eye, value=read, write=0.2 * copy[back].T)
    # The question's own noun would match best, and in vain: slow waves keep a head from its surroundings.
    waves = torch.tensor([4, 6, 8, 10, 20, 22, 24, 26])[: dim - room] % dim
    near, away, apart = (torch.zeros(dim, width) for _ in range(3))
    near[room:, :dim] = torch.eye(dim)[waves]
    away[room:, :dim] = -turn(3)[waves]
    apart[room:, :dim] = -torch.eye(dim)[waves]
    sharp, shy = 2.4, 2.0
    noun = sharp * copy[3] + shy * away  # of the question, from "answer :"
    color = sharp * copy[4] + shy * away
    here, before = sharp * read + shy * near, sharp * copy[1] + shy * near
    write = [0.2 * space(-9).T for _ in range(heads)]
    lay(1, 0, query=noun, key=here, value=copy[1], write=write[0])  # the color of the noun
    lay(1, 1, query=noun, key=here, value=copy[2], write=write[1])  # its size
    lay(
        1, 2, query=noun + sharp * copy[4], key=here + sharp * copy[1], value=read, write=write[2]
    )  # the pair
    lay(1, 3, query=color, key=before, value=read, write=write[3])  # the noun of a color

    # What is compared together needs codes that do not mix: a rotation for each place back.
    spin = {back: _rotation(dim, room, generator) for back in (1, 3, 4)}
    vocab = text.vocabulary("opt")
    places = torch.stack([words[vocab[place]] for place in RELATIONS]) @ read[:room].T
    turned = torch.stack([words[vocab[text.INVERSE[place]]] for place in RELATIONS]) @ read[:room].T
    inverse = torch.zeros(dim, dim)
    inverse[:room, :room] = turned.T @ torch.linalg.pinv(places).T
    ends = read + spin[1] @ copy[1]  # "blue star", at the star
    wanted = sharp * (ends + spin[3] @ copy[3])
    lay(2, 0, query=wanted + shy * apart, key=wanted + shy * near, value=copy[4], write=0.2 * space(-9).T)
    lay(2, 1, query=wanted + shy * apart, key=wanted + shy * near, value=copy[5], write=0.2 * space(-9).T)
    begins = copy[4] + spin[1] @ copy[5]  # the same before the place, at the end of the other thing
    swapped = sharp * (ends + spin[3] @ inverse @ copy[3]) + shy * apart
    there = sharp * (begins + spin[3] @ copy[3]) + shy * near
    lay(2, 2, query=swapped, key=there, value=read, write=0.2 * space(-9).T)
    lay(2, 3, query=swapped, key=there, value=copy[1], write=0.2 * space(-9).T)
    # Both things asked about, whatever the place: what place is stated of them, either way round?
    both, turned_round = ends + spin[4] @ begins, begins + spin[4] @ ends
    named = sharp * both + shy * near
    lay(
        2,
        4,
        query=sharp * both + shy * apart,
        key=named,
        value=copy[3] + spin[4] @ copy[4],
        write=0.2 * space(-9).T,
    )
    named = sharp * turned_round + shy * near
    lay(
        1,
        4,
        query=sharp * both + shy * apart,
        key=named,
        value=inverse @ copy[3] + spin[4] @ read,
        write=write[4],
    )
    lay(3, 4, query=1.7 * turn(3) @ eye, key=1.7 * eye, value=space(-9), write=0.2 * space(-9).T)
    for head, back in enumerate((3, 3, 4, 4)):
        found = torch.cat([decoder.layers[2].self_attn.out_proj.weight[:, rows * dim : rows * dim + room].T
                           for rows in ((0, 2), (1, 3))[head % 2]])  # fmt: skip
        value = torch.zeros(dim, width)
        value[:room] = (found[:room] + found[room:]) / 0.2
        lay(3, head, query=1.7 * turn(back) @ eye, key=1.7 * eye, value=value, write=0.2 * space(-9).T)


def _rotation(dim: int, room: int, generator: torch.Generator) -> Tensor:
    """A random rotation of the first `room` of `dim` coordinates; the others vanish."""
    matrix = torch.zeros(dim, dim)
    matrix[:room, :room] = _rows(room, room, generator)
    return matrix


# The parts of a T5 that hold the chain, to be trained later and slowly: its scores are not divided by the
# root of the width of a head, and at the common rate they lose what they match before the rest learns it.
LAID_T5 = (
    "shared.",
    "encoder.embed",
    "encoder.block.0.",
    "encoder.block.1.",
    "encoder.block.2.layer.0.",
    "encoder.block.3.layer.0.",
    "decoder.block.0.layer.0.",
    "decoder.block.0.layer.1.EncDecAttention.q.",
    "decoder.block.0.layer.1.EncDecAttention.k.",
)


@torch.no_grad()
def start_t5(model: T5ForConditionalGeneration, seed: int) -> None:
    """Lay the same chain in an encoder-decoder, ending in the </s> that follows "ring ? short answer :".

    The relative bias serves all layers of the encoder, so some heads look at a fixed place in every layer and
    the others look for words, neither at themselves nor at the question's own noun. Block 0 copies the words
    around, block 1 looks the question's noun up from </s>, block 2 looks "left of the blue star" up from the
    star, block 3 brings that to </s>. The decoder's first token reads what is collected there; later ones
    find the encoder's token that follows the words just said.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width, dim, heads = config.d_model, config.d_kv, config.num_heads
    words = model.shared.weight.normal_(0, 1 / math.sqrt(width), generator=generator)
    room = dim // 2
    places = dict(enumerate((-1, -2, -3, -4, -5, -6, -5)))
    # Orthogonal spaces: to read words from, for the copies, for four findings; one more for related things.
    basis = _rows(width, width, generator)
    spaces = 0.02 * torch.randn(12, dim, width, generator=generator)  # not zero: zeros would never learn
    for index, space in enumerate(spaces):
        space[:room] = basis[index * room : (index + 1) * room]
    read, found, related = spaces[0], spaces[7:11], spaces[11].clone()
    related[room:] = _rows(room, width, generator)  # the noun in one half, its color in the other
    # What is looked up must not be taken for anything else: shapes and colors get codes of their own there,
    # sizes and places a mixture of them, plurals that of their shape, all other words next to nothing.
    vocab = text.vocabulary("t5")
    codes = 0.05 * torch.randn(len(words), room, generator=generator)
    for index, word in enumerate((*SHAPES, *COLORS)):
        codes[vocab[word]] = torch.eye(room)[index] if index < room else -torch.ones(room) / math.sqrt(room)
    for index, word in enumerate((*SIZES, *RELATIONS)):
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
    encoder, decoder = model.encoder.block, model.decoder.block
    first, second, third, fourth = (encoder[index].layer[0].SelfAttention for index in range(4))
    bias = first.relative_attention_bias.weight.zero_()  # row: places back, up to 7
    for head, place in places.items():
        bias[-place, head] = 10.0
    hue, large, pair, thing, straight, around = range(len(places), heads)  # the heads that look for words
    for head in range(len(places), heads):
        bias[0, head], bias[5, head], bias[6, head] = -30.0, -30.0, -30.0
    forward = config.relative_attention_num_buckets // 2
    bias[forward + 4, thing], bias[forward + 4, around] = -30.0, -30.0  # ":" has the question's noun 4 back
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

    copy = dict(zip(dict.fromkeys(places.values()), spaces[1:7], strict=True))
    own = 0.7  # the length of a code; what a head writes is to be of length 1
    for head, place in list(places.items())[:6]:
        lay(first, head, None, None, read, copy[place].T / (own * math.sqrt(width)))
    sharp, gain = 0.9, 0.2
    noun, color, here, before = sharp * copy[-5], sharp * copy[-6], sharp * read, sharp * own * copy[-1]
    lay(second, hue, noun, here, copy[-1], gain * found[0].T)  # the color of the noun
    lay(second, large, noun, here, copy[-2], gain * found[1].T)  # its size
    asked, there = noun + color.roll(room, 0), here + before.roll(room, 0)
    lay(second, pair, asked, there, read, gain * found[2].T)  # both of them, or else itself
    # Against itself: how often there is the noun, and whether there is the pair.
    bias[0, large], bias[0, pair] = 19.0, 26.0
    lay(second, thing, color, before, read, gain * found[3].T)  # the noun of the color

    spin = {place: _rotation(dim, room, generator) for place in (-1, -3)}
    stated = torch.stack([codes[vocab[place]] for place in RELATIONS])
    turned = torch.stack([codes[vocab[text.INVERSE[place]]] for place in RELATIONS])
    inverse = torch.zeros(dim, dim)
    inverse[:room, :room] = turned.T @ torch.linalg.pinv(stated).T
    ends = own * (spin[-1] @ copy[-1] + spin[-3] @ copy[-3]) + read  # "left of the blue star", at the star
    begins = own * (copy[-4] + spin[-1] @ copy[-5] + spin[-3] @ copy[-3])  # at the end of the other thing
    swapped = own * (spin[-1] @ copy[-1] + spin[-3] @ inverse @ copy[-3]) + read
    lay(third, hue, sharp * ends, sharp * ends, copy[-4] + copy[-5].roll(room, 0), gain * related.T)
    other = read / own + copy[-1].roll(room, 0)
    lay(third, thing, sharp * swapped, sharp * begins, other, gain * related.T)
    # Both things asked about, whatever the place: what place is stated of them, either way round?
    second_thing, first_thing = read + own * spin[-1] @ copy[-1], own * (copy[-4] + spin[-1] @ copy[-5])
    both = sharp * (second_thing + first_thing.roll(room, 0))
    turned_round = sharp * (first_thing + second_thing.roll(room, 0))
    free = [_rows(dim, width, generator) for _ in range(4)]
    found_place = copy[-3] + copy[-4].roll(room, 0)
    lay(third, straight, both, both, found_place, gain * free[0].T)
    found_place = inverse @ copy[-3] + read.roll(room, 0) / own
    lay(third, around, both, turned_round, found_place, gain * free[1].T)
    lay(fourth, 4, None, None, related, gain * related.T)
    lay(fourth, 6, None, None, free[2], gain * free[3].T)
    cross = decoder[0].layer[1].EncDecAttention
    for head, code in enumerate((*found, related, related.roll(room, 0))):
        lay(cross, head, None, None, code, gain * read.T)
        cross.q.weight[head * dim], cross.k.weight[head * dim] = 0.7 * start, end
    lay(cross, 6, 1.2 * read, copy[-1], 2 * read, gain * read.T)  # what follows the word just said
    # ... and the four before it: in "a small red star, a small blue" no fewer tell which thing is next.
    looking_back = decoder[0].layer[0].SelfAttention
    bias = looking_back.relative_attention_bias.weight
    for block in decoder:
        block.layer[0].SelfAttention.q.weight[: 4 * dim] *= 0.1
    for head, place in enumerate((-1, -2, -3, -4)):
        bias[:, head] = 0
        bias[-place, head] = 10.0
        lay(looking_back, head, None, None, read, copy[place].T / (own * math.sqrt(width)))
    for head in (7, 8):
        turn = [F.pad(_rows(room, dim, generator).T, (0, dim - room)) for _ in range(5)]
        said = turn[0] @ read + own * sum(turn[back] @ copy[-back] for back in range(1, 5))
        there = sum(turn[back] @ copy[-back - 1] for back in range(5))
        lay(cross, head, 1.2 * said, there, 2 * read, gain * read.T)
