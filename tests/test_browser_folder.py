"""The Folder tab in Chromium: drop pictures, stop, go on, mend captions, take them away."""

import csv
import io
import json
import re
import zipfile

import pytest
from browsing import MARKS, PATIENCE, button, draw, expect, set_lengths, settle
from uploading import draw_all

pytestmark = MARKS
NAMES = ["a.png", "b.png", "bad.png", "c.png", "d.png", "<b>e<b>.png", "a.png"]


@pytest.fixture
def pictures(tmp_path):
    """Seven: one broken, two of the same name, one named like HTML."""
    return draw_all(tmp_path, NAMES)


def open_folder(page):
    page.get_by_role("tab", name="Folder").click()
    return page.locator("#folder-table .row")


def drop(page, files):
    page.locator("#folder-files input[type=file]").set_input_files(files)
    expect(page.locator("#folder-note")).to_have_text(f"{len(files)} pictures.")


def set_number(page, label, value):
    field = page.get_by_label(f"number input for {label}").locator("visible=true")
    for _ in range(5):  # as `set_lengths`
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(300)
        if field.input_value() == str(value):
            return
    expect(field).to_have_value(str(value))


def caption_all(page):
    """Press, and wait for the end; what the app says of it."""
    line = page.locator("#folder-note")
    button(page, "Caption all").click()
    page.wait_for_timeout(700)  # until it has begun: what was said before stands there still
    expect(button(page, "Caption all")).to_be_enabled()
    expect(line).to_have_text(re.compile("captioned|All have captions"))
    return line.inner_text()


def field(page, name, which="Caption"):
    return page.get_by_label(f"{which} of {name}", exact=True)


def downloaded(page, form):
    page.get_by_label("Download as").click()
    page.get_by_role("option", name=form).click()
    with page.expect_download() as waiting:
        button(page, "Download").click()
    return waiting.value


def read_csv(download):
    with open(download.path(), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_preview_stop_and_go_on(visit, app, pictures):
    page = visit()
    rows = open_folder(page)
    drop(page, pictures)
    begun = app.journal().get("pictures", 0)
    button(page, "Preview five").click()
    expect(page.locator("#folder-note")).to_contain_text("4 pictures captioned")
    expect(rows).to_have_count(5)
    expect(rows.nth(2)).to_contain_text("bad.png starts like an image but is truncated or damaged")
    expect(rows.nth(0).locator("img")).to_be_visible()
    assert app.journal()["pictures"] - begun == 4

    button(page, "Start over").click()
    expect(rows).to_have_count(0)
    drop(page, pictures)
    page.get_by_role("button", name="Options").locator("visible=true").click()
    set_number(page, "Pictures at once", 1)
    set_lengths(page, 34, 34)
    page.get_by_label("Greedy").locator("visible=true").check()
    begun = app.journal()["pictures"]
    button(page, "Caption all").click()
    expect(rows).not_to_have_count(0)
    button(page, "Stop").locator("visible=true").click()
    stopped = re.compile(r"Stopped: (\d) of 7 pictures")
    expect(page.locator("#folder-note")).to_contain_text(stopped)
    done = rows.count()
    assert 1 <= done <= 6 and int(stopped.search(page.locator("#folder-note").inner_text())[1]) == done
    settle(app)
    encoded = app.journal()["pictures"] - begun  # those done, and the one given up
    usable = done - (done > 2)  # the third is broken
    assert usable <= encoded <= usable + 1
    said = caption_all(page)
    expect(rows).to_have_count(7)
    assert app.journal()["pictures"] - begun - encoded == 6 - usable, said
    expect(rows.nth(6)).to_contain_text("a-2.png")
    expect(rows.nth(5)).to_contain_text("<b>e<b>.png")
    assert rows.locator("b, script").count() == 0
    assert "All have captions" in caption_all(page)


def test_edits_are_downloaded(visit, pictures):
    page = visit()
    rows = open_folder(page)
    drop(page, pictures)
    page.get_by_role("button", name="Options").locator("visible=true").click()
    page.get_by_label("Questions").locator("visible=true").fill("how many?")
    caption_all(page)
    expect(rows).to_have_count(7)
    expect(rows.nth(0).locator("meter")).to_be_visible()
    field(page, "b.png").fill('mine, "really" <i>ünd</i>')
    expect(rows.nth(1).locator("meter")).to_have_count(0)
    download = downloaded(page, "One table (.csv)")  # at once: the edit goes with the press
    assert download.suggested_filename == "captions.csv"
    table = read_csv(download)
    assert [row["caption"] for row in table if row["image"] == "b.png"] == ['mine, "really" <i>ünd</i>']
    assert {row["image"] for row in table} == {
        "a.png", "b.png", "c.png", "d.png", "a-2.png", "<b>e<b>.png"
    }  # fmt: skip
    assert list(table[0]) == ["image", "caption", "match", "how many?"]
    scores = [float(row["match"]) for row in table if row["match"]]
    assert len(scores) == 5 and scores == sorted(scores)

    page.get_by_label("Order").click()
    page.get_by_role("option", name="Worst match first").click()
    expect(rows.nth(0)).to_contain_text(table[0]["image"])
    expect(field(page, "b.png")).to_have_value('mine, "really" <i>ünd</i>')
    field(page, "a-2.png").fill("the other a")
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "(.txt)").path().read_bytes())) as file:
        texts = {name: file.read(name).decode() for name in file.namelist()}
    assert set(texts) == {"a.txt", "b.txt", "c.txt", "d.txt", "a-2.txt", "<b>e<b>.txt"}
    assert texts["a-2.txt"].startswith("the other a") and texts["b.txt"].startswith("mine, ")
    lines = downloaded(page, "One table (.jsonl)").path().read_text("utf-8").splitlines()
    assert {json.loads(line)["image"] for line in lines} == {row["image"] for row in table}


