"""Bulk runs on Ray: two nodes give what one gives, kills at any moment lose and repeat nothing, Ctrl-C ends.

The command runs in processes of its own, on the embedded models and drawn scenes.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from raying import draw, kill, start, wait_for

from blip2.bulk.run import run
from blip2.bulk.settings import Model, Settings, Source
from blip2.generation import Generation
from blip2.pictures import Captioning

pytestmark = pytest.mark.long
SCENES, BROKEN, PART = 5000, 0.01, 100


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "pictures"
    return folder, draw(folder, SCENES, BROKEN)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """An uninterrupted run, without Ray."""
    out = tmp_path_factory.mktemp("whole") / "captions.jsonl"
    wanted = Captioning(Generation.caption())
    run(
        Settings(
            "caption",
            Source(str(pictures[0])),
            str(out),
            "jsonl",
            Model("scenes-opt"),
            wanted,
            workers=0,
            force=True,
        )
    )
    return out


def words(source: Path, out: Path, *more: str) -> list[str]:
    flags = ["--model", "scenes-opt", "--json", "--force", *more]
    return ["blip2", "bulk", "caption", str(source), "--out", str(out), *flags]


def same(out: Path, whole: Path, spoiled: list[str]) -> dict:
    """Row for row; returns the summary."""
    assert out.read_bytes() == whole.read_bytes()
    errors = [json.loads(line) for line in Path(f"{out}.bulk", "errors.jsonl").read_text().splitlines()]
    assert [error["image"] for error in errors] == spoiled and all(error["reason"] for error in errors)
    names = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert len(names) == SCENES - len(spoiled) == len(set(names)) and names == sorted(names)
    summary = json.loads(Path(f"{out}.bulk", "bulk.json").read_text())["summary"]
    assert (summary["rows"], summary["failed"]) == (SCENES - len(spoiled), len(spoiled))
    return summary


def done(out: Path) -> int:
    return len(list(Path(f"{out}.bulk", ".units").glob("*.json")))


def test_three_kills_lose_and_repeat_nothing(pictures, whole, tmp_path):
    source, spoiled = pictures
    assert len(spoiled) == 50
    out, chance = tmp_path / "captions.jsonl", random.Random()
    waits = [chance.uniform(0, 8) for _ in range(3)]
    print(f"\nkilled {', '.join(f'{wait:.2f} s' for wait in waits)} after the first part that each call did")
    before = 0
    for number, wait in enumerate(waits):
        log = tmp_path / f"{number}.log"
        process = start(words(source, out, "--per-file", str(PART)), log)
        wait_for(lambda known=before: done(out) > known, process, log)
        time.sleep(wait)
        assert process.poll() is None, "it came to its end before it was killed: more scenes"
        kill(process)
        before = done(out)
    assert before < SCENES // PART, "nothing is left for the last call: more scenes"
    log = tmp_path / "last.log"
    assert start(words(source, out), log).wait(timeout=300) == 0, log.read_text()
    same(out, whole, spoiled)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", "0.jsonl"))]
    print(f"equal to an uninterrupted run, {before} parts of {SCENES // PART} done before the last call")


def test_two_nodes_give_the_same_rows(pictures, whole, tmp_path, monkeypatch):
    source, spoiled = pictures
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    try:
        nodes.add_node(num_cpus=1, object_store_memory=10**8)
        out, log = tmp_path / "captions.jsonl", tmp_path / "log"
        process = start(words(source, out, "--address", nodes.address), log)
        assert process.wait(timeout=400) == 0, log.read_text()
    finally:
        nodes.shutdown()
    same(out, whole, spoiled)
    said = log.read_text()
    assert "2 workers of 1 thread each" in said  # a node has one core, so they were on both
    assert json.loads(said[said.index("{") :])["this_call"]["workers"] == 2


def test_an_interrupt_ends_it(pictures, whole, tmp_path):
    source, spoiled = pictures
    out, log = tmp_path / "captions.jsonl", tmp_path / "log"
    process = start(words(source, out), log)
    wait_for(lambda: done(out) > 1, process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    said = log.read_text()
    assert "stopped; the same command goes on" in said and "Traceback" not in said, said
    assert not out.exists() and Path(f"{out}.bulk", "errors.jsonl").exists()
    log = tmp_path / "again.log"
    assert start(words(source, out), log).wait(timeout=300) == 0, log.read_text()
    same(out, whole, spoiled)
