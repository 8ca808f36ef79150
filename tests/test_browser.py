"""The app in Chromium, end to end, on tiny random models whose tokens are slowed down enough to watch.

Every test also holds that the page logged no error and asked no other host for anything.
"""

import re

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
    settle,
    upload,
    wait_for_tokens,
)
from hand import ATTEMPTS, Attempt, draw_attempt
from serving import embedded, serving
from test_ui import bad_files

pytestmark = MARKS


def test_upload_and_caption(visit, tmp_path):
    page = visit()
    upload(page, draw(tmp_path / "mine.png", 1))
    expect(page.locator("#picture img")).to_be_visible()
    page.get_by_role("tab", name="Caption").click()
    button(page, "Caption the picture").click()
    expect(page.locator("ol.captions li")).to_have_count(3)
    expect(page.locator("#caption-receipt")).to_contain_text("5 beams")


def test_instruct_shows_the_prompt_of_each_family(visit):
    page = visit()
    page.get_by_role("tab", name="Instruct").click()
    page.get_by_label("Instruction").fill("what color is the circle?")
    button(page, "Answer").click()
    prompt = page.locator("#instruct-receipt code")
    expect(prompt).to_have_text("Question: what color is the circle? Answer:")
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="scenes-flan-t5 (embedded)").click()
    expect(page.locator("#notice")).to_contain_text("scenes-flan-t5 knows drawn scenes only")
    button(page, "Answer").click()
    expect(prompt).to_have_text("Question: what color is the circle? Short answer:")


def test_compare_streams_both_and_takes_a_vote(visit, app):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Question for both").fill("what color is the circle?")
    button(page, "Ask both").click()
    expect(page.locator("#receipt-a code")).to_have_text("Question: what color is the circle? Answer:")
    expect(page.locator("#receipt-b code")).to_have_text("Question: what color is the circle? Short answer:")
    button(page, "Tie").click()
    expect(page.locator("#tally")).to_contain_text("Tie 1")
    expect(button(page, "Tie")).to_be_disabled()
    page.get_by_label("Send both the same text").check()
    set_lengths(page, 60, 60)
    button(page, "Ask both").click()
    wait_for_tokens(app, app.journal()["tokens"] + 8)
    begun = app.journal()["tokens"]
    button(page, "Stop").locator("visible=true").click()
    expect(page.locator("#compare-note")).to_have_text("Stopped.")
    assert settle(app) - begun < 80  # of 120 both
    expect(page.locator("#receipt-a code")).to_have_text("what color is the circle?")


def test_an_answer_is_looked_into(visit):
    page = visit()
    page.get_by_role("button", name="Why this answer?").click()
    button(page, "Look into it").click()
    expect(page.locator("#why-note")).to_contain_text("no answer to look into yet")
    page.get_by_label("Nucleus sampling")  # in a tab's panel, out of sight
    ask(page, "what color is the circle?")
    button(page, "Look into it").click()
    said = page.locator("#tokens meter").or_(page.locator("#why-note").get_by_text("no answer"))
    expect(said.first).to_be_visible()


def test_released_model_says_what_to_run(visit):
    page = visit()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="blip2-opt-2.7b (15.0 GB download)").click()
    expect(page.locator("#model-note")).to_contain_text("blip2 download blip2-opt-2.7b")
    expect(page.get_by_label("Model", exact=True)).to_have_value("scenes-opt (embedded)")
    button(page, "About the model ▼").or_(page.get_by_role("button", name="About the model")).click()
    expect(page.locator("#card")).to_contain_text("7.5 GB bfloat16")


def test_chat_streams_and_stops(visit, app):
    page = visit()
    set_lengths(page, 60, 60)
    page.get_by_label("Nucleus sampling").locator("visible=true").check()
    page.get_by_label("Temperature").locator("visible=true").first.fill("2")  # every token another word
    ask(page, "what is in the picture?", wait=False)
    expect(replies(page)).to_have_count(1)
    early = replies(page).inner_text()
    page.wait_for_function(
        "before => document.querySelector('[data-testid=bot]').innerText.length > before", arg=len(early)
    )
    begun = app.journal()["tokens"]
    button(page, "Stop").click()
    expect(page.locator("#chat-note")).to_have_text("Stopped.")
    assert settle(app) - begun < 40  # of 60: the server ended, not the display alone
    expect(button(page, "Send")).to_be_visible()


@pytest.mark.long
def test_beams_show_progress_and_stop(visit, app):
    page = visit()
    set_lengths(page, 80, 80)
    page.get_by_label("Beam search").locator("visible=true").check()
    ask(page, "what is it?", wait=False)
    expect(page.locator("#chat-note")).to_contain_text("Searching with 5 beams")
    begun = app.journal()["tokens"]
    button(page, "Stop").click()
    expect(page.locator("#chat-note")).to_have_text("Stopped.")
    assert settle(app) - begun < 60


