"""Tiny OPT and Flan-T5 language models, pretrained on text alone and then frozen, as in BLIP-2.

    python -m train.scenes.language opt --out runs/scenes/opt
    python -m train.scenes.language t5 --out runs/scenes/t5

They are stock transformers models; only where they start is ours (`start_opt`, `start_t5`). From a random start
such small models stay on a plateau for millions of tokens: asked for the color of the ring they name some color
that is there, never the right one. Reading a question takes a chain of attention heads (look back at the noun,
find it in the description, take the word before it), and no link pays before the others stand. So the start lays
such a chain, roughly, and training does the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from train.scenes import text
from train.scenes.documents import Document, describe, opt_document, t5_document, t5_question
from train.scenes.text import KINDS, split
from train.scenes.world import SHAPES, sample

Batch = dict[str, Tensor]


# ---------------------------------------------------------------- where the models start


def _rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T.contiguous()


@torch.no_grad()
def start_opt(model: OPTForCausalLM, seed: int) -> None:
    """Lay the chain of heads that looks words up.

    Positions are sinusoids in the first D dimensions (D = width of a head), words live in the rest. Layer 0: heads
    that copy the word 1, 2, 3, 4 places back ("ring ? answer :" has the noun 3 back, its color 4). Layer 1: heads
    that look for the copied word in the text and take the word before it, and their kin.
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
    # The question's own noun would match best, and in vain: a few slow waves keep a head from its surroundings.
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


@torch.no_grad()
def start_t5(model: T5ForConditionalGeneration, seed: int) -> None:
    """Lay the same chain in an encoder-decoder, ending in the </s> that follows "ring ? short answer :".

    The relative bias serves all layers of the encoder, so some heads look at a fixed place in every layer and the
    others look for words, neither at themselves nor at the question's own noun. The decoder's first token reads
    what they brought to </s>; later ones find the encoder's token that follows the word just said.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width, dim, heads = config.d_model, config.d_kv, config.num_heads
    words = model.shared.weight.normal_(0, 1 / math.sqrt(width), generator=generator)
    start, end = (words[index] / words[index].norm() for index in (config.pad_token_id, config.eos_token_id))
    vocab = text.vocabulary("t5")
    for shape in SHAPES:  # so that "rings" finds "ring"
        words[vocab[text.plural(shape)]] = (
            0.75 * words[vocab[shape]] + 0.66 * words[vocab[text.plural(shape)]]
        )
    words -= words @ torch.outer(end, end)  # nothing else looks like </s>, where the answer is collected
    words[config.eos_token_id] = 1.5 * end
    model.lm_head.weight.copy_(words)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            parameter.mul_(0.1)
    places = {0: -1, 1: -2, 2: -5, 3: -6}
    encoder, decoder = model.encoder.block, model.decoder.block
    bias = (
        encoder[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    )  # row: places back, up to 7
    for head, place in places.items():
        bias[-place, head] = 10.0
    for head in range(len(places), heads):
        bias[0, head], bias[5, head], bias[6, head] = -4.0, -30.0, -30.0
    for block in encoder:
        block.layer[0].SelfAttention.q.weight[: len(places) * dim] *= 0.1

    def lay(
        attention: nn.Module,
        head: int,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor,
        write: Tensor,
    ) -> None:
        rows = slice(head * dim, (head + 1) * dim)
        if query is not None and key is not None:
            attention.q.weight[rows], attention.k.weight[rows] = query, key
        attention.v.weight[rows], attention.o.weight[:, rows] = value, write

    room = dim // 2  # nine orthogonal spaces: to read words from, for four copies, for four findings
    basis = _rows(width, width, generator)
    spaces = 0.02 * torch.randn(9, dim, width, generator=generator)  # not zero: zeros would never learn
    for index, space in enumerate(spaces):
        space[:room] = basis[index * room : (index + 1) * room]
    read, found = spaces[0], spaces[5:]
    copy = dict(zip(places.values(), spaces[1:5], strict=True))
    gain = math.sqrt(1 / room)  # what a head writes is about as long as a word
    for head, place in places.items():
        lay(encoder[0].layer[0].SelfAttention, head, None, None, read, gain * copy[place].T)
    sharp, gain_read = 1.2, math.sqrt(room / width)
    # A copy is as long as the word; what is read of the word itself is shorter, by the share of the dimensions.
    noun, color, here, before = sharp * copy[-5], sharp * copy[-6], sharp * read, sharp * gain_read * copy[-1]
    attention = encoder[1].layer[0].SelfAttention
    lay(attention, 4, noun, here, copy[-1], gain * found[0].T)  # the color of the noun
    lay(attention, 5, noun, here, copy[-2], gain * found[1].T)  # its size
    pair, there = noun + color.roll(room, 0), here + before.roll(room, 0)
    lay(attention, 6, pair, there, read, gain * found[2].T)  # both of them, or else itself
    bias[0, 5], bias[0, 6] = (
        11.0,
        18.0,
    )  # against itself: how often there is the noun, whether there is the pair
    lay(attention, 7, color, before, read, gain * found[3].T)  # the noun of the color
    cross = decoder[0].layer[1].EncDecAttention
    for head, code in enumerate(found):
        lay(cross, head, None, None, code, gain * read.T)
        cross.q.weight[head * dim], cross.k.weight[head * dim] = 0.7 * start, end
    for head in (4, 5):
        lay(cross, head, 1.2 * read, copy[-1], 2 * read, gain * read.T)  # what follows the word just said


# ---------------------------------------------------------------- batches


def batches(
    make: Callable[[random.Random, float], Document], collate: Callable[[list[Document]], Batch],
    seed: int, first: int, steps: int, size: int, pool: int = 16,
) -> Iterator[Batch]:  # fmt: skip
    """Batches `first` to `steps`, of documents of similar length; the same for a seed wherever it starts."""
    for index in range(first // pool, math.ceil(steps / pool)):
        rng = random.Random(f"{seed}/{index}")
        documents = sorted(
            (make(rng, index * pool / steps) for _ in range(size * pool)), key=lambda d: len(d[0])
        )
        groups = [documents[start : start + size] for start in range(0, len(documents), size)]
        rng.shuffle(groups)
        for group in groups[first - index * pool if index == first // pool else 0 :]:
            yield collate(group)


def _longest(documents: list[Document]) -> int:
    """The longest length, in eights: each new shape costs the CPU library memory and time."""
    return math.ceil(max(len(words) for words, _, _ in documents) / 8) * 8


def collate_opt(documents: list[Document]) -> Batch:
    """Right-padded ids, targets (-100 where none) and weights."""
    vocab = text.vocabulary("opt")
    ids = torch.full((len(documents), _longest(documents)), vocab["<pad>"])
    targets, weights = torch.full_like(ids, -100), torch.zeros(ids.shape)
    for row, (words, wanted, weight) in enumerate(documents):
        ids[row, : len(words)] = torch.tensor([vocab[word] for word in words])
        targets[row, : len(words)] = torch.tensor([vocab[word] if word else -100 for word in wanted])
        weights[row, : len(words)] = torch.tensor(weight)
    return {
        "input_ids": ids,
        "attention_mask": (ids != vocab["<pad>"]).long(),
        "targets": targets,
        "weights": weights,
    }


def collate_t5(documents: list[Document]) -> Batch:
    """Right-padded encoder ids, and labels (-100 where none) with their weights."""
    vocab = text.vocabulary("t5")
    ids = torch.zeros(len(documents), _longest(documents), dtype=torch.long)
    targets = torch.full((len(documents), max(len(answer) for _, answer, _ in documents)), -100)
    weights = torch.zeros(targets.shape)
    for row, (words, answer, weight) in enumerate(documents):
        ids[row, : len(words)] = torch.tensor([vocab[word] for word in words])
        targets[row, : len(answer)] = torch.tensor([vocab[word] for word in answer])
        weights[row, : len(answer)] = torch.tensor(weight)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "targets": targets, "weights": weights}


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of every target, (B, T, words)."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = F.pad(batch["targets"].clamp(min=0), (1, -1))
    return model(**inputs, use_cache=False).logits


def weighted_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Weighted cross-entropy over the targets."""
    logits = logits_of(model, batch)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), batch["targets"].flatten(), reduction="none", ignore_index=-100
    )
    weights = batch["weights"].flatten() * (batch["targets"].flatten() >= 0)
    return (losses * weights).sum() / weights.sum()


