"""Many visitors at once, on the embedded model: each gets what the model says of their own picture.

Every visitor has a browser page, a drawn scene of their own, and two questions about it. All ask at the same
moment. The answers are held to the model's own, had beforehand with nobody else around.
"""

import json
import os
import statistics
import time

import pytest
from browsing import CHROMIUM, box, expect, replies, upload
from first_word import WATCH
from PIL import Image
from serving import embedded, serving

from train.scenes.world import render, sample

NEEDS = pytest.mark.skipif(
    not (CHROMIUM and embedded()), reason="takes Chromium and the embedded checkpoints"
)
ASKED = "#chat-receipt code"


@pytest.fixture(scope="module")
def app():
    with serving("--no-local", tiny=False) as running:
        yield running
    assert running.process.returncode == 0, running.lines
    assert not [line for line in running.lines if "Traceback" in line], running.lines


def visitors(folder, count):
    """(picture, two questions, the model's answers), for each a scene that no other has."""
    import blip2

    loaded = blip2.load("scenes-opt")
    found = []
    for seed in range(count):
        scene = sample(seed, "test")
        path = folder / f"scene-{seed}.png"
        Image.fromarray(render(scene, 256)).save(path)
        thing = scene.things[-1]
        questions = (f"what color is the {thing.shape}?", "how many things are there?")
        chat = blip2.Chat(loaded.model, loaded.processor)
        chat.set_image(blip2.open_image(path))
        found.append((path, questions, [chat.ask(text, method="greedy") for text in questions]))
    return found


def all_ask(pages, questions):
    """Press Enter on every page; seconds until each shows a first word, and until all are answered."""
    for page, text in zip(pages, questions, strict=True):
        box(page).fill(text)
        page.evaluate("window.seen()")
    start = time.monotonic()
    for page in pages:
        box(page).press("Enter")
    first = [page.evaluate("window.took") for page in pages]
    for page, text in zip(pages, questions, strict=True):
        expect(page.locator(ASKED)).to_contain_text(text)
    return first, time.monotonic() - start


def check(app, browser, folder, count):
    everyone = visitors(folder, count)
    assert len({answers[0] for _, _, answers in everyone}) > min(count, 9) // 2, (
        "too much alike to tell apart"
    )
    contexts = [browser.new_context(viewport={"width": 800, "height": 600}) for _ in everyone]
    try:
        pages = [context.new_page() for context in contexts]
        complaints: list[str] = []
        for page, (path, _, _) in zip(pages, everyone, strict=True):
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.set_default_timeout(120_000)
            page.goto(app.url)
            box(page).wait_for()
            page.evaluate(WATCH)
            upload(page, path)
            expect(page.locator("#picture img")).to_be_visible()
        for turn in range(2):
            first, done = all_ask(pages, [questions[turn] for _, questions, _ in everyone])
            figures = {
                "visitors": count, "question": turn + 1, "first_word_median_s": statistics.median(first),
                "first_word_worst_s": max(first), "all_done_s": done, "cores": os.cpu_count(),
            }  # fmt: skip
            print(json.dumps({name: round(value, 2) for name, value in figures.items()}))
        for page, (_, questions, answers) in zip(pages, everyone, strict=True):
            said = [text.strip() for text in replies(page).all_inner_texts()]
            asked = [text.strip() for text in page.locator("[data-testid=user]").all_inner_texts()]
            assert (asked, said) == (list(questions), answers)
        assert complaints == []
    finally:
        for context in contexts:
            context.close()


@pytest.mark.long
@NEEDS
@pytest.mark.browser
def test_six_visitors_at_once(app, browser, tmp_path):
    check(app, browser, tmp_path, 6)


@NEEDS
@pytest.mark.long
def test_thirty_two_visitors_at_once(app, browser, tmp_path):
    check(app, browser, tmp_path, 32)