def test_closed_page_ends_decoding(visit, app):
    page = visit()
    set_lengths(page, 80, 80)
    begun = settle(app)
    ask(page, "what is it?", wait=False)
    wait_for_tokens(app, begun + 5)  # not for words: a random model may say none
    page.close()
    assert settle(app) - begun < 70


@pytest.mark.long
def test_regenerate_undo_clear(visit):
    page = visit()
    ask(page, "what color is the circle?")
    ask(page, "is there a star?")
    expect(replies(page)).to_have_count(2)
    button(page, "Regenerate").click()
    expect(page.locator("#chat-note")).to_contain_text("The same again")
    expect(replies(page)).to_have_count(2)
    button(page, "Undo").click()
    expect(replies(page)).to_have_count(1)
    expect(box(page)).to_have_value("is there a star?")
    button(page, "Clear").click()
    expect(replies(page)).to_have_count(0)
    expect(button(page, "Undo")).to_be_disabled()


def test_new_picture_begins_a_new_chat(visit, tmp_path):
    page = visit()
    ask(page, "what color is the circle?")
    upload(page, draw(tmp_path / "other.png", 2))
    expect(page.locator("#chat-note")).to_have_text("New picture: a new chat begins.")
    expect(replies(page)).to_have_count(0)
    ask(page, "is there a star?")
    expect(page.locator("#chat-receipt code")).to_have_text("Question: is there a star? Answer:")
    page.locator("#examples").get_by_role("button").nth(1).click()  # which asks its own question
    expect(page.locator("#chat-receipt code")).to_have_text("Question: how many things are there? Answer:")
    expect(replies(page)).to_have_count(1)
    page.get_by_role("tab", name="Caption").click()
    page.locator("#examples").get_by_role("button").nth(2).click()  # but not where the chat is not open
    page.get_by_role("tab", name="Chat").click()
    expect(replies(page)).to_have_count(0)


def test_bad_uploads_get_a_sentence_each(visit, tmp_path):
    page = visit()
    for name, data in bad_files().items():
        path = tmp_path / name
        path.write_bytes(data)
        upload(page, path)
        expect(page.locator("#picture-note")).to_contain_text(name)
    ask(page, "what color is the circle?")  # of the picture before, which came back
    expect(replies(page)).to_have_count(1)


def test_bad_prompts_get_a_sentence_each(visit):
    page = visit()
    line = page.locator("#chat-note")
    box(page).press("Enter")
    expect(line).to_contain_text("There is nothing to ask yet")
    ask(page, "x" * 100_001, wait=False)
    expect(line).to_contain_text("100,001 characters")
    ask(page, "ring the bell\x07", wait=False)
    expect(line).to_contain_text("control characters")
    evil = "<img src=http://example.org/x.png> **is** <b>it</b> a [star](http://example.org)?"
    ask(page, evil)
    assert page.locator("[data-testid=user]").inner_text().strip() == evil
    assert page.locator("[data-testid=user] img, [data-testid=user] b, [data-testid=user] a").count() == 0


def test_two_visitors_do_not_mix(visit, tmp_path):
    one, two = visit(), visit()
    upload(one, draw(tmp_path / "one.png", 1))
    upload(two, draw(tmp_path / "two.png", 2))
    for page in (one, two):
        set_lengths(page, 20, 20)
    ask(one, "what color is the circle?", wait=False)
    ask(two, "is there a star?", wait=False)
    for page, mine, other in ((one, "circle", "star"), (two, "star", "circle")):
        expect(page.locator("#chat-receipt code")).to_contain_text(mine)
        assert other not in page.locator("#conversation").inner_text()
        assert other not in page.locator("#chat-receipt").inner_text()
        expect(page.locator("[data-testid=user]")).to_have_count(1)
    pictures = [page.locator("#picture img").get_attribute("src") for page in (one, two)]
    assert "one.png" in pictures[0] and "two.png" in pictures[1]


@pytest.mark.long
def test_ignored_settings_are_greyed_out(visit):
    page = visit()
    page.get_by_role("button", name="Parameters").locator("visible=true").click()
    beams = page.get_by_label("number input for Beams").locator("visible=true")
    top_p = page.get_by_label("number input for Top p").locator("visible=true")
    expect(beams).to_be_disabled()
    page.get_by_label("Nucleus sampling").locator("visible=true").check()
    expect(top_p).to_be_enabled()
    expect(beams).to_be_disabled()
    page.get_by_label("Beam search").locator("visible=true").check()
    expect(beams).to_be_enabled()
    expect(top_p).to_be_disabled()


def test_pasted_picture(visit, tmp_path):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#picture").get_by_role("button", name="Remove Image").click()
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 40, height: 30});
            canvas.getContext("2d").fillRect(5, 5, 20, 20);
            const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    page.get_by_role("button", name="Paste from clipboard").click()
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "what is it?")


def test_webcam_picture(visit):
    page = visit(permissions=["camera"])
    page.locator("#picture").get_by_role("button", name="Remove Image").click()
    page.get_by_role("button", name="Capture from camera").click()
    page.get_by_title("grant webcam access").click()
    page.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    page.get_by_title("capture photo").or_(page.get_by_label("capture photo")).first.click()
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "what is it?")


