"""Annotation files in their publishers' layouts -> shards; what is dropped, resumed, refused."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import making as made
import pytest
from PIL import Image

from train.data import __main__ as command
from train.data import loader as data
from train.data import shards
from train.data.shards import PrepareError, write_shards
from train.datasets import Shards


def jpeg(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.picture(number, kind="JPEG"))


def dump(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def prepare(*arguments):
    return command.main(["prepare", *map(str, arguments), "--workers", "1"])


def read(folder):
    """{shard: {key: {extension: bytes}}}"""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                found.setdefault(path.name, {}).setdefault(key, {})[extension] = tar.extractfile(
                    member
                ).read()
    return found


def records(folder):
    return {
        key: (part.split("-")[0], json.loads(sample["json"]))
        for part, samples in read(folder).items()
        for key, sample in samples.items()
    }


@pytest.fixture
def karpathy(tmp_path):
    """dataset_coco.json: five images in all four splits; one without a file, one broken."""

    def image(number, split, folder="val2014"):
        name = f"COCO_{folder}_{number:012d}.jpg"
        sentences = [
            {"tokens": ["a", "b"], "raw": raw, "imgid": number, "sentid": 10 * number + i}
            for i, raw in enumerate((f"A picture of {number}.", f"Number {number}", "  "))
        ]
        return {
            "filepath": folder, "sentids": [s["sentid"] for s in sentences], "filename": name,
            "imgid": number, "split": split, "sentences": sentences, "cocoid": 1000 + number,
        }  # fmt: skip

    images = [
        image(1, "train", "train2014"), image(2, "restval"), image(3, "val"), image(4, "test"),
        image(5, "train"), image(6, "train"),
    ]  # fmt: skip
    for i in images[:4]:
        jpeg(tmp_path / "images" / i["filepath"] / i["filename"], i["imgid"])
    (tmp_path / "images" / "val2014" / images[5]["filename"]).write_bytes(b"<html>gone</html>")
    return dump(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})


def test_coco_with_karpathys_splits(karpathy, tmp_path, capsys):
    assert prepare("coco", karpathy, tmp_path / "images", tmp_path / "out") == 0
    assert "4 kept; dropped: 1 no image file, 1 broken image" in capsys.readouterr().out
    found = records(tmp_path / "out")
    assert {part for part, _ in found.values()} == {"train", "val", "test"}
    assert found["COCO_val2014_000000000002"] == (
        "train",
        {"captions": ["A picture of 2.", "Number 2"], "image_id": 1002},
    )
    assert found["COCO_val2014_000000000004"][0] == "test"
    kept = read(tmp_path / "out")["train-00000.tar"]["COCO_train2014_000000000001"]["jpg"]
    assert kept == (tmp_path / "images" / "train2014" / "COCO_train2014_000000000001.jpg").read_bytes()
    assert Shards({str(tmp_path / "out"): 1.0}).missing() == []


def test_coco_with_one_record_per_caption(karpathy, tmp_path):
    images = tmp_path / "images"
    assert prepare("coco", karpathy, images, tmp_path / "out", "--one-record-per-caption") == 0
    found = records(tmp_path / "out")
    assert found["COCO_train2014_000000000001_1"] == ("train", {"captions": ["Number 1"], "image_id": 1001})
    assert len(found) == 8  # the empty third caption of each is dropped


def test_coco_captions_json_and_nocaps(tmp_path):
    jpeg(tmp_path / "images" / "000000000007.jpg")
    jpeg(tmp_path / "images" / "0013ea2087020901.jpg")
    coco = {
        "info": {}, "licenses": [],
        "images": [{"id": 7, "file_name": "000000000007.jpg", "height": 12, "width": 12, "license": 1}],
        "annotations": [
            {"image_id": 7, "id": 9, "caption": "two"}, {"image_id": 7, "id": 8, "caption": "one"},
        ],
    }  # fmt: skip
    path = dump(tmp_path / "captions_val2017.json", coco)
    assert prepare("coco", path, tmp_path / "images", tmp_path / "coco", "--split", "val") == 0
    assert records(tmp_path / "coco") == {
        "000000000007": ("val", {"captions": ["one", "two"], "image_id": 7})
    }
    image = {
        "license": 0, "id": 0, "file_name": "0013ea2087020901.jpg", "domain": "near-domain",
        "open_images_id": "0013ea2087020901", "coco_url": "https://x", "date_captured": "", "width": 1,
    }  # fmt: skip
    captions = [{"image_id": 0, "id": i, "caption": f"c{i}"} for i in range(10)]
    path = dump(
        tmp_path / "nocaps.json", {"images": [image], "annotations": captions, "info": {}, "licenses": []}
    )
    assert prepare("nocaps", path, tmp_path / "images", tmp_path / "nocaps") == 0
    part, record = records(tmp_path / "nocaps")["0013ea2087020901"]
    assert (
        part == "val"
        and record["domain"] == "near-domain"
        and record["captions"] == [f"c{i}" for i in range(10)]
    )


def test_flickr30k(tmp_path):
    jpeg(tmp_path / "flickr30k-images" / "1000092795.jpg")
    sentence = {"tokens": ["two"], "raw": "Two young guys.", "imgid": 0, "sentid": 0}
    image = {
        "sentids": [0],
        "imgid": 0,
        "sentences": [sentence],
        "split": "test",
        "filename": "1000092795.jpg",
    }
    path = dump(tmp_path / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"})
    assert prepare("flickr30k", path, tmp_path / "flickr30k-images", tmp_path / "out") == 0
    assert records(tmp_path / "out") == {
        "1000092795": ("test", {"captions": ["Two young guys."], "image_id": 0})
    }


def test_vqav2(tmp_path, capsys):
    jpeg(tmp_path / "coco" / "train2014" / "COCO_train2014_000000458752.jpg")
    asked = [
        {
            "image_id": 458752,
            "question": "What is this photo?",
            "question_id": 458752000,
        },
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
    ]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    questions = dump(tmp_path / "q.json", {**head, "task_type": "Open-Ended", "questions": asked})
    answered = [
        {
            "question_type": "what", "multiple_choice_answer": "net", "image_id": 458752,
            "answer_type": "other", "question_id": q["question_id"],
            "answers": [{"answer": "net", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)],
        }
        for q in asked
    ]  # fmt: skip
    answers = dump(tmp_path / "a.json", {**head, "annotations": answered})
    assert prepare("vqav2", questions, tmp_path / "coco", tmp_path / "out", "--answers", answers) == 0
    _, record = records(tmp_path / "out")["COCO_train2014_000000458752"]
    assert [q["question"] for q in record["questions"]] == [q["question"] for q in asked]
    assert record["questions"][1]["answers"] == ["net"] * 10 and record["captions"] == []
    assert record["questions"][0]["multiple_choice_answer"] == "net"
    fewer = dump(tmp_path / "b.json", {**head, "annotations": answered[:1]})
    assert prepare("vqav2", questions, tmp_path / "coco", tmp_path / "other", "--answers", fewer) == 2
    assert "has no answers to 1 of 2 questions" in capsys.readouterr().err
    assert prepare("vqav2", questions, tmp_path / "coco", tmp_path / "test", "--split", "test") == 0
    nameless = dump(tmp_path / "c.json", {"questions": asked})
    assert prepare("vqav2", nameless, tmp_path / "coco", tmp_path / "more", "--split", "test") == 2
    assert "has no 'data_subtype', which names its pictures" in capsys.readouterr().err


def test_visual_genome(tmp_path):
    jpeg(tmp_path / "vg" / "VG_100K" / "1.jpg")
    jpeg(tmp_path / "vg" / "VG_100K_2" / "2.jpg")

    def region(number, phrase):
        return {"region_id": 1, "width": 5, "height": 5, "image_id": number, "phrase": phrase, "y": 0, "x": 0}

    content = [
        {"regions": [region(1, "the clock is green"), region(1, "a man"), region(1, "a man")], "id": 1},
        {"regions": [region(2, "shade")], "id": 2},
        {"regions": [], "id": 3},
    ]
    path = dump(tmp_path / "region_descriptions.json", content)
    assert prepare("visual-genome", path, tmp_path / "vg", tmp_path / "out", "--validation", 1) == 0
    found = records(tmp_path / "out")
    assert found["1"][1]["captions"] == ["the clock is green", "a man"] and set(found) == {"1", "2"}


def test_tables_of_ones_own(tmp_path, capsys):
    for number in range(4):
        jpeg(tmp_path / f"p{number}.JPG", number)
    (tmp_path / "t.csv").write_text(
        'image,caption,split\np0.JPG,"a cat, asleep",train\np1.JPG,a dog,validation\np0.JPG,again,train\n'
    )
    assert prepare("pairs", tmp_path / "t.csv", tmp_path / "csv") == 0
    found = records(tmp_path / "csv")
    assert found["00000000"] == ("train", {"captions": ["a cat, asleep", "again"], "file": "p0.JPG"})
    assert found["00000001"][0] == "val"
    rows = [{"file": f"p{i}.JPG", "captions": ["one", "two"]} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prepare("pairs", tmp_path / "t.jsonl", tmp_path / "jsonl", "--validation", 1) == 0
    assert sorted(part for part, _ in records(tmp_path / "jsonl").values()) == ["train"] * 3 + ["val"]
    capsys.readouterr()
    for text, complaint in (
        ("picture,caption\na,b\n", "no `image`"),
        ('image,captions\np0.JPG,"{}"\n', "no JSON list"),
        ("image,caption,split\np0.JPG,a,dev\n", "split is 'dev'"),
        ("image,caption\n", "name no image"),
        ("image,caption\nnowhere.jpg,a\n", "1 no image file; is the folder of images the right one?"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        assert prepare("pairs", tmp_path / "bad.csv", tmp_path / f"bad-{hash(text)}") == 2
        assert complaint in capsys.readouterr().err
    assert prepare("pairs", tmp_path / "t.jsonl", tmp_path / "all", "--validation", 4) == 2
    assert prepare("coco", tmp_path / "t.csv", tmp_path, tmp_path / "x") == 2
    assert "no JSON" in capsys.readouterr().err


def test_img2dataset_folders_get_their_metadata(tmp_path, capsys):
    folder, image = tmp_path / "cc3m", made.picture(1, kind="JPEG")
    for shard in range(4):
        samples = [
            {"__key__": f"{shard:05d}{i:04d}", "jpg": image, "txt": b"words", "json": b"{}"}
            for i in range(10)
        ]
        made.write(folder / f"{shard:05d}.tar", samples)
        stats = {"count": 14, "successes": 10, "failed_to_download": 3, "failed_to_resize": 1}
        if shard < 3:  # the fourth was not finished
            dump(folder / f"{shard:05d}_stats.json", stats)
    assert prepare("img2dataset", folder, "--validation-shards", 1) == 0
    told = capsys.readouterr().out
    assert "30 kept" in told and "9 not downloaded" in told and "1 unfinished shards" in told
    assert json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"] == {
        f"{shard:05d}.tar": 10 for shard in range(3)
    }
    before = (folder / "00001.tar.idx").stat().st_mtime_ns
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:5000])  # and one is cut off later
    os.utime(folder / "00002.tar", (time.time() + 5, time.time() + 5))
    assert prepare("img2dataset", folder) == 0
    assert "1 unreadable shards" in capsys.readouterr().out
    assert (folder / "00001.tar.idx").stat().st_mtime_ns == before
    batch = next(iter(data.shards_loader(Shards({str(folder): 1.0}), made.tokenize, 4, image_size=8, seed=0)))
    assert "".join(map(chr, batch["input_ids"][0, 1:])) == "words"
    assert prepare("img2dataset", tmp_path / "nothing") == 2


def test_the_metadata_is_energons(tmp_path):
    """What `energon prepare` would write for the same shards is the same."""
    from megatron.energon import CrudeWebdataset

    folder = tmp_path / "a"
    made.make(folder, 10)
    ours = {p.name: p.read_bytes() for p in folder.glob("*.idx")}
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    for path in folder.glob("*.idx"):
        path.unlink()
    CrudeWebdataset.prepare_dataset(
        folder, sorted(info["shard_counts"]), split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1
    )
    assert {p.name: p.read_bytes() for p in folder.glob("*.idx")} == ours
    assert json.loads((folder / ".nv-meta" / ".info.json").read_text()) == info


# --- resuming ---


def table(tmp_path, number=60):
    for i in range(number):
        file = io.BytesIO()
        Image.new("RGB", (300, 300), (i, 0, 0)).save(file, "PNG")
        (tmp_path / f"{i}.png").write_bytes(file.getvalue())
    rows = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(number)]
    (tmp_path / "t.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"image": "no.png", "caption": "x"}]))
    )
    return tmp_path / "t.jsonl"


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    path, out = table(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "train.data", "prepare", "pairs", path, out, "--per-shard", "5"]
    whole = tmp_path / "whole"
    assert prepare("pairs", path, whole, "--per-shard", 5) == 0
    for when in (1, 6):
        process = subprocess.Popen(map(str, [*command, "--workers", "1"]), stderr=subprocess.DEVNULL)
        while len(list(out.glob("*.tar"))) < when and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / ".nv-meta" / "dataset.yaml").exists()
        assert Shards({str(out): 1.0}).missing()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert 6 <= len(kept) < 13
    assert prepare("pairs", path, out, "--per-shard", 5) == 0
    assert read(out) == read(whole) and all(p.stat().st_mtime_ns == then for p, then in kept.items())
    assert not list(out.glob(".*.tmp")) and not list(out.glob("*.tmp"))


def test_other_records_are_refused_in_the_same_folder(tmp_path, capsys):
    path, out = table(tmp_path, 6), tmp_path / "out"
    assert prepare("pairs", path, out) == 0
    told = capsys.readouterr().out
    assert prepare("pairs", path, out) == 0 and capsys.readouterr().out == told
    assert prepare("pairs", path, out, "--per-shard", 3) == 2
    assert "per_shard: 1000 there, 3 here" in capsys.readouterr().err
    made.write(tmp_path / "foreign" / "a.tar", [])
    assert prepare("pairs", path, tmp_path / "foreign") == 2


def test_a_full_disk_leaves_whole_shards_only(tmp_path, capsys, monkeypatch):
    path, out = table(tmp_path, 6), tmp_path / "out"
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(shards.os, "fsync", full)
    assert prepare("pairs", path, out, "--per-shard", 2) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert 0 < len(read(out)) < 3
    assert prepare("pairs", path, out, "--per-shard", 2) == 0 and len(records(out)) == 6


def test_workers_write_the_same_shards(tmp_path):
    from train.data.records import pairs

    path = table(tmp_path, 12)
    counts = [write_shards(pairs(path, tmp_path), tmp_path / str(w), per_shard=4, workers=w) for w in (1, 2)]
    assert counts[0] == counts[1] == {"kept": 12, "no image file": 1}
    assert read(tmp_path / "1") == read(tmp_path / "2")
    with pytest.raises(PrepareError, match="name no image"):
        write_shards([], tmp_path / "none")
