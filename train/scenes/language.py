"""Tiny OPT and Flan-T5 language models, pretrained on text alone and then frozen, as in BLIP-2.

    python -m train.scenes.language opt --out runs/scenes/opt
    python -m train.scenes.language t5 --out runs/scenes/t5

They are stock transformers models; only where they start is ours (`train.scenes.circuits`).
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
from train.scenes.circuits import LAID_T5, start_opt, start_t5
from train.scenes.documents import Document, describe, opt_document, t5_document, t5_question
from train.scenes.text import split
from train.scenes.world import sample

SLOW_SHARE, SLOW_FROM = 0.1, 0.12  # of the rate and of the steps, for parts that start laid out
Batch = dict[str, Tensor]


# ---------------------------------------------------------------- batches


def batches(
    make: Callable[[random.Random, float], Document], collate: Callable[[list[Document]], Batch],
    seed: int, first: int, steps: int, size: int, pool: int = 16,
) -> Iterator[Batch]:  # fmt: skip
    """Batches `first` to `steps`, of documents of similar length; the same for a seed wherever it starts."""
    for index in range(first // pool, math.ceil(steps / pool)):
        rng = random.Random(f"{seed}/{index}")
        documents = [make(rng, index * pool / steps) for _ in range(size * pool)]
        documents.sort(key=lambda document: (len(document[1]) > 6, len(document[0])))
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
    stream: Callable[[int], Iterator[Batch]],
    *,
    out: Path,
    steps: int,
    rate: float,
    every: int = 100,
    look: int = 60,
    slow: tuple[str, ...] = (),
) -> float:
    """Train, keeping a state in `out` that the next call resumes from; `save` deletes it.

    Returns the seconds it took, earlier calls included.

    Args:
        every: steps between two looks at the gate, each of which also saves the state.
        look: validation scenes of such a look.
        slow: beginnings of the names of parameters that rest at first and then learn slowly.
    """
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.pt"
    share = {"slow": SLOW_SHARE, "plain": 1.0, "decayed": 1.0}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in share}
    for name, parameter in model.named_parameters():
        plain = "embed" in name or parameter.ndim < 2
        groups["slow" if name.startswith(slow) else "plain" if plain else "decayed"].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": found, "share": share[kind], "weight_decay": 0.02 * (kind == "decayed")}
            for kind, found in groups.items()
            if found
        ],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    first, before = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"], state["seconds"]
    model.set_attn_implementation("eager")  # much faster here than the fused kernel
    started, running, tokens = time.monotonic(), 0.0, 0
    model.train()
    for step, batch in enumerate(stream(first), start=first):
        if step >= steps:
            break
        done = step / steps
        scale = min(1.0, (step + 1) / 200) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            resting = group["share"] < 1 and done < SLOW_FROM
            group["lr"] = 0.0 if resting else group["share"] * rate * scale
        with torch.autocast("cpu", torch.bfloat16):
            value = weighted_loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += value.item()
        tokens += batch["input_ids"].numel()
        if (step + 1) % every == 0 or step + 1 == steps:
            model.eval()
            figures = {name: round(figure, 3) for name, figure in gate(model, look).items()}
            model.train()
            seconds = time.monotonic() - started
            speed = f"{seconds:.0f} s {tokens / seconds:.0f} tokens/s"
            print(f"{step + 1} loss {running / every:.3f} {speed} {figures}", flush=True)
            running = 0.0
            temporary = state_file.with_suffix(".tmp")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["seconds"] = before + seconds
            torch.save(state, temporary)
            os.replace(temporary, state_file)
    model.eval()
    return before + time.monotonic() - started


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
    """Accuracy per kind of question: every token of the answer, and its end, must be the likeliest."""
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
    steps: int = 5600,
    seed: int = 0,
    size: int = 48,
    every: int = 100,
    scenes: int = 400,
    rate: float = 1.2e-3,
) -> dict:
    """Pretrain the OPT of the drawn world, 1.6 M parameters; model, tokenizer and figures end in `out`.

    Args:
        size: documents in a batch.
        every: steps between a look at the gate, which also saves the state.
        scenes: validation scenes of the final gate.
        rate: the highest learning rate.
    """
    torch.manual_seed(seed)
    vocab = text.vocabulary("opt")
    config = OPTConfig(
        vocab_size=len(vocab),
        hidden_size=160,
        word_embed_proj_dim=160,
        ffn_dim=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        max_position_embeddings=512,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=vocab["<pad>"],
        bos_token_id=vocab["</s>"],
        eos_token_id=vocab["\n"],
    )
    model = OPTForCausalLM(config)
    start_opt(model, seed)

    def make(rng: random.Random, done: float) -> Document:
        return opt_document(rng, most=2 if done < 0.08 else 4)

    def stream(first: int) -> Iterator[Batch]:
        return batches(make, collate_opt, seed, first, steps, size)

    seconds = fit(model, stream, out=Path(out), steps=steps, rate=rate, every=every, look=min(60, scenes))
    run = {"steps": steps, "seed": seed, "batch": size, "rate": rate, "seconds": round(seconds)}
    return save(model, "opt", Path(out), scenes, run)


def new_t5(seed: int) -> T5ForConditionalGeneration:
    """The Flan-T5 of the drawn world as it starts."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(text.vocabulary("t5")),
        d_model=192,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=13,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        scale_decoder_outputs=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # Flan-T5's head is its own. transformers 5 builds it tied whatever the config says, but keeps apart what
    # it finds apart in a checkpoint.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    start_t5(model, seed)
    return model


def train_t5(
    out: str | Path,
    steps: int = 10_000,
    seed: int = 0,
    size: int = 64,
    every: int = 100,
    scenes: int = 400,
    rate: float = 2e-3,
) -> dict:
    """Pretrain the Flan-T5 of the drawn world, 3.5 M parameters; arguments as of `train_opt`."""
    model = new_t5(seed)

    def make(rng: random.Random, done: float) -> Document:
        return t5_document(rng)

    def stream(first: int) -> Iterator[Batch]:
        return batches(make, collate_t5, seed, first, steps, size)

    look = min(60, scenes)
    seconds = fit(model, stream, out=Path(out), steps=steps, rate=rate, every=every, look=look, slow=LAID_T5)
    model.config.tie_word_embeddings = False  # as the released files say
    run = {"steps": steps, "seed": seed, "batch": size, "rate": rate, "seconds": round(seconds)}
    return save(model, "t5", Path(out), scenes, run)


def save(model: PreTrainedModel, family: str, out: Path, scenes: int, run: dict[str, float]) -> dict:
    """Write a folder that transformers loads, with the figures of the gate, and delete the training state."""
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **run,
        "validation": gate(model, scenes),
        "validation_unseen_wordings": gate(model, scenes, unseen=True),
    }
    model.save_pretrained(out)
    text.build_tokenizer(family).save_pretrained(out)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "state.pt").unlink(missing_ok=True)
    print(json.dumps(figures, indent=1))
    return figures


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
    train = {"opt": train_opt, "t5": train_t5}[given.family]
    steps = {} if given.steps is None else {"steps": given.steps}
    train(given.out or Path("runs/scenes") / given.family, seed=given.seed, **steps)
