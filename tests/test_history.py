"""Conversations that the visitor's browser keeps, and that come back from there; and their export."""

import base64
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from blip2.chat import Turn
from blip2.ui import history
from blip2.ui.session import Session


@pytest.fixture
def visitor(tmp_path):
    path = tmp_path / "a big one.png"
    pixels = np.random.default_rng(0).integers(0, 255, (500, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    session = Session()
    session.look(str(path), "a big *one*.png")
    session.turns[:] = [
        Turn("what is <it>?", "a _star_", "Question: what is <it>? Answer:"),
        Turn("why?", ""),
    ]
    return session


def test_what_is_kept_comes_back(visitor):
    kept = json.loads(json.dumps(history.record(visitor, "scenes-opt")))["record"]
    key, data, name, turns = history.opened({"open": kept})
    assert (key, name) == (visitor.subject.conversation.id, "a big *one*.jpg")
    assert [(turn.question, turn.answer) for turn in turns] == [("what is <it>?", "a _star_"), ("why?", "")]
    assert Image.open(io.BytesIO(data)).size == (320, 178)
    assert key != visitor.subject.conversation.key  # a browser must not be able to name another's cache


@pytest.mark.parametrize(
    "change",
    [
        {"turns": [{"question": "a\x00b", "answer": ""}]},
        {"turns": [{"question": "a"}]},
        {"turns": [{"question": "a", "answer": "b" * 30_000}]},
        {"turns": [{"question": "a", "answer": "b"}] * 300},
        {"turns": 3},
        {"picture": "https://example.org/a.jpg"},
        {"picture": history.JPEG + "!!"},
        {"picture": history.JPEG + base64.b64encode(b"no picture").decode()},
        {"name": None, "picture": None},
    ],
)
def test_what_is_damaged_is_refused(visitor, change):
    kept = history.record(visitor, "scenes-opt")["record"] | change
    with pytest.raises(ValueError, match="damaged"):
        history.opened({"open": kept})


@pytest.mark.parametrize("value", [None, "", [], {}, {"open": None}])
def test_nothing_is_refused(value):
    with pytest.raises(ValueError, match="damaged"):
        history.opened(value)


def test_export_holds_text_and_picture(visitor):
    name, data = history.export(visitor, "scenes-opt")
    pack = zipfile.ZipFile(io.BytesIO(data))
    document = json.loads(pack.read("conversation.json"))
    assert name.endswith(".zip") and document["turns"][0]["prompt"] == "Question: what is <it>? Answer:"
    text = pack.read("conversation.md").decode()
    assert r"**You:** what is \<it\>?" in text and r"**scenes-opt:** a \_star\_" in text
    assert "![a big \\*one\\*.png](picture.png)" in text
    assert Image.open(io.BytesIO(pack.read("picture.png"))).size == (900, 500)
    visitor.forget()
    with pytest.raises(ValueError, match="no conversation to export"):
        history.export(visitor, "scenes-opt")
