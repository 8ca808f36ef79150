"""axe-core finds nothing on the page that is ours to mend: every tab, in light, in dark and on a phone.

axe-core (MPL-2.0) is fetched by npm into pytest's cache and is no part of the project.
"""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from browsing import MARKS, ask, button, expect

pytestmark = MARKS
PICTURES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("scene-*.png"))
PACKAGE = "axe-core@4.14.1"
LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
# gradio's own, which no option changes: (rule, part of the element's HTML)
GRADIOS = {
    ("image-redundant-alt", 'alt="Settings"'),
    ("nested-interactive", 'aria-label="common.upload"'),  # of a file input that holds files
}
RUN = """async () => {
  const found = await axe.run(document, {resultTypes: ['violations']});
  return found.violations.flatMap(({id, nodes}) => nodes.map((node) => [id, node.html, node.failureSummary]));
}"""


@pytest.fixture(scope="module")
def axe(request):
    """The script, as text."""
    folder = request.config.cache.mkdir(PACKAGE.replace("@", "-"))
    script = folder / "package" / "axe.min.js"
    if not script.exists():
        if shutil.which("npm") is None:
            pytest.skip("no npm here to fetch axe-core with")
        done = subprocess.run(
            ["npm", "pack", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            pytest.skip(f"npm cannot fetch axe-core: {done.stderr[-300:]}")
        with tarfile.open(folder / done.stdout.split()[-1]) as package:
            package.extract("package/axe.min.js", folder, filter="data")
    return script.read_text()


def open_parts(page):
    """Unfold what is folded and in sight."""
    folded = page.locator("button.label-wrap:not(.open)").locator("visible=true")
    for left in range(folded.count() - 1, -1, -1):
        folded.first.click()
        expect(folded).to_have_count(left)


def chat(page):
    ask(page, "what color is the circle?")
    ask(page, "is there a star?")


def caption(page):
    page.get_by_role("tab", name="Caption").click()
    button(page, "Caption the picture").click()
    expect(page.locator("ol.captions li")).to_have_count(3)


def instruct(page):
    page.get_by_role("tab", name="Instruct").click()
    page.get_by_label("Instruction").fill("what color is the circle?")
    button(page, "Answer").click()
    expect(page.locator("#instruct-receipt code")).to_be_visible()


def compare(page):
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Question for both").fill("what color is the circle?")
    button(page, "Ask both").click()
    expect(button(page, "Tie")).to_be_enabled()


def why(page):
    """Under the picture; a random model may have given no answer to look into."""
    button(page, "Look into it").click()
    said = page.locator("#tokens meter").or_(page.locator("#why-note .note"))
    expect(said.first).to_be_visible()


def refused(page):
    """A sentence about an error."""
    page.get_by_role("tab", name="Chat").click()
    ask(page, "ring the bell\x07", wait=False)
    expect(page.locator("#chat-note")).to_contain_text("control characters")


def folder(page):
    page.get_by_role("tab", name="Folder").click()
    page.locator("#folder-files input[type=file]").set_input_files(PICTURES[:3])
    expect(page.locator("#folder-note")).to_have_text("3 pictures.")
    button(page, "Caption all").click()
    expect(page.locator("#folder-note")).to_contain_text("pictures captioned")


def search(page):
    page.get_by_role("tab", name="Search").click()
    page.locator("#search-files input[type=file]").set_input_files(PICTURES)
    expect(page.locator("#search-note")).to_have_text(f"{len(PICTURES)} pictures.")
    page.get_by_label("What to look for").fill("a red circle")
    button(page, "Search").click()
    expect(page.locator("ol.found li")).to_have_count(len(PICTURES))


def drawn(page):
    page.get_by_role("tab", name="Draw").click()


@pytest.mark.parametrize(
    "look", ["light", *(pytest.param(n, marks=pytest.mark.long) for n in LOOKS if n != "light")]
)
def test_axe_finds_nothing_of_ours(visit, axe, look):
    page = visit(**LOOKS[look])
    page.evaluate(axe)
    found = {}
    for show in (chat, why, caption, instruct, compare, folder, search, refused, drawn):
        show(page)
        open_parts(page)
        page.wait_for_timeout(500)  # for gradio's fades: half a color has too little contrast
        for rule, markup, summary in page.evaluate(RUN):
            if not any(rule == known and part in markup for known, part in GRADIOS):
                found.setdefault((rule, markup[:400]), (show.__name__, summary))
    assert not found, json.dumps([[*what, *where] for what, where in found.items()], indent=1)
