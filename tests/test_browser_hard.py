"""Hard input through the page: huge pictures and texts, many uploads, markup; and visitors who walk away."""

import numpy as np
import pytest
from browsing import (
    MARKS,
    ask,
    button,
    draw,
    expect,
    replies,
    set_lengths,
    settle,
    upload,
    wait_for_tokens,
)
from PIL import Image

pytestmark = MARKS
EVIL = [
    "<script>alert(1)</script> is it red?",
    "<img src=x onerror=alert(1)> is it red?",
    "**bold** _it_ [star](javascript:alert(1)) `code` # is it?",
    "&lt;b&gt; &amp; </code></div><style>*{display:none}</style>?",
    "$$x^2$$ ```html <b>x</b> ``` | a | b |?",
]


@pytest.fixture
def no_dialogs(visit):
    """A page on which no script of a visitor's runs."""
    page = visit()
    seen = []
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    yield page
    assert seen == []


def marked_up(place):
    """Elements that a text would have made, had it been taken as markup."""
    return place.locator("script, img, b, strong, em, a, style, table, h1, pre, .katex").count()


def test_markup_in_a_chat_is_text(no_dialogs):
    page = no_dialogs
    for text in EVIL:
        ask(page, text)
    said = page.locator("[data-testid=user]")
    assert [text.strip() for text in said.all_inner_texts()] == EVIL
    assert marked_up(said) == 0 and marked_up(page.locator("#chat-receipt")) == 0


@pytest.mark.parametrize(("tab", "label", "go", "receipt"), [
    ("Instruct", "Instruction", "Answer", "#instruct-receipt"),
    ("Compare", "Question for both", "Ask both", "#receipt-a"),
])  # fmt: skip
def test_markup_elsewhere_is_text(no_dialogs, tab, label, go, receipt):
    page = no_dialogs
    page.get_by_role("tab", name=tab).click()
    for text in EVIL[:3]:
        page.get_by_label(label).fill(text)
        button(page, go).click()
        expect(page.locator(f"{receipt} code")).to_contain_text(text)
    assert marked_up(page.locator(receipt)) == 0


def test_a_hundred_kilobytes_are_refused_and_the_page_lives_on(visit):
    page = visit()
    for text in ("what color is it? " * 5600, "\U0001f534" * 25_000):
        ask(page, text, wait=False)
        expect(page.locator("#chat-note .note.error")).to_be_visible()
    ask(page, "is it red?")
    expect(replies(page)).to_have_count(1)


@pytest.mark.long
def test_a_photo_of_fifty_megapixels(visit, tmp_path):
    rows = np.linspace(0, 255, 5774, dtype=np.uint8)[:, None, None]
    path = tmp_path / "huge.jpg"
    Image.fromarray(np.broadcast_to(rows, (5774, 8660, 3)).copy()).save(path, quality=80)
    page = visit()
    upload(page, path)
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "is it red?")
    expect(replies(page)).to_have_count(1)


@pytest.mark.long
def test_thirty_uploads_in_a_row(visit, tmp_path, app):
    page = visit()
    for number in range(30):
        upload(page, draw(tmp_path / f"picture-{number}.png", number))
    ask(page, "is it red?")
    expect(replies(page)).to_have_count(1)
    expect(page.locator("#picture-note .error")).to_have_count(0)
    name = page.locator("#picture img").get_attribute("src")
    assert "picture-29.png" in name, name


@pytest.mark.long
def test_tabs_closed_in_the_midst_leave_the_model_free(visit, app):
    pages = [visit() for _ in range(3)]
    for page in pages:
        set_lengths(page, 80, 80)
    begun = settle(app)
    for page in pages:
        ask(page, "what is it?", wait=False)
    wait_for_tokens(app, begun + 5)
    for page in pages:
        page.close()
    assert settle(app) - begun < 160  # of 240
    page = visit()
    ask(page, "is it red?")
    expect(replies(page)).to_have_count(1)
