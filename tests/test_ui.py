"""The app without a browser: what may be served where, one visitor's session, what the server gives away."""

import copy
import io
import json
import re
import threading
import time
import uuid
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
import zerogpu
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from serving import TINY

from blip2.chat import Turn
from blip2.generation import Generation, generate
from blip2.images import ImageError
from blip2.model import Blip2
from blip2.novelty import Novelty
from blip2.pictures import Captioning
from blip2.ports import is_loopback
from blip2.presets import PRESETS
from blip2.processing import PromptError
from blip2.ui import build, errors, history, launch, main, page
from blip2.ui.answers import Background, Progress
from blip2.ui.caption import CaptionTab
from blip2.ui.compare import VOTES, CompareTab, pair
from blip2.ui.errors import friendly, question
from blip2.ui.instruct import InstructTab
from blip2.ui.line import Line
from blip2.ui.models import Models
from blip2.ui.page import DELETE_CACHE
from blip2.ui.parameters import DESCRIBE, KEPT, Parameters
from blip2.ui.picture import Picture
from blip2.ui.serve import UsageError, may_be_local
from blip2.ui.session import Session
from blip2.ui.stop import Stop
from blip2.ui.subject import Subject
from blip2.ui.talk import ChatTab
from blip2.ui.votes import Votes
from blip2.ui.why import Why
from blip2.ui.words import SILENCE, note, plain, receipt
from blip2.ui.work import Work

pytestmark = pytest.mark.usefixtures("assets")


def picture(tmp_path, seed: int) -> str:
    path = tmp_path / f"{seed}.png"
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


# --- where the app may do what ---


@pytest.mark.parametrize(
    ("host", "wanted", "space", "allowed"),
    [
        ("127.0.0.1", None, "", True),
        ("localhost", None, "", True),
        ("[::1]", None, "", True),
        ("127.0.0.1", False, "", False),
        ("0.0.0.0", None, "", False),
        ("192.168.1.7", None, "", False),
        ("::", None, "", False),
        ("example.org", None, "", False),
        ("127.0.0.1", None, "someone/blip2", False),
    ],
)
def test_local_is_for_this_machine_alone(monkeypatch, host, wanted, space, allowed):
    monkeypatch.setenv("SPACE_ID", space)
    assert may_be_local(host, wanted) is allowed


@pytest.mark.parametrize(
    ("host", "space"), [("0.0.0.0", ""), ("127.0.0.1", "someone/blip2"), ("10.0.0.3", "")]
)
def test_local_is_refused_where_strangers_come(monkeypatch, capsys, host, space):
    monkeypatch.setenv("SPACE_ID", space)
    with pytest.raises(UsageError):
        may_be_local(host, True)
    with pytest.raises(SystemExit) as stop:
        main(["--host", host, "--local"])
    assert stop.value.code == 2 and "--local would let strangers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--port", "70000"], 2, "allowed: 1 to 65535"),
        (["--max-models", "0"], 2, "allowed: 1 or more"),
        (["--model", "scenes-itm"], 1, "scores texts"),
        (["--model", "scenes-otp"], 1, "Did you mean scenes-opt"),
        (["--model", "blip2-opt-2.7b"], 1, "blip2 download blip2-opt-2.7b"),
        (["--model", "./nowhere"], 1, "there is no folder ./nowhere"),
    ],
)
def test_bad_command_line_ends_with_a_sentence(capsys, arguments, code, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == code and words in error and "Traceback" not in error


def test_loopback_names():
    assert (
        is_loopback("127.0.0.9") and not is_loopback("0.0.0.0") and not is_loopback("localhost.example.org")
    )


# --- one visitor ---


def bad_files() -> dict[str, bytes]:
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    bomb = bytearray(png.getvalue())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # a header that promises 3.6 billion pixels
    return {
        "notes.png": b"just some text",
        "cut.png": png.getvalue()[:60],
        "nothing.png": b"",
        "bomb.png": bytes(bomb),
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "page.png": b"<!doctype html><html><body>hello</body></html>",
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_upload_is_one_sentence_and_changes_nothing(tmp_path, name):
    visitor = Session()
    visitor.look(picture(tmp_path, 1))
    before = visitor.subject.path
    path = tmp_path / "ab12" / name
    path.parent.mkdir()
    path.write_bytes(bad_files()[name])
    with pytest.raises(ImageError) as error:
        visitor.look(str(path), name)
    assert name in str(error.value) and str(tmp_path) not in str(error.value) and "\n" not in str(error.value)
    assert visitor.subject.path == before and visitor.look(before) is False


def test_new_picture_new_chat(tmp_path):
    visitor = Session()
    first, second = picture(tmp_path, 1), picture(tmp_path, 2)
    assert visitor.look(first)
    visitor.turns.append(Turn("what color is the circle?", "red"))
    again = tmp_path / "copy.png"
    again.write_bytes((tmp_path / "1.png").read_bytes())
    assert not visitor.look(str(again)) and visitor.turns
    assert visitor.look(second) and not visitor.turns


def test_deleted_upload_is_said(tmp_path):
    models, visitor, path = Models("scenes-opt"), Session(), picture(tmp_path, 1)
    visitor.look(path)
    visitor.subject.features(models.get("scenes-opt"))
    (tmp_path / "1.png").unlink()
    visitor.look(path)
    assert len(visitor.subject.features(models.get("scenes-opt"))) == 1
    with pytest.raises(ImageError, match=r"1\.png is no longer here"):
        visitor.subject.features(models.get("scenes-flan-t5"))


def test_every_visitor_starts_afresh(tmp_path):
    with gr.Blocks():
        state = gr.State(Session())
    one, two = copy.deepcopy(state.value), copy.deepcopy(state.value)
    one.look(picture(tmp_path, 1))
    assert one is not two and two.subject.path is None and one._stop is not two._stop


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "nothing to ask"),
        (" \n ", "nothing to ask"),
        ("bell\x07", r"control characters \(U\+0007\)"),
        ("a\x85b", r"U\+0085"),
        ("\ud800", "half a character"),
    ],
)
def test_prompts_that_are_no_text(text, words):
    with pytest.raises(PromptError, match=words):
        question(text)
    assert question(" two\nlines\t ") == "two\nlines"


