"""The command line: what goes to stdout, what to stderr, and exit codes; every bad input is one sentence."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

import blip2.chat
import blip2.convert
import blip2.images
import blip2.presets
from blip2 import generation, report
from blip2.checkpoint import load, save
from blip2.cli import main
from blip2.cli.arguments import PRECISIONS
from blip2.generation import Generation
from blip2.novelty import Novelty
from blip2.presets import PRESETS
from blip2.processing import Processor

ROOT = Path(__file__).resolve().parent.parent
LONG = ["--method", "nucleus", "--seed", "1", "--temperature", "3", "--top-p", "1"]
LONG += ["--max-new-tokens", "12", "--min-new-tokens", "12"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tiny random checkpoints: opt, t5 and retrieval."""
    root = tmp_path_factory.mktemp("models")
    for family in ("opt", "t5", "retrieval"):
        words = tiny.language_family(family)
        processor = Processor(
            tiny.tokenizer(words), family=words, image_size=tiny.IMAGE_SIZE, num_query_tokens=tiny.NUM_QUERIES
        )
        save(tiny.ours(family), processor, root / family)
    return root


@pytest.fixture
def folder(tmp_path, models, monkeypatch):
    """The current folder: pictures and checkpoints; the Hub's cache is empty, and nothing is embedded."""
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(
            tmp_path / name
        )
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blip2.presets, "resources", SimpleNamespace(files=lambda _: tmp_path / "package"))
    return tmp_path


@pytest.fixture
def embedded(folder, models):
    """Tiny checkpoints in place of the embedded ones."""
    for name, family in {"scenes-opt": "opt", "scenes-flan-t5": "t5", "scenes-itm": "retrieval"}.items():
        shutil.copytree(models / family, folder / "package" / "assets" / name)


@pytest.fixture
def cached(folder, models):
    """A tiny checkpoint in place of a released one in the Hub's cache."""
    repository = folder / "cache" / "models--Salesforce--blip2-flan-t5-xl"
    shutil.copytree(models / "t5", repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


@pytest.fixture
def blip2_(folder, capsys):
    """Run a command: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def chat(blip2_, monkeypatch):
    """Run `chat` with lines in a pipe."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return blip2_("chat", "a.png", "--model", "opt", *options)

    return run


# --- answers ---


def test_caption_is_the_models(blip2_, models):
    code, out, err = blip2_("caption", "a.png", "--model", "t5", "--quiet")
    loaded = load(models / "t5")
    pixels = loaded.processor.images(Image.open("a.png"))
    ids = loaded.model.generate(pixels, **loaded.processor.text(""), **Generation.caption().options())
    assert (code, out, err) == (0, loaded.processor.decode(ids)[0] + "\n", "")


def test_caption_prompt_and_number(blip2_):
    code, out, _ = blip2_(
        "caption",
        "a.png",
        "--model",
        "t5",
        "--prompt",
        "a photo of",
        "--num-captions",
        3,
        "--max-new-tokens",
        4,
    )
    assert (code, len(out.splitlines())) == (0, 3)
    plain = blip2_("caption", "a.png", "--model", "t5", "--num-captions", 3, "--max-new-tokens", 4)[1]
    assert out != plain


def test_several_pictures_and_one_bad(blip2_):
    code, out, err = blip2_("caption", "a.png", "no.png", "b.png", "--model", "t5", "--json")
    document = json.loads(out)
    assert code == 1 and err == "blip2: there is no file 'no.png'; check the path.\n"
    assert [sorted(result) for result in document["results"]] == [
        ["captions", "image"],
        ["error", "image"],
        ["captions", "image"],
    ]
    assert (document["model"], document["precision"], document["prompt"]) == ("t5", "float32", "")
    code, out, _ = blip2_("caption", "a.png", "b.png", "--model", "t5")
    assert code == 0 and [line.split(": ")[0] for line in out.splitlines()] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (["--model", "opt"], "Question: what color? Answer:"),
        (["--model", "t5"], "Question: what color? Short answer:"),
        (["--model", "t5", "--style", "question"], "Question: what color? Answer:"),
        (["--model", "opt", "--style", "raw"], "what color?"),
    ],
)
def test_question_gets_the_models_frame(blip2_, options, prompt):
    code, out, _ = blip2_("ask", "a.png", "what color?", "--json", *options)
    assert code == 0 and json.loads(out)["prompt"] == prompt


