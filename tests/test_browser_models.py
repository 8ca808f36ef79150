"""The model picker in Chromium: precisions, slow loads and downloads, and what is said offline."""

import shutil

import pytest
from browsing import MARKS, ask, box, button, expect, shown
from hub import Hub
from serving import serving, tiny_checkpoints

pytestmark = MARKS
REPO = "Salesforce/blip2-opt-2.7b"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model in folders of its own, which is not embedded, and all of them."""
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoints(folder)
    shutil.copytree(folder / "scenes-opt", folder / "mine")
    return folder


@pytest.fixture(scope="module")
def slow_app(folders):
    """Loads take 4 s, and the best model for the machine is one that a stand-in for the Hub has."""
    with (
        Hub(folders / "scenes-opt", REPO, pace=0.02) as hub,
        serving(load_pace=0.05, hub=hub.url, best="blip2-opt-2.7b") as app,
    ):
        yield app


def picked(page):
    return page.get_by_label("Model", exact=True)


def pick(page, text):
    """Type a name or a folder into the list."""
    picked(page).click()
    picked(page).fill(str(text))
    picked(page).press("Enter")


def about(page):
    page.get_by_role("button", name="About the model").click()
    return page.locator("#card")


def test_precision_is_for_what_is_not_embedded(visit, folders):
    page = visit()
    expect(page.locator("#precision")).to_be_hidden()
    pick(page, folders / "mine")
    expect(page.get_by_label("Full", exact=True)).to_be_checked()
    card = about(page)
    page.get_by_label("8-bit").check()
    expect(card).to_contain_text("8-bit (int8)")
    ask(page, "what is it?")
    expect(page.locator("#chat-receipt")).to_contain_text("Sent to mine@int8")
    pick(page, "scenes-flan-t5")
    expect(page.locator("#notice")).to_contain_text("scenes-flan-t5 knows drawn scenes only")
    expect(page.locator("#precision")).to_be_hidden()


def test_missing_model_says_the_command(visit):
    page = visit()
    pick(page, "blip2-flan-t5-xl")
    note = page.locator("#model-note")
    expect(note).to_contain_text("blip2 download blip2-flan-t5-xl (15.8 GB). scenes-opt stays in use.")
    expect(picked(page)).to_have_value("scenes-opt (embedded)")
    expect(page.locator("#precision")).to_be_hidden()
    expect(about(page)).to_contain_text("Apache-2.0")
    button(page, "Download it (15.8 GB)").click()
    expect(note).to_contain_text("downloading is off (HF_HUB_OFFLINE is set)")
    ask(page, "what is it?")


@pytest.mark.long
def test_real_model_offline_says_the_command(visit):
    with serving(best="blip2-flan-t5-xl@nf4") as app:
        page = visit(app.url)
        about(page)
        button(page, "Get a real model").click()
        expect(page.locator("#model-note")).to_contain_text("blip2 download blip2-flan-t5-xl (15.8 GB)")
        expect(page.locator("#model-note")).to_contain_text("scenes-opt stays in use")
        expect(button(page, "Cancel")).to_be_hidden()
        ask(page, "what is it?")


def test_slow_load_is_cancelled(visit, slow_app, folders):
    page, before = visit(slow_app.url), slow_app.journal().get("tensors", 0)
    pick(page, folders / "mine")
    expect(page.locator("#model-note")).to_contain_text("tensors, ")
    button(page, "Cancel").click()
    expect(page.locator("#model-note")).to_have_text("Cancelled. scenes-opt stays in use.")
    expect(picked(page)).to_have_value("scenes-opt (embedded)")
    expect(button(page, "Cancel")).to_be_hidden()
    page.wait_for_timeout(400)
    ended = slow_app.journal()["tensors"]
    page.wait_for_timeout(600)
    assert before < slow_app.journal()["tensors"] == ended  # the load itself, not the page alone
    ask(page, "what is it?")


@pytest.mark.long
def test_another_choice_during_a_load(visit, slow_app, folders):
    page = visit(slow_app.url)
    pick(page, folders / "mine")
    expect(page.locator("#model-note")).to_contain_text("tensors, ")
    pick(page, "scenes-flan-t5")
    expect(page.locator("#notice")).to_contain_text("scenes-flan-t5 knows drawn scenes only")
    expect(button(page, "Cancel")).to_be_hidden()
    expect(page.locator("#model-note")).to_be_empty()
    ask(page, "what is it?")
    expect(page.locator("#chat-receipt")).to_contain_text("Sent to scenes-flan-t5")


@pytest.mark.long
def test_real_model_is_downloaded_cancelled_and_gone_on_with(visit, slow_app):
    page = visit(slow_app.url)
    about(page)
    button(page, "Get a real model").click()
    note = page.locator("#model-note")
    expect(note).to_contain_text("Downloading blip2-opt-2.7b: 0.0 of 0.0 GB")
    expect(note).to_contain_text("non-commercial research only")
    button(page, "Cancel").click()
    expect(note).to_contain_text("Cancelled")
    button(page, "Get a real model").click()
    expect(note).to_contain_text("Loading blip2-opt-2.7b")
    expect(picked(page)).to_have_value("blip2-opt-2.7b (in the cache)")
    expect(page.get_by_label("4-bit")).to_be_visible()
    expect(note).to_be_empty()
    expect(page.locator("#notice")).to_be_hidden()
    assert box(page).is_enabled()
    ask(page, "what is it?")
    expect(page.locator("#chat-receipt")).to_contain_text("Sent to blip2-opt-2.7b")
    assert shown(page, "in the cache").count()