def test_errors_are_friendly_and_leak_nothing(caplog):
    assert "ran out of memory" in friendly(torch.OutOfMemoryError("CUDA out of memory. /secret"))
    assert "/secret" not in friendly(RuntimeError("/secret/path exploded"))
    assert "/secret/path exploded" in caplog.text
    assert friendly(ValueError("say this")) == "say this"


def test_background_stops_when_its_reader_leaves():
    stop, over = Stop(), threading.Event()
    work = Background(lambda: over.wait(10), stop)
    ticks = work.ticks(0.01)
    assert next(ticks) > 0
    ticks.close()
    assert stop.is_set()
    over.set()
    broken = Background(lambda: 1 / 0, Stop())
    list(broken.ticks(0.01))
    with pytest.raises(ZeroDivisionError):
        broken.result()


def test_text_stays_text():
    evil = "<img src=x onerror=alert(1)> & <b>"
    for shown in (note(evil), receipt("m<b>", evil, [evil]), plain(evil)):
        assert "<img" not in shown and "<b>" not in shown
    assert plain("1 < 2 & 3") == "1 < 2 & 3"


# --- settings ---


def test_ignored_settings_are_greyed_out_and_left_out():
    with gr.Blocks():
        panel = Parameters(Generation.caption(num_captions=3), several=True)
    on = {name for name, control in panel.controls.items() if control.interactive is not False}
    assert on >= {"num_beams", "length_penalty", "num_captions"} and not on & {"top_p", "temperature", "seed"}
    values = {name: control.value for name, control in panel.controls.items()}
    assert panel.generation(tuple(values.values())) == Generation.caption(num_captions=3)
    greedy = values | {"method": "greedy", "top_p": None, "seed": "oops"}
    assert panel.generation(tuple(greedy.values())) == Generation()
    nucleus = values | {"method": "nucleus", "seed": " 7 ", "temperature": 0.5}
    wanted = Generation("nucleus", seed=7, temperature=0.5, num_captions=3)
    assert panel.generation(tuple(nucleus.values())) == wanted
    whole = panel.generation(tuple((nucleus | {"temperature": 2, "num_captions": 3.0}).values()))
    assert type(whole.temperature) is float and type(whole.num_captions) is int
    for change, words in (({"seed": "oops"}, "seed is 'oops'"), ({"top_p": None}, "Top p is empty")):
        with pytest.raises(ValueError, match=words):
            panel.generation(tuple((nucleus | change).values()))