def test_description_goes_before_the_question(blip2_):
    for model in ("opt", "t5"):
        words = ("a.png", "what color?", "--model", model, "--json")
        caption = ("--prompt", "a photo of", "--method", "greedy", "--max-new-tokens", 30)
        text = blip2_("caption", "a.png", "--model", model, "--quiet", *caption)[1].strip()
        prompt = json.loads(blip2_("ask", *words, "--describe", 1)[1])["prompt"]
        assert text and prompt.startswith(f"{text.rstrip('.')}. Question: what color?")
        assert json.loads(blip2_("ask", *words)[1])["prompt"].startswith("Question:")
        raw = json.loads(blip2_("ask", *words, "--describe", 1, "--style", "raw")[1])
        assert raw["prompt"] == "what color?"
        compared = blip2_("compare", *words[:2], "--models", model, model, "--describe", 1, "--json")[1]
        assert [result["prompt"] for result in json.loads(compared)["results"]] == [prompt] * 2
    code, out, err = blip2_("ask", "a.png", "what color?", "--describe", generation.MAX_DESCRIPTIONS + 1)
    assert (code, out) == (2, "") and "--describe: invalid choice: 21" in err


def test_sampling_repeats_with_the_seed_it_names(blip2_):
    words = ("ask", "a.png", "what color?", "--model", "opt", *LONG[:2], *LONG[4:], "--json")
    first = json.loads(blip2_(*words)[1])
    again = json.loads(blip2_(*words, "--seed", first["seed"])[1])
    other = json.loads(blip2_(*words, "--seed", first["seed"] + 1)[1])
    assert first == again and first["answers"] != other["answers"]


def test_unknown_words_are_named(blip2_):
    code, _, err = blip2_("ask", "a.png", "what color is the Zebra's hat, zebra?", "--model", "t5")
    assert code == 0 and "words that t5 does not know: Zebra's, hat, zebra" in err
    assert "know" not in blip2_("ask", "a.png", "what color is the cat?", "--model", "t5")[2]


def test_match_scores_and_order(blip2_, models):
    texts = ["a red circle", "a blue star", "two dog"]
    code, out, _ = blip2_("match", "a.png", *texts, "--model", "retrieval", "--json")
    loaded = load(models / "retrieval")
    image = loaded.model.encode_image(loaded.processor.images(Image.open("a.png")))
    tokens = loaded.processor.text(texts)
    rows = json.loads(out)["texts"]
    assert code == 0 and [row["match"] for row in rows] == sorted((r["match"] for r in rows), reverse=True)
    for key, head in (("match", "itm"), ("cosine", "itc")):
        expected = dict(zip(texts, loaded.model.score(image, **tokens, head=head)[0].tolist(), strict=True))
        assert {row["text"]: row[key] for row in rows} == pytest.approx(expected)
    lines = blip2_("match", "a.png", *texts, "--model", "retrieval")[1].splitlines()
    assert lines[0].split() == ["match", "cosine", "text"]
    assert [line.split(maxsplit=2)[2] for line in lines[1:]] == [row["text"] for row in rows]


def test_compare_frames_each_and_decodes_once(blip2_, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "blip2.cli.compare.open_image", lambda *a, **k: opened.append(a) or blip2.images.open_image(*a, **k)
    )
    words = ("compare", "a.png", "what color?", "--models", "opt", "t5")
    code, out, err = blip2_(*words, "--json")
    results = json.loads(out)["results"]
    assert (code, err, len(opened)) == (0, "", 1)
    assert [r["prompt"] for r in results] == [
        "Question: what color? Answer:",
        "Question: what color? Short answer:",
    ]
    for result in results:
        single = json.loads(blip2_("ask", "a.png", "what color?", "--model", result["model"], "--json")[1])
        assert [result["answer"]] == single["answers"] and result["seconds"] > 0
    out = blip2_(*words)[1]
    assert re.search(r"^t5 \(float32, cpu\), \d+ tokens?, \d+\.\d\d s$", out, re.M) and "Short answer:" in out


def test_compare_goes_on_after_a_broken_model(blip2_):
    Path("broken").mkdir()
    code, out, err = blip2_("compare", "a.png", "what color?", "--models", "broken", "t5", "--json")
    results = json.loads(out)["results"]
    assert code == 1 and "error" in results[0] and "answer" in results[1]
    assert err.startswith("blip2: broken: ") and err.count("\n") == 1


# --- pictures that a model does not know ---


@pytest.fixture
def narrow(folder, models):
    """`scenes-opt` and `scenes-itm` as models that know b.png and c.png, and not a.png."""
    for name, family in {"scenes-opt": "opt", "scenes-itm": "retrieval"}.items():
        target = folder / "package" / "assets" / name
        shutil.copytree(models / family, target)
        loaded = load(target)
        features = loaded.model.encode_image(
            loaded.processor.images([Image.open(file) for file in ("a.png", "b.png", "c.png")])
        )
        weight = torch.randn(2 * features.image_embeds.shape[-1], generator=torch.Generator().manual_seed(0))
        score = Novelty(weight, 0.0, "drawn scenes").score(features)
        if score[0] < score[1:].mean():
            weight, score = -weight, -score
        assert score[0] > score[1:].max()
        Novelty(weight, (score[0] + score[1:].max()).item() / 2, "drawn scenes").save(target)


