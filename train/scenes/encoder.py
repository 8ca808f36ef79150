"""Pretrain the drawn world's image encoder: every patch says what thing it belongs to, without any language.

The released BLIP-2 models start from an encoder pretrained on hundreds of millions of images; this one starts
from dense labels that the scenes come with. The heads are thrown away; in the end a run's folder holds

    model.safetensors   weights of `blip2.vision.VisionTransformer`, fp16
    config.json         its `transformers.Blip2VisionConfig`
    figures.json        validation figures along the way and at the end
    state.pt            optimizer and heads; a rerun goes on from here, exactly as if it had not stopped
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Blip2VisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from blip2.vision import VisionTransformer
from train.scenes.world import (
    COLORS,
    HELD_OUT,
    MAX_THINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    Thing,
    labels,
    relation,
    render,
    sample,
)

IMAGE_SIZE, PATCH_SIZE = 64, 8
CLASSES = {
    "shape": SHAPES,
    "color": COLORS,
    "size": SIZES,
    "style": STYLES,
}  # of a patch; class 0 is "nothing"
WEIGHTS = {"shape": 1.0, "color": 0.5, "size": 0.5, "style": 0.25}
NOTHING_WEIGHT = 0.3  # three patches of four show nothing
NOWHERE_WEIGHT = 0.1  # most names are those of no other thing
RECOLORED = 0.35  # share of training pictures whose color channels are exchanged
OFFSET_SCALE = 0.1  # offsets are predicted in tenths of the picture


def encoder_config() -> Blip2VisionConfig:
    """A plain ViT that transformers loads too: 5 layers of width 192, 64 patches of 8x8 pixels."""
    return Blip2VisionConfig(
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=768,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
        hidden_act="gelu",
        qkv_bias=True,
    )


def normalize(
    pixels: Tensor, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
) -> Tensor:
    """uint8 (B, S, S, 3) -> float pixel_values (B, 3, S, S), by default with BLIP-2's mean and deviation."""
    return ((pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).contiguous()


def load_encoder(folder: Path) -> VisionTransformer:
    """The pretrained encoder of a run folder, in float32."""
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} holds no finished encoder; run `python -m train.scenes encoder` first")
    model = VisionTransformer(Blip2VisionConfig.from_json_file(folder / "config.json"))
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return model.eval()


def batch(seeds: range, split: str) -> dict[str, Tensor]:
    """Pictures and targets of some scenes.

    `pixels` uint8 (B, S, S, 3); `thing`, `shape`, `color`, `size`, `style` long (B, P) and `offset` float
    (B, P, 2) as in `world.labels`; `around` long (B, P, shapes + colors), of `neighbors`, for patches that
    show a thing, or else -100; `has` float (B, shapes + colors), which occur; `count` long (B,), number of
    things - 1; `held_out` bool (B, P), patches of a color and shape never together in training.
    """
    rows: list[dict[str, np.ndarray]] = []
    for seed in seeds:
        scene = sample(seed, split)
        row = labels(scene, IMAGE_SIZE, PATCH_SIZE)
        styles = [0, *(1 + STYLES.index(thing.style) for thing in scene.things)]
        held_out = [False, *((thing.color, thing.shape) in HELD_OUT for thing in scene.things)]
        shapes, colors = {t.shape for t in scene.things}, {t.color for t in scene.things}
        row["pixels"] = render(scene, IMAGE_SIZE)
        row["style"] = np.array(styles)[row["thing"] + 1]
        row["held_out"] = np.array(held_out)[row["thing"] + 1]
        found = [neighbors(thing, scene.things) for thing in scene.things]
        around = [[-100] * (len(SHAPES) + len(COLORS)), *found]
        row["around"] = np.array(around)[row["thing"] + 1]
        row["has"] = np.array([s in shapes for s in SHAPES] + [c in colors for c in COLORS], np.float32)
        row["count"] = np.array(len(scene.things) - 1)
        rows.append(row)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def neighbors(thing: Thing, things: Sequence[Thing]) -> list[int]:
    """Where the thing is, seen from others, by their shape and then by their color: 1 + index in RELATIONS.

    0: there is no such other, or it is not clear; -100: there are several, and they do not agree.
    """
    found = []
    for name in (*SHAPES, *COLORS):
        named = [other for other in things if other is not thing and name in (other.shape, other.color)]
        seen = {relation(thing, other) for other in named}
        where = seen.pop() if len(seen) == 1 else None
        found.append(-100 if seen else 1 + RELATIONS.index(where) if where else 0)
    return found