@pytest.mark.parametrize("questions", [True, False])
def test_presets_set_the_controls(questions):
    with gr.Blocks():
        panel = Parameters(Generation(), several=not questions, questions=questions)
    start = {name: control.value for name, control in panel.controls.items()}
    for name, method in {"Paper": "beam", "Precise": "greedy", "Creative": "nucleus"}.items():
        changed = [key for key in panel.controls if key not in KEPT]
        updates = dict(zip(changed, panel.preset(name), strict=True))
        values = start | {key: update["value"] for key, update in updates.items()}
        got = panel.generation(tuple(values.values()))
        assert got.method == method and updates["num_beams"]["interactive"] == (method == "beam")
        if name == "Paper":
            assert got == (Generation.answer() if questions else Generation.caption())


def test_first_come_first_served():
    line, stop, leaving = Line(1), Stop(), Stop()
    with line.ticket() as first:
        assert list(line.wait(first, stop)) == []
        with line.ticket() as second, line.ticket() as third:
            waits, last = line.wait(second, leaving), line.wait(third, stop)
            assert (next(waits), next(last)) == (1, 2)
            leaving.set()
            assert list(waits) == []  # a visitor who stops does not wait
        with line.ticket() as fourth:
            assert next(line.wait(fourth, stop)) == 1  # those who left are not counted
    with line.ticket() as fifth:
        assert list(line.wait(fifth, stop)) == []


# --- the tabs, called as gradio calls them ---


@pytest.fixture(scope="module", params=["here", "zerogpu"])
def tabs(request):
    """Where models work in this process, and where in a forked one, as on ZeroGPU."""
    models = Models("scenes-opt")
    for name in TINY:
        models.get(name, "match" if name == "scenes-itm" else "generate")
    work = Work(models, zerogpu.gpu if request.param == "zerogpu" else None)
    with gr.Blocks():
        state, box = gr.State(Session()), Picture()
        made = {tab: tab(work, state, box) for tab in (CaptionTab, InstructTab, Why)}
        made[CompareTab] = CompareTab(work, state, box, Votes())
        made[ChatTab] = ChatTab(work, state, box, history.panel())
    return made


def settings(tab, **changes):
    values = {name: control.value for name, control in tab.parameters.controls.items()} | changes
    return list(values.values())


def last(updates, component):
    return [update[component] for update in updates if component in update][-1]


def test_chat_turns(tabs, tmp_path):
    tab, visitor, path = tabs[ChatTab], Session(), picture(tmp_path, 1)
    shown = list(tab.ask(visitor, (path, ""), "what color is the circle?", *settings(tab)))
    assert [m["role"] for m in last(shown, tab.chatbot)] == ["user", "assistant"]
    assert "Question: what color is the circle? Answer:" in last(shown, tab.receipt)
    again = list(tab.regenerate(visitor, (path, ""), *settings(tab)))
    assert last(again, tab.chatbot) == last(shown, tab.chatbot) and "same again" in last(again, tab.note)
    kept = last(again, tab.history)["record"]
    assert kept["turns"] == [{"question": "what color is the circle?", "answer": visitor.turns[0].answer}]
    list(tab.ask(visitor, (path, ""), "is there a star?", *settings(tab)))
    event = gr.EditData(None, {"index": 0, "previous_value": "", "value": "is it a &lt;b> &amp; c?"})
    list(tab.edit(visitor, (path, ""), event, *settings(tab)))
    assert [turn.question for turn in visitor.turns] == ["is it a <b> & c?"]
    undone = tab.undo(visitor)
    assert undone[tab.chatbot] == [] and undone[tab.box] == "is it a <b> & c?"
    assert undone[tab.history]["record"]["id"] == kept["id"] and not undone[tab.history]["record"]["turns"]
    with pytest.raises(ValueError, match="no longer part"):
        list(tab.edit(visitor, (path, ""), event, *settings(tab)))