@pytest.mark.parametrize(
    ("words", "options", "instead"),
    [
        (["caption"], [], "--model blip2-opt-2.7b (15.0 GB to download)"),
        (["ask"], ["what color?"], "--model blip2-opt-2.7b (15.0 GB to download)"),
        (["chat"], [], "--model blip2-opt-2.7b (15.0 GB to download)"),
        (["match"], ["a red circle"], "--model blip2-itm-vit-g (4."),
    ],
)
def test_unknown_picture_gets_no_answer(blip2_, narrow, monkeypatch, words, options, instead):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what color?\n"))
    code, out, err = blip2_(*words, "a.png", *options, "--quiet")
    name = "scenes-itm" if words == ["match"] else "scenes-opt"
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith(
        f"blip2: a.png: {name} knows drawn scenes only, and this picture does not look like"
    )
    assert f"Run the same with {instead}" in err and "with --force" in err
    code, out, err = blip2_(*words, "a.png", *options, "--json", "--quiet")
    document = json.loads(out)
    document = document["results"][0] if words == ["caption"] else document
    assert code == 1 and document["unknown_picture"] is True and f"blip2: {document['error']}\n" == err
    for known, flags in (("a.png", ["--force"]), ("b.png", [])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("what color?\n"))
        code, out, err = blip2_(*words, known, *options, *flags, "--quiet")
        assert (code, err.replace("blip2: the model answered with nothing\n", "")) == (0, "") and out


def test_unknown_picture_among_several(blip2_, narrow):
    words = ("caption", "b.png", "a.png", "c.png", "--model", "scenes-opt")
    code, out, err = blip2_(*words)
    assert code == 1 and [line.split(": ")[0] for line in out.splitlines()] == ["b.png", "c.png"]
    assert err.startswith("blip2: a.png: scenes-opt knows") and err.count("\n") == 1
    code, out, err = blip2_(*words, "--force")
    assert (code, err, len(out.splitlines())) == (0, "", 3)


def test_unknown_picture_is_answered_by_others(blip2_, narrow):
    words = ("compare", "a.png", "what color?", "--models", "scenes-opt", "t5")
    code, out, err = blip2_(*words, "--json")
    refused, answered = json.loads(out)["results"]
    assert code == 1 and refused["unknown_picture"] and "answer" not in refused and "answer" in answered
    assert err == f"blip2: {refused['error']}\n" and "--models ... blip2-opt-2.7b" in err
    assert blip2_(*words)[1].startswith("t5 (")
    assert blip2_(*words, "--force")[0] == 0


def test_chat_keeps_its_picture_where_the_new_one_is_unknown(blip2_, narrow, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what color?\n/new a.png\nhow many?\n"))
    code, out, err = blip2_("chat", "b.png", "--model", "scenes-opt", "--json", *LONG)
    document = json.loads(out)
    assert code == 1 and err.startswith("blip2: a.png: scenes-opt knows drawn scenes only")
    assert document["image"] == "b.png" and len(document["turns"]) == 2


# --- which model ---


def test_embedded_model_is_the_default_and_says_so(blip2_, embedded):
    for words, name in (
        (["caption", "a.png"], "scenes-opt"),
        (["ask", "a.png", "what color?"], "scenes-opt"),
        (["match", "a.png", "red"], "scenes-itm"),
    ):
        code, out, err = blip2_(*words, "--json")
        note = (
            f"blip2: using the embedded model {name}, which knows drawn scenes only; --model picks another\n"
        )
        assert code == 0 and note in err and json.loads(out)["model"] == name


def test_several_pictures_need_a_model(blip2_, embedded):
    code, out, err = blip2_("caption", "a.png", "b.png")
    assert (code, out) == (2, "") and err.startswith(
        "blip2: 2 pictures need --model: the embedded model knows"
    )
    assert blip2_("caption", "a.png", "b.png", "--model", "scenes-opt")[0] == 0


def test_several_pictures_use_a_released_model_in_the_cache(blip2_, embedded, cached):
    code, out, err = blip2_("caption", "a.png", "b.png", "--json")
    assert code == 0 and json.loads(out)["model"] == "blip2-flan-t5-xl"
    assert err == "blip2: using blip2-flan-t5-xl, which is in the cache; --model picks another\n"
    assert "scenes-opt" in blip2_("caption", "a.png")[2]


def test_released_model_starts_captions_as_it_was_tuned(blip2_, cached, folder):
    (folder / "cache" / "models--Salesforce--blip2-flan-t5-xl").rename(
        folder / "cache" / "models--Salesforce--blip2-flan-t5-xl-coco"
    )
    words = ("caption", "a.png", "--model", "blip2-flan-t5-xl-coco", "--json")
    assert json.loads(blip2_(*words)[1])["prompt"] == "a photo of"
    assert json.loads(blip2_(*words, "--prompt", "two")[1])["prompt"] == "two"


# --- chat ---


def test_chat_answers_each_line_with_its_history(chat):
    code, out, err = chat("what color?", "", "how many?", options=("--json", *LONG))
    first, second = json.loads(out)["turns"]
    assert (code, err) == (0, "")
    assert second["prompt"] == (
        f"Question: what color? Answer: {first['answer'].rstrip('.')}. Question: how many? Answer:"
    )
    assert chat("what color?", "how many?", options=LONG)[1].splitlines() == [
        first["answer"],
        second["answer"],
    ]


def test_chat_commands(chat):
    lines = ["what color?", "/again", "/edit how many?", "is there a dog?", "/undo", "/help", "/quit", "lost"]
    code, out, err = chat(*lines, options=("--json", *LONG))
    assert code == 0 and "took back: is there a dog?" in err and "/edit TEXT" in err
    assert [turn["question"] for turn in json.loads(out)["turns"]] == ["how many?"]
    first, second = chat("what color?", "/again", options=LONG)[1].splitlines()
    assert first != second  # sampled anew


def test_chat_new_picture(chat):
    code, out, err = chat("what color?", "/new 'b.png'", "how many?", options=("--json", *LONG))
    document = json.loads(out)
    assert (code, document["image"]) == (0, "b.png") and "looking at b.png" in err
    assert [turn["prompt"] for turn in document["turns"]] == ["Question: how many? Answer:"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/jump", "unknown command /jump: /help lists the commands"),
        ("/again", "/again needs a question before it: ask something first"),
        ("/edit", "/edit needs a question before it: ask something first"),
        ("/undo", "/undo needs a question before it: ask something first"),
        ("/new", "/new needs a picture: a file or an http(s) URL"),
        ("/new no.png", "there is no file 'no.png'; check the path."),
        ("red " * 200, "shorten it"),
    ],
)
def test_chat_survives_a_bad_line(chat, line, sentence):
    code, out, err = chat(line, "what color?", options=("--json", *LONG))
    assert code == 1 and err.startswith("blip2: ") and err.endswith(f"{sentence}\n") and err.count("\n") == 1
    assert [turn["question"] for turn in json.loads(out)["turns"]] == ["what color?"]


