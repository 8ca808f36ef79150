"""The Folder tab without a browser: what is left to do, what is written, what the visitor takes away."""

import copy
import csv
import json
import threading
import uuid
import zipfile
from functools import partial
from pathlib import Path

import gradio as gr
import httpx
import pytest
import torch
from PIL import Image
from uploading import counting, draw, uploads

from blip2.folder import caption_pictures
from blip2.generation import Generation, generate
from blip2.model import Blip2
from blip2.novelty import Novelty
from blip2.pictures import Captioning, Failure
from blip2.sidecars import Entry, Sidecars
from blip2.ui import build, launch
from blip2.ui import pile as piles
from blip2.ui.folder import PREVIEWED, FolderTab
from blip2.ui.models import Models
from blip2.ui.pile import MAX_PICTURES, PER_PAGE, Pile, Settings
from blip2.ui.session import Session
from blip2.ui.wanted import Files
from blip2.ui.work import Work

EVIL = "<img src=x onerror=alert(1)>.png"
START = "a photo of"


pytestmark = pytest.mark.usefixtures("assets")


@pytest.fixture(scope="module")
def shelf():
    return {local: Models("scenes-opt", local=local) for local in (False, True)}


@pytest.fixture(scope="module")
def tabs(shelf):
    """The tab of a public server, and of this machine's own."""
    made = {}
    for local, models in shelf.items():
        with gr.Blocks():
            made[local] = FolderTab(Work(models), gr.State(Session()), gr.Image())
    return made


