"""The page rendered by Node on the server, as Hugging Face Spaces have it: what matters most, once more."""

import shutil

import pytest
from browsing import MARKS, PACE, ask, box, button, draw, expect, replies, set_lengths, settle, shown, upload
from serving import serving

pytestmark = [*MARKS, pytest.mark.skipif(shutil.which("node") is None, reason="no Node here to render pages")]


@pytest.fixture(scope="module")
def app():
    with serving(tiny=True, pace=PACE, GRADIO_SSR_MODE="True") as running:
        yield running
    assert running.process.returncode == 0 and "Stopped.\n" in running.lines, running.lines


@pytest.fixture
def visit(app, visit):
    """On this app, whose page comes from Node."""

    def open_page(**options):
        page = visit(app.url, **options)
        source = page.request.get(app.url).text()
        assert "sveltekit" in source, source[:500]
        return page

    return open_page


def test_upload_ask_and_stop(visit, app, tmp_path):
    page = visit()
    upload(page, draw(tmp_path / "mine.png", 1))
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "what color is the circle?")
    expect(replies(page)).to_have_count(1)
    set_lengths(page, 80, 80)
    begun = settle(app)
    ask(page, "is there a star?", wait=False)
    button(page, "Stop").click()
    expect(page.locator("#chat-note")).to_have_text("Stopped.")
    assert settle(app) - begun < 70


@pytest.mark.long
def test_a_new_picture_begins_a_new_chat(visit, tmp_path):
    page = visit()
    ask(page, "what color is the circle?")
    upload(page, draw(tmp_path / "other.png", 2))
    shown(page, "New picture: a new chat begins.").wait_for()
    expect(replies(page)).to_have_count(0)


@pytest.mark.long
def test_compare(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Question for both").fill("what color is the circle?")
    button(page, "Ask both").click()
    expect(page.locator("#receipt-a code")).to_contain_text("circle? Answer:")
    expect(page.locator("#receipt-b code")).to_contain_text("circle? Short answer:")
    expect(button(page, "Tie")).to_be_enabled()


def test_a_dark_phone(visit):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.body.classList.contains('dark')")
    box(page).tap()
    ask(page, "what color is the circle?")
    expect(replies(page)).to_have_count(1)