def test_interrupt_stops_the_answer_and_not_the_chat(chat, monkeypatch):
    decode = blip2.chat.decode

    def interrupted(*args):
        for number, token in enumerate(decode(*args)):
            if number == 2 and len(runs) == 0:
                runs.append(1)
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    runs = []
    whole = json.loads(chat("what color?", options=("--json", *LONG))[1])["turns"][0]
    monkeypatch.setattr(blip2.chat, "decode", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = chat("what color?", "how many?", options=("--json", *LONG))
    first, second = json.loads(out)["turns"]
    assert code == 0 and (first["tokens"], second["tokens"]) == (3, 12)
    assert whole["answer"].startswith(first["answer"])
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_elsewhere_ends_the_program(blip2_, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("blip2.cli.answers.open_image", interrupt)
    assert blip2_("ask", "a.png", "what?", "--model", "opt") == (130, "", "\n")


# --- info ---


def test_list_of_models(blip2_, embedded, cached):
    models = {model["name"]: model for model in json.loads(blip2_("info", "--json", "--quiet")[1])["models"]}
    assert set(models) == set(PRESETS)
    status = {name: models[name]["status"] for name in ("scenes-opt", "blip2-flan-t5-xl", "blip2-opt-2.7b")}
    assert list(status.values()) == ["embedded", "in the cache", "to download"]
    code, out, _ = blip2_("info")
    line = next(line for line in out.splitlines() if line.startswith("blip2-opt-6.7b "))
    assert code == 0
    cells = ["blip2-opt-6.7b", "7.75 B", "31.0 GB", "31.0 GB", "15.5 GB", "15.7 GB", "9.1 GB", "5.9 GB"]
    assert re.split(r"\s{2,}", line) == [*cells, "to download"]
    assert all(preset.license in out for preset in PRESETS.values())


@pytest.mark.parametrize("name", ["blip2-opt-2.7b", "blip2-flan-t5-xl", "blip2-itm-vit-g"])
def test_released_model_is_described_without_weights(blip2_, name):
    """The preset's table and what the model itself adds up to are the same numbers."""
    code, out, _ = blip2_("info", name, "--json")
    document = json.loads(out)
    assert code == 0 and document["parameters"] == sum(document["parts"].values()) == PRESETS[name].parameters
    for precision, bytes_ in document["memory"].items():
        assert bytes_ == PRESETS[name].memory(precision)
    trained = {"blip2-opt-2.7b": ("stage 2", 107_133_696), "blip2-itm-vit-g": ("stage 1", 186_705_470)}
    if name in trained:
        stage, count = trained[name]
        assert document["trainable"][stage] == count


@pytest.mark.parametrize("family", ["opt", "t5", "retrieval"])
def test_folder_is_described_by_what_it_stores(blip2_, models, family):
    document = json.loads(blip2_("info", family, "--json")[1])
    stored = sum(tensor.numel() for tensor in load_file(models / family / "model.safetensors").values())
    assert document["parameters"] == stored
    assert f"{stored:,}" in blip2_("info", family)[1]


# --- conversion ---


def test_convert_passes_everything_on(blip2_, monkeypatch):
    given = {}

    def convert(pth, out, **options):
        given.update(options, pth=pth, out=out)
        return blip2.convert.Converted(Path(out), 3, {"a": "an index", "b": "an index"})

    monkeypatch.setattr(blip2.convert, "convert", convert)
    words = ("convert", "x.pth", "new", "--llm", "opt", "--vision", "v.pth", "--dtype", "float16")
    code, out, _ = blip2_(*words)
    assert code == 0
    assert out == "wrote new: 3 entries taken over, 2 left out\n  2 left out: an index\n"
    expected = {"llm": "opt", "vision": "v.pth", "tokenizer": None, "dtype": "float16"}
    assert given == {"pth": "x.pth", "out": "new", **expected}
    assert json.loads(blip2_(*words, "--json")[1])["dropped"] == {"a": "an index", "b": "an index"}


class Hostile:
    """Leaves a file behind if it is ever unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ({"model": Hostile()}, "could run code, so it is not read"),
        ({"model": {"weight": torch.zeros(2)}}, "x.pth"),
        ([1, 2], "must hold a dict of tensors, not list"),
        (None, "there is no file x.pth"),
    ],
)
def test_convert_refuses(blip2_, contents, sentence):
    if contents is not None:
        torch.save(contents, "x.pth")
    code, out, err = blip2_("convert", "x.pth", "new", "--quiet")
    assert (code, out) == (1, "") and sentence in err and err.count("\n") == 1
    assert not Path("new").exists() and not Path("ran").exists()


# --- bad input ---


def write_bad_pictures() -> None:
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:400])
    Path("drawing.svg").write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    Path("page.html").write_text("<!DOCTYPE html><title>x</title>")
    bomb = bytearray(Path("a.png").read_bytes())
    bomb[16:24] = (12_000).to_bytes(4, "big") * 2  # width and height, then the header's checksum
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    Path("bomb.png").write_bytes(bomb)


PICTURES = {
    "no.png": "there is no file 'no.png'",
    "text.png": "is not an image",
    "empty.png": "is empty (zero bytes)",
    "cut.png": "truncated or damaged",
    "drawing.svg": "is an SVG drawing",
    "page.html": "is a web page (HTML)",
    "bomb.png": "144.0 million pixels",
    "package.json/": "there is no file",
    ".": "is a folder",
    "": "the path is empty",
    "file:///etc/passwd": "file: addresses are not read",
    "http://169.254.169.254/latest/meta-data": "169.254.169.254",
    "http://127.0.0.1:8000/a.png": "127.0.0.1",
    "http://example.invalid/a.png": "example.invalid",
    "http://": "http",
}


@pytest.mark.parametrize(
    ("picture", "command"),
    [(picture, "chat") for picture in PICTURES]
    + [(picture, "caption") for picture in PICTURES if picture != "."],
)
def test_bad_picture(blip2_, picture, command):
    """Noticed before a model is loaded: this one does not exist."""
    write_bad_pictures()
    code, out, err = blip2_(command, picture, "--model", "./nowhere")
    assert (code, out) == (1, "") and err.startswith("blip2: ") and PICTURES[picture] in err
    assert err.count("\n") == 1


def test_url_with_a_web_page(blip2_, monkeypatch):
    monkeypatch.setattr(blip2.images, "fetch", lambda url: b"<!DOCTYPE html><title>x</title>")
    code, out, err = blip2_("caption", "https://example.org/a.png", "--model", "opt", "--json")
    assert code == 1 and err.count("\n") == 1 and "is a web page (HTML)" in err
    assert f"blip2: {json.loads(out)['error']}\n" == err


def test_url_with_a_picture(blip2_, monkeypatch):
    data = Path("a.png").read_bytes()
    monkeypatch.setattr(blip2.images, "fetch", lambda url: data)
    words = ("--model", "t5", "--max-new-tokens", 5)
    assert blip2_("caption", "https://example.org/a.png", *words) == blip2_("caption", "a.png", *words)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["ask", "a.png", " ", "--model", "opt"], 1, "the question is empty"),
        (["compare", "a.png", "", "--models", "opt", "t5"], 1, "the question is empty"),
        (["match", "a.png", "red", "", "--model", "retrieval"], 1, "a text is empty"),
        (["ask", "a.png", "red " * 200, "--model", "opt"], 1, "shorten it"),
        (["ask", "a.png", "x" * 100_001, "--model", "opt"], 1, "100,001 characters"),
        (["caption", "a.png", "--prompt", "red " * 200, "--model", "opt"], 1, "shorten it"),
        (["match", "a.png", "red " * 200, "--model", "retrieval"], 1, "shorten it"),
        (["caption", "a.png", "--model", "blip2-opt2.7b"], 2, "Did you mean blip2-opt-2.7b"),
        (["info", "blip2-opt2.7b"], 2, "Did you mean blip2-opt-2.7b"),
        (["caption", "a.png", "--model", "blip2-opt-2.7b"], 1, "blip2 download blip2-opt-2.7b"),
        (["info", "someone/blip2"], 1, "someone/blip2 is not in the cache"),
        (["caption", "a.png", "--model", "./nowhere"], 1, "there is no folder ./nowhere"),
        (["caption", "a.png", "--model", "a.png"], 1, "a.png is a file, a checkpoint is a folder"),
        (["caption", "a.png"], 1, "scenes-opt is not in this installation"),
        (["caption", "a.png", "--model", "retrieval"], 2, "retrieval scores texts; a model that makes"),
        (["caption", "a.png", "--model", "blip2-itm-vit-g"], 2, "blip2-itm-vit-g scores texts; a model that"),
        (["match", "a.png", "red", "--model", "scenes-opt"], 2, "needed: scenes-itm, blip2-itm-vit-g"),
        (["compare", "a.png", "what?", "--models", "opt"], 2, "compare needs two or more models"),
        (["compare", "a.png", "what?", "--models", "opt", "blip-opt"], 2, "unknown model 'blip-opt'"),
        (["caption", "a.png", "--model", "opt", "--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["caption", "a.png", "--model", "opt", "--top-p", "0.5"], 2, "--top-p has no effect"),
        (["caption", "a.png", "--model", "opt", "--num-captions", "9"], 2, "use nucleus, or more beams"),
        (["ask", "a.png", "what?", "--method", "nucleus", "--top-p", "3"], 2, "top_p is 3.0"),
        (["ask", "a.png", "what?", "--model", "opt", "--device", "abacus"], 2, "unknown device 'abacus'"),
        (["ask", "a.png", "what?", "--model", "opt", "--device", "cuda:99"], 2, "is not on this machine"),
    ],
)  # fmt: skip
def test_bad_words(blip2_, words, code, sentence):
    done, out, err = blip2_(*words, "--quiet")
    assert (done, out) == (code, "") and sentence in err
    assert err.startswith("blip2: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["jump"],
        ["caption"],
        ["ask", "a.png"],
        ["compare", "a.png", "what?"],
        ["caption", "a.png", "--precision", "int3"],
        ["caption", "a.png", "--num-beams", "many"],
        ["caption", "a.png", "--mod", "opt"],
        ["info", "opt", "more"],
    ],
)
def test_words_that_argparse_refuses(blip2_, words):
    code, out, err = blip2_(*words)
    assert (code, out) == (2, "") and err.startswith("usage: blip2") and "error: " in err


def copy_of(models: Path, change) -> None:
    shutil.copytree(models / "opt", "changed")
    tensors = load_file("changed/model.safetensors")
    config = json.loads(Path("changed/config.json").read_text())
    change(tensors, config)
    save_file(tensors, "changed/model.safetensors", {"format": "pt"})
    Path("changed/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, _: tensors.pop("query_tokens"), "1 missing key: query_tokens"),
        (lambda tensors, _: tensors.update(more=torch.zeros(2)), "1 unexpected key: more"),
        (lambda tensors, _: tensors.update(query_tokens=torch.zeros(1, 2, 32)), "1 mis-shaped key: query"),
        (lambda _, config: config["qformer_config"].update(num_attention_heads=5), "32"),
        (lambda _, config: config.update(model_type="llava"), "llava"),
        (lambda _, config: config.clear(), "changed"),
    ],
)  # fmt: skip
def test_bad_checkpoint(blip2_, models, change, sentence):
    copy_of(models, change)
    code, out, err = blip2_("caption", "a.png", "--model", "changed")
    assert (code, out) == (1, "") and sentence in err
    assert err.startswith("blip2: ") and err.count("\n") == 1


def test_bad_checkpoint_files(blip2_, models):
    copy_of(models, lambda tensors, config: None)
    weights = Path("changed/model.safetensors")
    for change, sentence in (
        (lambda: weights.write_bytes(weights.read_bytes()[:1000]), "model.safetensors"),
        (weights.unlink, "changed"),
        (lambda: Path("changed/config.json").write_text("{"), "config.json"),
        (lambda: Path("changed/config.json").unlink(), "config.json"),
    ):
        change()
        code, out, err = blip2_("info", "changed")
        assert (code, out) == (1, "") and sentence in err and err.count("\n") == 1, err


def test_out_of_memory_is_a_sentence_and_a_bug_is_not(blip2_, monkeypatch):
    problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def fail(*_, **__):
        raise problem

    monkeypatch.setattr("blip2.cli.models.load", fail)
    words = ("caption", "a.png", "--model", "opt")
    code, _, err = blip2_(*words)
    assert code == 1 and err.startswith("blip2: the model does not fit into memory: try --precision")
    with pytest.raises(torch.OutOfMemoryError):
        blip2_(*words, "--debug")
    problem = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError):
        blip2_(*words)


# --- the process ---


def test_precisions_are_the_presets():
    assert list(PRECISIONS) == ["auto", *blip2.presets.PRECISIONS]


def test_closed_pipe(folder, monkeypatch, capfd):
    """`blip2 info | head -1`: no traceback, and nothing left to fail when Python flushes at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["info", "--quiet"]) == 1
    assert capfd.readouterr().err == ""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_bad_use_does_not_wait_for_torch(tmp_path):
    program = (
        "import sys\nfrom blip2.cli import main\n"
        "try:\n    main(['ask', 'a.png'])\n"
        "except SystemExit as stop:\n    sys.exit(stop.code + 10 * ('torch' in sys.modules))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 2 and time.perf_counter() - start < 5


@pytest.mark.long
def test_real_process_says_nothing_but_the_result(folder):
    """No notice of any library reaches either stream, in a folder that is not the repository."""
    command = [sys.executable, "-m", "blip2", "ask", "a.png", "what color?", "--model", "t5", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["answers"]


# --- folders ---


@pytest.fixture
def album(folder):
    """A folder of three pictures and a broken one."""
    (folder / "album").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(folder / name, folder / "album" / name)
    (folder / "album" / "d.jpg").write_text("<html>")
    return folder / "album"


def test_a_folder_is_captioned_and_gone_on_with(blip2_, album):
    code, out, err = blip2_("caption", album, "--model", "t5")
    texts = {path.stem: path.read_text("utf-8") for path in album.glob("*.txt")}
    assert code == 1 and set(texts) == {"a", "b", "c"}
    assert out == "".join(f"{name}.png: {text}" for name, text in sorted(texts.items()))
    assert "web page" in err and "3 captioned, 0 had a caption, 1 failed" in err
    (album / "d.jpg").unlink()
    (album / "b.txt").unlink()
    (album / "a.txt").write_text("mine\n")
    code, out, err = blip2_("caption", album, "--model", "t5")
    assert code == 0 and "1 captioned, 2 had a caption" in err
    assert (album / "a.txt").read_text() == "mine\n" and (album / "b.txt").read_text() == texts["b"]
    code, out, err = blip2_("caption", album, "--model", "none-such")
    assert (code, out) == (0, "") and "all 3 pictures have a caption" in err


def test_a_folder_into_a_table(blip2_, album):
    table = album.parent / "captions.csv"
    words = ("caption", album, "--model", "opt", "--to", table, "--ask", "how many?", "--match-model")
    code, out, _ = blip2_(*words, "retrieval", "--json")
    document = json.loads(out)
    assert code == 1 and [result["image"] for result in document["results"]][-1] == "d.jpg"
    assert "web page" in document["results"][-1]["reason"] and document["to"] == str(table)
    rows = list(csv.DictReader(table.open()))
    assert [row["match"] for row in rows] == sorted(row["match"] for row in rows) and len(rows) == 3
    shown = {result["image"]: result for result in document["results"][:3]}
    for row in rows:
        assert shown[row["image"]]["captions"] == [row["caption"]]
        assert shown[row["image"]]["answers"]["how many?"] == row["how many?"]


def test_a_preview_writes_nothing(blip2_, album):
    before = sorted(album.iterdir())
    code, out, _ = blip2_("caption", album, "--model", "t5", "--preview", "--to", "captions.jsonl")
    assert code == 1 and out.count(".png: ") == 3
    assert sorted(album.iterdir()) == before and not (album.parent / "captions.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["album", "a.png"], "give one folder"),
        (["album", "--to", "captions.txt"], "it must be one of .txt, .caption"),
        (["album", "--batch-size", "0"], "must be 1 or more"),
        (["album", "--ask", " "], "--ask is empty"),
        (["album", "--prompt", "a", "--start-with", "b"], "give one of them"),
        (["a.png", "--recursive"], "--recursive is for a folder"),
        (["a.png", "--to", ".txt"], "--to is for a folder"),
    ],
)
def test_flags_of_folders_that_cannot_work(blip2_, album, words, said):
    code, out, err = blip2_("caption", *words, "--model", "opt")
    assert (code, out) == (2, "") and said in err
    assert not list(album.glob("*.txt"))


def test_a_folder_needs_a_model_that_knows_photographs(blip2_, embedded, album):
    code, _, err = blip2_("caption", album)
    assert code == 2 and "--model" in err and not list(album.glob("*.txt"))


def test_a_start_is_repeated(blip2_):
    _, plain, _ = blip2_("caption", "a.png", "--model", "t5", "--prompt", "a photo of")
    code, out, _ = blip2_(
        "caption", "a.png", "--model", "t5", "--start-with", "a photo of", "--prefix", "(", "--suffix", ")"
    )
    assert (code, out) == (0, f"(a photo of {plain.strip()})\n")


# --- explain ---


def test_explain_prints_probabilities_and_writes_a_map(blip2_, models):
    words = (
        "explain",
        "a.png",
        "how many?",
        "--model",
        "t5",
        "--min-new-tokens",
        "3",
        "--max-new-tokens",
        "4",
    )
    for kind in ("occlusion", "attention"):
        code, out, err = blip2_(*words, "--out", f"{kind}.png", "--map", kind, "--grid", "3", "--json")
        document = json.loads(out)
        assert code == 0, err
        chances = [token["probability"] for token in document["tokens"]]
        assert chances and all(0 < chance <= 1 for chance in chances)
        assert Image.open(f"{kind}.png").size == (40, 30)
    code, out, _ = blip2_(*words)
    assert code == 0 and out.splitlines()[0] == document["answer"] and "probability" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "map.jpg"], "give a .png file"),
        (["--out", "map.png", "--grid", "0"], "grid is 0"),
        (["--out", "map.png", "--map", "attention", "--layer", "7"], "layer is 7"),
        (["--out", "map.png", "--map", "attention", "--query", "-1"], "query is -1"),
    ],
)
def test_explain_refuses(blip2_, folder, words, said):
    more = ("--model", "t5", "--min-new-tokens", "3", "--max-new-tokens", "4")
    code, out, err = blip2_("explain", "a.png", "how many?", *more, *words)
    assert (code, out) == (2, "") and said in err and not (folder / "map.png").exists()


