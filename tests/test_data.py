"""Image-text shards: order, blends, restoring, ranks and workers, samples that cannot be used."""

import http.server
import io
import itertools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import making as made
import pytest
import torch

from blip2.images import preprocess
from train.data import __main__ as command
from train.data import bench, samples
from train.data import loader as data
from train.data.loader import shards_loader
from train.data.transforms import clean_caption
from train.datasets import RecipeError, Shards, Source
from train.loader import DataError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two data sets of 120 and 80 samples; the second has a val split of 9."""
    root = tmp_path_factory.mktemp("shards")
    first, second = made.make(root / "first", 120), made.make(root / "second", 80)
    made.make(root / "second", 9, shards=1, part="val", start=500)
    return first, second


def loader(shards, batch=8, workers=0, **options):
    if not isinstance(shards, Shards):
        shards = Shards(dict.fromkeys(shards, 1.0))
    return shards_loader(shards, made.tokenize, batch, image_size=8, seed=3, workers=workers, **options)


def take(source, number):
    return list(itertools.islice(source, number))


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and one["keys"] == other["keys"]
        assert one["captions"] == other["captions"]
        assert all(torch.equal(one[k], other[k]) for k in one if k not in ("keys", "captions"))


def stored(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_batches_have_what_training_takes(folders):
    (batch,) = take(loader(folders), 1)
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask", "labels", "captions", "keys"}
    assert batch["pixel_values"].shape == (8, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert len(batch["input_ids"]) == len(set(batch["keys"])) == 8
    for key, ids in zip(batch["keys"], batch["input_ids"], strict=True):
        folder, shard, name = key.rsplit("/", 2)
        assert folder in folders and shard in os.listdir(folder)
        caption = "".join(map(chr, ids[1:][ids[1:] != 0]))
        kind = Path(folder).name
        assert caption in (f"{kind} number {int(name)}", f"{kind} again {int(name)}")


def test_an_epoch_takes_every_sample_once_and_each_caption_comes_up(folders):
    source = loader(folders[:1])
    captions, keys = set(), []
    for batch in take(source, 15):
        keys += batch["keys"]
    assert len(set(keys)) > 90  # the shuffle buffer carries some over the epoch's end
    for batch in take(source, 60):
        keys += batch["keys"]
        captions |= {tuple(row[1:].tolist()) for row in batch["input_ids"]}
    assert len(set(keys)) == 120 and max(Counter(keys).values()) <= 6  # 600 draws
    assert keys[:120] != sorted(keys[:120])
    assert len({bytes(c for c in caption if c) for caption in captions}) > 200  # of 240


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_ten_batches_are_five_and_five_restored(folders, workers):
    unbroken = loader(folders, workers=workers)
    steps = iter(unbroken)
    first = take(steps, 5)
    state = stored(unbroken.state_dict())
    rest = take(steps, 5)
    again = loader(folders, workers=workers)
    again.load_state_dict(state)
    assert stored(again.state_dict())["drawn"] == state["drawn"] >= 40
    same(take(again, 5), rest)
    other = loader(folders, workers=workers)  # and to an earlier place, while running
    same(take(other, 5), first)
    other.load_state_dict(state)
    same(take(other, 5), rest)
    for source in (unbroken, again, other):
        source.close()


def test_the_state_of_another_order_is_refused(folders):
    state = loader(folders).state_dict()
    for other in (loader(folders, batch=4), loader(folders[:1]), loader(folders, micro_batch_size=4)):
        with pytest.raises(ValueError, match="the saved loader had"):
            other.load_state_dict(state)


@pytest.mark.long
@pytest.mark.parametrize("micro", [None, 2])
def test_two_processes_read_what_two_workers_read(folders, micro):
    one = loader(folders, workers=2, micro_batch_size=micro)
    ranks = [
        loader(folders, workers=workers, rank=rank, world_size=2, micro_batch_size=micro)
        for rank, workers in ((0, 1), (1, 0))  # a worker counts as much as the process itself
    ]
    for whole, *parts in zip(take(one, 4), *(take(r, 4) for r in ranks), strict=True):
        same([whole], [samples.concatenate(parts)])
    assert len(set(whole["keys"])) == 8
    one.close(), ranks[0].close()


def test_token_tensors_are_padded_to_a_common_length():
    def batch(length):
        ids = torch.ones(2, length, dtype=torch.long)
        return {"pixel_values": torch.zeros(2, 3, 4, 4), "input_ids": ids, "labels": ids, "keys": ["a", "b"]}

    joined = samples.concatenate([batch(3), batch(5)])
    assert joined["input_ids"][0].tolist() == [1, 1, 1, 0, 0]
    assert joined["labels"][1].tolist() == [1, 1, 1, -100, -100] and joined["labels"][2].sum() == 5
    assert joined["pixel_values"].shape == (4, 3, 4, 4) and joined["keys"] == ["a", "b", "a", "b"]


@pytest.mark.long
def test_blend_weights_hold_over_20000_draws(tmp_path, monkeypatch):
    names = ["coco", "vg", "web"]
    folders = [made.make(tmp_path / name, 40, shards=1, size=2) for name in names]
    monkeypatch.setattr(
        samples.Encoder, "_encode", lambda *a: {"pixel_values": torch.zeros(1), "caption": ""}
    )
    monkeypatch.setattr(made, "tokenize", lambda captions, generator: {})
    source = loader(Shards(dict(zip(folders, (1.0, 0.5, 2.5), strict=True))), batch=100)
    found = Counter(key.split("/")[-3] for batch in take(source, 200) for key in batch["keys"])
    assert sum(found.values()) == 20_000
    for name, share in zip(names, (0.25, 0.125, 0.625), strict=True):
        assert abs(found[name] / 20_000 - share) < 0.01


def test_validation_is_whole_pictures_in_order(folders):
    source = loader(folders, batch=3, split="validation")
    assert len(source) == 3 and source.num_samples == 9
    batches = take(source, 4)
    keys = [key.rsplit("/", 1)[1] for batch in batches for key in batch["keys"]]
    assert keys == [f"{i:05d}" for i in (*range(500, 509), 500, 501, 502)]  # then from the start
    from blip2.images import open_image

    picture = open_image(made.picture(500))
    assert torch.equal(batches[0]["pixel_values"][:1], preprocess([picture], 8))
    assert "".join(map(chr, batches[0]["input_ids"][0, 1:])) == "second number 500"
    with pytest.raises(DataError, match=r"first.*val split"):
        loader(Shards({folders[0]: 1.0}, validation=folders[:1]), split="validation")
    with pytest.raises(DataError, match="none of"):
        loader(folders[:1], split="validation")


def test_each_data_set_is_read_its_own_way(folders):
    settings = {
        folders[0]: Source(clean=False, max_words=2, prefix="a photo of ", mean=(0, 0, 0), std=(1, 1, 1)),
        folders[1]: Source(flip=0.0),
    }
    shards = Shards(dict.fromkeys(folders, 1.0), settings=settings)
    batches = take(loader(shards), 10)
    rows = [
        (key, "".join(chr(i) for i in ids[1:] if i), pixels)
        for batch in batches
        for key, ids, pixels in zip(batch["keys"], batch["input_ids"], batch["pixel_values"], strict=True)
    ]
    for key, caption, pixels in rows:
        if key.startswith(folders[0]):
            assert caption in ("a photo of first number", "a photo of first again")
            assert pixels.min() >= 0 and pixels.max() <= 1
        else:
            assert caption == clean_caption(caption) and pixels.min() < 0
    with pytest.raises(RecipeError, match="does not have"):
        Shards({folders[0]: 1.0}, settings={"elsewhere": Source()})


def mean_color(data):
    from PIL import Image

    if not data.startswith(b"\x89PNG"):
        raise ValueError("no PNG")
    return Image.new("RGB", (9, 9), (255, 0, 0))


def test_a_data_set_can_bring_its_decoder(folders):
    red = Source(decoder="test_data:mean_color", mean=(0, 0, 0), std=(1, 1, 1))
    (batch,) = take(loader(Shards({folders[0]: 1.0}, settings={folders[0]: red})), 1)
    assert (
        torch.equal(batch["pixel_values"][:, 0], torch.ones(8, 8, 8))
        and not batch["pixel_values"][:, 1:].any()
    )


# --- what cannot be used ---


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_half_a_percent_of_broken_samples_is_reported(tmp_path, caplog, workers):
    folder = made.make(tmp_path / "web", 1000, broken=(10, 500, 900), wordless=(30, 31), size=2)
    source = loader([folder], batch=50, workers=workers)
    with caplog.at_level(logging.WARNING, logger="train.data"):
        take(source, 44)
    assert source.drawn > 2000
    assert 4 <= source.skipped["broken image"] <= 9 and 2 <= source.skipped["empty caption"] <= 6
    assert all(key.split("/")[-1] in ("00010", "00500", "00900") for key in source.examples["broken image"])
    assert len([r for r in caplog.records if "could not be used" in r.message]) in (1, 2)  # at 1 and 10
    assert stored(source.state_dict())["skipped"] == source.skipped
    again = loader([folder], batch=50, workers=workers)
    again.load_state_dict(stored(source.state_dict()))
    same(take(source, 3), take(again, 3))
    assert again.skipped == source.skipped and again.drawn == source.drawn
    source.close(), again.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_five_percent_of_broken_samples_stop_it(tmp_path, workers):
    folder = made.make(tmp_path / "web", 400, broken=range(0, 400, 20), size=2)
    source = loader([folder], batch=50, workers=workers)
    with pytest.raises(DataError) as stopped:
        take(source, 100)
    told = str(stopped.value)
    assert 1000 <= source.drawn < 1100 and f"of {source.drawn:,} samples" in told
    assert "broken images" in told and f"{folder}/train-0000" in told and "limit of 1%" in told
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_used_ends(tmp_path, workers):
    folder = made.make(tmp_path / "web", 20, wordless=range(20), size=2)
    with pytest.raises(
        DataError, match=r"^1000 samples in a row could not be used: 1,000 empty captions, such as"
    ):
        take(loader([folder], workers=workers), 1)


def test_records_that_cannot_be_read_are_counted(tmp_path):
    good = [{"__key__": f"{i}", "png": made.picture(i), "txt": b"words"} for i in range(5)]
    odd = [
        {"__key__": "a", "png": made.picture(1), "json": b"{no json"},
        {"__key__": "b", "png": made.picture(1), "json": b"[1]"},
        {"__key__": "c", "txt": b"no image"},
        {"__key__": "d", "png": made.picture(1), "txt": b"\xff\xfe\xff"},
        {"__key__": "e", "png": made.picture(1), "txt": b" ..! "},
        {"__key__": "f", "png": made.picture(1), "json": b'{"captions": [null, 3]}'},
        {"__key__": "g", "png": made.picture(1), "json": b'{"caption": "one", "captions": null}'},
    ]
    made.write(tmp_path / "web" / "0.tar", good + odd)
    made.write_metadata(tmp_path / "web", {"train": [tmp_path / "web" / "0.tar"]})
    source = loader([str(tmp_path / "web")], batch=6)
    keys = {key for batch in take(source, 20) for key in batch["keys"]}
    assert {key.rsplit("/", 1)[1] for key in keys} == {"0", "1", "2", "3", "4", "g"}
    assert set(source.skipped) == {"broken record", "empty caption"}
    assert source.skipped["broken record"] == pytest.approx(2 * source.skipped["empty caption"], rel=0.2)


@pytest.mark.parametrize("how", ["missing", "truncated", "no tar"])
def test_an_unreadable_shard_is_skipped_and_counted(tmp_path, how, monkeypatch):
    monkeypatch.setattr(data, "SKIP_LIMIT", 1.0)
    folder = made.make(tmp_path / "web", 40, shards=4)
    path = tmp_path / "web" / "train-00002.tar"
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[:9000] if how == "truncated" else b"?" * len(content))
    source = loader([folder])
    keys = {key for batch in take(source, 20) for key in batch["keys"]}
    lost = [k for k in keys if "train-00002" in k]
    assert len(keys) - len(lost) == 30 and (0 < len(lost) < 10 if how == "truncated" else not lost)
    assert source.skipped["unreadable shard"] > 20
    assert f"{folder}/train-00002.tar/" in source.examples["unreadable shard"][0]


def test_what_is_missing_is_said_with_the_command(tmp_path, folders):
    assert Shards(dict.fromkeys(folders, 1.0)).missing() == []
    (line,) = Shards({str(tmp_path / "none"): 1.0}).missing()
    assert "no .tar file" in line and "docs/data.md" in line
    bare = tmp_path / "bare"
    made.write(bare / "0.tar", [{"__key__": "a", "png": b"", "txt": b""}])
    (line,) = Shards({str(bare): 1.0}).missing()
    assert f"python -m train.data prepare img2dataset {bare}" in line
    with pytest.raises(DataError, match="not prepared"):
        loader([str(bare)])
    shutil.copytree(folders[0], tmp_path / "part")
    (tmp_path / "part" / "train-00001.tar").unlink()
    (line,) = Shards({str(tmp_path / "part"): 1.0}).missing()
    assert "1 shard(s)" in line and "train-00001.tar" in line


def test_numbers_that_do_not_go_together_are_refused(tmp_path, folders):
    with pytest.raises(ValueError, match="no multiple of micro_batch_size 3"):
        loader(folders, micro_batch_size=3)
    with pytest.raises(ValueError, match="no multiple of the 3 processes"):
        loader(folders, rank=0, world_size=3)
    with pytest.raises(DataError, match="fewer than the 16 processes x workers"):
        loader([made.make(tmp_path / "few", 8)], batch=16, workers=16)


def test_a_remote_store_is_read_like_a_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    (tmp_path / "msc.yaml").write_text(
        "profiles:\n  far:\n    storage_provider:\n      type: file\n      options:\n"
        f"        base_path: {Path(folders[0]).parent}\n"
    )
    remote = Shards({"msc://far/first": 1.0})
    assert remote.missing() == []
    (near,), (far,) = take(loader(folders[:1]), 1), take(loader(remote), 1)
    assert [key.rsplit("/", 1)[1] for key in near["keys"]] == [key.rsplit("/", 1)[1] for key in far["keys"]]
    assert far["keys"][0].startswith("msc://far/first/") and torch.equal(
        near["pixel_values"], far["pixel_values"]
    )


class Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading takes: HEAD, and GET with a range."""

    root, asked = Path(), []

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.root / self.path.split("?")[0].removeprefix("/bucket/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, found = path.read_bytes(), self.headers.get("Range")
        if found and self.command == "GET":
            first, last = map(int, found.removeprefix("bytes=").split("-"))
            self.asked.append((path.name, last + 1 - first))
            part = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)


