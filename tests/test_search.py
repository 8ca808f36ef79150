"""Search: the nearest are `score`'s, only what is new is encoded, no stop and no bad file spoils an index."""

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from PIL import Image
from uploading import counting

from blip2.checkpoint import load, save
from blip2.errors import PromptError, UnknownPictureError
from blip2.novelty import Novelty
from blip2.processing import Processor
from blip2.representation import Blip2Representation
from blip2.search import Index, SearchError, check_model, index_folder, indexing, search
from blip2.search import writer as writers
from blip2.search.store import HIDDEN
from blip2.search.vectors import nearest
from blip2.sidecars import FolderError

NAMES = ["a.png", "b.jpg", "C.PNG", "d.png", "e.png", "f.png", "g.png"]
TEXT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models of the same name and shape."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        words = tiny.tokenizer("bert")
        processor = Processor(
            words, family="bert", image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
        )
        save(tiny.ours("retrieval", seed), processor, root / str(seed) / "matcher")
    return root


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return load(checkpoints / "0" / "matcher")


def draw(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Seven pictures; files that are none, and one in a folder."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        draw(folder / name, seed)
    draw(folder / "deep" / "h.png", 100)
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures were encoded, each time."""
    return counting(monkeypatch, Blip2Representation, [])


def truth(loaded, folder, names, text):
    """What `score` says of each picture by ITC, and its match logit."""
    pixels = loaded.processor.images([folder / name for name in names])
    image = loaded.model.encode_image(pixels)
    tokens = loaded.processor.text([text])
    cosine = loaded.model.score(image, **tokens, head="itc")[:, 0].tolist()
    logits = loaded.model.match_logits(image, **tokens)[:, 0]
    return cosine, logits[:, 1].tolist(), logits.softmax(-1)[:, 1].tolist()


def names(found):
    return [one.image for one in found]


# --- nearest ---


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02])
def test_nearest_are_the_nearest(share):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((300, 5, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    query = rows[7, 3] + 0.1
    query /= np.linalg.norm(query)
    alive = generator.random(300) < share
    best = (rows @ query).max(1)
    rows = rows.astype(np.float16)
    order = [int(row) for row in np.argsort(-(rows.astype(np.float32) @ query).max(1)) if alive[row]]
    for k in (1, 10, 1000):
        found = nearest(rows, query, k, alive)
        assert [row for row, _ in found] == order[:k]
        assert [cosine for _, cosine in found] == pytest.approx(best[order[:k]], abs=1e-3)
    assert nearest(rows, query, 3)[0][0] == 7


def test_nearest_looks_on_where_the_nearest_are_dead():
    """All vectors of the dead rows are closer than any of the living."""
    rows = np.zeros((400, 4, 2), np.float16)
    rows[:380, :, 0] = 1
    rows[380:, :, 1] = 1
    alive = np.arange(400) >= 380
    assert [row for row, _ in nearest(rows, np.array([1, 0], np.float32), 5, alive)] == [
        380,
        381,
        382,
        383,
        384,
    ]
    assert nearest(rows, np.array([1, 0], np.float32), 5, np.zeros(400, bool)) == []


# --- search ---


def test_a_text_finds_what_itc_scores_best(loaded, folder):
    summary = index_folder(loaded, folder)
    assert (summary.pictures, summary.encoded, summary.place) == (7, 7, folder / HIDDEN)
    found = search(loaded, Index(folder), TEXT, k=5)
    cosine, _, _ = truth(loaded, folder, NAMES, TEXT)
    order = sorted(range(7), key=lambda row: -cosine[row])
    assert names(found) == [NAMES[row] for row in order[:5]]
    assert [one.score for one in found] == pytest.approx([cosine[row] for row in order[:5]], abs=1e-3)
    assert found[0].path == folder / found[0].image and found[0].match is None
    assert search(loaded, Index(folder), "dog on the left", k=1)[0].score != found[0].score


def test_itm_puts_the_nearest_in_order(loaded, folder):
    index_folder(loaded, folder)
    cosine, logit, match = truth(loaded, folder, NAMES, TEXT)
    order = sorted(range(7), key=lambda row: -cosine[row])
    again = sorted(order[:4], key=lambda row: -(logit[row] + cosine[row]))
    assert again != order[:4], "the test would show nothing"
    found = search(loaded, Index(folder), TEXT, k=6, rerank=4)
    assert names(found) == [NAMES[row] for row in [*again, *order[4:6]]]
    assert [one.match for one in found[:4]] == pytest.approx([match[row] for row in again], abs=1e-5)
    assert [one.score for one in found[:4]] == pytest.approx([logit[r] + cosine[r] for r in again], abs=1e-3)
    assert [one.match for one in found[4:]] == [None, None]
    # more are looked at than are wanted, and a lower one may win
    assert names(search(loaded, Index(folder), TEXT, k=1, rerank=4)) == [NAMES[again[0]]]


def test_a_picture_that_is_gone_comes_after_those_that_matched(loaded, folder):
    index_folder(loaded, folder)
    index = Index(folder)
    first = search(loaded, index, TEXT, k=7, rerank=7)[0]
    first.path.unlink()
    found = search(loaded, index, TEXT, k=7, rerank=7)
    assert names(found)[-1] == first.image and "not here any more" in found[-1].reason
    assert all(one.match is not None and not one.reason for one in found[:-1])


def test_a_picture_finds_itself(loaded, folder):
    index_folder(loaded, folder, recursive=True)
    index = Index(folder)
    for name in ("b.jpg", "deep/h.png"):
        found = search(loaded, index, Image.open(folder / name), k=3)
        assert (
            found[0].image == name and found[0].score == pytest.approx(1, abs=2e-3) and found[1].score < 0.999
        )


def test_searches_that_cannot_be(loaded, folder):
    index_folder(loaded, folder)
    index = Index(folder)
    with pytest.raises(PromptError, match="empty"):
        search(loaded, index, "  ")
    with pytest.raises(PromptError, match="shorten"):
        search(loaded, index, "cat " * 60)
    for options in ({"k": 0}, {"rerank": -1}):
        with pytest.raises(SearchError, match="are allowed"):
            search(loaded, index, TEXT, **options)
    with pytest.raises(SearchError, match="not reranked"):
        search(loaded, index, Image.open(folder / "a.png"), rerank=4)


# --- indexing again ---


def test_only_what_is_new_is_encoded(loaded, folder, encoded):
    index_folder(loaded, folder, batch_size=3)
    assert encoded == [3, 3, 1]
    before = search(loaded, Index(folder), TEXT, k=7)

    encoded.clear()
    summary = index_folder(loaded, folder)
    assert (summary.encoded, summary.kept, summary.gone, encoded) == (0, 7, [], [])
    assert search(loaded, Index(folder), TEXT, k=7) == before

    os.utime(folder / "a.png", (1, 1))  # touched
    (folder / "C.PNG").rename(folder / "moved.png")
    shutil.copy(folder / "d.png", folder / "same.png")
    summary = index_folder(loaded, folder)
    assert (summary.encoded, summary.kept, summary.gone, encoded) == (0, 8, ["C.PNG"], [])
    after = {one.image: one.score for one in search(loaded, Index(folder), TEXT, k=8)}
    assert after["same.png"] == after["d.png"] and after.pop("same.png")
    assert after == {one.image.replace("C.PNG", "moved.png"): one.score for one in before}

    draw(folder / "new.png", 50)
    draw(folder / "b.jpg", 51)
    (folder / "e.png").unlink()
    summary = index_folder(loaded, folder)
    assert (summary.encoded, summary.gone, encoded) == (2, ["e.png"], [2])
    found = search(loaded, Index(folder), TEXT, k=20)
    assert sorted(names(found)) == [
        "a.png",
        "b.jpg",
        "d.png",
        "f.png",
        "g.png",
        "moved.png",
        "new.png",
        "same.png",
    ]
    cosine, _, _ = truth(loaded, folder, names(found), TEXT)
    assert [one.score for one in found] == pytest.approx(cosine, abs=1e-3)


def test_folders_in_it_stay_once_they_are_in(loaded, folder, encoded):
    assert index_folder(loaded, folder).pictures == 7
    assert index_folder(loaded, folder, recursive=True).pictures == 8
    assert index_folder(loaded, folder).pictures == 8
    assert sum(encoded) == 8


def test_bad_pictures_are_told_and_spoil_nothing(loaded, folder, encoded):
    (folder / "bad.png").write_bytes(b"\x89PNG not really")
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.png")
    summary = index_folder(loaded, folder, batch_size=4)
    assert summary.pictures == 7
    reasons = {picture.image: picture.reason for picture in summary.bad}
    assert set(reasons) == {"bad.png", "empty.jpg", "pipe.png"}
    assert (
        "damaged" in reasons["bad.png"]
        and "empty" in reasons["empty.jpg"]
        and "regular" in reasons["pipe.png"]
    )
    again = index_folder(loaded, folder)
    assert {picture.image: picture.reason for picture in again.bad} == reasons and sum(encoded) == 7
    draw(folder / "bad.png", 60)
    mended = index_folder(loaded, folder)
    assert (mended.pictures, mended.encoded) == (8, 1) and sum(encoded) == 8


def test_pictures_of_an_unknown_kind_are_left_out_unless_forced(loaded, folder, encoded):
    shy = replace(loaded, novelty=Novelty(torch.zeros(48), -1.0, "nothing"))
    summary = index_folder(shy, folder)
    assert summary.pictures == 0 and all(picture.unknown for picture in summary.bad) and len(summary.bad) == 7
    assert "knows nothing only" in summary.bad[0].reason and search(loaded, Index(folder), TEXT) == []
    index_folder(shy, folder)
    assert sum(encoded) == 7, "an unchanged folder is not encoded"
    assert index_folder(shy, folder, force=True).pictures == 7
    index_folder(shy, folder, force=True)
    assert sum(encoded) == 14
    with pytest.raises(UnknownPictureError):
        search(shy, Index(folder), Image.open(folder / "a.png"))
    assert len(search(shy, Index(folder), Image.open(folder / "a.png"), force=True)) == 7


def test_a_batch_that_does_not_fit_is_halved(loaded, folder, monkeypatch):
    encode, sizes = Blip2Representation.encode_image, []

    def small(self, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return encode(self, pixels)

    monkeypatch.setattr(Blip2Representation, "encode_image", small)
    assert index_folder(loaded, folder).pictures == 7 and sizes == [7, 3, 1, 2, 4, 2, 2]
    monkeypatch.undo()
    found = search(loaded, Index(folder), TEXT, k=7)
    assert [one.score for one in found] == pytest.approx(
        truth(loaded, folder, names(found), TEXT)[0], abs=1e-3
    )


def test_no_numbers_are_no_vectors(loaded, folder, monkeypatch):
    feats = Blip2Representation.image_feats
    spoil = torch.tensor([1.0, float("nan"), 1.0]).view(3, 1, 1)
    monkeypatch.setattr(
        Blip2Representation, "image_feats", lambda self, seen: feats(self, seen) * spoil[: len(seen)]
    )
    summary = index_folder(loaded, folder, batch_size=3)
    assert [picture.image for picture in summary.bad] == ["b.jpg", "e.png"] and summary.pictures == 5
    assert "NaN" in summary.bad[0].reason


# --- stops ---


def stop_after(monkeypatch, batches):
    """Have a run end in the midst of encoding."""
    encode, left = Blip2Representation.encode_image, [batches]

    def failing(self, pixels):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Blip2Representation, "encode_image", failing)


def test_a_stopped_run_is_gone_on_with(loaded, folder, monkeypatch, encoded):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            index_folder(loaded, folder, batch_size=2)
    with pytest.raises(SearchError, match="was not finished"):
        Index(folder)
    assert sum(encoded) == 4
    assert index_folder(loaded, folder).encoded == 3 and sum(encoded) == 7

    before = search(loaded, Index(folder), TEXT, k=9)
    for seed in range(4):
        draw(folder / f"new-{seed}.png", 70 + seed)
    (folder / "a.png").unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            index_folder(loaded, folder, batch_size=2)
    assert search(loaded, Index(folder), TEXT, k=9) == before, "what searches see is whole"
    assert index_folder(loaded, folder).encoded == 2 and sum(encoded) == 11
    found = search(loaded, Index(folder), TEXT, k=20)
    assert len(found) == 10
    assert [one.score for one in found] == pytest.approx(
        truth(loaded, folder, names(found), TEXT)[0], abs=1e-3
    )


def test_files_cut_off_anywhere_are_recovered(loaded, folder, tmp_path):
    """As a kill or a full disk leaves them: every line that is whole counts, and its row is there."""
    place = folder / HIDDEN
    summary = index_folder(loaded, folder, batch_size=2)
    head = json.loads((place / "index.json").read_text())
    whole = (place / "pictures-1.jsonl").read_bytes()
    found = search(loaded, Index(folder), TEXT, k=7)
    (place / "index.json").write_text(json.dumps(head | {"lines": -1}))
    for cut in [*range(0, len(whole), 97), len(whole) - 1]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        with (copy / HIDDEN / "pictures-1.jsonl").open("r+b") as file:
            file.truncate(cut)
        with (copy / HIDDEN / "features-1.f16").open("ab") as file:
            file.write(b"half a row")
        again = index_folder(loaded, copy)
        assert again.encoded == summary.encoded - whole[:cut].count(b"\n")
        assert [one.score for one in search(loaded, Index(copy), TEXT, k=7)] == [one.score for one in found]


def test_one_run_at_a_time(loaded, folder):
    with indexing(loaded, folder) as run:
        with pytest.raises(SearchError, match="another run is at work"):
            index_folder(loaded, folder)
        assert len(list(run)) == 7
    assert index_folder(loaded, folder).encoded == 0
    with FileLock(folder / HIDDEN / ".lock"):
        assert len(Index(folder)) == 7, "searching waits for nobody"


def test_the_dead_make_room(loaded, folder, monkeypatch, encoded):
    monkeypatch.setattr(writers, "DEAD", 0)
    monkeypatch.setattr(writers, "COPIED", 2)
    index_folder(loaded, folder)
    opened = Index(folder)
    for name in NAMES[:5]:
        (folder / name).unlink()
    index_folder(loaded, folder)
    place = folder / HIDDEN
    assert Index(folder).head.number == 2 and sorted(p.name for p in place.glob("*-*")) == [
        "features-2.f16", "means-2.f16", "pictures-2.jsonl"
    ]  # fmt: skip
    assert (place / "features-2.f16").stat().st_size == 2 * 2 * tiny.NUM_QUERIES * 16
    found = search(loaded, Index(folder), TEXT)
    assert sorted(names(found)) == ["f.png", "g.png"]
    assert [one.score for one in found] == pytest.approx(
        truth(loaded, folder, names(found), TEXT)[0], abs=1e-3
    )
    assert len(search(loaded, opened, TEXT)) == 7, "who has it open goes on with the old files"
    encoded.clear()
    draw(folder / "new.png", 80)
    assert index_folder(loaded, folder).pictures == 3 and encoded == [1] and len(Index(folder)) == 3
    found = search(loaded, Index(folder), TEXT)
    assert [one.score for one in found] == pytest.approx(
        truth(loaded, folder, names(found), TEXT)[0], abs=1e-3
    )


# --- what does not go together ---


def test_another_model_is_refused(loaded, folder, checkpoints, encoded):
    index_folder(loaded, folder)
    index = Index(folder)
    other = load(checkpoints / "1" / "matcher")
    for refuse in (lambda: index_folder(other, folder), lambda: check_model(index, other)):
        with pytest.raises(SearchError, match=r"with .*matcher, and this is .*1/matcher"):
            refuse()
    half = load(checkpoints / "0" / "matcher", precision="bfloat16")
    with pytest.raises(SearchError, match="was made in float32, and this is bfloat16"):
        index_folder(half, folder)
    assert sum(encoded) == 7
    check_model(index, loaded)
    copy = checkpoints / "copy"
    shutil.copytree(checkpoints / "0" / "matcher", copy)  # the same weights, elsewhere
    check_model(index, load(copy))


def test_weights_are_read_once(loaded, folder, monkeypatch):
    index_folder(loaded, folder)
    digests = Counter()
    digest = __import__("hashlib").file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *a: digests.update(["read"]) or digest(*a))
    index_folder(loaded, folder)
    check_model(Index(folder), loaded)
    assert not digests
    weights = loaded.folder / "model.safetensors"
    os.utime(weights, ns=(time.time_ns(), time.time_ns()))
    check_model(Index(folder), loaded)
    assert digests["read"] == 1, "a file that may have changed is read"


def test_a_model_that_writes_finds_nothing(loaded, folder):
    writer = replace(loaded, model=tiny.ours("opt"))
    with pytest.raises(SearchError, match="writes texts"):
        index_folder(writer, folder)
    assert not (folder / HIDDEN).exists()


def test_places_that_cannot_be(loaded, folder, tmp_path):
    with pytest.raises(FolderError, match="not a folder"):
        index_folder(loaded, tmp_path / "nowhere")
    (tmp_path / "empty" / "in").mkdir(parents=True)
    draw(tmp_path / "empty" / "in" / "a.png", 0)
    with pytest.raises(FolderError, match="hold 1"):
        index_folder(loaded, tmp_path / "empty")
    assert not (tmp_path / "empty" / HIDDEN).exists()
    for other in (folder, folder / "notes.md"):
        with pytest.raises(SearchError, match="is no index"):
            index_folder(loaded, folder, other)
    for path, said in ((tmp_path / "nowhere", "is not a folder"), (folder, "has no index")):
        with pytest.raises(SearchError, match=said):
            Index(path)
    elsewhere = tmp_path / "index"
    index_folder(loaded, folder, elsewhere)
    assert not (folder / HIDDEN).exists() and Index(elsewhere).folder == folder
    (tmp_path / "others").mkdir()
    draw(tmp_path / "others" / "a.png", 0)
    with pytest.raises(SearchError, match="is of the pictures in"):
        index_folder(loaded, tmp_path / "others", elsewhere)
    with pytest.raises(ValueError, match="batch_size is 0"):
        index_folder(loaded, folder, batch_size=0)


def test_an_index_moves_with_its_folder(loaded, folder, tmp_path, encoded):
    index_folder(loaded, folder)
    folder.rename(tmp_path / "renamed")
    assert index_folder(loaded, tmp_path / "renamed").encoded == 0 and sum(encoded) == 7
    assert search(loaded, Index(tmp_path / "renamed"), TEXT)[0].path.is_file()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("index.json", b"{"),
        ("index.json", b"[1]"),
        ("index.json", b'{"format": 1}'),
        ("pictures-1.jsonl", b""),
        ("pictures-1.jsonl", b"{}\n" * 7),
        ("pictures-1.jsonl", b"\xff\n" * 7),
        ("features-1.f16", b"short"),
        ("means-1.f16", b""),
        ("means-1.f16", None),
    ],
)
def test_a_damaged_index_is_said_to_be(loaded, folder, file, content):
    index_folder(loaded, folder)
    path = folder / HIDDEN / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(SearchError, match="is damaged"):
        Index(folder)
    with pytest.raises(SearchError, match="is damaged"):
        index_folder(loaded, folder)


def test_an_index_of_a_later_version_is_left_alone(loaded, folder):
    index_folder(loaded, folder)
    path = folder / HIDDEN / "index.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    for refused in (lambda: Index(folder), lambda: index_folder(loaded, folder)):
        with pytest.raises(SearchError, match="update blip2"):
            refused()


def test_without_the_library_a_sentence(loaded, folder, monkeypatch):
    index_folder(loaded, folder)
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(SearchError, match='pip install "usearch'):
        search(loaded, Index(folder), TEXT)