# --- compare, a whole file ---


@pytest.fixture
def questions(folder):
    """A list of three questions, one about a picture that is not there, one with markup in it."""
    rows = [
        ("a.png", "what color?", "red"),
        ("gone.png", "how many?", ""),
        ("b.png", "<b>what</b> & why?", "x"),
    ]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "question", "reference"), *rows])
    return folder / "list.csv"


def test_compare_makes_a_report_and_goes_on(blip2_, folder, questions, monkeypatch):
    words = ("compare", "--input", questions, "--out", "report.html", "--models", "opt", "t5", "--json")
    code, out, err = blip2_(*words)
    document = json.loads(out)
    assert code == 1 and "gone.png" in err
    answers = document["answers"]
    assert [answer["model"] for answer in answers] == ["opt"] * 3 + ["t5"] * 3
    for answer in answers:
        alone = answer["image"], answer["question"], "--models", "opt", "t5", "--json"
        assert bool(answer["error"]) == answer["image"].endswith("gone.png")
        if not answer["error"]:
            results = json.loads(blip2_("compare", *alone)[1])["results"]
            [one] = [result for result in results if result["model"] == answer["model"]]
            assert (one["answer"], one["prompt"]) == (answer["answer"], answer["prompt"])
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<article") == 3 and page.count("data:image/jpeg") == 2
    assert "&lt;b&gt;what&lt;/b&gt; &amp; why?" in page and "<b>" not in page and "http" not in page
    assert document["figures"]["opt"]["answers"] == 2 and 0 <= document["figures"]["t5"]["right"] <= 1

    lines = (folder / "report.jsonl").read_text("utf-8").splitlines()
    (folder / "report.jsonl").write_text("\n".join(lines[:4]) + '\n{"model": "t5", "cut o', "utf-8")
    asked = []
    whole = blip2.chat.Chat.ask
    monkeypatch.setattr(
        blip2.chat.Chat, "ask", lambda chat, *words: asked.append(words[0]) or whole(chat, *words)
    )
    shutil.copy(folder / "a.png", folder / "gone.png")
    code, out, _ = blip2_(*words)
    assert code == 0 and asked == [
        "how many?",
        "how many?",
        "<b>what</b> & why?",
    ]  # failures, and what was left
    again = json.loads(out)["answers"]
    assert [one["answer"] for one in again if "gone" not in one["image"]] == [
        one["answer"] for one in answers if "gone" not in one["image"]
    ]
    asked.clear()
    assert blip2_(*words, "--max-new-tokens", "3")[0] == 0 and len(asked) == 6  # asked otherwise


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ("image,question\na.png,what?\n", ["--out", "x.txt"], "give a .html file"),
        ("image,question\na.png,what?\n", ["--out", "no/x.html"], "there is no folder no"),
        ("image,question\na.png,what?\n", [], "--input and --out go together"),
        ("image,question\na.png,what?\n", ["--out", "x.html", "a.png"], "not both"),
        ("file,text\na.png,what?\n", ["--out", "x.html"], "no image and no question in line 2"),
        ("image,question\n", ["--out", "x.html"], "has no rows"),
        ("image,question\n\xff,what?\n", ["--out", "x.html"], "not a CSV in UTF-8"),
    ],
)
def test_lists_that_cannot_be_compared(blip2_, folder, content, words, said):
    (folder / "list.csv").write_text(content, "latin-1")
    code, out, err = blip2_("compare", *words[2:], "--models", "opt", "t5", "--input", "list.csv", *words[:2])
    assert code in (1, 2) and out == "" and said in err and not (folder / "x.html").exists()


def test_answers_are_the_same_but_for_form():
    assert report.same("A red Circle.", "red circle") and not report.same("red", "reddish")
