"""The models the app offers: which, at what cost, and loaded once for all visitors."""

import html
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from blip2 import checkpoint
from blip2.checkpoint import CheckpointError, Loaded
from blip2.presets import EMBEDDED, PRESETS, Preset

WORLD = "nine colors, eight shapes, two sizes"


class Models:
    """A shelf of models; each is loaded at most once, whoever asks, and shared by all visitors.

    Args:
        default: a preset's name, a Hub id, or a folder: the operator's choice.
        local: visitors may load released checkpoints, from the cache, and folders.
        offered: names of presets or Hub ids: these alone are in the picker and may be loaded; to score
            texts, the embedded one may, too.
    """

    def __init__(self, default: str, *, local: bool = False, offered: Sequence[str] = ()):
        preset = _preset(default)
        if preset is not None and preset.kind == "match":
            raise ValueError(
                f"{preset.name} scores texts against pictures and writes none; "
                f"choose {' or '.join(name for name in EMBEDDED if PRESETS[name].kind == 'generate')}"
            )
        self.default = preset.name if preset else default
        self.local = local
        presets = ((name, _preset(name)) for name in offered)
        self.offered = tuple(dict.fromkeys(preset.name if preset else name for name, preset in presets))
        self._loaded: dict[str, Loaded] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """What the picker offers: embedded, then released; first the operator's own, if it is neither."""
        if self.offered:
            return list(self.offered)
        names = [preset.name for preset in PRESETS.values() if preset.kind == "generate"]
        return names if self.default in names else [self.default, *names]

    def choices(self) -> list[tuple[str, str]]:
        """(label, name) for the picker; a released checkpoint's label holds its download size."""
        return [(name if name in self.offered else _label(name), name) for name in self.names]

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
                loaded = checkpoint.load(name, local_files_only=True)
                _check_kind(loaded, kind)  # before it takes a place on the shelf
                self._loaded[name] = loaded
            _check_kind(self._loaded[name], kind)
            return self._loaded[name]

    def _check_allowed(self, name: str) -> None:
        if name in EMBEDDED and (not self.offered or PRESETS[name].kind == "match"):
            return
        if name == self.default or name in self.offered or self.local:
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
        instead = "For photographs choose a released model."
        if self.offered and set(self.offered) <= set(EMBEDDED):
            instead = "The released models, for photographs, are not served here."
        return (
            f'<div class="notice"><strong>{name}</strong> knows drawn scenes only: {WORLD}. {instead}</div>'
        )

    def instead(self) -> str:
        """A sentence on where to turn with a picture that an embedded model does not know."""
        names = [preset.name for preset in PRESETS.values() if preset.kind == "generate" and preset.repo_id]
        here = [name for name in (self.default, *self.offered) if name in names]
        name = here[0] if here else names[0]
        if self.local or here:
            label = name if name in self.offered else _label(name)
            return f"Choose a released model above, such as {label}, or have an answer all the same."
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
