"""What lies in a checkpoint's files, held to what is known of it: checksums, names, shapes and counts.

Files are held to the Hub's checksums in its cache, names, shapes and counts to the configuration, those of a
released checkpoint to the release. Values are `blip2.values`'s.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import git_hash

from blip2.base import Blip2Base
from blip2.checkpoint import check_loading
from blip2.errors import CheckpointError
from blip2.layout import EXTERNAL, STAGE1_EXTRAS, Layout
from blip2.presets import Preset
from blip2.quantize import T5_OUTPUT, empty_model, stored_precision
from blip2.representation import Blip2Representation
from blip2.shards import weight_files

PARTS = {
    "vision_model": "image encoder",
    "qformer": "Q-Former",
    "embeddings": "Q-Former's word embeddings",
    "query_tokens": "queries",
    "language_projection": "language projection",
    "language_model": "language model",
}
OLD_OPT_VOCABULARY = 50272  # revisions before 2025

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


# --- files and names ---


def check_sums(folder: Path, tell: Watch) -> Check:
    """Files against what the Hub's client noted of them: git's hash of small ones, sha256 of big ones."""
    recorded: dict[Path, str] = {}
    for file in sorted(folder.iterdir()):  # one link only: the blob may itself be a link to a shared one
        name = Path(os.readlink(file)).name if file.is_symlink() else ""
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        if note.is_file():  # of `hf download --local-dir`: commit, checksum, time
            name = "".join(note.read_text("utf-8").splitlines()[1:2])
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
            recorded[file] = name
    expected = "the checksums that the Hub's client notes, in its cache or beside the files"
    if not recorded:
        return Check("checksums", None, expected, "there are none: these files did not come from the Hub")
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
    stored = {ours(name, layout): shape for name, shape in layout.shapes.items()}
    if stored_precision(layout) is not None:  # packed, with scales beside them; loading holds them to account
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


def ours(name: str, layout: Layout) -> str:
    """The name of a stored tensor in our models."""
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
    stored = {ours(name, layout): math.prod(shape) for name, shape in layout.shapes.items()}
    if stored_precision(layout) is not None:
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