def test_a_conversation_can_be_kept_for_another_picture_or_model(tabs, tmp_path):
    tab, visitor = tabs[ChatTab], Session()
    first, second = picture(tmp_path, 1), picture(tmp_path, 2)
    list(tab.ask(visitor, (first, ""), "what color is it?", *settings(tab)))
    visitor.look(second)
    begun = tab.begun_anew(visitor, "New picture.")
    assert begun[tab.chatbot] == [] and begun[tab.keep]["visible"] is True
    assert len(tab.resume(visitor)[tab.chatbot]) == 2
    shown = list(tab.ask(visitor, (second, ""), "is it red?", *settings(tab)))
    assert len(visitor.turns) == 2 and "what color is it?" in last(shown, tab.receipt)
    visitor.use("scenes-flan-t5")
    list(tab.ask(visitor, (second, ""), "is it blue?", *settings(tab)))
    visitor.look(first)  # what was left is the newest conversation
    tab.resume(visitor)
    assert [turn.question for turn in visitor.turns] == ["is it blue?"]
    tab.forget(visitor)
    assert tab.keep not in tab.begun_anew(visitor, "") or not visitor.left


def test_a_picture_is_encoded_once_in_five_turns(tabs, tmp_path, monkeypatch):
    tab, visitor, path, seen = tabs[ChatTab], Session(), picture(tmp_path, 1), tmp_path / "encoded"
    encode = Blip2.encode_image

    def counted(self, pixels):
        with seen.open("a") as file:  # a forked process could not tell otherwise
            file.write("x")
        return encode(self, pixels)

    monkeypatch.setattr(Blip2, "encode_image", counted)
    for _ in range(5):
        list(tab.ask(visitor, (path, ""), "what color is it?", *settings(tab)))
    assert len(visitor.turns) == 5 and seen.read_text() == "x"


def test_scores_and_many_captions(tabs, tmp_path):
    """What no tab of the fixture does; in a forked process, too."""
    work, paths = tabs[ChatTab].work, {name: Path(picture(tmp_path, n)) for n, name in enumerate("abc")}
    scores = work.last(
        "match", ["scenes-itm"], Subject.of_file(str(paths["a"])), ["a star", "a cat"], stop=Stop(),
        kinds=["match"],
    )  # fmt: skip
    assert [len(pair) for pair in scores] == [2, 2] and all(0 <= match <= 1 for match, _ in scores)
    task = ("caption_all", ["scenes-opt", "scenes-itm"], Subject(), paths, None, Captioning(batch_size=2))
    said = [item for item in work.run(*task, stop=Stop(), kinds=["generate", "match"])
            if not isinstance(item, Progress)]  # fmt: skip
    assert [entry.image for entry in said] == ["a", "b", "c"] and all(entry.match for entry in said)