def test_a_bucket_is_read_with_one_request_a_sample(folders, monkeypatch):
    pytest.importorskip("boto3")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(Store, "root", Path(folders[0]).parent)
        monkeypatch.setattr(Store, "asked", [])
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        (near,), (far,) = take(loader(folders[:1]), 1), take(loader(["s3://bucket/first"]), 1)
        samples_asked = [name for name, _ in Store.asked if name.endswith(".tar")]
        server.shutdown()
    assert (
        torch.equal(near["pixel_values"], far["pixel_values"]) and len(samples_asked) == 107
    )  # 8 and the buffer


# --- processes ---

SIGNALLED = """
import itertools, os, signal, sys, time
sys.path.insert(0, "tests")
import making as made
from train.data.loader import shards_loader
from train.datasets import Shards
source = shards_loader(Shards({sys.argv[1]: 1.0}), made.tokenize, 8, image_size=8, seed=3, workers=2)
steps = iter(source)
first = next(steps)
workers = [w.pid for w in source._loader._iterator._workers]
for name in (signal.SIGTERM, signal.SIGINT):
    for worker in workers:
        os.kill(worker, name)
time.sleep(0.3)
batches = list(itertools.islice(steps, 30))
state = source.state_dict()
print(state["drawn"], *workers, flush=True)
if len(sys.argv) > 2:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_workers_outlive_signals_but_not_their_process(folders, killed):
    command = [sys.executable, "-c", SIGNALLED, folders[0], *(["kill"] if killed else [])]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    drawn, *workers = map(int, done.stdout.split())
    assert drawn >= 31 * 8
    while any(map(alive, workers)) and time.monotonic() < began + 60:
        time.sleep(0.1)
    assert not any(map(alive, workers))


@pytest.mark.long
def test_a_worker_that_dies_ends_it_with_a_message(folders):
    script = SIGNALLED.split("for name in")[0] + "os.kill(workers[0], signal.SIGKILL)\nfor _ in steps: pass"
    done = subprocess.run(
        [sys.executable, "-c", script, folders[0]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "worker" in done.stderr and "killed" in done.stderr.lower()


def test_the_benchmark_compares_with_plain_pillow(tmp_path, capsys):
    """On photographs of its own, which it finds from wherever it lies."""
    bench.make_photos(tmp_path, number=8)
    given = ["bench", str(tmp_path), "--batch-size", "2", "--batches", "1", "--turns", "1", "--workers", "0"]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert re.search(r"the loader reaches \d+\.\d% of it", said) and "8 images such as 500 x 375" in said