class Sizes(list):
    """Of the batches that were encoded; `at` has something done when there are so many."""

    def at(self, number, call):
        self.number, self.call = number, call

    def append(self, size):
        super().append(size)
        if len(self) == getattr(self, "number", None):
            self.call()


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures were encoded, each time."""
    return counting(monkeypatch, Blip2, Sizes())


@pytest.fixture
def dropped(tmp_path):
    """Seven files as uploads lie: two of the same name, one broken, one with a name that is HTML."""
    return uploads(tmp_path, ["a.png", "b.png", "a.png", "c.jpg", "bad.png", "c.png"], EVIL)


def values(tab, **changes):
    chosen = {name: control.value for name, control in tab.options.controls.items()}
    decoding = {name: control.value for name, control in tab.parameters.controls.items()}
    quick = {"method": "greedy", "max_new_tokens": 8, "min_new_tokens": 6, "batch": 2}
    every = chosen | decoding | quick | changes
    return [every[name] for name in [*chosen, *decoding]]


def run(tab, pile, files=(), folder="", first=None, anyway=False, recursive=False, **changes):
    """Every update of a press."""
    going = tab.run(first, anyway, Session(), pile, list(files), folder, recursive, *values(tab, **changes))
    return list(going)


def said(updates, tab):
    return [update[tab.note] for update in updates if tab.note in update][-1]


def captions(pile):
    return {row.image: row.result.captions for row in pile.rows.values() if isinstance(row.result, Entry)}


def edit(pile, image, text, which=0):
    [row] = [row for row in pile.rows.values() if row.image == image]
    pile.edit(json.dumps([[row.id, row.made, which, text]]))


# --- the run ---


def test_every_picture_gets_its_own_caption(tabs, dropped, shelf):
    tab, pile = tabs[False], Pile()
    updates = run(tab, pile, dropped, questions="how many?\n\n", prefix="<i>", start=START)
    names = ["a.png", "b.png", "a-2.png", "c.jpg", "bad.png", "c.png", EVIL]
    assert [row.image for row in pile.shown.values()] == names
    loaded = shelf[False].get("scenes-opt")
    for row in pile.rows.values():
        if row.image == "bad.png":
            assert "bad.png" in row.result.reason and "damaged" in row.result.reason
            assert str(row.path.parent) not in row.result.reason
            continue
        image = loaded.model.encode_image(loaded.processor.images(Image.open(row.path)))
        settings = Generation(max_new_tokens=8, min_new_tokens=6)
        [[text]] = generate(loaded.model, loaded.processor, image, START, settings)
        assert row.result.captions == (f"<i>{START} {text}",)
        assert list(row.result.answers) == ["how many?"] and 0 <= row.result.match[0] <= 1
    assert len(set(captions(pile).values())) > 2  # a random model, but no constant
    assert "6 pictures captioned" in said(updates, tab) and "1 picture could not be used" in said(
        updates, tab
    )
    assert updates[-1][tab.go]["interactive"] and updates[-1][tab.preview]["interactive"]
    assert updates[-1][tab.choice]["visible"] is False
    [table] = [update[tab.table] for update in updates if tab.table in update][-1:]
    assert [row["name"] for row in table["rows"]] == names and table["total"] == 7
    assert all(row["thumbnail"].startswith("data:image/jpeg;base64,") for row in table["rows"][:4])
    assert table["rows"][4]["thumbnail"] == "" and len(json.dumps(table)) < 40_000


def test_preview_then_all_does_nothing_twice(tabs, dropped, encoded):
    tab, pile = tabs[False], Pile()
    run(tab, pile, dropped, first=PREVIEWED)
    assert len(pile.shown) == 5 and sum(encoded) == 4
    before = captions(pile)
    run(tab, pile, dropped)
    assert len(pile.shown) == 7 and sum(encoded) == 6 and before.items() <= captions(pile).items()
    assert "All have captions" in said(run(tab, pile, dropped), tab) and sum(encoded) == 6
    run(tab, pile, [*dropped[1:], (dropped[0][0], "a.png")])  # the same again, in another order
    assert sum(encoded) == 6


def test_other_settings_are_captioned_anew_but_edits_stay(tabs, dropped, encoded):
    tab, pile = tabs[False], Pile()
    run(tab, pile, dropped)
    edit(pile, "b.png", " my own\n words ")
    run(tab, pile, dropped, suffix="!")
    assert sum(encoded) == 6 + 5
    assert captions(pile).pop("b.png") == ("my own words",)
    assert all(texts[0].endswith("!") for image, texts in captions(pile).items() if image != "b.png")


def test_stop_keeps_what_is_done_and_goes_on_from_there(tabs, dropped, encoded):
    tab, pile = tabs[False], Pile()
    encoded.at(3, pile.stop)
    updates = run(tab, pile, dropped, batch=1)
    done = captions(pile)
    assert list(done) == ["a.png", "b.png"] and sum(encoded) == 3
    assert "Stopped: 2 of 7 pictures; the same button goes on" in said(updates, tab)
    run(tab, pile, dropped, batch=1)
    assert done.items() <= captions(pile).items() and len(captions(pile)) == 6
    assert sum(encoded) == 3 + 4


def test_stop_ends_decoding_and_gives_the_batch_up(shelf, dropped):
    loaded, stop, steps = shelf[False].get("scenes-opt"), threading.Event(), []

    def forward(*arguments):
        steps.append(1)
        if len(steps) == 10:
            stop.set()

    hook = loaded.model.language_model.lm_head.register_forward_pre_hook(forward)
    pictures = {name: Path(path) for path, name in dropped[:2]}
    for method in ("greedy", "beam"):
        steps.clear()
        stop.clear()
        wanted = Captioning(Generation(method, max_new_tokens=40, min_new_tokens=40), questions=("what?",))
        assert list(caption_pictures(loaded, pictures, None, wanted, None, stop)) == []
        assert len(steps) <= 11, method
    hook.remove()


def test_closed_page_ends_the_run(tabs, dropped):
    tab, pile = tabs[False], Pile()
    going = tab.run(None, False, Session(), pile, dropped, "", False, *values(tab))
    next(going)
    next(going)
    going.close()
    assert pile._stop.is_set()


def test_unknown_pictures_are_rows_until_the_visitor_insists(tabs, dropped, shelf, monkeypatch, encoded):
    tab, pile = tabs[False], Pile()
    loaded = shelf[False].get("scenes-opt")
    width = loaded.model.config.vision_config.hidden_size
    novelty = Novelty(torch.zeros(2 * width), -1.0, "circles")  # every picture is new to it
    monkeypatch.setattr(loaded, "novelty", novelty)
    updates = run(tab, pile, dropped, first=PREVIEWED)
    assert captions(pile) == {} and updates[-1][tab.choice]["visible"] is True
    assert "4 pictures are of a kind that scenes-opt does not know" in said(updates, tab)
    assert all("circles only" in row.result.reason for row in pile.shown.values() if row.image != "bad.png")
    updates = run(tab, pile, dropped, anyway=True)
    assert len(captions(pile)) == 4 and len(pile.shown) == 5  # of the preview, no more
    assert updates[-1][tab.choice]["visible"] is False
    begun = sum(encoded)
    run(tab, pile, dropped)
    assert len(captions(pile)) == 4 and sum(encoded) - begun == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "beam", "num_beams": 2, "num_captions": 3}, "num_captions is 3"),
        ({"questions": "bell\x07"}, "control characters"),
        ({"files": []}, "There are no pictures yet"),
        ({"folder": "/etc"}, "a machine of your own"),
    ],
)
def test_what_cannot_be_is_a_sentence(tabs, dropped, change, words):
    tab = tabs[False]
    settings = {"files": dropped} | change
    files, folder = settings.pop("files"), settings.pop("folder", "")
    guarded = tab.guarded(partial(tab.run, None, False))
    updates = list(guarded(Session(), Pile(), files, folder, False, *values(tab, **settings)))
    assert words in said(updates, tab) and updates[-1][tab.go]["interactive"]


def test_a_public_server_takes_so_many(tmp_path, monkeypatch):
    many = [(f"{tmp_path}/{number}.png", f"{number}.png") for number in range(MAX_PICTURES + 1)]
    with pytest.raises(ValueError, match="501 pictures; at most 500"):
        Pile().drop(many, limited=True)
    Pile().drop(many, limited=False)
    monkeypatch.setattr(piles, "MAX_BYTES", 1_000_000)
    (tmp_path / "0.png").write_bytes(b"x" * 2_000_000)
    with pytest.raises(ValueError, match="have 2 MB; at most 1 MB"):
        Pile().drop(many[:2], limited=True)


def test_uploads_that_are_gone_are_rows(tabs, dropped):
    tab, pile = tabs[False], Pile()
    Path(dropped[1][0]).unlink()
    run(tab, pile, dropped[:3])
    row = list(pile.rows.values())[1]
    assert isinstance(row.result, Failure) and "b.png is not here any more" in row.result.reason


# --- the pile ---


def test_names_are_the_visitors_and_each_has_its_own(tmp_path):
    pile = Pile()
    names = ["a.png", "C:\\pictures\\a.png", "../../a.png", "a-2.png", ""]
    files = [(f"{tmp_path}/{place}", name) for place, name in enumerate(names)]
    pile.drop(files, limited=True)
    assert [row.image for row in pile.rows.values()] == [
        "a.png",
        "a-2.png",
        "a-3.png",
        "a-2-2.png",
        "picture",
    ]
    pile.drop(files[1:], limited=True)
    assert [row.image for row in pile.rows.values()][:2] == ["a-2.png", "a-3.png"]  # as they were


def test_table_is_paged_and_ordered(tmp_path):
    pile, settings = Pile(), Settings("m", None, Captioning())
    total = 2 * PER_PAGE + 3
    pile.drop([(f"{tmp_path}/{number}", f"{number}.png") for number in range(total)], limited=True)
    for number, row in enumerate(pile.rows.values()):
        match = () if number == 5 else (1 - number / 100, 0.99)
        pile.add(row, Entry(row.image, ("one", "two"), match), settings, None)
    assert [row["name"] for row in pile.view()["rows"]] == [f"{number}.png" for number in range(PER_PAGE)]
    for _ in range(5):
        pile.turn(1)
    last = pile.view()
    assert (last["page"], last["pages"], last["first"], len(last["rows"])) == (3, 3, 2 * PER_PAGE + 1, 3)
    pile.order(True)
    rows = pile.view()["rows"]
    assert rows[0]["name"] == f"{total - 1}.png" and pile.page == 0
    assert list(pile.shown.values())[-1].image == "5.png"
    pile.turn(1)
    pile.order()
    assert pile.page == 1
    pile.order(False)
    assert pile.view()["rows"][0]["name"] == "0.png"
    json.dumps(last, allow_nan=False)


def test_edits_are_of_captions_that_are_there(tmp_path):
    pile, settings = Pile(), Settings("m", None, Captioning())
    pile.drop([(f"{tmp_path}/a", "a.png")], limited=True)
    [row] = pile.rows.values()
    pile.add(row, Entry("a.png", ("one", "two"), (0.5, 0.6)), settings, None)
    for stale in ([row.id, 2, 0, "x"], [99, 1, 0, "x"], [row.id, 1, 2, "x"], [row.id, 1, -1, "x"]):
        pile.edit(json.dumps([stale]))
    assert row.result.captions == ("one", "two") and not row.edited
    edit(pile, "a.png", "drei", 1)
    assert row.result.captions == ("one", "drei") and row.edited
    assert pile.view()["rows"][0]["match"] == [0.5, None]  # the score was of the old one
    for broken in ("[", "[1]", "[[1, 1, 0]]", '[["a", 1, 0, "x"]]'):
        with pytest.raises(ValueError, match="did not arrive whole"):
            pile.edit(broken)


def test_every_visitor_has_a_pile_of_their_own(tmp_path):
    with gr.Blocks():
        state = gr.State(Pile())
    one, two = copy.deepcopy(state.value), copy.deepcopy(state.value)
    one.drop([(f"{tmp_path}/a", "a.png")], limited=True)
    assert one is not two and not two.rows


# --- what is taken away ---


def test_downloads_hold_the_edits(tabs, dropped, tmp_path):
    tab, pile = tabs[False], Pile()
    run(tab, pile, dropped, method="beam", num_captions=2, questions="what?")
    edit(pile, "a-2.png", "mine, «really»", 1)
    expected = captions(pile)
    with (pile.save(".csv", tmp_path)).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["image"] for row in rows} == set(expected)
    assert {row["caption"] for row in rows} == {text for texts in expected.values() for text in texts}
    [mine] = [row for row in rows if row["caption"] == "mine, «really»"]
    assert mine["match"] == "" and list(mine) == ["image", "caption", "match", "what?"]
    lines = pile.save(".jsonl", tmp_path).read_text("utf-8").splitlines()
    documents = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert {one["image"]: tuple(one["captions"]) for one in documents} == expected
    for ending in (".txt", ".caption"):
        with zipfile.ZipFile(pile.save(ending, tmp_path)) as file:
            names = ["a", "b", "a-2", "c.jpg", "c.png", EVIL.removesuffix(".png")]
            assert sorted(file.namelist()) == sorted(name + ending for name in names)
            answer = pile.rows[Path(dropped[2][0])].result.answers["what?"]
            text = f"{expected['a-2.png'][0]}, {answer}\nmine, «really», {answer}\n"
            assert file.read("a-2" + ending).decode() == text


def test_download_lies_with_the_uploads(tabs, dropped):
    tab, pile = tabs[False], Pile()
    nothing = tab.download(pile, "[]", ".csv")
    assert "no captions to download yet" in nothing[tab.note] and nothing[tab.file] is None
    run(tab, pile, dropped)
    [row] = [row for row in pile.rows.values() if row.image == "b.png"]
    path = Path(tab.download(pile, json.dumps([[row.id, row.made, 0, "typed"]]), ".csv")[tab.file])
    assert path.name == "captions.csv" and "b.png,typed," in path.read_text("utf-8")
    assert path.is_relative_to(tab.file.GRADIO_CACHE) and str(path) in tab.file.temp_files  # deleted in time


# --- a folder of this machine ---


@pytest.fixture
def folder(tmp_path):
    for place, name in enumerate(["a.png", "b.png", "deep/c.png"]):
        draw(tmp_path / "album" / name, place)
    return tmp_path / "album"


def texts(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.txt"))
    }


def test_sidecars_lie_beside_the_pictures(tabs, folder, encoded):
    tab, pile = tabs[True], Pile()
    updates = run(tab, pile, folder=str(folder), first=PREVIEWED, recursive=True)
    assert texts(folder) == {} and "nothing is written yet" in said(updates, tab)
    edit(pile, "b.png", "mine")
    updates = run(tab, pile, folder=str(folder), recursive=True)
    assert sum(encoded) == 3  # by the preview
    expected = {image.replace(".png", ".txt"): f"{said[0]}\n" for image, said in captions(pile).items()}
    assert texts(folder) == expected and expected["b.txt"] == "mine\n" and "deep/c.txt" in expected
    edit(pile, "deep/c.png", "ours")
    assert texts(folder)["deep/c.txt"] == "ours\n"
    assert not list(folder.rglob("*.part"))
    updates = run(tab, Pile(), folder=str(folder))  # another visit
    assert "2 pictures had a text already" in said(updates, tab) and sum(encoded) == 3
    run(tab, pile, folder=str(folder), recursive=True, ending=".caption")
    assert (folder / "b.caption").read_text("utf-8") == "mine\n" and sum(encoded) == 3


@pytest.mark.parametrize("if_exists", ["overwrite", "append"])
def test_texts_that_are_there(tabs, folder, if_exists):
    tab, pile = tabs[True], Pile()
    (folder / "a.txt").write_text("before", "utf-8")
    run(tab, pile, folder=str(folder), if_exists=if_exists)
    kept = "before\n" if if_exists == "append" else ""
    assert texts(folder)["a.txt"] == f"{kept}{captions(pile)['a.png'][0]}\n"
    edit(pile, "a.png", "mine")  # in place of what was appended
    assert texts(folder)["a.txt"] == f"{kept}mine\n"
    run(tab, pile, folder=str(folder), if_exists=if_exists)
    assert texts(folder)["a.txt"] == f"{kept}mine\n"


def test_folders_that_cannot_be_used(tabs, folder, dropped):
    tab = tabs[True]
    for settings, words in (
        ({"folder": str(folder / "none")}, "is not a folder"),
        ({"folder": str(folder), "files": dropped}, "take the ones or the other away"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tab, Pile(), **settings)
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match='"The folders in it, too" takes in'):
        run(tab, Pile(), folder=str(folder))
    draw(folder / "deep" / "c.jpg", 9)
    with pytest.raises(ValueError, match=r"c\.jpg and .*c\.png would share"):
        run(tab, Pile(), folder=str(folder), recursive=True)


def test_a_text_that_cannot_be_written_is_a_sentence(tabs, folder):
    tab, pile = tabs[True], Pile()
    (folder / "b.txt").mkdir()
    guarded = tab.guarded(partial(tab.run, None, False))
    arguments = [[], str(folder), False, *values(tab, if_exists="overwrite", batch=1)]
    updates = list(guarded(Session(), pile, *arguments))
    assert "cannot write" in said(updates, tab) and "b.txt" in said(updates, tab)
    assert list(captions(pile)) == ["a.png"] and (folder / "a.txt").is_file()
    assert not list(folder.rglob("*.part")) and updates[-1][tab.go]["interactive"]


# --- what the page hands over ---


def test_uploads_are_handed_on_unopened(tmp_path):
    with gr.Blocks():
        files = Files(file_count="multiple")
    path = draw(tmp_path / "x.png", 1)
    payload = files.data_model.model_validate(
        [{"path": str(path), "orig_name": "mine.png", "meta": {"_type": "gradio.FileData"}}]
    )
    assert files.preprocess(payload) == [(str(path), "mine.png")] and files.preprocess(None) == []


def test_a_scorer_that_does_not_know_the_picture_gives_no_score(shelf, dropped, monkeypatch):
    models = shelf[False]
    loaded, scorer = models.get("scenes-opt"), models.get("scenes-itm", "match")
    pictures, wanted = {"b.png": Path(dropped[1][0])}, Captioning(Generation(max_new_tokens=4))
    [scored] = caption_pictures(loaded, pictures, None, wanted, scorer)
    width = scorer.model.config.vision_config.hidden_size
    monkeypatch.setattr(scorer, "novelty", Novelty(torch.zeros(2 * width), -1.0, "circles"))
    [unscored] = caption_pictures(loaded, pictures, None, wanted, scorer)
    assert len(scored.match) == 1 and unscored.match == () and unscored.captions == scored.captions


def test_a_sidecar_written_again_replaces_itself(tmp_path):
    (tmp_path / "a.txt").write_text("before\n", "utf-8")
    out = Sidecars(tmp_path, if_exists="append")
    for text in ("one", "two"):
        out.write(Entry("a.png", (text,)))
    assert (tmp_path / "a.txt").read_text("utf-8") == "before\ntwo\n"


# --- the server ---


@pytest.fixture(scope="module")
def server(assets):
    demo = build(local=False)
    address = launch(demo)
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client, demo
    demo.close(verbose=False)


def drop_at(client, demo, files, place):
    """The event that the page sends when files were dropped; its last message."""
    [index] = [
        index
        for index, event in demo.fns.items()
        if len(event.inputs) == 2 and event.inputs[1].elem_id == place
    ]
    visit = uuid.uuid4().hex
    data = [dict(file, meta={"_type": "gradio.FileData"}) for file in files]
    body = {"data": [None, data], "fn_index": index, "session_hash": visit}
    joined = client.post("/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": visit}) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return line
    return ""


@pytest.mark.parametrize("place", ["folder-files", "search-files"])
def test_pictures_come_from_uploads_alone(server, tmp_path, place):
    client, demo = server
    with draw(tmp_path / "x.png", 3).open("rb") as file:
        [path] = client.post("/gradio_api/upload", files={"files": ("mine.png", file)}).json()
    assert "1 picture." in drop_at(client, demo, [{"path": path, "orig_name": "mine.png"}], place)
    for wrong in ("/etc/passwd", __file__, "http://127.0.0.1:1/x.png", "file:///etc/passwd"):
        final = drop_at(client, demo, [{"path": path}, {"path": wrong, "orig_name": "x.png"}], place)
        assert "picture" not in final.replace("Only uploaded pictures", ""), final


def test_events_of_the_tab_are_private(server):
    public = {event.api_name for event in server[1].fns.values() if event.api_visibility != "private"}
    assert public == {"caption", "answer", "chat", "compare", "match"}