def test_a_failing_model_leaves_the_conversation_as_it_was(tabs, tmp_path, monkeypatch):
    tab, visitor, path = tabs[ChatTab], Session(), picture(tmp_path, 1)
    list(tab.ask(visitor, (path, ""), "what color is the circle?", *settings(tab)))
    before = list(visitor.turns)
    language = tab.models.get("scenes-opt").model.language_model

    def fail(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(language.lm_head, "forward", fail)
    for run, words in ((tab.ask, ["is there a star?"]), (tab.regenerate, [])):
        with pytest.raises(RuntimeError, match="broken"):
            list(run(visitor, (path, ""), *words, *settings(tab)))
        assert visitor.turns == before


def test_two_visitors_do_not_mix(tabs, tmp_path):
    tab, visitors = tabs[ChatTab], [Session(), Session()]
    paths = [picture(tmp_path, seed) for seed in (1, 2)]
    running = [
        tab.ask(visitor, (path, ""), f"is it {number}?", *settings(tab, min_new_tokens=5))
        for number, (visitor, path) in enumerate(zip(visitors, paths, strict=True))
    ]
    shown: list[list] = [[], []]
    for both in zip(*running, strict=False):  # a token of one, then a token of the other
        for seen, update in zip(shown, both, strict=True):
            seen.append(update)
    for seen, stream in zip(shown, running, strict=True):
        seen.extend(stream)
    for number, (visitor, path) in enumerate(zip(visitors, paths, strict=True)):
        alone = Session()
        expected = list(tab.ask(alone, (path, ""), f"is it {number}?", *settings(tab, min_new_tokens=5)))
        assert last(shown[number], tab.chatbot) == last(expected, tab.chatbot)
        assert [turn.question for turn in visitor.turns] == [f"is it {number}?"]


def test_stop_ends_decoding(tabs, tmp_path):
    tab, visitor = tabs[ChatTab], Session()
    stream = tab.ask(
        visitor, (picture(tmp_path, 1), ""), "what?", *settings(tab, max_new_tokens=60, min_new_tokens=60)
    )
    for update in stream:
        if len(update.get(tab.chatbot, [])) == 2:
            break
    visitor.stop()
    rest = list(stream)
    assert last(rest, tab.note) == note("Stopped.")
    assert 1 <= visitor.turns[0].num_tokens < 60


def test_captions_and_instruction(tabs, tmp_path):
    path, caption, instruct = picture(tmp_path, 1), tabs[CaptionTab], tabs[InstructTab]
    shown = list(caption.run(Session(), (path, ""), *settings(caption)))
    assert last(shown, caption.captions).count("<li>") == 3
    visitor = Session()
    for frame, prompt in (
        ("auto", "Question: what? Answer:"),
        ("short", "Short answer:"),
        ("raw", ">what?<"),
    ):
        shown = list(instruct.run(visitor, (path, ""), "what?", frame, *settings(instruct)))
        assert prompt in last(shown, instruct.receipt)


def test_both_answer_in_their_own_frames(tabs, tmp_path, monkeypatch):
    tab, instruct, path = tabs[CompareTab], tabs[InstructTab], picture(tmp_path, 1)
    names = ["scenes-opt", "scenes-flan-t5"]
    for same, prompts in (
        (False, ["Question: what? Answer:", "Question: what? Short answer:"]),
        (True, [">what?<"] * 2),
    ):
        visitor = Session()
        shown = list(tab.run(visitor, (path, ""), "what?", *names, same, *settings(tab, min_new_tokens=4)))
        for side, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            assert f"Sent to {name}" in last(shown, tab.receipts[side])
            assert prompt in last(shown, tab.receipts[side])
            alone = Session()
            alone.use(name)
            frame = "raw" if same else "auto"
            one = settings(instruct, method="greedy", max_new_tokens=30, min_new_tokens=4)
            expected = list(instruct.run(alone, (path, ""), "what?", frame, *one))
            assert last(shown, tab.answers[side]) == last(expected, instruct.answer)
    assert last(shown, tab.votes[0])["interactive"] is True

    file = tmp_path / "votes.jsonl"
    monkeypatch.setattr(tab, "kept", Votes(file))
    said = tab.vote(VOTES[1], visitor)
    assert "scenes-flan-t5 1" in said[tab.tally] and "scenes-opt 0" in said[tab.tally]
    tab.vote(VOTES[0], visitor)  # once a pair
    [line] = file.read_text("utf-8").splitlines()
    vote = json.loads(line)
    assert (vote["vote"], vote["question"], vote["B"]["model"]) == (VOTES[1], "what?", "scenes-flan-t5")
    assert vote["A"]["answer"] == visitor_answer(shown, tab) and path not in line


def visitor_answer(shown, tab):
    """What side A said, as the model said it."""
    answer = last(shown, tab.answers[0])
    return "" if answer == SILENCE else answer


def test_the_last_answer_is_looked_into(tabs, tmp_path):
    why, chat, path, visitor = tabs[Why], tabs[ChatTab], picture(tmp_path, 1), Session()
    with pytest.raises(ValueError, match="no answer to look into"):
        list(why.run(visitor, (path, ""), "occlusion", None, None))
    asked = settings(chat, min_new_tokens=4, method="nucleus", seed="1")
    list(chat.ask(visitor, (path, ""), "<b>what</b>?", *asked))
    assert visitor.answered.turn.answer == visitor.turns[-1].answer != ""
    for kind, layer, query in (("occlusion", None, None), ("attention", None, None), ("attention", 1, 3)):
        shown = list(why.run(visitor, (path, ""), kind, layer, query))
        assert "<meter" in last(shown, why.tokens) and "<b>" not in last(shown, why.tokens)
        assert last(shown, why.map)["value"].size == (40, 40) and last(shown, why.map)["visible"]
    for layer, query in ((9, None), (None, 99), (0, None)):
        with pytest.raises(ValueError, match="this model has 1 to"):
            list(why.run(visitor, (path, ""), "attention", layer, query))
    visitor.look(picture(tmp_path, 2))
    assert visitor.answered is None


def test_one_side_that_fails_leaves_the_other(tabs, tmp_path, monkeypatch):
    tab, visitor = tabs[CompareTab], Session()
    language = tab.models.get("scenes-flan-t5").model.language_model

    def fail(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(language.lm_head, "forward", fail)
    words = ["what?", "scenes-opt", "scenes-flan-t5", False]
    shown = list(tab.run(visitor, (picture(tmp_path, 1), ""), *words, *settings(tab)))
    assert "scenes-opt" in last(shown, tab.receipts[0]) and "failed" in last(shown, tab.receipts[1])
    assert visitor.compared is None and last(shown, tab.go)["interactive"] is True
    with pytest.raises(ValueError, match="A or B is empty"):
        list(tab.run(visitor, (picture(tmp_path, 1), ""), "what?", "", None, False, *settings(tab)))


def test_stop_ends_both(tabs, tmp_path):
    tab, visitor = tabs[CompareTab], Session()
    long = settings(tab, max_new_tokens=60, min_new_tokens=60)
    words = ["what?", "scenes-opt", "scenes-flan-t5", False]
    stream = tab.run(visitor, (picture(tmp_path, 1), ""), *words, *long)
    for update in stream:
        if any(update.get(answer) for answer in tab.answers):
            break
    visitor.stop()
    rest = list(stream)
    assert last(rest, tab.note) == note("Stopped.") and visitor.compared is None
    for side in tab.receipts:
        assert int(re.search(r"(\d+) tokens?", last(rest, side))[1]) < 60


def test_the_pair_is_an_opt_beside_a_flan_t5():
    assert pair(Models("scenes-flan-t5")) == ("scenes-opt", "scenes-flan-t5")
    assert pair(Models("blip2-opt-6.7b")) == ("blip2-opt-6.7b", "blip2-flan-t5-xl")
    assert pair(Models("blip2-flan-t5-xxl")) == ("blip2-opt-2.7b", "blip2-flan-t5-xxl")


def test_ways_of_answering(tabs, tmp_path):
    path = picture(tmp_path, 1)
    for way, expected in zip(DESCRIBE, (False, False, True, True), strict=True):
        chat, instruct = tabs[ChatTab], tabs[InstructTab]
        for tab, run, words in ((chat, chat.ask, ["what?"]), (instruct, instruct.run, ["what?", "auto"])):
            shown = list(run(Session(), (path, ""), *words, *settings(tab, describe=way)))
            assert (">Question: what?" in last(shown, tab.receipt)) != expected
            assert "Question: what?" in last(shown, tab.receipt)


def test_unknown_pictures_are_not_answered_unless_the_visitor_insists(tabs, tmp_path, monkeypatch):
    loaded = tabs[ChatTab].models.get("scenes-opt")
    width = loaded.model.config.vision_config.hidden_size
    monkeypatch.setattr(loaded, "novelty", Novelty(torch.zeros(2 * width), -1.0, "drawn scenes"))
    shown, hidden = gr.update(visible=True), gr.update(visible=False)
    answers = {ChatTab: "chatbot", CaptionTab: "captions", InstructTab: "answer"}
    runs = {ChatTab: "ask", CaptionTab: "run", InstructTab: "run"}
    words = {ChatTab: ["is it red?"], CaptionTab: [], InstructTab: ["is it red?", "auto"]}
    for kind in runs:
        tab = tabs[kind]
        visitor, run = Session(), getattr(tab, runs[kind])
        place = getattr(tab, answers[kind])

        def answer(attempt, path, visitor=visitor, tab=tab, kind=kind):
            return list(attempt(visitor, (path, ""), *words[kind], *settings(tab)))

        first, second = picture(tmp_path, 1), picture(tmp_path, 2)
        refused = answer(tab.guarded(run), first)
        assert "scenes-opt knows drawn scenes only, and this picture does not" in last(refused, tab.note)
        assert "--model blip2-opt-2.7b" in last(refused, tab.note)  # this app serves no released model
        assert last(refused, tab.choice) == shown and last(refused, tab.go)["interactive"]
        if kind is ChatTab:
            assert last(refused, place) == [] and last(refused, tab.box) == "is it red?"
        else:
            assert not any(update.get(place) for update in refused)
        given = answer(tab.guarded(tab.insisting(run)), first)
        assert last(given, place) and last(given, tab.choice) == hidden
        assert "knows" not in last(given, tab.note)
        assert last(answer(tab.guarded(run), first), place)  # remembered
        assert "knows drawn scenes only" in last(answer(tab.guarded(run), second), tab.note)  # for it alone
        assert tab.cleared()[tab.choice] == hidden


def test_long_prompts_are_refused(tabs, tmp_path):
    tab, path = tabs[ChatTab], picture(tmp_path, 1)
    for text in ("what " * 200, "x" * 100_001):
        with pytest.raises(PromptError, match=r"tokens|characters"):
            list(tab.ask(Session(), (path, ""), text, *settings(tab)))


def test_vanished_subject_leaves_the_page_alone(tabs, tmp_path):
    """An answer that ends after its picture was replaced must not be shown beside the new one."""
    tab, visitor = tabs[InstructTab], Session()
    stream = tab.run(visitor, (picture(tmp_path, 1), ""), "what?", "auto", *settings(tab))
    next(stream)
    visitor.look(picture(tmp_path, 2))
    assert not any(tab.receipt in update for update in stream)


# --- the server ---


@pytest.fixture(scope="module")
def server(assets):
    demo = build(local=False)
    address = launch(demo)
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client, demo
    demo.close(verbose=False)


def ask_server(client, demo, name: str, data: list) -> list[dict]:
    """Call an event as the page does, private or not; its messages."""
    [index] = [index for index, event in demo.fns.items() if event.name == name]
    visit = uuid.uuid4().hex
    body = {"data": data, "fn_index": index, "session_hash": visit}
    joined = client.post("/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return [{"msg": "refused", "output": joined.json()}]
    messages = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": visit}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                messages.append(json.loads(line[5:]))
                if messages[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return messages


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "file:///etc/passwd", "../../../etc/passwd", "http://169.254.169.254/latest/meta-data",
     "http://127.0.0.1:1/", __file__],
)  # fmt: skip
@pytest.mark.parametrize("route", ["file=", "proxy=", "stream/"])
def test_server_files_are_not_served(server, route, target):
    reply = server[0].get(f"/gradio_api/{route}{target}")
    assert reply.status_code in (400, 401, 403, 404, 405) and "root:" not in reply.text


@pytest.mark.parametrize(
    "data",
    [
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", "url": "file:///etc/passwd"},
        {"path": "file:///etc/passwd"},
        {"path": "http://169.254.169.254/latest/meta-data/x.png"},
        {"path": "https://example.org/cat.png", "url": "https://example.org/cat.png"},
        {"path": __file__},
    ],
    ids=lambda data: data["path"][:20],
)
def test_pictures_come_from_uploads_alone(server, data):
    messages = ask_server(*server, "look", [None, {"meta": {"_type": "gradio.FileData"}, **data}])
    final = messages[-1]
    assert final["msg"] == "refused" or not final["success"], final
    assert "root:" not in json.dumps(messages)


def test_an_upload_is_taken(server, tmp_path):
    client, demo = server
    with open(picture(tmp_path, 3), "rb") as file:
        [path] = client.post("/gradio_api/upload", files={"files": ("mine.png", file)}).json()
    data = {"path": path, "orig_name": "mine.png", "meta": {"_type": "gradio.FileData"}}
    assert ask_server(client, demo, "look", [None, data])[-1]["success"]


def test_visitors_cannot_choose_what_is_not_offered(server, assets):
    for name in (str(assets / "scenes-opt"), "/etc", "someone/else"):
        assert not ask_server(*server, "choose", [None, name])[-1]["success"]
    final = ask_server(*server, "choose", [None, "blip2-opt-2.7b"])[-1]
    assert final["success"] and "not served here" in json.dumps(final["output"])


def test_programs_are_answered(server, tmp_path):
    """The documented endpoints, and no other, through gradio's client."""
    client, demo = server
    remote = Client(str(client.base_url), verbose=False, download_files=False)
    documented = remote.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(documented) == {"/caption", "/answer", "/chat", "/compare", "/match"}
    public = {event.api_name for event in demo.fns.values() if event.api_visibility != "private"}
    assert public == {name[1:] for name in documented}
    assert client.get("/monitoring").status_code in (403, 404)
    path = picture(tmp_path, 1)
    file, loaded = handle_file(path), demo.blip2_models.get("scenes-opt")
    image = loaded.model.encode_image(loaded.processor.images(Image.open(path)))
    [captions] = generate(
        loaded.model, loaded.processor, image, "a photo of", Generation.caption(num_captions=2)
    )
    assert remote.predict(file, "a photo of", 2, api_name="/caption") == captions
    prompt = "Question: what? Answer:"
    [[answer]] = generate(loaded.model, loaded.processor, image, prompt, Generation.answer())
    assert remote.predict(file, "what?", api_name="/answer") == answer
    asked = [{"role": "user", "content": "what?"}]
    assert remote.predict(file, asked, api_name="/chat") == answer
    more = [*asked, {"role": "assistant", "content": "red"}, {"role": "user", "content": "where?"}]
    prompt = "Question: what? Answer: red. Question: where? Answer:"
    [[answer]] = generate(loaded.model, loaded.processor, image, prompt, Generation.answer())
    assert remote.predict(file, more, api_name="/chat") == answer
    both = remote.predict(file, "where?", api_name="/compare")
    assert [one["prompt"] for one in both] == ["Question: where? Answer:", "Question: where? Short answer:"]
    scored = remote.predict(file, ["a red ring", "a dog"], api_name="/match")
    assert {row["text"] for row in scored} == {"a red ring", "a dog"}
    assert scored[0]["match"] >= scored[1]["match"] and all(0 <= row["match"] <= 1 for row in scored)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("answer", [" "], "nothing to ask"),
        ("answer", ["what?", "no-such-model"], "not served here"),
        ("answer", ["what?", "scenes-itm"], "scores texts"),
        ("caption", ["", 9], "num_captions is 9"),
        ("chat", [[]], "messages must be a list"),
        ("chat", [[{"role": "assistant", "content": "x"}]], "messages must be a list"),
        ("match", [["a", ""]], "texts must be a list"),
        ("match", [["a"], "scenes-opt"], "scores none"),
    ],
)
def test_programs_get_a_sentence(server, tmp_path, name, values, words):
    remote = Client(str(server[0].base_url), verbose=False)
    with pytest.raises(AppError, match=words):
        remote.predict(handle_file(picture(tmp_path, 1)), *values, api_name=f"/{name}")


