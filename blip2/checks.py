"""What lies in a checkpoint's files, held to what is known of it; each finding is a `Check`.

Files are held to the Hub's checksums in its cache, tensors to their digests (`digests.json`, as the embedded
checkpoints have it), names, shapes and counts to the configuration, those of a released checkpoint to the
release. Damage that nothing recorded could tell is looked for: numbers that are not finite, zeros, and
tensors or rows wildly larger than their like.
"""

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub.utils.sha import git_hash
from safetensors import safe_open
from torch import Tensor

from blip2.base import Blip2Base
from blip2.checkpoint import EXTERNAL, check_loading
from blip2.errors import CheckpointError
from blip2.layout import NOVELTY, STAGE1_EXTRAS, Layout, read_json, read_layout, read_pickle, weight_files
from blip2.model import Blip2
from blip2.presets import Preset
from blip2.representation import Blip2Representation

DIGESTS = "digests.json"
PARTS = {
    "vision_model": "image encoder",
    "qformer": "Q-Former",
    "embeddings": "Q-Former's word embeddings",
    "query_tokens": "queries",
    "language_projection": "language projection",
    "language_model": "language model",
}
T5_OUTPUT = "language_model.lm_head.weight"
EVA_WIDTH = 1408
OLD_OPT_VOCABULARY = 50272  # revisions before 2025
# How many times larger than its like a tensor may be. Trained models spread by a factor of ten; vectors more.
NORM = re.compile(r"norm\d?\.weight$", re.IGNORECASE)
TABLE = re.compile(r"embed|shared|relative_attention_bias")  # each row is learned by itself
WILD = {"matrix": 20.0, "vector": 50.0, "row": 50.0, "alone": 1000.0}