def sheet(page, state):
    """The sketch pad, once what is on it is the page's picture ("ready"), or it is "empty"."""
    pad = page.locator("#pad .pad")
    expect(pad).to_have_attribute("data-state", state)
    return pad


def test_drawing_is_the_picture(visit):
    page = visit()
    ask(page, "what color is the circle?")
    page.get_by_role("tab", name="Draw").click()
    expect(sheet(page, "empty").get_by_role("status")).to_contain_text("The sheet is empty")
    ask(page, "is there a star?", wait=False)
    expect(page.locator("#chat-note")).to_contain_text("There is no picture")
    draw_attempt(page, Attempt("square", "blue", 0.4, 0.4, 0.2, full=False, seed=1))
    expect(sheet(page, "ready").get_by_role("status")).to_contain_text("the picture now")
    expect(page.locator("#chat-note")).to_have_text("New picture: a new chat begins.")
    ask(page, "is there a star?")
    draw_attempt(page, Attempt("star", "red", 0.7, 0.7, 0.15, full=False, seed=2), clear=False)
    expect(page.locator("#chat-note")).to_have_text("New picture: a new chat begins.")
    expect(replies(page)).to_have_count(0)
    button(page, "Clear sheet").click()
    sheet(page, "empty")
    page.get_by_role("tab", name="Caption").click()
    button(page, "Caption the picture").click()
    expect(page.locator("#caption-note")).to_contain_text("There is no picture")
    button(page, "Undo stroke").click()
    sheet(page, "ready")
    page.get_by_role("tab", name="Picture").click()  # the picture it had, not the drawing
    expect(page.locator("#picture img")).to_have_attribute("src", re.compile("scene-1"))


@pytest.mark.long
def test_erased_drawing_is_no_picture(visit):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    dot = Attempt("circle", "green", 0.5, 0.5, 0.01, full=False, seed=1)
    draw_attempt(page, dot)
    page.locator("#pad").get_by_role("radio", name="eraser").check(force=True)
    page.locator("#pad").get_by_role("slider", name="Thickness").fill("44")
    page.locator("#pad canvas").click()
    sheet(page, "empty")


@pytest.mark.long
def test_drawing_by_finger(visit):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.get_by_role("tab", name="Draw").click()
    canvas = page.locator("#pad canvas")
    canvas.scroll_into_view_if_needed()
    area, before = canvas.bounding_box(), page.evaluate("scrollY")
    finger = page.context.new_cdp_session(page)
    for kind, share in (("touchStart", 0.8), ("touchMove", 0.5), ("touchMove", 0.2), ("touchEnd", None)):
        points = [{"x": area["x"] + 60, "y": area["y"] + share * area["height"]}] if share else []
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    sheet(page, "ready")
    assert page.evaluate("scrollY") == before  # it drew, and did not scroll
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ask(page, "what is it?")


@pytest.mark.long
@pytest.mark.skipif(not embedded(), reason="needs the embedded checkpoints")
def test_embedded_model_knows_drawings(visit, capsys):
    with serving(tiny=False) as real:
        page = visit(real.url)
        page.get_by_role("tab", name="Draw").click()
        said = []
        for attempt in ATTEMPTS:
            draw_attempt(page, attempt)
            shape, color = f"what shape is the {attempt.color} thing?", f"what color is the {attempt.shape}?"
            for question in (shape, color):
                ask(page, question)
                expect(page.locator("#chat-receipt p")).to_be_visible()
                said.append(replies(page).last.inner_text().strip())
    shapes = sum(answer == attempt.shape for answer, attempt in zip(said[::2], ATTEMPTS, strict=True))
    colors = sum(answer == attempt.color for answer, attempt in zip(said[1::2], ATTEMPTS, strict=True))
    with capsys.disabled():
        print(f"\nof {len(ATTEMPTS)} drawings: {shapes} shapes, {colors} colors right")
        for attempt, shape, color in zip(ATTEMPTS, said[::2], said[1::2], strict=True):
            full = " (full)" if attempt.full else ""
            print(f"  {attempt.color} {attempt.shape}{full}, radius {attempt.radius:.2f}: {color} {shape}")
    assert shapes >= 8, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_has_no_horizontal_scroll(visit, scheme):
    page = visit(
        viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True,
        color_scheme=scheme,
    )  # fmt: skip
    for tab in ("Chat", "Caption", "Instruct"):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name="Parameters").locator("visible=true").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#look').getBoundingClientRect().bottom") <= page.evaluate(
        "document.querySelector('#ask').getBoundingClientRect().top"
    )


def test_picture_stays_in_view(visit):
    page = visit()
    page.get_by_role("tab", name="Caption").click()
    page.get_by_role("button", name="Parameters").locator("visible=true").click()
    page.mouse.move(900, 500)
    page.mouse.wheel(0, 400)
    page.wait_for_function("scrollY > 150")
    expect(page.locator("#picture img")).to_be_in_viewport(ratio=0.9)
