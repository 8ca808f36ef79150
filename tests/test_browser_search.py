"""The Search tab in Chromium: drop pictures, look for a text, take what was found for the next query."""

import re

import pytest
from browsing import MARKS, button, draw, expect
from uploading import draw_all

pytestmark = MARKS
NAMES = ["a.png", "bad.png", "<b>c<b>.png", "d.png", "a.png"]


@pytest.fixture
def pictures(tmp_path):
    """Five: one broken, two of the same name, one named like HTML."""
    return draw_all(tmp_path, NAMES)


def open_search(page, files=()):
    page.get_by_role("tab", name="Search").click()
    if files:
        page.locator("#search-files input[type=file]").set_input_files(files)
        expect(page.locator("#search-note")).to_have_text(f"{len(files)} pictures.")
    return page.locator("ol.found li")


def look_for(page, text):
    page.get_by_label("What to look for").fill(text)
    button(page, "Search").click()
    expect(page.locator("#search-note")).to_contain_text("searched with scenes-itm")


def listed(found):
    return [found.nth(place).locator(".name").inner_text() for place in range(found.count())]


def test_a_text_finds_pictures_and_a_picture_its_like(visit, pictures):
    page = visit()
    found = open_search(page, pictures)
    look_for(page, "a red circle")
    expect(found).to_have_count(4)
    assert sorted(listed(found)) == ["<b>c<b>.png", "a-2.png", "a.png", "d.png"]
    expect(page.locator("#search-note")).to_contain_text("1 picture could not be used: bad.png starts like")
    scores = [float(found.nth(place).locator(".score").inner_text()) for place in range(4)]
    assert scores == sorted(scores, reverse=True)
    expect(found.nth(0).locator("img")).to_be_visible()
    assert page.locator("ol.found b, ol.found script").count() == 0

    before = page.locator("#picture img").get_attribute("src")
    chosen = found.nth(2).locator(".name").inner_text()
    found.nth(2).get_by_role("button").press("Enter")  # by keyboard
    expect(page.locator("#picture img")).not_to_have_attribute("src", before)
    button(page, "Search by the picture").click()
    expect(found.nth(0)).to_contain_text(re.compile(rf"{re.escape(chosen)}\s*1\.00"))
    page.get_by_role("button", name="Options").locator("visible=true").click()
    page.get_by_label("Look at the best again").check()
    look_for(page, "a blue square")
    expect(found.nth(0).locator(".score")).to_contain_text("% match")


def test_visitors_do_not_mix_and_a_phone_shows_all(visit, pictures, tmp_path):
    one = visit()
    two = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    for name in ("Chat", "Caption", "Instruct", "Compare", "Folder", "Search"):
        expect(two.get_by_role("tab", name=name)).to_be_visible()
    mine = open_search(one, [pictures[0], pictures[3]])
    others = open_search(two, [pictures[2], pictures[4]])
    for page in (one, two):
        look_for(page, "a red circle")
    assert sorted(listed(mine)) == ["a.png", "d.png"] and sorted(listed(others)) == ["<b>c<b>.png", "a.png"]
    assert two.evaluate("document.documentElement.scrollWidth") == 390
    box = others.nth(0).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert box["width"] > 120, "two beside each other"
    two.get_by_label("What to look for").fill(" ")
    button(two, "Search").click()
    expect(two.locator("#search-note")).to_contain_text("nothing to look for yet")


def test_a_folder_of_this_machine(visit, tmp_path):
    page = visit()
    found = open_search(page)
    album = tmp_path / "album"
    album.mkdir()
    for place in range(3):
        draw(album / f"{place}.png", 40 + place)
    page.get_by_label("Or a folder of this machine").locator("visible=true").fill(str(tmp_path / "nowhere"))
    page.get_by_label("What to look for").fill("a red circle")
    button(page, "Search").click()
    expect(page.locator("#search-note")).to_contain_text("nowhere is not a folder")
    page.get_by_label("Or a folder of this machine").locator("visible=true").fill(str(album))
    look_for(page, "a red circle")
    expect(found).to_have_count(3)
    assert (album / ".blip2-index" / "index.json").is_file()
