"""The Search tab without a browser: what is read, what is found, what cannot be."""

import copy
import html
import re
from functools import partial
from pathlib import Path

import gradio as gr
import pytest
import torch
import zerogpu
from uploading import counting, draw, uploads

from blip2.novelty import Novelty
from blip2.representation import Blip2Representation
from blip2.search import Index, index_folder, search
from blip2.ui import pile as piles
from blip2.ui.album import Album
from blip2.ui.models import Models
from blip2.ui.search import EMPTY, SearchTab
from blip2.ui.session import Session
from blip2.ui.work import Work

EVIL = "<img src=x onerror=alert(1)>.png"
TEXT = "a red circle"

pytestmark = pytest.mark.usefixtures("assets")


@pytest.fixture(scope="module")
def shelf():
    return {local: Models("scenes-opt", local=local) for local in (False, True)}


@pytest.fixture(scope="module")
def tabs(shelf):
    """The tab of a public server, of this machine's own, and on ZeroGPU."""
    made = {}
    for name, work in {
        "public": Work(shelf[False]),
        "local": Work(shelf[True]),
        "zerogpu": Work(shelf[False], zerogpu.gpu),
    }.items():
        with gr.Blocks():
            made[name] = SearchTab(work, gr.State(Session()), gr.Image())
    shelf[False].get("scenes-itm", "match")
    return made


@pytest.fixture
def encoded(monkeypatch):
    return counting(monkeypatch, Blip2Representation, [])


@pytest.fixture
def dropped(tmp_path):
    """Six files as uploads lie: two of the same name, one broken, one with a name that is HTML."""
    return uploads(tmp_path, ["a.png", "b.png", "a.png", "bad.png", "c.png"], EVIL)


def run(tab, album, files=(), folder="", text=TEXT, picture=(None, ""), by_picture=False, **changes):
    """Every update of a press."""
    options = {"force": False, "recursive": False, "model": "scenes-itm", "top": 12, "again": False} | changes
    going = tab.guarded(partial(tab.run, by_picture, options["force"]))(
        Session(), picture, album, list(files), folder, options["recursive"], text,
        options["model"], options["top"], options["again"],
    )  # fmt: skip
    return list(going)


def said(updates, tab):
    return html.unescape([update[tab.note] for update in updates if tab.note in update][-1])


def shown(updates, tab):
    return [update[tab.results] for update in updates if tab.results in update][-1]


def names(album):
    return [one.image for one in album.found]


# --- dropped pictures ---


@pytest.mark.parametrize("place", ["public", "zerogpu"])
def test_dropped_pictures_are_found_as_in_an_index(tabs, dropped, shelf, tmp_path, place):
    tab, album = tabs[place], Album()
    updates = run(tab, album, dropped)
    folder = tmp_path / "same"
    for (path, _), name in zip(dropped, ["a.png", "b.png", "a-2.png", "", "c.png", "e.png"], strict=True):
        if name:
            draw(folder / name, int(Path(path).parent.name))
    loaded = shelf[False].get("scenes-itm", "match")
    index_folder(loaded, folder)
    expected = search(loaded, Index(folder), TEXT)
    assert names(album) == [one.image.replace("e.png", EVIL) for one in expected]
    assert [one.score for one in album.found] == pytest.approx([one.score for one in expected], abs=1e-3)
    assert "5 pictures searched with scenes-itm" in said(updates, tab)
    assert "1 picture could not be used: bad.png starts like an image" in said(updates, tab)
    assert updates[-1][tab.go]["interactive"] and updates[-1][tab.like]["interactive"]
    page = shown(updates, tab)
    assert html.escape(EVIL) in page and "<img src=x" not in page and str(tmp_path) not in page
    places = [int(number) for number in re.findall(r'place="(\d)"', page)]
    assert page.count("data:image/jpeg;base64,") == 5 and places == [0, 1, 2, 3, 4]
    run(tab, album, dropped, again=True)
    expected = search(loaded, Index(folder), TEXT, rerank=16)
    assert names(album) == [one.image.replace("e.png", EVIL) for one in expected]
    assert [one.match for one in album.found] == pytest.approx([one.match for one in expected], abs=1e-4)


