"""Serve the app in a child process, for browser tests and screenshots.

    with serving("--no-local", tiny=True, pace=0.05) as app:  app.url, app.journal()

Run as a program it is that child: it patches what the tests need to see and to slow down, then runs the app's
own command line.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = 30  # tokens; only longer answers are slowed down
TINY = {"scenes-opt": "opt", "scenes-flan-t5": "t5", "scenes-itm": "retrieval"}


def embedded() -> bool:
    """Whether this clone has the embedded checkpoints."""
    return all((ROOT / "blip2" / "assets" / name / "model.safetensors").is_file() for name in TINY)


def tiny_checkpoints(folder: Path) -> None:
    """Save random models under the embedded ones' names."""
    import tiny

    from blip2 import checkpoint
    from blip2.processing import Processor

    for name, family in TINY.items():
        words = tiny.language_family(family)
        processor = Processor(
            tiny.tokenizer(words), family=words, image_size=tiny.IMAGE_SIZE,
            num_query_tokens=tiny.NUM_QUERIES, context=96 if family == "opt" else None,
        )  # fmt: skip
        checkpoint.save(tiny.ours(family), processor, folder / name)


@dataclass
class App:
    """A running app."""

    url: str
    process: subprocess.Popen
    folder: Path
    lines: list[str]

    def journal(self) -> dict[str, int]:
        """How often the server has done what: "tokens" decoded, "pictures" "encoded", models "loaded"."""
        path = self.folder / "journal.json"
        return json.loads(path.read_text()) if path.exists() else {}


@contextlib.contextmanager
def serving(
    *arguments: str,
    tiny: bool = True,
    pace: float = 0.0,
    load_pace: float = 0.0,
    hub: str = "",
    best: str = "",
    **environment: str,
) -> Iterator[App]:
    """Start the app, wait for its address, and end it as Ctrl-C does.

    Args:
        arguments: for the app.
        tiny: on tiny random checkpoints in place of the embedded ones.
        pace: seconds that a token takes at least, in answers of more than LONG.
        load_pace: seconds that a tensor takes to load, in models that are not embedded.
        hub: address of a stand-in for the Hub (see `hub.py`); by default the app is offline.
        best: the model that is best for this machine; by default found out.
        environment: changes to the child's.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = [sys.executable, "-u", __file__, f"--folder={folder}", f"--pace={pace}"]
        child += [f"--load-pace={load_pace}", f"--hub={hub}", f"--best={best}"]
        child += ["--tiny"] * tiny + ["--", *arguments]
        settings = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "GRADIO_TEMP_DIR": str(folder / "uploads"),
        }
        process = subprocess.Popen(
            child, cwd=ROOT, env={**os.environ, **settings, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        seen: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                seen.append(line)
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            url, deadline = "", time.monotonic() + 240
            while not url:
                line = lines.get(timeout=max(0.1, deadline - time.monotonic()))
                if line is None:
                    raise RuntimeError(f"the app ended with {process.wait()}: {''.join(seen)}")
                if "ready: " in line:
                    url = line.split("ready: ")[1].strip()
            yield App(url, process, folder, seen)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _end_with(parent: int) -> None:
    """End this process when the one that tests in it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)


def _child() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pace", type=float)
    parser.add_argument("--load-pace", type=float)
    parser.add_argument("--hub")
    parser.add_argument("--best")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import pytest

    import blip2.beams
    import blip2.chat
    import blip2.generation
    from blip2 import checkpoint
    from blip2.model import Blip2
    from blip2.presets import Preset

    counts: dict[str, int] = {}
    lock = threading.Lock()

    def count(what: str, number: int = 1) -> None:
        with lock:
            counts[what] = counts.get(what, 0) + number
            partial = options.folder / "journal.part"
            partial.write_text(json.dumps(counts))
            partial.replace(options.folder / "journal.json")

    decode, encode, load, advance = (
        blip2.generation.decode, Blip2.encode_image, checkpoint.load, blip2.beams._advance
    )  # fmt: skip

    def slow_decode(model, image, text, generation, *arguments, **settings):
        for token in decode(model, image, text, generation, *arguments, **settings):
            count("tokens")
            time.sleep(options.pace if generation.min_new_tokens > LONG else 0)
            yield token

    def slow_beam(state, *arguments):
        count("tokens")
        time.sleep(options.pace if state.tokens.shape[2] > LONG else 0)
        return advance(state, *arguments)

    def slow_load(name, *arguments, watch=None, **settings):
        def slowly(done, total):
            count("tensors")
            time.sleep(0 if name in TINY else options.load_pace)
            if watch:
                watch(done, total)

        return load(name, *arguments, watch=slowly, **settings)

    def counted(what, function):
        def call(*arguments, **settings):
            count(what)
            return function(*arguments, **settings)

        return call

    def counted_encode(self, pixel_values):
        count("encoded")
        count("pictures", len(pixel_values))
        return encode(self, pixel_values)

    blip2.chat.decode = blip2.generation.decode = slow_decode
    blip2.beams._advance = slow_beam
    Blip2.encode_image = counted_encode
    checkpoint.load = counted("loaded", slow_load)
    if options.hub:
        from hub import point_to

        point_to(options.hub, options.folder / "cache", pytest.MonkeyPatch())
    if options.best:
        from blip2.ui import fitting

        fitting.best_here = lambda: options.best
    if options.tiny:
        tiny_checkpoints(options.folder)
        Preset.folder = property(lambda self: None if self.repo_id else options.folder / self.name)
    from blip2.ui import main

    main(options.rest)


if __name__ == "__main__":
    _child()