def test_curl_is_answered(server, tmp_path):
    """As the README says: upload, call, read."""
    client, _ = server
    with open(picture(tmp_path, 1), "rb") as file:
        [path] = client.post("/gradio_api/upload", files={"files": file}).json()
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    call = client.post("/gradio_api/call/answer", json={"data": [image, "what?", "", False]}).json()
    events = client.get(f"/gradio_api/call/answer/{call['event_id']}").text
    assert "event: complete" in events and "data: [" in events
    for wrong in ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": "/etc/passwd"}):
        call = client.post("/gradio_api/call/answer", json={"data": [wrong, "what?", "", False]}).json()
        assert "event: error" in client.get(f"/gradio_api/call/answer/{call['event_id']}").text


def test_uploads_go_within_the_hour(server, assets, tmp_path, monkeypatch):
    assert server[1].delete_cache == DELETE_CACHE and sum(DELETE_CACHE) <= 3600
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))  # the same, with seconds for the hour
    monkeypatch.setattr(page, "DELETE_CACHE", (1, 3))
    demo = build(local=False)
    visitor = Session()
    visitor.look(picture(tmp_path, 7))
    visitor.turns.append(Turn("what?", "this"))
    kept = {"open": history.record(visitor, "scenes-opt")["record"]}
    with httpx.Client(base_url=launch(demo), timeout=20) as client, open(tmp_path / "7.png", "rb") as file:
        [path] = client.post("/gradio_api/upload", files={"files": ("mine.png", file)}).json()
        data = {"path": path, "orig_name": "mine.png", "meta": {"_type": "gradio.FileData"}}
        assert ask_server(client, demo, "look", [None, data])[-1]["success"]
        values = ask_server(client, demo, "reopen", [None, kept])[-1]["output"]["data"]
        [there] = [value for value in values if isinstance(value, dict) and "path" in value]
        made = [Path(path), Path(there["path"])]
        assert all(file.is_file() for file in made)
        deadline = time.monotonic() + 20
        while any(file.exists() for file in made):
            assert time.monotonic() < deadline, made
            time.sleep(0.2)
    demo.close(verbose=False)
    left = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert not left & {file.name for file in made}  # no copy is anywhere either


def test_page_and_presets_agree(server):
    names = [choice[1] for choice in Models("scenes-opt").choices()]
    assert names[:2] == list(TINY)[:2] and set(names) <= set(PRESETS)
    assert errors.log.name == "blip2.ui"
