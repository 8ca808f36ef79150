"""Searching at length: killed at any moment an index comes out the same; the figures of docs/search.md."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import search_quality

from blip2.checkpoint import load
from blip2.search import Index, index_folder
from train.scenes.evaluate import gallery
from train.scenes.world import sample

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parent.parent
COUNT = 1500


@pytest.fixture(scope="module")
def loaded():
    return load("scenes-itm")


def run_index(folder):
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "blip2",
        "index",
        str(folder),
        "--model",
        "scenes-itm",
        "--quiet",
        "--force",
    ]
    return subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)


def test_killed_three_times_it_comes_out_the_same(loaded, tmp_path):
    folder, whole = tmp_path / "scenes", tmp_path / "whole"
    search_quality.write(folder, [sample(seed, "validation") for seed in range(COUNT)], 64)
    chance, journal = random.Random(time.time_ns()), folder / ".blip2-index" / "pictures-1.jsonl"
    kept = []
    for _ in range(3):
        process, before = run_index(folder), kept[-1] if kept else 0
        while not journal.exists() or journal.read_bytes().count(b"\n") <= before:
            assert process.poll() is None, "it came to its end before it was killed: more pictures"
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(journal.read_bytes().count(b"\n"))
        assert kept[-1] < COUNT, "it came to its end before it was killed: more pictures"
    assert kept == sorted(kept) and kept[0] > 0
    last = run_index(folder)
    said, _ = last.communicate()
    assert last.returncode == 0 and f"{COUNT:,} pictures; {COUNT - kept[-1]:,} encoded" in said, (said, kept)
    index_folder(loaded, folder, whole, force=True)
    one, other = Index(folder), Index(whole)
    assert one.pictures.keys() == other.pictures.keys()
    for name, picture in one.pictures.items():
        assert picture.digest == other.pictures[name].digest
    rows = [[index.pictures[name].row for name in one.pictures] for index in (one, other)]
    for part in ("features", "means"):
        mine, theirs = (
            getattr(index.vectors, part)[row] for index, row in zip((one, other), rows, strict=True)
        )
        assert np.abs(mine.astype(np.float32) - theirs.astype(np.float32)).max() < 2e-3


def test_scenes_are_found(loaded, tmp_path, capsys):
    scenes, texts = gallery(200, "validation")
    search_quality.write(tmp_path / "scenes", scenes, loaded.processor.image_size)
    index_folder(loaded, tmp_path / "scenes", force=True)
    index = Index(tmp_path / "scenes")
    itc, itm = (search_quality.recalls(loaded, index, texts, rerank) for rerank in (0, 16))
    with capsys.disabled():
        print(f"\nof 200 validation scenes: ITC {itc}, ITM on the best 16 {itm}")
    assert itc["R@1"] > 0.95 and itc["R@10"] > 0.99 and itm["R@1"] >= itc["R@1"] - 0.01
    ways = search_quality.by_picture(loaded, scenes)
    assert ways["mean of the queries"] > 0.9


def test_a_query_among_100_000_pictures(tmp_path, capsys):
    queries, width = search_quality.SHAPES["scenes-itm"]
    seconds = search_quality.query_seconds(tmp_path, 100_000, queries, width)
    with capsys.disabled():
        print(f"\n100,000 pictures, 1,600,000 vectors: {1000 * seconds:.0f} ms a query")
    assert seconds < 2
