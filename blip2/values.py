"""The values of a checkpoint's tensors: held to digests recorded beside them, or else looked at for damage.

`digests.json` holds the sha256 of every tensor; the embedded checkpoints have it, and so do the small folders
that `blip2 download --precision` writes. Without one, damage shows where numbers are not finite, where all
are zero, and where a tensor or a row is wildly larger than its like. The limits are loose, as trained models
spread; what they let pass only a digest or a checksum tells.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from blip2.checks import Check, Watch, ours
from blip2.layout import DIGESTS, NOVELTY, Layout, read_layout
from blip2.shards import read_json, read_pickle, weight_files

EVA_WIDTH = 1408
# How many times larger than its like a tensor may be, and a row than the tensor's others. Trained models
# spread by a factor of ten; vectors more.
WILD = {"matrix": 20.0, "vector": 50.0, "row": 50.0, "alone": 1000.0}
NORM = re.compile(r"norm\d?\.weight$", re.IGNORECASE)
TABLE = re.compile(r"embed|shared|relative_attention_bias")  # each row is learned by itself


def tensors(folder: Path, variant: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every stored tensor, one at a time."""
    for file in weight_files(folder, variant):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    yield name, opened.get_tensor(name)
        else:
            yield from read_pickle(file).items()


def digest(tensor: Tensor) -> str:
    """The sha256 of a tensor's type, shape and bytes."""
    made = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    made.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def write_digests(folder: Path) -> Path:
    """Record every tensor of a finished checkpoint beside it, so that `verify` can tell later damage."""
    variant = read_layout(folder).variant
    found = {name: digest(tensor) for name, tensor in _recorded(folder, variant)}
    fresh = folder / f".{DIGESTS}"
    fresh.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    return fresh.replace(folder / DIGESTS)


def _recorded(folder: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
    yield from tensors(folder, variant)
    if (folder / NOVELTY).is_file():
        with safe_open(folder / NOVELTY, framework="pt") as opened:
            yield NOVELTY, opened.get_tensor("weight")


def check_values(layout: Layout, sums: bool, tell: Watch) -> Iterator[Check]:
    """Every number, read once: digests, finite, plausible, and the encoder's key bias."""
    path = layout.folder / DIGESTS
    digests: dict[str, str] = read_json(path) if path.is_file() else {}
    altered, unending, key_bias = [], [], []
    sizes: dict[str, Size] = {}
    done, total = 0, sum(file.stat().st_size for file in weight_files(layout.folder, layout.variant))
    seen = set()
    for name, tensor in _recorded(layout.folder, layout.variant):
        seen.add(name)
        tell("values", done := done + tensor.nbytes, max(total, done))
        if digests and digest(tensor) != digests.get(name):
            altered.append(name)
        if not tensor.is_floating_point() or name == NOVELTY:
            continue
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = (~finite).flatten().nonzero()[:, 0]
            unending.append(f"{name} ({len(bad):,} of {tensor.numel():,}, the first at {int(bad[0]):,})")
            continue
        sizes[ours(name, layout)] = Size.of(tensor)
        if name.endswith("self_attn.qkv.bias"):
            key_bias.append((name, tensor.chunk(3)[1].abs().max().item()))
    altered += sorted(digests.keys() - seen)
    recorded = f"{DIGESTS} beside the weights"
    if digests:
        found = f"{len(digests) - len(altered)} of {len(digests)} tensors have the digest recorded for them"
        yield Check("digests", not altered, recorded, found, _first(altered))
    else:
        yield Check("digests", None, recorded, "there is none")
    found = f"{len(seen) - len(unending)} of {len(seen)} tensors"
    yield Check("finite", not unending, "no NaN and no infinity", found, _first(unending))
    sane = "no zeros, nothing wildly larger than the same tensor of other layers, or than other rows"
    if (digests and not altered) or sums:
        yield Check("plausible", None, sane, "not needed: all values are those recorded")
    else:
        odd = implausible(sizes)
        found = f"{len(sizes) - len(odd)} of {len(sizes)} tensors; smaller damage would not be seen"
        yield Check("plausible", not odd, sane, found, _first(odd))
    yield _key_bias(layout, key_bias)


def _key_bias(layout: Layout, largest: list[tuple[str, float]]) -> Check:
    vision: Any = layout.config.vision_config
    expected = "0 in every layer: EVA-CLIP has no bias for keys"
    if vision.model_type != "blip_2_vision_model" or vision.hidden_size != EVA_WIDTH or not largest:
        return Check("key bias", None, expected, "does not apply: the image encoder is no EVA-CLIP ViT-g")
    wrong = [f"{name} ({size:.2g})" for name, size in largest if size]
    found = f"{len(largest) - len(wrong)} of {len(largest)} layers"
    return Check("key bias", not wrong, expected, found, _first(wrong))


@dataclass(frozen=True)
class Size:
    """How large a tensor's values are.

    Attributes:
        kind: "matrix", "vector" or "number".
        rms: root mean square of all.
        row: the largest row of a matrix.
        times: how many times the median row that one is, rows of zeros left out.
    """

    kind: str
    rms: float
    row: int = 0
    times: float = 1.0

    @classmethod
    def of(cls, tensor: Tensor) -> "Size":
        """Measure one."""
        if tensor.ndim < 2:
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float32).item()
            return cls("vector" if tensor.ndim else "number", norm / max(1, tensor.numel()) ** 0.5)
        rows = tensor.flatten(1) if tensor.ndim == 4 else tensor.reshape(-1, tensor.shape[-1])
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double()
        used, row = norms[norms > 0], int(norms.argmax())
        times = (norms[row] / used.median()).item() if len(used) >= 8 else 1.0
        return cls("matrix", (norms.square().sum().item() / tensor.numel()) ** 0.5, row, times)


def implausible(sizes: dict[str, Size]) -> list[str]:
    """Names of tensors that no training would have made so, and why."""
    like: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        like[re.sub(r"\.\d+\.", ".#.", name, count=1)].append(name)
    usual = median([size.rms for size in sizes.values() if size.kind == "matrix"] or [0.0])
    odd = []
    for names in like.values():
        for name in names:
            size = sizes[name]
            if size.kind == "number":
                continue
            others = median([sizes[other].rms for other in names if other != name] or [0.0])
            limit = WILD[size.kind] * others if others else WILD["alone"] * usual
            if not size.rms and (size.kind == "matrix" or others or NORM.search(name)):
                odd.append(f"{name} (all zero)")
            elif size.times > WILD["row"] and not TABLE.search(name):
                odd.append(f"{name} (row {size.row}, {size.times:.0f} times as large as the others)")
            elif size.rms > limit:
                odd.append(f"{name} ({size.rms / (others or usual):.0f} times as large as its like)")
    return odd


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