def recolor(target: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Exchange the color channels of some pictures, and ask for no color there.

    Without it the encoder learns that what is blue is no heart (no training scene shows one), and shape is
    read wrongly in HELD_OUT pairs. Colors to be ignored become -100 in `color` and `around`, NaN in `has`.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = ("pixels", "color", "around", "has")
    target = {name: t.clone() if name in changed else t for name, t in target.items()}
    rows = torch.randperm(len(target["pixels"]), generator=generator)
    for row in rows[: int(RECOLORED * len(rows))].tolist():
        order = torch.randperm(3, generator=generator)
        target["pixels"][row] = target["pixels"][row][..., order]
        target["color"][row] = -100
        target["around"][row, :, len(SHAPES) :] = -100
        target["has"][row, len(SHAPES) :] = torch.nan
    return target


class PatchLabeler(nn.Module):
    """The encoder with heads that are thrown away: linear, so that what they read lies open in the tokens."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        self.vision_model = VisionTransformer(config)
        grid = self.vision_model.embeddings.position_embedding
        with torch.no_grad():  # neighbors start out similar; learning that from noise takes long
            grid[:, 1:] = 0.5 * sine_positions(IMAGE_SIZE // PATCH_SIZE, config.hidden_size)
        width = config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1 + len(CLASSES[name])) for name in CLASSES})
        self.offset = nn.Linear(width, 2)
        self.around = nn.Linear(width, (len(SHAPES) + len(COLORS)) * (1 + len(RELATIONS)))
        self.has = nn.Linear(width, len(SHAPES) + len(COLORS))
        self.count = nn.Linear(width, MAX_THINGS)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values (B, 3, S, S) -> logits (B, P, classes) by name, `around`, `offset`, `has`, `count`."""
        tokens = self.vision_model(pixel_values)
        whole, patches = tokens[:, 0], tokens[:, 1:]
        out = {name: head(patches).float() for name, head in self.heads.items()}
        out["around"] = self.around(patches).float().unflatten(-1, (-1, 1 + len(RELATIONS)))
        out["offset"] = OFFSET_SCALE * self.offset(patches).float()
        out["has"], out["count"] = self.has(whole).float(), self.count(whole).float()
        return out


def sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column: float (side^2, width)."""
    wave = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * wave
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def loss_of(out: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """The sum of all objectives: patch classes, what is where around a thing, its center, what there is."""
    asked = ~target["has"].isnan()
    loss = F.binary_cross_entropy_with_logits(out["has"][asked], target["has"][asked])
    loss = loss + 0.25 * F.cross_entropy(out["count"], target["count"])
    for name, values in CLASSES.items():
        weight = torch.tensor([NOTHING_WEIGHT] + [1.0] * len(values))
        loss = loss + WEIGHTS[name] * F.cross_entropy(out[name].flatten(0, 1), target[name].flatten(), weight)
    nowhere = torch.tensor([NOWHERE_WEIGHT] + [1.0] * len(RELATIONS))
    loss = loss + F.cross_entropy(out["around"].flatten(0, 2), target["around"].flatten(), nowhere)
    shown = target["thing"] >= 0
    miss = (out["offset"] - target["offset"])[shown] / OFFSET_SCALE
    return loss + 0.5 * F.smooth_l1_loss(miss, torch.zeros_like(miss))


@torch.no_grad()
def evaluate(model: PatchLabeler, data: dict[str, Tensor]) -> dict[str, float]:
    """Shares of right answers.

    `shape`, `color`, `size`, `style`: of the patches that show a thing; `patch_shape`: of all patches;
    `things`: of whole things, whose patches vote, the share with shape, color and size all right, and
    `things_held_out` that of the color-shape pairs never trained on; `around`: of the relations to others
    that patches are asked for; `offset_pixels`: mean distance by which the center is missed; `has`, `count`:
    of the class token's answers.
    """
    model.eval()
    parts = [forward(model, part) for part in data["pixels"].split(250)]
    out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    model.train()
    shown = data["thing"] >= 0
    right = {name: out[name].argmax(-1) == data[name] for name in CLASSES}
    figures = {name: right[name][shown].float().mean().item() for name in CLASSES}
    figures["patch_shape"] = right["shape"].float().mean().item()
    image = torch.arange(len(shown))[:, None] * MAX_THINGS
    index = (image + data["thing"])[shown]  # (N,) which thing a patch belongs to
    good = torch.ones(len(shown) * MAX_THINGS, dtype=torch.bool)
    for name in ("shape", "color", "size"):
        logits = out[name][shown].log_softmax(-1)
        votes = torch.zeros(len(good), logits.shape[-1]).index_add_(0, index, logits)
        truth = torch.zeros(len(good), dtype=torch.long).index_copy_(0, index, data[name][shown])
        good &= votes[:, 1:].argmax(-1) + 1 == truth
    held_out = index[data["held_out"][shown]].unique()
    figures["things"] = good[index.unique()].float().mean().item()
    if len(held_out):
        figures["things_held_out"] = good[held_out].float().mean().item()
    related = data["around"] > 0
    figures["around"] = (out["around"].argmax(-1) == data["around"])[related].float().mean().item()
    figures["offset_pixels"] = (out["offset"] - data["offset"])[shown].norm(dim=-1).mean().item() * IMAGE_SIZE
    figures["has"] = ((out["has"] > 0) == (data["has"] > 0)).float().mean().item()
    figures["count"] = (out["count"].argmax(-1) == data["count"]).float().mean().item()
    return {name: round(value, 4) for name, value in figures.items()}


def forward(model: PatchLabeler, pixels: Tensor) -> dict[str, Tensor]:
    """The model in bfloat16; plain attention is the fastest on a CPU for 65 tokens."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return model(normalize(pixels))


def pretrain_encoder(
    out: Path,
    steps: int = 4000,
    seed: int = 0,
    batch_size: int = 64,
    peak_rate: float = 1.5e-3,
    warmup: int = 150,
    validation_scenes: int = 500,
    final_scenes: int = 2000,
    evaluate_every: int = 200,
    save_every_s: float = 180.0,
) -> dict[str, float]:
    """Train, or go on training, the encoder in folder `out`; returns the final validation figures.

    About 110 pictures a second on one CPU core. Scene `step * batch_size + i` of split "train" is used once;
    another `seed` means another start and other scenes. Raises ValueError if `out` holds a run with another
    seed or batch size, or a longer one.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = PatchLabeler(encoder_config())
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]  # biases, norms, embeddings
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    start, elapsed = 0, 0.0
    history: list[dict[str, float]] = []
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        if (state["seed"], state["batch_size"]) != (seed, batch_size):
            raise ValueError(
                f"{out} holds a run with seed {state['seed']} and batch size {state['batch_size']}, "
                f"not {seed} and {batch_size}: choose another --out, or delete it"
            )
        if state["step"] > steps:
            raise ValueError(f"{out} holds a run of {state['step']} steps, more than {steps}: raise --steps")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, elapsed, history = state["step"], state["elapsed"], state["history"]
        print(f"going on from step {start} of {steps}", flush=True)

    validation = batch(range(validation_scenes), "validation")
    first = seed * 100_000_000
    begun, saved = time.monotonic() - elapsed, time.monotonic()
    for step in range(start, steps + 1):
        last = step == steps
        if (step % evaluate_every == 0 or last) and not (history and history[-1]["step"] == step):
            figures = evaluate(model, validation)
            history.append({"step": step, "seconds": round(time.monotonic() - begun), **figures})
            print(json.dumps(history[-1]), flush=True)
        if last or time.monotonic() - saved > save_every_s:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            state |= {"seed": seed, "batch_size": batch_size}
            state |= {"elapsed": time.monotonic() - begun, "history": history}
            torch.save(state, out / "state.tmp")
            os.replace(out / "state.tmp", out / "state.pt")
            saved = time.monotonic()
        if last:
            break
        rate = peak_rate * learning_rate_at(step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scenes = range(first + step * batch_size, first + (step + 1) * batch_size)
        target = recolor(batch(scenes, "train"), first + step)
        loss = loss_of(forward(model, target["pixels"]), target)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; lower peak_rate ({peak_rate})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            speed = (step - start + 1) * batch_size / (time.monotonic() - begun - elapsed)
            print(f"step {step} loss {loss.item():.3f} rate {rate:.2e} {speed:.0f} pictures/s", flush=True)

    run = {"steps": steps, "seed": seed, "batch_size": batch_size, "pictures": steps * batch_size}
    return _finish(out, model, history, final_scenes, run)


def learning_rate_at(step: int, steps: int, warmup: int) -> float:
    """The share of the peak rate: linear warm-up, then a cosine down to a hundredth."""
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def _finish(
    out: Path, model: PatchLabeler, history: list[dict[str, float]], scenes: int, run: dict[str, int]
) -> dict[str, float]:
    """Write weights, config and figures; the figures are those of the fp16 weights that others load."""
    config = model.vision_model.config
    weights = {name: t.half().contiguous() for name, t in model.vision_model.state_dict().items()}
    save_file(weights, out / "model.tmp")
    os.replace(out / "model.tmp", out / "model.safetensors")
    config.to_json_file(out / "config.json", use_diff=False)
    model.vision_model.load_state_dict({name: t.float() for name, t in weights.items()})
    final = evaluate(model, batch(range(10_000, 10_000 + scenes), "validation"))
    run = run | {"parameters": sum(t.numel() for t in weights.values())}
    text = json.dumps({"run": run, "validation": final, "history": history}, indent=1)
    (out / "figures.json").write_text(text + "\n")
    print("final", json.dumps(final), flush=True)
    return final
