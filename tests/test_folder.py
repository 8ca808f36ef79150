"""Captions of a folder: every picture gets its own, a stop loses nothing, bad pictures spoil nothing."""

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from blip2.chat import Chat
from blip2.checkpoint import Loaded, load
from blip2.folder import caption_folder
from blip2.generation import Generation, generate
from blip2.pictures import Captioning, Failure, find_pictures
from blip2.processing import Processor
from blip2.sidecars import Entry, FolderError, Sidecars, Table

EXAMPLES = Path(__file__).parents[1] / "examples"
GREEDY = Generation(max_new_tokens=6, min_new_tokens=3)


def loaded(family):
    words = tiny.language_family(family)
    processor = Processor(
        tiny.tokenizer(words), family=words, image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
    )
    return Loaded(tiny.ours(family), processor, family, "float32", torch.device("cpu"), None, [])


@pytest.fixture
def folder(tmp_path):
    """Five pictures, one of them in a folder, one unreadable, and what is none."""
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("b.png", "a.jpg", "C.PNG", "deep/d.webp", ".hidden/no.png"):
        pixels = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    (tmp_path / "e.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_pictures_are_found(folder, tmp_path_factory):
    assert find_pictures(folder) == ["a.jpg", "b.png", "C.PNG", "e.png"]
    assert find_pictures(folder, recursive=True) == ["a.jpg", "b.png", "C.PNG", "deep/d.webp", "e.png"]
    with pytest.raises(FolderError, match="not a folder"):
        find_pictures(folder / "notes.md")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FolderError, match="no pictures"):
        find_pictures(empty)
    (empty / "in").mkdir()
    (folder / "a.jpg").rename(empty / "in" / "a.jpg")
    with pytest.raises(FolderError, match="hold 1, which --recursive takes in"):
        find_pictures(empty)