# ---------------------------------------------------------------- training


def fit(
    model: PreTrainedModel,
    loss: Callable[[nn.Module, Batch], Tensor],
    stream: Callable[[int], Iterator[Batch]],
    *,
    out: Path,
    steps: int,
    rate: float,
    evaluate: Callable[[], dict[str, float]],
    every: int = 250,
) -> None:
    """Train, keeping a state in `out` that the next call resumes from; it is deleted at the end by the caller."""
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.pt"
    decayed = [
        p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "shared" not in n
    ]
    rest = [p for p in model.parameters() if all(p is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.set_attn_implementation(
        "eager"
    )  # at this size and length much faster on a CPU than the fused kernel
    started, running, tokens = time.monotonic(), 0.0, 0
    model.train()
    for step, batch in enumerate(stream(first), start=first):
        if step >= steps:
            break
        warm, done = min(1.0, (step + 1) / 200), step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += value.item()
        tokens += batch["input_ids"].numel()
        if (step + 1) % every == 0 or step + 1 == steps:
            model.eval()
            figures = {name: round(figure, 3) for name, figure in evaluate().items()}
            model.train()
            seconds = time.monotonic() - started
            print(
                f"{step + 1} loss {running / every:.3f} {seconds:.0f} s {tokens / seconds:.0f} tok/s {figures}",
                flush=True,
            )
            running = 0.0
            temporary = state_file.with_suffix(".tmp")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, temporary)
            os.replace(temporary, state_file)
    model.eval()


# ---------------------------------------------------------------- the gate: questions on text


def gate_examples(
    count: int, unseen: bool, split_name: str = "validation"
) -> list[tuple[str, str, str, str, int]]:
    """(description, question, answer, kind, number of things) of held-out scenes, all facts described."""
    examples = []
    for seed in range(count):
        scene, rng = sample(seed, split_name), random.Random(seed)
        about = describe(scene, rng, full=True)
        for asked, answer, kind in text.questions(scene, rng, unseen=unseen):
            examples.append((about.words, asked, answer, kind, len(scene.things)))
    return examples


@torch.no_grad()
def gate(model: PreTrainedModel, count: int = 200, unseen: bool = False) -> dict[str, float]:
    """Exact-match accuracy per kind of question. Every token of the answer and its end must be the likeliest."""
    examples = gate_examples(count, unseen)
    encodes = model.config.is_encoder_decoder
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(examples), 128):
        documents, chosen = [], examples[start : start + 128]
        for described, asked, said, _, _ in chosen:
            answer = [*split(said), "</s>" if encodes else "\n"]
            if encodes:
                documents.append(
                    ([*split(described), *t5_question(asked, ()), "</s>"], answer, [1.0] * len(answer))
                )
                continue
            words = [*split(described), "</s>", "question", ":", *split(asked), "answer", ":", *answer]
            weights = [0.0] * (len(words) - len(answer) - 1) + [1.0] * len(answer) + [0.0]
            documents.append((words, [*words[1:], ""], weights))
        batch = collate_t5(documents) if encodes else collate_opt(documents)
        right = (logits_of(model, batch).argmax(-1) == batch["targets"]) | (batch["weights"] == 0)
        for hit, (*_, kind, things) in zip(right.all(1).tolist(), chosen, strict=True):
            hits.setdefault(kind, []).append(hit)
            if kind == "color":
                hits.setdefault(f"color of {things}", []).append(hit)
    return {name: sum(found) / len(found) for name, found in sorted(hits.items())}


