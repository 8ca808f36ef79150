"""What the page says about models: names with a precision (`blip2-opt-2.7b@nf4`), labels, cards, notices."""

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.devices import (
    accelerator_memory,
    choose_device,
    device_name,
    half_precision,
    main_memory,
    why_not_quantized,
)
from blip2.presets import EMBEDDED, PRECISIONS, Preset, find_preset, gigabytes

if TYPE_CHECKING:
    from blip2.adapters import Adapter

WORLD = "nine colors, eight shapes, two sizes"
FULL = "auto"
BITS = {"int8": "8-bit", "nf4": "4-bit"}


def split(name: str) -> tuple[str, str]:
    """A model's name without its precision, and the precision, "auto" where none is given.

    Raises:
        ValueError: what stands after the last @ is no precision.
    """
    name = name.strip()
    base, at, precision = name.rpartition("@")
    if not at or "/" in precision or Path(name).expanduser().is_dir():
        return name, FULL
    if precision not in PRECISIONS:
        raise ValueError(
            f"unknown precision {precision!r} in {name!r}: choose one of {', '.join(PRECISIONS)}"
        )
    return base.strip(), precision


def join(base: str, precision: str | None) -> str:
    """The name of a model in a precision; the inverse of `split`."""
    return base if precision in (None, "", FULL) else f"{base}@{precision}"


def adapter_of(base: str) -> "Adapter | None":
    """The adapter whose folder a model's name, without a precision, is; None for other names.

    Raises:
        CheckpointError: the folder is broken.
    """
    folder = Path(base).expanduser()
    if not base or not (folder / "adapter_config.json").is_file():
        return None
    from blip2.adapters import is_adapter, read_adapter  # takes torch: the page is served before

    return read_adapter(folder) if is_adapter(folder) else None


def embedded(name: str) -> str:
    """The embedded model that this is, or that an adapter is on; "" for others."""
    base = name.rpartition("@")[0] or name
    if worn := adapter_of(base):
        base = worn.base
    return base if base in EMBEDDED else ""


def caption_prompt(name: str) -> str:
    """What a model's captions go on from; "" for most."""
    base = split(name)[0]
    if worn := adapter_of(base):
        return str(worn.settings.get("caption_prompt", caption_prompt(worn.base)))
    preset, config = find_preset(base), Path(base).expanduser() / "config.json"
    if preset is None and base and config.is_file():  # a folder, perhaps fine-tuned
        return str(json.loads(config.read_text("utf-8")).get("caption_prompt", ""))
    return preset.prompt if preset else ""


def full_precision(preset: Preset) -> str:
    """What "full" means for a released checkpoint on this machine."""
    return half_precision(choose_device(), preset.language_model)


def exact(base: str, precision: str) -> str:
    """The precision to load in: full precision is meant so, where "auto" would take what is here."""
    preset = find_preset(base) if precision == FULL else None
    return full_precision(preset) if preset and preset.repo_id else precision


def label(name: str, look: bool = True) -> str:
    """A model for a list: whether it is here, if one is to look, or the size of its download."""
    base, precision = split(name)
    preset = find_preset(base)
    suffix = "" if precision == FULL else f", {BITS.get(precision, precision)}"
    if worn := adapter_of(base):
        return f"{Path(worn.base).name} + {worn.name} (adapter{suffix})"
    if preset is None:
        return (Path(base).name or base) + suffix
    if preset.repo_id is None:
        return f"{preset.name} (embedded{suffix})"
    where = f"{gigabytes(preset.download_bytes)} download"
    if look:
        from blip2.checkpoint import is_available

        here = is_available(preset.name, precision=exact(base, precision))
        where = "in the cache" if here else where
    return f"{preset.name} ({where}{suffix})"


def title(name: str) -> str:
    """A model in a sentence: a folder without where it lies, a training run's "model" by the run."""
    if worn := adapter_of(name) or adapter_of(name.rpartition("@")[0]):
        return worn.name
    path = Path(name).expanduser()
    path = path.parent if path.name == "model" else path
    return path.name if path.name and Path(name.rpartition("@")[0] or name).expanduser().is_dir() else name


def card(name: str, local: bool) -> str:
    """HTML: what a model is, what it takes, what may be done with it; if local, what this machine has."""
    from blip2.checkpoint import is_available

    here = [("This machine", machine())] if local else []
    if local and (why := why_not_quantized()):
        here.append(("Precision", why))
    try:
        base, precision = split(name)
    except ValueError:
        base, precision = name, FULL
    preset = find_preset(base)
    if worn := adapter_of(base):
        from blip2.adapters import num_parameters

        size = f"LoRA of rank {worn.rank}, {sum(num_parameters(worn).values()):,} parameters"
        facts = [("Adapter", size), ("Trained on", Path(worn.base).name)]
        return _card(worn.name, [*facts, *_chosen(precision), *here], "")
    if preset is None:
        where = "this machine: a folder, or the Hub's cache"
        return _card(base, [("From", where), *_chosen(precision), *here], "")
    if preset.repo_id is None:
        facts = [
            ("Size", f"{preset.parameters / 1e6:.1f} million parameters"),
            ("Download", "none, it is part of the app"),
            ("Memory", f"{preset.memory('float32') / 1e6:.0f} MB"),
        ]
        return _card(preset.name, facts, preset.license)
    memory = [f"{gigabytes(preset.memory(p))} {p}" for p in ("float32", "bfloat16", "int8", "nf4")]
    cached = " (in the cache)" if is_available(preset.name, precision=exact(base, precision)) else ""
    facts = [
        ("Size", f"{preset.parameters / 1e9:.1f} billion parameters"),
        ("Download", gigabytes(preset.download_bytes) + cached),
        ("Memory", " · ".join(memory)),
        *_chosen(precision),
        *here,
    ]
    return _card(preset.name, facts, preset.license)


def _chosen(precision: str) -> list[tuple[str, str]]:
    return [] if precision == FULL else [("Precision", f"{BITS.get(precision, precision)} ({precision})")]


def machine() -> str:
    """What this machine has for models, in a few words."""
    memory, accelerator = main_memory(), accelerator_memory()
    words = f"{gigabytes(memory.free)} of {gigabytes(memory.total)} memory free"
    if accelerator is None:
        return f"{words}, no accelerator"
    return f"{words}; {device_name()}, {gigabytes(accelerator.free)} of {gigabytes(accelerator.total)} free"


def notice(name: str, served: bool = True) -> str:
    """HTML: what the embedded models know; nothing for others. `served` says whether released ones are."""
    base = embedded(name)
    if not base:
        return ""
    instead = "choose a released model" if served else "there are the released models, not served here"
    return (
        f'<div class="notice"><strong>{base}</strong> knows drawn scenes only: {WORLD}. '
        f"For photographs {instead}.</div>"
    )


def _card(title: str, facts: list[tuple[str, str]], license: str) -> str:
    rows = [*facts, *([("License", license)] if license else [])]
    cells = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in rows)
    return f'<dl class="card" aria-label="About {html.escape(title)}">{cells}</dl>'