@pytest.mark.parametrize("family", ["opt", "t5"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_picture_gets_its_own_captions_answers_and_scores(folder, family, size):
    model, scorer = loaded(family), loaded("retrieval")
    pictures = find_pictures(folder, recursive=True)
    wanted = Captioning(
        GREEDY, prompt="a photo of", keep_prompt=True, suffix="!", questions=("how many?",), batch_size=size
    )
    with Sidecars(folder) as out:
        results = list(caption_folder(model, folder, pictures, out, wanted, scorer))
    assert [result.image for result in results] == pictures
    assert isinstance(results[-1], Failure) and "damaged" in results[-1].reason
    for entry in results[:-1]:
        image = model.model.encode_image(model.processor.images(Image.open(folder / entry.image)))
        [[text]] = generate(model.model, model.processor, image, "a photo of", GREEDY)
        assert entry.captions == (f"a photo of {text}!",)
        prompt = model.processor.prompt("how many?", model.processor.question_style)
        [[answer]] = generate(
            model.model, model.processor, image, prompt, Generation.answer(), questions=["how many?"]
        )
        assert entry.answers == {"how many?": answer}
        seen = scorer.model.encode_image(scorer.processor.images(Image.open(folder / entry.image)))
        expected = scorer.model.score(seen, **scorer.processor.text(entry.captions[0]))
        assert entry.match == pytest.approx(expected[0].tolist(), abs=1e-5)
        line = ", ".join([*entry.captions, answer])
        assert (folder / entry.image).with_suffix(".txt").read_text("utf-8") == f"{line}\n"
    assert not (folder / "e.txt").exists()


def test_a_batch_that_does_not_fit_is_halved(folder, monkeypatch):
    model = loaded("opt")
    encode, sizes = model.model.encode_image, []

    def small(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return encode(pixels)

    monkeypatch.setattr(model.model, "encode_image", small)
    results = list(caption_folder(model, folder, ["a.jpg", "b.png", "C.PNG"], None, Captioning(GREEDY)))
    assert [type(result) for result in results] == [Entry] * 3 and sizes == [3, 1, 2, 1, 1]
    monkeypatch.setattr(model.model, "encode_image", lambda pixels: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(caption_folder(model, folder, ["a.jpg"], None, Captioning(GREEDY)))


def test_sidecars_that_exist(folder):
    (folder / "a.txt").write_bytes("\ufeffalready".encode())
    pictures = ["a.jpg", "b.png"]
    assert Sidecars(folder).missing(pictures) == ["b.png"]
    assert Sidecars(folder, ".caption").missing(pictures) == pictures
    Sidecars(folder, if_exists="append").write(Entry("a.jpg", ("one", "twö")))
    assert (folder / "a.txt").read_text("utf-8") == "already\none\ntwö\n"
    overwrite = Sidecars(folder, if_exists="overwrite")
    assert overwrite.missing(pictures) == pictures
    overwrite.write(Entry("a.jpg", ("new",)))
    assert (folder / "a.txt").read_text("utf-8") == "new\n"
    with pytest.raises(FolderError, match=r"a\.jpg and a\.png would share a\.txt"):
        Sidecars(folder).missing(["a.jpg", "a.png"])
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_table_goes_on_after_a_crash(tmp_path, ending):
    path = tmp_path / f"captions{ending}"
    entries = [
        Entry("a.png", ("a, b", 'c "d"'), (0.9, 0.25), {"what?": "x\ny"}),
        Entry("b.png", ("é",), (0.1,), {"what?": "z"}),
    ]
    table = Table(path, questions=["what?"])
    assert not path.exists() and table.missing(["a.png", "b.png"]) == ["a.png", "b.png"]
    table.__enter__()
    for entry in entries:
        table.write(entry)
    with path.open("a", encoding="utf-8") as file:
        file.write('c.png,"half a' if ending == ".csv" else '{"image": "c.png", "cap')
    with Table(path, questions=["why?"]) as again:
        assert again.missing(["a.png", "b.png", "c.png"]) == ["c.png"]
        again.write(Entry("c.png", ("fine",), (0.5,), {"why?": "so"}))
    found = Table(path).entries
    assert list(found) == ["b.png", "a.png", "c.png"]  # the worst match first
    assert found["a.png"] == entries[0] and found["b.png"] == entries[1]
    assert found["c.png"].answers == {"why?": "so"}
    if ending == ".csv":
        rows = list(csv.DictReader(path.open(encoding="utf-8")))
        assert rows[0] == {"image": "b.png", "caption": "é", "match": "0.1000", "what?": "z", "why?": ""}
        assert len(rows) == 4
    else:
        assert json.loads(path.read_text("utf-8").splitlines()[0])["captions"] == ["é"]


def test_a_table_of_something_else_is_left_alone(tmp_path):
    for name, text in {"a.csv": "name,price\nx,1\n", "b.jsonl": '{"id": 1}\n', "c.csv": "\xff"}.items():
        (tmp_path / name).write_text(text, "latin-1")
        with pytest.raises(FolderError, match="choose another name"):
            Table(tmp_path / name)
        assert (tmp_path / name).read_text("latin-1") == text


def test_rows_are_appended_or_replaced(tmp_path):
    path = tmp_path / "captions.csv"
    with Table(path) as table:
        table.write(Entry("a.png", ("one",)))
    with Table(path, "append") as table:
        assert table.missing(["a.png"]) == ["a.png"]
        table.write(Entry("a.png", ("two",), (0.5,)))
    first, second = csv.DictReader(path.open())
    assert (first["caption"], first["match"]) == ("one", "")
    assert (second["caption"], second["match"]) == ("two", "0.5000")
    with Table(path, "overwrite") as table:
        table.write(Entry("a.png", ("three",)))
    assert Table(path).entries == {"a.png": Entry("a.png", ("three",))}


@pytest.mark.parametrize("name", ["scenes-opt", "scenes-flan-t5"])
@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_words_to_avoid_are_not_said(name, method):
    model = load(name)
    settings = Generation(method, seed=0)
    image = model.model.encode_image(model.processor.images(Image.open(EXAMPLES / "scene-1.png")))
    [[said]] = generate(model.model, model.processor, image, "a photo of", settings)
    words = tuple(word.upper() for word in said.replace(",", "").split() if word not in ("a", "and"))
    [[other]] = generate(model.model, model.processor, image, "a photo of", settings.with_(avoid=words))
    assert len(words) > 1 and other and not {word.lower() for word in words} & set(other.split())
    chat = Chat(model.model, model.processor, style="raw")
    chat.set_image(image)
    first = chat.ask("a photo of", settings)
    assert first.split()[0] not in chat.ask("a photo of", settings.with_(avoid=tuple(first.split()))).split()
