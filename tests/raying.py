"""Commands that start a Ray, in processes of their own, to be killed; and pictures for them."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
from PIL import Image

from train.scenes import world

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}


def start(words: Sequence[str], log: Path) -> subprocess.Popen:
    """`python -m WORDS` in a process group of its own; what it says goes into a file."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file,
            start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        )  # fmt: skip


def wait_for(condition: Callable[[], object], process: subprocess.Popen, log: Path, seconds: float = 240):
    """What the condition says once it holds, while the process runs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end and process.poll() is None, log.read_text()
        time.sleep(0.05)
    return found


def kill(process: subprocess.Popen, alone: bool = False) -> None:
    """SIGKILL to the process, and to its whole group unless alone; nobody may work on."""
    family = psutil.Process(process.pid).children(recursive=True)
    family = [child for child in family if "Agent" not in _name(child)]  # Ray's own, which look now and then
    if alone:
        process.send_signal(signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], "working on with nobody to report to"


def _name(child: psutil.Process) -> str:
    try:
        return child.name()
    except psutil.NoSuchProcess:
        return ""


def draw(folder: Path, scenes: int, broken: float = 0.0) -> list[str]:
    """Draw test scenes into a folder, once; returns the names of those that were spoiled, a share of all."""
    folder.mkdir(parents=True, exist_ok=True)
    spoiled = sorted(random.Random(0).sample(range(scenes), round(broken * scenes)))
    for seed in range(scenes):
        path = folder / f"{seed:06d}.png"
        if path.exists():
            continue
        part = path.with_suffix(".part")
        Image.fromarray(world.render(world.sample(seed, "test"))).save(part, "png")
        if seed in spoiled:
            part.write_bytes(part.read_bytes()[:300] if seed % 2 else b"<html>gone</html>")
        part.rename(path)
    return [f"{seed:06d}.png" for seed in spoiled]