Watch = Callable[[str, int, int], None]  # (what is being done, bytes so far, bytes in all)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        passed: None where it does not apply or could not be done; `found` says why.
        expected: and against what it was checked.
        found: numbers, or what is wrong.
        where: the first tensor, file or part that is wrong.
    """

    name: str
    passed: bool | None
    expected: str
    found: str
    where: str = ""


def empty_model(layout: Layout) -> Blip2Base:
    """The model that the configuration describes, without memory for its weights."""
    with torch.device("meta"):
        return (Blip2Representation if layout.stage1 else Blip2)(layout.config)


def is_quantized(layout: Layout) -> bool:
    """Whether it holds 8-bit or 4-bit weights."""
    return bool(getattr(layout.config, "quantization_config", None))


# --- files and names ---


def check_sums(folder: Path, tell: Watch) -> Check:
    """Files in the Hub's cache against their names there: git's hash of small ones, sha256 of big ones."""
    recorded: dict[Path, str] = {}
    for file in sorted(folder.iterdir()):  # one link only: the blob may itself be a link to a shared one
        name = Path(os.readlink(file)).name if file.is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
            recorded[file] = name
    expected = "the checksums that the Hub names files by in its cache"
    if not recorded:
        return Check("checksums", None, expected, "none: this folder is not in the Hub's cache")
    total, done = sum(file.stat().st_size for file in recorded), 0
    wrong = []
    for file, name in recorded.items():
        if len(name) == 40:
            same = git_hash(file.read_bytes()) == name
        else:
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while chunk := opened.read(1 << 23):
                    digest.update(chunk)
                    tell("checksums", done := done + len(chunk), total)
            same = digest.hexdigest() == name
        wrong += [] if same else [file.name]
    found = f"{len(recorded) - len(wrong)} of {len(recorded)} files have theirs"
    if wrong:
        found += f"; delete {' and '.join(wrong)} and download again"
    return Check("checksums", not wrong, expected, found, ", ".join(wrong))


def check_layout(layout: Layout, model: Blip2Base) -> Check:
    """Names and shapes against the configuration."""
    expected = "a place for every tensor, in the shapes of config.json"
    try:
        check_loading(layout, _account(layout, model))
    except CheckpointError as error:
        return Check("layout", False, expected, str(error))
    files = weight_files(layout.folder, layout.variant)
    where = files[0].name if len(files) == 1 else f"{len(files)} files"
    return Check("layout", True, expected, f"{len(layout.shapes)} tensors in {where}")


def _account(layout: Layout, model: Blip2Base) -> dict[str, Any]:
    """What loading would say of names and shapes, without reading values."""
    places = {name: tuple(place.shape) for name, place in model.state_dict().items()}
    stored = {_ours(name, layout): shape for name, shape in layout.shapes.items()}
    if is_quantized(layout):  # packed, with scales beside them; loading holds them to account
        stored = {name: places[name] for name in stored if name in places}
    copies = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    return {
        "missing_keys": places.keys() - stored.keys() - copies,
        "unexpected_keys": {n for n in stored.keys() - places.keys() if not n.startswith(EXTERNAL)},
        "mismatched_keys": [
            (name, shape, places[name])
            for name, shape in stored.items()
            if name in places and shape != places[name]
        ],
    }


def _ours(name: str, layout: Layout) -> str:
    for pattern, replacement in layout.renames.items():
        name = re.sub(pattern, replacement, name)
    return name


def count_parts(model: Blip2Base, stored: set[str] | None) -> dict[str, int]:
    """Parameters of each part, tied matrices once.

    Args:
        model: on the meta device.
        stored: names in the checkpoint's files; None for a released one, whose matching models lack stage 1's
            temperature and language model head.
    """
    counts = {path: parameter.numel() for path, parameter in model.named_parameters()}
    if isinstance(model, Blip2Representation):
        if stored is None or "temperature" not in stored:
            counts = {path: count for path, count in counts.items() if path not in STAGE1_EXTRAS}
    elif model.config.text_config.model_type == "t5" and (stored is None or T5_OUTPUT in stored):
        language: Any = model.language_model  # transformers builds it tied, loading gives it its own matrix
        counts[T5_OUTPUT] = language.lm_head.weight.numel()
    return _by_part(counts)


def _by_part(counts: dict[str, int]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for path, count in counts.items():
        part = "stage 1's own head" if path in STAGE1_EXTRAS else PARTS.get(path.split(".")[0], "heads")
        parts[part] = parts.get(part, 0) + count
    order = [*PARTS.values(), *parts]
    return dict(sorted(parts.items(), key=lambda item: order.index(item[0])))


def check_counts(layout: Layout, model: Blip2Base, preset: Preset | None) -> Check:
    """Parameters by part: what the files hold against the release, or against what config.json describes."""
    stored = {_ours(name, layout): math.prod(shape) for name, shape in layout.shapes.items()}
    if is_quantized(layout):
        return Check("parameters", None, "", "not counted: 8-bit and 4-bit weights are stored packed")
    expected, source = count_parts(model, set(stored)), "config.json"
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True)) - {T5_OUTPUT}
    if layout.config.text_config.model_type != "t5":
        tied.add(T5_OUTPUT)
    known = {name for name in model.state_dict() if name not in tied}
    found = _by_part({name: count for name, count in stored.items() if name in known})
    if preset is not None:
        config, source = preset.config(), f"the release of {preset.name}"
        if layout.config.text_config.vocab_size == OLD_OPT_VOCABULARY:
            config.text_config.vocab_size, source = OLD_OPT_VOCABULARY, f"an old revision of {preset.name}"
        expected = count_parts(empty_model(Layout(layout.folder, config, layout.stage1, {}, {})), None)
    differ = [part for part in {**expected, **found} if expected.get(part) != found.get(part)]
    words = ", ".join(f"{part} {count:,}" for part, count in expected.items())
    said = f"{sum(found.values()):,}"
    said += "".join(f"; {part} {found.get(part, 0):,}" for part in differ)
    return Check(
        "parameters", not differ, f"{sum(expected.values()):,} by {source}: {words}", said, ", ".join(differ)
    )


# --- values ---


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
        sizes[_ours(name, layout)] = Size.of(tensor)
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
            elif size.rms > limit:
                odd.append(f"{name} ({size.rms / (others or usual):.0f} times as large as its like)")
            elif size.times > WILD["row"] and not TABLE.search(name):
                odd.append(f"{name} (row {size.row}, {size.times:.0f} times as large as the others)")
    return odd


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
