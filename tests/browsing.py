"""What the browser tests share: Chromium's options, and hands for the page."""

import shutil
import time

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--use-fake-device-for-media-stream",
         "--use-fake-ui-for-media-stream"]  # fmt: skip
PACE = 0.04  # seconds a token
PATIENCE = 30_000  # milliseconds; for machines busy with other things
expect.set_options(timeout=PATIENCE)


def box(page):
    return page.get_by_placeholder("Ask about the picture; Enter sends")


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def shown(page, text):
    return page.get_by_text(text).locator("visible=true").first


def replies(page):
    return page.locator("[data-testid=bot]")


def ask(page, text, *, wait=True):
    box(page).fill(text)
    for _ in range(3):  # faster than a hand: while gradio closes the event before, it takes no other
        box(page).press("Enter")
        try:
            expect(box(page)).to_have_value("", timeout=2000)
            break
        except AssertionError:
            continue
    if wait:
        expect(page.locator("#chat-receipt code")).to_contain_text(text.strip())


def set_lengths(page, shortest, longest):
    """So that an answer is long enough to be stopped."""
    page.get_by_role("button", name="Parameters").locator("visible=true").click()
    for label, value in (("Longest answer", longest), ("Shortest answer", shortest)):
        field = page.get_by_label(f"number input for {label}").locator("visible=true")
        for _ in range(5):  # a control that has just come into view takes its default, and drops what it had
            field.fill(str(value))
            field.press("Tab")
            page.wait_for_timeout(300)
            if field.input_value() == str(value):
                break
        expect(field).to_have_value(str(value))


def draw(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def upload(page, path):
    """Replace the picture."""
    remove = page.locator("#picture").get_by_role("button", name="Remove Image")
    if remove.count():
        remove.click()
    page.locator("#picture input[type=file]").set_input_files(path)


def settle(app):
    """The number of tokens decoded so far, once it no longer grows."""
    while True:
        before = app.journal().get("tokens", 0)
        time.sleep(8 * PACE)
        if app.journal().get("tokens", 0) == before:
            return before


def wait_for_tokens(app, number):
    """Until that many tokens were decoded in all."""
    deadline = time.monotonic() + PATIENCE / 1000
    while app.journal().get("tokens", 0) < number:
        assert time.monotonic() < deadline, f"no {number} tokens: {app.journal()}"
        time.sleep(PACE)