def test_a_folder_of_this_machine(visit, app, tmp_path):
    page = visit()
    rows = open_folder(page)
    album = tmp_path / "album"
    (album / "deep").mkdir(parents=True)
    for place, name in enumerate(["a.png", "b.png", "deep/c.png"]):
        draw(album / name, 20 + place)
    (album / "a.txt").write_text("there before\n", "utf-8")
    path = page.get_by_label("Or a folder of this machine")
    path.fill(str(tmp_path / "nowhere"))
    button(page, "Preview five").click()
    expect(page.locator("#folder-note")).to_contain_text("nowhere is not a folder")
    path.fill(str(album))
    page.get_by_label("The folders in it, too").check()
    button(page, "Preview five").click()
    expect(page.locator("#folder-note")).to_contain_text("3 pictures captioned, nothing is written yet")
    assert {file.name for file in album.rglob("*.txt")} == {"a.txt"}
    caption_all(page)
    c = album / "deep" / "c.txt"
    assert (album / "b.txt").exists() and c.exists()
    assert (album / "a.txt").read_text("utf-8") == "there before\n"
    field(page, "deep/c.png").fill("mended")
    field(page, "deep/c.png").press("Tab")
    for _ in range(100):
        if c.read_text("utf-8") == "mended\n":
            break
        page.wait_for_timeout(100)
    assert c.read_text("utf-8") == "mended\n"
    expect(rows).to_have_count(3)


@pytest.mark.long
def test_two_visitors_do_not_mix(visit, pictures):
    one, two = visit(), visit()
    for page, files in ((one, pictures[:2]), (two, pictures[3:5])):
        open_folder(page)
        drop(page, files)
    for page in (one, two):
        button(page, "Caption all").click()
    for page, mine, others in ((one, ["a.png", "b.png"], "c.png"), (two, ["c.png", "d.png"], "a.png")):
        rows = page.locator("#folder-table .row")
        expect(rows).to_have_count(2)
        expect(button(page, "Caption all")).to_be_enabled()
        assert [rows.nth(place).locator(".name").inner_text() for place in (0, 1)] == mine
        field(page, mine[0]).fill(f"only of {mine[0]}")
        table = read_csv(downloaded(page, "One table (.csv)"))
        assert sorted(row["image"] for row in table) == mine and others not in page.content()


@pytest.mark.long
def test_many_pictures_on_a_phone(visit, tmp_path):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    rows = open_folder(page)
    files = [
        draw(tmp_path / f"a-rather-long-name-of-a-picture-{number:03}.png", number) for number in range(45)
    ]
    drop(page, files)
    caption_all(page)
    expect(rows).to_have_count(20)
    pager = page.get_by_label("Pages of the table")
    expect(pager).to_contain_text("1–20 of 45")
    expect(pager.get_by_role("button", name="Previous")).to_be_disabled()
    pager.get_by_role("button", name="Next").click()
    expect(rows.nth(0)).to_contain_text("020.png")
    field(page, files[20].name).fill("of the second page")
    pager.get_by_role("button", name="Next").click()
    expect(rows).to_have_count(5)
    pager.get_by_role("button", name="Previous").click()
    expect(field(page, files[20].name)).to_have_value("of the second page")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = rows.nth(0).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_closed_page_ends_the_run(visit, app, pictures):
    page = visit()
    rows = open_folder(page)
    drop(page, pictures[:2] + pictures[3:])
    page.get_by_role("button", name="Options").locator("visible=true").click()
    set_number(page, "Pictures at once", 1)
    set_lengths(page, 60, 60)
    page.get_by_label("Greedy").locator("visible=true").check()
    begun = settle(app)
    button(page, "Caption all").click()
    expect(rows).not_to_have_count(0, timeout=PATIENCE)
    page.close()
    assert settle(app) - begun < 60 * 5
