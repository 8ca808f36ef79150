"""The models the app offers: which, at what cost, and loaded once for all visitors."""

from __future__ import annotations

import html
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.errors import CheckpointError
from blip2.presets import EMBEDDED, PRESETS, Preset

if TYPE_CHECKING:
    from blip2.checkpoint import Loaded

WORLD = "nine colors, eight shapes, two sizes"


class Models:
    """A shelf of models; each is loaded at most once, whoever asks, and shared by all visitors.

    Args:
        default: a preset's name, a Hub id, or a folder: the operator's choice.
        local: visitors may load released checkpoints, from the cache, and folders.
    """

    def __init__(self, default: str, *, local: bool = False):
        preset = _preset(default)
        if preset is not None and preset.kind == "match":
            raise ValueError(
                f"{preset.name} scores texts against pictures and writes none; "
                f"choose {' or '.join(name for name in EMBEDDED if PRESETS[name].kind == 'generate')}"
            )
        self.default = preset.name if preset else default
        self.local = local
        self._loaded: dict[str, Loaded] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """What the picker offers: embedded, then released; first the operator's own, if it is neither."""
        names = [preset.name for preset in PRESETS.values() if preset.kind == "generate"]
        return names if self.default in names else [self.default, *names]

    def choices(self) -> list[tuple[str, str]]:
        """(label, name) for the picker; a released checkpoint's label holds its download size."""
        return [(_label(name), name) for name in self.names]

    def is_loaded(self, name: str) -> bool:
        """Whether `get` returns at once."""
        return name in self._loaded

    def get(self, name: str, kind: str = "generate") -> Loaded:
        """The model, loaded on first use; nothing is ever downloaded.

        Args:
            name: a preset's, a Hub id, or a folder.
            kind: "generate" for captions and answers, "match" for scores.

        Raises:
            ValueError: it may not be loaded here, is not on this machine, or is broken; the message says what
                to do.
        """
        self._check_allowed(name)
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._loaded:
                from blip2 import checkpoint  # and with it torch: the page is served before

                loaded = checkpoint.load(name, local_files_only=True)
                _check_kind(loaded, kind)  # before it takes a place on the shelf
                self._loaded[name] = loaded
            _check_kind(self._loaded[name], kind)
            return self._loaded[name]

    def unload(self, name: str) -> None:
        """Let go of a model; who still uses it keeps it."""
        self._loaded.pop(name, None)

    def _check_allowed(self, name: str) -> None:
        if name in EMBEDDED or name == self.default or self.local:
            return
        raise CheckpointError(
            f"{name} is not served here: the app's operator can start it with --model {name}, "
            "or with --local on a machine of their own"
        )

    def card(self, name: str) -> str:
        """HTML: what a model is, what it takes, and what may be done with it."""
        preset = _preset(name)
        if preset is None:
            return _card(name, [("From", "a folder or the cache of this machine")], "")
        if preset.repo_id is None:
            facts = [
                ("Size", f"{preset.parameters / 1e6:.1f} million parameters"),
                ("Download", "none, it is part of the app"),
                ("Memory", f"{preset.memory('float32') / 1e6:.0f} MB"),
            ]
            return _card(preset.name, facts, preset.license)
        memory = [f"{preset.memory(p) / 1e9:.1f} GB {p}" for p in ("float32", "bfloat16", "int8", "nf4")]
        here = _machine_memory()
        facts = [
            ("Size", f"{preset.parameters / 1e9:.1f} billion parameters"),
            ("Download", f"{preset.download_bytes / 1e9:.1f} GB"),
            ("Memory", " · ".join(memory) + (f" (this machine: {here / 1e9:.0f} GB)" if here else "")),
        ]
        return _card(preset.name, facts, preset.license)

    def notice(self, name: str) -> str:
        """HTML: what the embedded models know, in so many words; nothing for others."""
        if name not in EMBEDDED:
            return ""
        return (
            f'<div class="notice"><strong>{name}</strong> knows drawn scenes only: {WORLD}. '
            "For photographs choose a released model.</div>"
        )

    def instead(self) -> str:
        """A sentence on where to turn with a picture that an embedded model does not know."""
        names = [preset.name for preset in PRESETS.values() if preset.kind == "generate" and preset.repo_id]
        name = self.default if self.default in names else names[0]
        if self.local or name == self.default:
            return f"Choose a released model above, such as {_label(name)}, or have an answer all the same."
        return (
            "The released models are for photographs, but not served here: the app's operator can start it "
            f"with --model {name}. Or have an answer all the same."
        )


def _check_kind(loaded: Loaded, kind: str) -> None:
    if (loaded.processor.family == "bert") != (kind == "match"):
        does = "writes texts and scores none" if kind == "match" else "scores texts and writes none"
        raise ValueError(f"{loaded.name} {does}")


def _preset(name: str) -> Preset | None:
    """The preset of that name, unless a folder of the same name was meant."""
    bare = name.strip().lower().removeprefix("salesforce/")
    return None if Path(name).expanduser().is_dir() else PRESETS.get(bare)


def _label(name: str) -> str:
    preset = _preset(name)
    if preset is None:
        return Path(name).name or name
    if preset.repo_id is None:
        return f"{preset.name} (embedded)"
    return f"{preset.name} ({preset.download_bytes / 1e9:.1f} GB download)"


def _card(title: str, facts: list[tuple[str, str]], license: str) -> str:
    rows = [*facts, *([("License", license)] if license else [])]
    cells = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in rows)
    return f'<dl class="card" aria-label="About {html.escape(title)}">{cells}</dl>'


def _machine_memory() -> int | None:
    """Bytes of main memory, where the system says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
