"""The models the app offers: which, at what cost, and loaded once for all visitors."""

from __future__ import annotations

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.devices import free_unused, is_out_of_memory
from blip2.errors import CheckpointError
from blip2.presets import EMBEDDED, PRESETS, find_preset, gigabytes
from blip2.ui import cards, fitting
from blip2.ui.cards import FULL, full_precision, join, split
from blip2.ui.jobs import Job

if TYPE_CHECKING:
    from blip2.checkpoint import Loaded

AT_MOST = 2  # a comparison takes two


class Models:
    """A shelf of models; each is loaded at most once, whoever asks, and shared by all visitors.

    A name may carry a precision, as in `blip2-opt-2.7b@nf4` (see `blip2.ui.cards.split`): another model on
    the shelf, with that name in receipts. Of models that are not embedded at most `at_most` stay; the one
    asked for longest ago leaves, and earlier where memory is short. Who is answering with it at that moment
    holds it still; then its memory is free.

    Args:
        default: a preset's name, a Hub id, or a folder: the operator's choice.
        local: visitors may load released checkpoints, from the cache, and folders; and download.
        at_most: how many models, the embedded ones not counted.
        only: offer and allow these names alone, and keep all of them; for a Space, which loads them when it
            starts (`load_all`), downloading them if need be.
    """

    def __init__(
        self,
        default: str,
        *,
        local: bool = False,
        at_most: int = AT_MOST,
        only: Sequence[str] | None = None,
    ):
        preset = find_preset(split(default)[0])
        if preset is not None and preset.kind == "match":
            raise ValueError(
                f"{preset.name} scores texts against pictures and writes none; "
                f"choose {' or '.join(name for name in EMBEDDED if PRESETS[name].kind == 'generate')}"
            )
        if at_most < 1:
            raise ValueError(f"at most {at_most} models in memory leaves none: use 1 or more")
        self.default = _plain(default)
        self.only = None if only is None else tuple(dict.fromkeys(map(_plain, only)))
        if self.only is not None and self.default not in self.only:
            raise ValueError(
                f"the default model {default} is not among those to offer: {', '.join(self.only)}"
            )
        self.local = local and only is None
        self.at_most = at_most
        self._shelf: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first
        self._jobs: dict[tuple[str, str], Job[Any]] = {}
        self._titles: dict[str, str] = {}
        self._lock = threading.Lock()
        self._room = threading.Lock()  # held while a model that is not embedded is loaded: one at a time

    # --- what is offered ---

    @property
    def names(self) -> list[str]:
        """What the picker offers: embedded, then released; first the operator's own, if it is neither."""
        if self.only is not None:
            presets = {name: find_preset(split(name)[0]) for name in self.only}
            return [name for name, preset in presets.items() if preset is None or preset.kind == "generate"]
        names = [preset.name for preset in PRESETS.values() if preset.kind == "generate"]
        return names if self.default in names else [self.default, *names]

    def choices(self, look: bool = True) -> list[tuple[str, str]]:
        """(label, name) for the picker; the label tells what has to be downloaded, and how much.

        Args:
            look: into the cache, which takes torch; the page is served before.
        """
        return [(self._label(name, look), name) for name in self.names]

    def _label(self, name: str, look: bool = True) -> str:
        return cards.label(name, look) if self.only is None else name  # all are loaded: nothing to tell

    def precisions(self, name: str) -> list[tuple[str, str]]:
        """(label, precision) to choose from for a model; empty where there is no choice."""
        base = split(name)[0]
        return fitting.precisions(base) if self.local and not cards.embedded(base) else []

    def fitting(self, name: str) -> str:
        """The model in the first precision, full, 8-bit, 4-bit, that this machine has memory for."""
        base, precision = split(name)
        if precision == FULL:
            for _, value in self.precisions(base):
                if self.is_loaded(join(base, value)) or fitting.needed(base, value) <= fitting.space():
                    return join(base, value)
        return name

    def best(self) -> str | None:
        """The released checkpoint that answers photographs best on this machine; None if none fits."""
        return fitting.best_here()

    def is_loaded(self, name: str) -> bool:
        """Whether `get` returns at once."""
        try:
            return self._key(name) in self._shelf
        except ValueError:
            return False

    # --- getting one ---

    def get(self, name: str, kind: str = "generate") -> Loaded:
        """The model, loaded on first use; nothing is ever downloaded.

        Args:
            name: a preset's, a Hub id, or a folder; with a precision if need be.
            kind: "generate" for captions and answers, "match" for scores.

        Raises:
            ValueError: it may not be loaded here, is not on this machine, does not fit into its memory, or is
                broken; the message says what to do.
        """
        loaded = self._find(name, kind)
        if loaded is None:
            job = self._load_job(name, kind)
            try:
                if job.begin():
                    job.run()
                job.wait()
                loaded = job.result()
            finally:
                job.leave()
        return loaded

    def load(self, name: str, stop: threading.Event, kind: str = "generate") -> Iterator[str]:
        """Load a model if it is not there yet; yields how far that is, several times a second.

        Once `stop` is set, or the iteration is left, this visitor no longer waits. If nobody else does, the
        loading ends at the next tensor; a load beyond that point is finished and the model kept.

        Raises:
            ValueError: as `get` does.
        """
        if self._find(name, kind) is None:
            job = self._load_job(name, kind)
            yield from job.follow(stop)
            if job.done and not stop.is_set():
                job.result()

    def download(self, name: str, stop: threading.Event) -> Iterator[str]:
        """Bring a released checkpoint into the cache; yields how far that is.

        It ends early as `load` does; what has come stays on the disk, and the next download goes on from it.

        Raises:
            ValueError: it is none, visitors may not download here, there is no connection, or no room.
        """
        self._check_allowed(name)
        base, precision = split(name)
        preset = find_preset(base)
        if not self.local or preset is None or preset.repo_id is None:
            raise CheckpointError(f"{name} cannot be downloaded here")
        from blip2.checkpoint import is_available
        from blip2.download import download

        if is_available(preset.name, precision=cards.exact(base, precision)):
            return
        repo_id, title = preset.repo_id, f"Downloading {preset.name}"

        def work(job: Job[Path]) -> Path:
            def watch(done: int, total: int) -> None:
                job.report(f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

            return download(repo_id, watch=watch)

        job = self._joined(("download", repo_id), work, f"{title} ({gigabytes(preset.download_bytes)})")
        yield from job.follow(stop)
        if job.done and not stop.is_set():
            job.result()

    def load_all(self) -> None:
        """Load every model of `only`, or the default alone: where a Space starts."""
        for name in self.only or (self.default,):
            preset = find_preset(split(name)[0])
            self.get(name, preset.kind if preset else "generate")

    def unload(self, name: str, error: BaseException | None = None) -> None:
        """Take a model off the shelf and free its memory; for when an answer ran out of memory.

        Call it with the error in hand, `if is_out_of_memory(error): models.unload(name, error)`: the error's
        traceback would otherwise keep what was being computed. The model is loaded anew on next use. Models
        of `only` stay.

        Args:
            name: as given to `get`.
            error: what the answer ended with.
        """
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        if self.only is None:
            with self._lock:
                self._shelf.pop(self._key(name), None)
        free_unused()

    # --- the shelf ---

    def _key(self, name: str) -> str:
        """One key for all the ways to name a model."""
        base, precision = split(name)
        preset = find_preset(base)
        if preset is None:
            path = Path(base).expanduser()
            return join(str(path.resolve()) if path.is_dir() else base, precision)
        same = "float32" if preset.repo_id is None else full_precision(preset)
        return join(preset.name, FULL if precision == same else precision)

    def _find(self, name: str, kind: str) -> Loaded | None:
        self._check_allowed(name)
        key = self._key(name)
        with self._lock:
            loaded = self._shelf.get(key)
            if loaded is not None:
                self._shelf.move_to_end(key)
        if loaded is not None:
            _check_kind(loaded.name, loaded.processor.family == "bert", kind)
        return loaded

    def _joined(self, key: tuple[str, str], work: Callable[[Job[Any]], Any], doing: str) -> Job[Any]:
        """The job of that key, begun anew if there is none; the caller waits for it."""

        def once(job: Job[Any]) -> Any:
            try:
                return work(job)
            finally:
                with self._lock:
                    self._jobs.pop(key, None)

        while True:
            with self._lock:
                job = self._jobs.get(key)
                if job is None:
                    job = self._jobs[key] = Job(once, doing)
                if job.join():
                    return job
            job.wait()  # it is ending, abandoned by others

    def _load_job(self, name: str, kind: str) -> Job[Loaded]:
        key = self._key(name)
        return self._joined(
            (key, kind), lambda job: self._load(name, key, kind, job), f"Loading {cards.title(name)}"
        )

    def _load(self, name: str, key: str, kind: str, job: Job[Loaded]) -> Loaded:
        base, precision = split(name)
        preset = find_preset(base)
        if preset is not None:
            _check_kind(preset.name, preset.kind == "match", kind)
        embedded = split(key)[0] in EMBEDDED
        while not embedded and not self._room.acquire(timeout=0.2):
            job.report(f"Loading {cards.title(name)}, after another model")
        try:
            with self._lock:
                if key in self._shelf:
                    return self._shelf[key]
            if self.only is None:
                from blip2.checkpoint import locate
                from blip2.layout import read_layout

                kept = cards.exact(base, precision)
                layout = read_layout(locate(base, local_files_only=True, precision=kept)[1])
                _check_kind(base, layout.stage1, kind)
                if not embedded:
                    self._make_room(base, precision)
            loaded = self._read(name, job)
            _check_kind(loaded.name, loaded.processor.family == "bert", kind)
            loaded.name = join(loaded.name, precision)
            if self._titles.setdefault(loaded.name, key) != key:  # another folder of the same name
                loaded.name = key
            with self._lock:
                self._shelf[key] = loaded
            return loaded
        finally:
            if not embedded:
                self._room.release()

    def _read(self, name: str, job: Job[Loaded]) -> Loaded:
        from blip2 import checkpoint

        base, precision = split(name)

        def watch(done: int, total: int) -> None:
            job.report(f"Loading {cards.title(name)}: {done} of {total} tensors")

        try:
            return checkpoint.load(
                base,
                precision=cards.exact(base, precision),
                local_files_only=self.only is None,
                check_memory=False,  # `_make_room` has, and a Space's memory is not what it seems
                watch=watch,
            )
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # half a model
            free_unused()
            if not is_out_of_memory(error):
                raise
            advice = fitting.advice(base, precision)
            raise CheckpointError(f"{name} does not fit into memory: {advice}") from None

    def _make_room(self, base: str, precision: str) -> None:
        """Let the least recently used leave until there is a place, and memory, for one more.

        Raises:
            CheckpointError: there is not enough memory even so.
        """
        needed, whole, tidied = fitting.needed(base, precision), fitting.memory().total, False
        while True:
            free = fitting.space()
            short = needed > free
            with self._lock:
                shelved = [key for key in self._shelf if split(key)[0] not in EMBEDDED]
                leave = len(shelved) >= self.at_most or (short and tidied and needed <= whole)
                if shelved and leave:
                    del self._shelf[shelved[0]]
                elif short and tidied:
                    raise CheckpointError(
                        f"{join(base, precision)} needs {gigabytes(needed)} of memory, and {gigabytes(free)} "
                        f"of {gigabytes(whole)} are free: {fitting.advice(base, precision)}"
                    )
                elif not short:
                    return
            free_unused()  # takes a third of a second, and all others wait: only where it may help
            tidied = True

    def _check_allowed(self, name: str) -> None:
        base = split(name)[0]
        if self.only is not None:
            if self._key(name) in map(self._key, self.only):
                return
            raise CheckpointError(f"{name} is not served here: choose one of {', '.join(self.only)}")
        if name in EMBEDDED or self.local or self._key(name) == self._key(self.default):
            return
        raise CheckpointError(
            f"{name} is not served here: the app's operator can start it with --model {base}, "
            "or with --local on a machine of their own"
        )

    # --- what is said about them ---

    def card(self, name: str) -> str:
        """HTML: what a model is, what it takes, and what may be done with it."""
        return cards.card(name, self.local)

    def notice(self, name: str) -> str:
        """HTML: what the embedded models know, in so many words; nothing for others."""
        served = self.only is None or any(split(name)[0] not in EMBEDDED for name in self.only)
        return cards.notice(name, served)

    def instead(self) -> str:
        """A sentence on where to turn with a picture that an embedded model does not know."""
        names = [preset.name for preset in PRESETS.values() if preset.kind == "generate" and preset.repo_id]
        served = [name for name in self.only or () if split(name)[0] in names]
        name = self.default if split(self.default)[0] in names else [*served, *names][0]
        if self.local:
            return (
                "Choose a released model above, get the best one for this machine, or have an answer all the "
                "same."
            )
        if served or name == self.default:
            return (
                f"Choose a released model above, such as {self._label(name)}, or have an answer all the same."
            )
        return (
            "The released models are for photographs, but not served here: the app's operator can start it "
            f"with --model {name}. Or have an answer all the same."
        )


def _plain(name: str) -> str:
    """A preset by its own name, however it was named."""
    base, precision = split(name)
    preset = find_preset(base)
    return join(preset.name, precision) if preset else name


def _check_kind(name: str, matches: bool, kind: str) -> None:
    if matches != (kind == "match"):
        does = "writes texts and scores none" if kind == "match" else "scores texts and writes none"
        raise ValueError(f"{name} {does}")
