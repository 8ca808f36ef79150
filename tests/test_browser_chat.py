"""Conversations in Chromium: edited, kept for another picture, found again after a reload, exported."""

import json
import zipfile

import pytest
from browsing import (
    MARKS,
    ask,
    box,
    button,
    draw,
    expect,
    replies,
    set_lengths,
    shown,
    upload,
)  # fmt: skip
from serving import serving

pytestmark = MARKS


def questions(page):
    return page.locator("[data-testid=user]")


def test_an_earlier_question_is_edited(visit):
    page = visit()
    for text in ("how many things are there?", "is it 1 < 2 <b>?", "is it red?"):
        ask(page, text)
    page.locator("#conversation").get_by_role("button", name="Edit").nth(1).click()
    page.locator(".edit-textarea").fill("is it <i>blue</i>?")
    page.locator("#conversation").get_by_role("button", name="Submit").click()
    expect(questions(page)).to_have_text(["how many things are there?", "is it <i>blue</i>?"])
    expect(page.locator("#chat-receipt code")).to_contain_text("is it <i>blue</i>?")
    expect(replies(page)).to_have_count(2)


def test_a_new_picture_leaves_the_choice(visit, tmp_path):
    page = visit()
    ask(page, "what color is it?")
    upload(page, draw(tmp_path / "other.png", 5))
    shown(page, "New picture: a new chat begins.")
    expect(replies(page)).to_have_count(0)
    button(page, "Keep the conversation").click()
    expect(questions(page)).to_have_text(["what color is it?"])
    ask(page, "is it red?")
    expect(page.locator("#chat-receipt code")).to_contain_text("what color is it?")
    expect(button(page, "Keep the conversation")).to_be_hidden()


def kept(page):
    return json.loads(page.evaluate("localStorage.getItem('blip2-conversations')") or "[]")


def test_conversations_are_found_again_after_a_reload(visit, tmp_path):
    page = visit()
    ask(page, "what color is it?")
    ask(page, "is it <b>red</b>?")
    first = replies(page).first.inner_text()
    upload(page, draw(tmp_path / "other.png", 6))
    shown(page, "New picture: a new chat begins.")
    ask(page, "how many?")
    expect(page.locator("#history li")).to_have_count(2)
    page.reload()
    box(page).wait_for()
    expect(replies(page)).to_have_count(0)
    page.locator("#history summary").click()
    page.get_by_role("button", name="Open: what color is it?").click()
    expect(questions(page)).to_have_text(["what color is it?", "is it <b>red</b>?"])
    expect(replies(page).first).to_have_text(first)
    ask(page, "is it big?")  # goes on where it was
    expect(page.locator("#chat-receipt code")).to_contain_text("what color is it?")
    expect(page.locator("#history li")).to_have_count(2)
    assert [len(record["turns"]) for record in kept(page)] == [3, 1]
    assert all(record["picture"].startswith("data:image/jpeg") for record in kept(page))
    page.get_by_role("button", name="Forget: how many?").click()
    expect(page.locator("#history li")).to_have_count(1)
    page.locator("#history").get_by_role("button", name="Forget all").click()
    assert kept(page) == []
    shown(page, "Nothing yet")


@pytest.mark.long
def test_the_oldest_conversations_leave_a_full_browser(visit):
    page = visit()
    one = {"time": 1, "model": "m", "name": "n", "picture": "data:image/jpeg;base64," + "A" * 999_500}
    old = [one | {"id": str(n), "turns": [{"question": f"old {n}", "answer": ""}]} for n in (4, 3, 2, 1)]
    page.evaluate("text => localStorage.setItem('blip2-conversations', text)", json.dumps(old))
    page.reload()
    box(page).wait_for()
    page.locator("#history summary").click()
    ask(page, "what color is it?")
    shown(page, "There was no room left: the oldest left.")
    assert [record["id"] for record in kept(page)][1:] == ["4", "3", "2"]


@pytest.mark.long
def test_what_a_browser_kept_wrongly_does_no_harm(visit):
    page = visit()
    bad = [{"id": "x", "turns": [{"question": "<img src=x onerror=alert(1)>"}]}]
    for text in ("no json", "{}", json.dumps(bad)):
        page.evaluate("text => localStorage.setItem('blip2-conversations', text)", text)
        page.wait_for_timeout(500)  # a reload in the midst of opening is an error to gradio's client
        page.reload()
        box(page).wait_for()
    page.locator("#history summary").click()
    page.locator("#history [data-act=open]").click()
    shown(page, "what the browser kept is damaged")
    ask(page, "is it red?")
    expect(replies(page)).to_have_count(1)


@pytest.mark.long
def test_a_conversation_is_exported(visit, tmp_path):
    page = visit()
    expect(button(page, "Export")).to_be_disabled()
    ask(page, "is it _red_?")
    with page.expect_download() as download:
        button(page, "Export").click()
    download.value.save_as(tmp_path / "kept.zip")
    pack = zipfile.ZipFile(tmp_path / "kept.zip")
    assert {"conversation.md", "conversation.json", "picture.png"} == set(pack.namelist())
    assert json.loads(pack.read("conversation.json"))["turns"][0]["question"] == "is it _red_?"


def test_enter_sends_and_shift_enter_breaks_the_line(visit):
    page = visit()
    box(page).fill("one")
    box(page).press("Shift+Enter")
    box(page).press_sequentially("two?")
    expect(box(page)).to_have_value("one\ntwo?")
    box(page).press("Enter")
    expect(page.locator("#chat-receipt code")).to_contain_text("one\ntwo?")


@pytest.mark.long
def test_a_visitor_in_line_is_told_the_place(visit):
    with serving(tiny=True, pace=0.3) as slow:
        pages = [visit(slow.url) for _ in range(4)]
        for page in pages[:3]:
            set_lengths(page, 60, 60)
            ask(page, "what?", wait=False)
        shown(pages[2], "You are number 1 in line")
        ask(pages[3], "and?", wait=False)
        shown(pages[3], "You are number 2 in line")
        button(pages[2], "Stop").click()  # leaves the line
        shown(pages[2], "Stopped.")
        shown(pages[3], "You are number 1 in line")
        for page in pages[:2]:
            button(page, "Stop").click()
        expect(pages[3].locator("#chat-receipt code")).to_contain_text("and?")
        for page in pages:
            page.close()  # before the server goes
