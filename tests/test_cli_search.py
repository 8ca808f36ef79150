"""`blip2 index` and `blip2 search`: what they print, what they refuse, and how they end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import tiny_checkpoints

import blip2.cli.search
from blip2.checkpoint import load
from blip2.cli import main
from blip2.representation import Blip2Representation

ROOT = Path(__file__).resolve().parent.parent
TEXT = "a red circle"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_checkpoints(root)
    return root


@pytest.fixture
def album(tmp_path, monkeypatch):
    """The current folder, with five pictures in `album`, one of them broken."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["a.png", "b.png", "deep/c.png", "d.png"]):
        (tmp_path / "album" / "deep").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "album" / name)
    (tmp_path / "album" / "bad.png").write_bytes(b"\x89PNG not really")
    return tmp_path / "album"


@pytest.fixture
def run(capsys, models):
    """Run a command; `@` stands for the matching model."""

    def run(*words, code=0):
        capsys.readouterr()
        words = [str(models / "scenes-itm") if word == "@" else str(word) for word in words]
        assert main(words) == code, capsys.readouterr().err
        return capsys.readouterr()

    return run


def index(run, album, *words):
    return run("index", album, "--model", "@", *words)


def test_index_and_search(run, album, models, monkeypatch):
    said = index(run, album)
    assert said.out == f"{album / '.blip2-index'}: 3 pictures; 3 encoded, 0 kept, 0 gone, 1 failed\n"
    assert "bad.png starts like an image but is truncated" in said.err
    out = run("search", album, TEXT, "--top", "2").out.splitlines()
    loaded = load(models / "scenes-itm")
    names = ["a.png", "b.png", "d.png"]
    image = loaded.model.encode_image(loaded.processor.images([album / name for name in names]))
    tokens = loaded.processor.text([TEXT])
    cosine = dict(zip(names, loaded.model.score(image, **tokens, head="itc")[:, 0].tolist(), strict=True))
    best = sorted(names, key=cosine.get, reverse=True)
    assert out[0].split() == ["cosine", "file"]
    assert [line.split()[1] for line in out[1:]] == [str(album / name) for name in best[:2]]
    assert [float(line.split()[0]) for line in out[1:]] == pytest.approx(
        [cosine[n] for n in best[:2]], abs=2e-3
    )

    document = json.loads(run("search", album, TEXT, "--rerank", "2", "--json").out)
    logits = dict(zip(names, loaded.model.match_logits(image, **tokens)[:, 0, 1].tolist(), strict=True))
    assert [one["match"] is None for one in document["results"]] == [False, False, True]
    for one in document["results"][:2]:
        assert one["score"] == pytest.approx(logits[one["image"]] + cosine[one["image"]], abs=2e-3)
    assert document["pictures"] == 3 and document["query"] == {"text": TEXT}
    table = run("search", album, TEXT, "--rerank", "2").out.splitlines()
    assert table[0].split() == ["score", "match", "cosine", "file"]
    assert [len(line.split()) for line in table[1:]] == [4, 4, 2]
    found = json.loads(run("search", album, "--image", album / "b.png", "--json").out)["results"]
    assert found[0]["image"] == "b.png" and found[0]["path"] == str(album / "b.png")

    # as it is, without a model; then with what is new
    monkeypatch.setattr(blip2.cli.search, "load_model", None)
    said = run("index", album, "--json")
    assert json.loads(said.out) | {"failed": 0} == {
        "model": str(models / "scenes-itm"), "precision": "float32", "index": str(album / ".blip2-index"),
        "pictures": 3, "encoded": 0, "kept": 3, "gone": [], "failed": 0, "unknown": [],
    }  # fmt: skip
    assert [one["image"] for one in json.loads(said.out)["failed"]] == ["bad.png"]
    monkeypatch.undo()
    monkeypatch.chdir(album.parent)
    (album / "a.png").unlink()
    assert "3 pictures; 1 encoded, 2 kept, 1 gone" in run("index", "album", "--recursive").out
    assert "0 encoded, 3 kept" in run("index", "album").out


def test_an_index_elsewhere(run, album):
    assert index(run, album, "--out", "mine").out.startswith("mine: 3 pictures")
    assert str(album) in run("search", "mine", TEXT, "-k", "1").out and not (album / ".blip2-index").exists()
    assert "0 encoded" in run("index", album, "--out", "mine").out


def test_stopped_runs_say_so(run, album, monkeypatch):
    encode, left = Blip2Representation.encode_image, [1]

    def stop(self, pixels):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Blip2Representation, "encode_image", stop)
    said = run("index", album, "--model", "@", "--batch-size", "1", code=130)
    assert "1 picture done, 3 left: the same command goes on" in said.err
    monkeypatch.undo()
    monkeypatch.chdir(album.parent)
    assert "was not finished" in run("search", album, TEXT, code=1).err
    assert "3 pictures; 2 encoded" in run("index", album).out  # the model is known by now


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["search", "album"], 2, "give a text"),
        (["search", "album", TEXT, "--image", "album/a.png"], 2, "give a text"),
        (["search", "album", "  "], 1, "the query is empty"),
        (["search", "album", TEXT, "--top", "0"], 2, "--top is 0"),
        (["search", "album", TEXT, "--rerank", "-1"], 2, "--rerank is -1"),
        (["search", "album", "--image", "album/a.png", "--rerank", "4"], 2, "--rerank goes with a text"),
        (["search", "album", "--image", "album/bad.png"], 1, "truncated or damaged"),
        (["search", "nowhere", TEXT], 1, "nowhere is not a folder"),
        (["search", "album/deep", TEXT], 1, "has no index: make one with"),
        (["search", "album", TEXT, "--precision", "bfloat16"], 1, "in float32, and this is bfloat16"),
        (["search", "album", TEXT, "--model", "opt"], 2, "a model that scores texts is needed"),
        (["index", "nowhere"], 1, "nowhere is not a folder"),
        (["index", "album", "--batch-size", "0"], 2, "--batch-size is 0"),
        (["index", "album", "--precision", "bfloat16"], 1, "was made in float32"),
        (["index", "album/deep", "--out", "album"], 1, "is no index"),
    ],
)  # fmt: skip
def test_bad_words(run, album, models, words, code, said):
    index(run, album)
    (album.parent / "opt").symlink_to(models / "scenes-opt")
    assert said in run(*words, code=code).err


def test_a_folder_without_a_usable_picture(run, album):
    for name in ("a.png", "b.png", "d.png"):
        (album / name).unlink()
    said = run("index", album, "--model", "@", code=1)
    assert "0 pictures; 0 encoded, 0 kept, 0 gone, 1 failed" in said.out
    assert "has no pictures" in run("search", album, TEXT).err


def test_the_embedded_model_finds_scenes_and_declines_photographs(run, tmp_path, capsys):
    for name in ("scene-1.png", "scene-2.png", "scene-4.png", "photos/cat.jpg"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    said = run("index", tmp_path)
    assert "using the embedded model scenes-itm" in said.err
    assert "1 picture left out, of a kind that scenes-itm does not know" in said.err
    for text, name in (
        ("a small green circle and a large red star", "scene-1.png"),
        ("a yellow heart right of a blue square", "scene-2.png"),
    ):
        for more in ([], ["--rerank", "3"]):
            assert name in run("search", tmp_path, text, *more).out.splitlines()[1]
    assert "does not look like one" in run("search", tmp_path, "--image", tmp_path / "cat.jpg", code=1).err
    assert "words that scenes-itm does not know: zebra" in run("search", tmp_path, "a zebra").err