def test_a_picture_finds_its_like(tabs, dropped):
    tab, album = tabs["public"], Album()
    run(tab, album, dropped, text="", picture=(dropped[4][0], "query.png"), by_picture=True, top=2)
    assert names(album)[0] == "c.png" and len(album.found) == 2 and album.found[0].score > 0.99
    assert "% match" not in shown(run(tab, album, dropped, again=True, text="", picture=(dropped[4][0], "q"),
                                      by_picture=True), tab)  # fmt: skip


def test_nothing_is_read_twice(tabs, dropped, encoded):
    tab, album = tabs["public"], Album()
    run(tab, album, dropped[:3])
    assert sum(encoded) == 3
    run(tab, album, dropped, text="something else")
    assert sum(encoded) == 5
    run(tab, album, [dropped[0], *dropped[2:]])
    assert sum(encoded) == 5 and "b.png" not in names(album), "what is taken away is not found"


def test_a_stop_keeps_what_was_read(tabs, dropped, encoded, monkeypatch):
    tab, album = tabs["public"], Album()
    monkeypatch.setattr("blip2.ui.search.PORTION", 2)
    add = album.add

    def stop(*arguments):
        add(*arguments)
        album.stop()

    monkeypatch.setattr(album, "add", stop)
    updates = run(tab, album, dropped)
    assert "Stopped" in said(updates, tab) and sum(encoded) == 2 and updates[-1][tab.go]["interactive"]
    monkeypatch.undo()
    run(tab, album, dropped)
    assert len(album.found) == 5


def test_unknown_pictures_wait_for_the_visitor_to_insist(tabs, dropped, shelf, monkeypatch, encoded):
    tab, album = tabs["public"], Album()
    loaded = shelf[False].get("scenes-itm", "match")
    width = loaded.model.config.vision_config.hidden_size
    monkeypatch.setattr(loaded, "novelty", Novelty(torch.zeros(2 * width), -1.0, "circles"))
    updates = run(tab, album, dropped)
    assert "5 pictures are of a kind that scenes-itm does not know" in said(updates, tab)
    assert "no picture here that can be searched" in said(updates, tab)
    assert updates[-1][tab.choice]["visible"] is True and shown(updates, tab) == EMPTY and album.found == []
    run(tab, album, dropped)
    assert sum(encoded) == 5
    updates = run(tab, album, dropped, by_picture=None, force=True)
    assert len(album.found) == 5 and updates[-1][tab.choice]["visible"] is False
    run(tab, album, dropped)
    assert len(album.found) == 5 and sum(encoded) == 10
    updates = run(tab, album, dropped, by_picture=True, picture=(dropped[0][0], "a.png"))
    assert "does not look like one" in said(updates, tab) and updates[-1][tab.choice]["visible"] is True
    run(tab, album, dropped, by_picture=None, force=True, picture=(dropped[0][0], "a.png"))
    assert names(album)[0] == "a.png", "as the last time: by the picture"


def test_a_found_picture_becomes_the_pages(tabs, dropped):
    tab, album = tabs["public"], Album()
    run(tab, album, dropped)
    event = gr.EventData(None, {"place": 1})
    picked = Path(tab.pick(album, event)[tab.picture])
    assert picked.read_bytes() == album.found[1].path.read_bytes()
    assert picked.is_relative_to(tab.picture.GRADIO_CACHE) and str(picked) in tab.picture.temp_files
    for place in (5, -1, "1", None):
        assert tab.picture not in tab.pick(album, gr.EventData(None, {"place": place}))
    album.found[1].path.unlink()
    assert "no longer here" in tab.pick(album, event)[tab.note]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "  "}, "nothing to look for yet"),
        ({"text": "bell\x07"}, "control characters"),
        ({"text": "cat " * 60}, "shorten it"),
        ({"files": []}, "no pictures to search yet"),
        ({"folder": "/etc", "files": []}, "a machine of your own"),
        ({"folder": "/etc"}, "take the ones or the other away"),
        ({"by_picture": True}, "There is no picture"),
        ({"model": "blip2-itm-vit-g"}, "is not served here"),
        ({"model": "scenes-opt"}, "writes texts and scores none"),
    ],
)
def test_what_cannot_be_is_a_sentence(tabs, dropped, change, words):
    tab, album = tabs["public"], Album()
    updates = run(tab, album, **{"files": dropped} | change)
    assert words in said(updates, tab) and updates[-1][tab.go]["interactive"]
    assert updates[-1][tab.like]["interactive"] and album.found == []