def train_opt(
    out: str | Path,
    steps: int = 3000,
    seed: int = 0,
    size: int = 32,
    every: int = 100,
    scenes: int = 400,
    rate: float = 1.2e-3,
) -> dict:
    """Pretrain the OPT of the drawn world and save model, tokenizer and figures in `out`."""
    out = Path(out)
    torch.manual_seed(seed)
    tokenizer = text.build_tokenizer("opt")
    vocab = text.vocabulary("opt")
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(vocab),
            hidden_size=160,
            word_embed_proj_dim=160,
            ffn_dim=640,
            num_hidden_layers=4,
            num_attention_heads=5,
            max_position_embeddings=512,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=vocab["<pad>"],
            bos_token_id=vocab["</s>"],
            eos_token_id=vocab["\n"],
        )  # fmt: skip
    )
    start_opt(model, seed)

    def make(rng: random.Random, done: float) -> Document:
        return opt_document(rng, most=2 if done < 0.08 else 4)

    started = time.monotonic()
    fit(
        model, weighted_loss, lambda first: batches(make, collate_opt, seed, first, steps, size),
        out=out, steps=steps, rate=rate, evaluate=lambda: gate(model, 60), every=every,
    )  # fmt: skip
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seed": seed, "batch": size,
        "seconds_since_start_or_resume": round(time.monotonic() - started),
        "validation": gate(model, scenes), "validation_unseen_wordings": gate(model, scenes, unseen=True),
    }  # fmt: skip
    save(model, tokenizer, figures, out)
    return figures


def train_t5(
    out: str | Path,
    steps: int = 6000,
    seed: int = 0,
    size: int = 64,
    every: int = 250,
    scenes: int = 400,
    rate: float = 2e-3,
) -> dict:
    """Pretrain the Flan-T5 of the drawn world and save model, tokenizer and figures in `out`."""
    out = Path(out)
    torch.manual_seed(seed)
    vocab = text.vocabulary("t5")
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(vocab),
            d_model=160,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=8,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            dense_act_fn="gelu",
            tie_word_embeddings=False,
            scale_decoder_outputs=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=0,
        )  # fmt: skip
    )
    start_t5(model, seed)

    def make(rng: random.Random, done: float) -> Document:
        return t5_document(rng, most=2 if done < 0.08 else 4)

    started = time.monotonic()
    fit(
        model, weighted_loss, lambda first: batches(make, collate_t5, seed, first, steps, size),
        out=out, steps=steps, rate=rate, evaluate=lambda: gate(model, 60), every=every,
    )  # fmt: skip
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seed": seed, "batch": size,
        "seconds_since_start_or_resume": round(time.monotonic() - started),
        "validation": gate(model, scenes), "validation_unseen_wordings": gate(model, scenes, unseen=True),
    }  # fmt: skip
    save(model, text.build_tokenizer("t5"), figures, out)
    return figures


def save(model: PreTrainedModel, tokenizer: object, figures: dict, out: Path) -> None:
    """Write one folder that transformers loads, and delete the training state."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)  # type: ignore[attr-defined]
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "state.pt").unlink(missing_ok=True)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("opt", "t5"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.out or Path("runs/scenes") / given.family
    if given.family == "opt":
        train_opt(folder, given.steps or 3000, given.seed)
    else:
        train_t5(folder, given.steps or 6000, given.seed)