def test_a_public_server_takes_so_many(tabs, dropped, monkeypatch):
    tab, album = tabs["public"], Album()
    monkeypatch.setattr(piles, "MAX_PICTURES", 3)
    assert "6 pictures; at most 3" in tab.take(album, dropped)[tab.note]
    assert "6 pictures; at most 3" in said(run(tab, album, dropped), tab)
    own = tabs["local"]
    assert "6 pictures." in own.take(album, dropped)[own.note]


def test_every_visitor_has_an_album_of_their_own(tabs, dropped):
    with gr.Blocks():
        state = gr.State(Album())
    one, two = copy.deepcopy(state.value), copy.deepcopy(state.value)
    tab = tabs["public"]
    run(tab, one, dropped[:2])
    run(tab, two, dropped[4:])
    assert set(names(one)) == {"a.png", "b.png"} and set(names(two)) == {"c.png", EVIL}
    run(tab, one, dropped[:2])
    assert set(names(one)) == {"a.png", "b.png"}


def test_uploads_that_are_gone_are_told(tabs, dropped):
    tab, album = tabs["public"], Album()
    run(tab, album, dropped)
    Path(dropped[0][0]).unlink()
    updates = run(tab, album, dropped)
    assert "no longer here" in shown(updates, tab) and len(album.found) == 5
    updates = run(tab, Album(), dropped)
    assert "cannot read a.png" in said(updates, tab)


# --- a folder of this machine ---


@pytest.fixture
def folder(tmp_path):
    for place, name in enumerate(["a.png", "b.png", "deep/c.png"]):
        draw(tmp_path / "album" / name, place)
    return tmp_path / "album"


def test_a_folder_is_indexed_once(tabs, folder, encoded):
    tab, album = tabs["local"], Album()
    updates = run(tab, album, folder=str(folder))
    assert "2 pictures searched with scenes-itm" in said(updates, tab) and sum(encoded) == 2
    assert sorted(names(album)) == ["a.png", "b.png"] and len(Index(folder)) == 2
    run(tab, Album(), folder=str(folder))  # another visit
    assert sum(encoded) == 2
    run(tab, album, folder=str(folder), recursive=True)
    assert sum(encoded) == 3 and sorted(names(album)) == ["a.png", "b.png", "deep/c.png"]
    picked = tab.pick(album, gr.EventData(None, {"place": names(album).index("deep/c.png")}))
    assert Path(picked[tab.picture]).name == "c.png"


def test_an_index_keeps_to_its_model(tabs, folder):
    tab, album = tabs["local"], Album()
    run(tab, album, folder=str(folder))
    updates = run(tab, album, folder=str(folder), model="blip2-itm-vit-g")  # which is not here
    assert "searched with scenes-itm" in said(updates, tab)


def test_folders_that_cannot_be_used(tabs, folder):
    tab = tabs["local"]
    assert "is not a folder" in said(run(tab, Album(), folder=str(folder / "none")), tab)
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    assert '"The folders in it, too" takes in' in said(run(tab, Album(), folder=str(folder)), tab)
    (folder / ".blip2-index").mkdir()
    (folder / ".blip2-index" / "index.json").write_text("{")
    assert "is damaged" in said(run(tab, Album(), folder=str(folder), recursive=True), tab)


def test_a_stopped_index_goes_on(tabs, folder, encoded, monkeypatch):
    tab, album = tabs["local"], Album()
    for place in range(20):
        draw(folder / f"more-{place}.png", 10 + place)
    encode = Blip2Representation.encode_image

    def stop(self, pixels):
        album.stop()
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Blip2Representation, "encode_image", stop)
        updates = run(tab, album, folder=str(folder))
    assert "Stopped" in said(updates, tab) and sum(encoded) == 8
    run(tab, album, folder=str(folder), top=48)
    assert sum(encoded) == 22 and len(album.found) == 22
