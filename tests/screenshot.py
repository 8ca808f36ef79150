"""Take the README's pictures of the app: `python tests/screenshot.py docs/app.png [dark] [compare] ...`."""

import shutil
import sys
from pathlib import Path

from hand import Attempt, draw_attempt
from playwright.sync_api import sync_playwright
from serving import embedded, serving

QUESTIONS = ("how many things are there?", "what color is the circle?")
DRAWN = (
    Attempt("circle", "orange", 0.3, 0.36, 0.2, full=False, seed=1),
    Attempt("heart", "purple", 0.7, 0.62, 0.22, full=True, seed=2),
)


def main() -> None:
    path, words = Path(sys.argv[1]), sys.argv[2:]
    phone = "phone" in words
    with serving(tiny=not embedded()) as app, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": 390, "height": 844} if phone else {"width": 1280, "height": 800},
            device_scale_factor=2 if phone else 1,
            color_scheme="dark" if "dark" in words else "light",
            is_mobile=phone,
        )
        page.goto(app.url)
        page.get_by_placeholder("Ask about the picture; Enter sends").wait_for()
        if "draw" in words:
            page.get_by_role("tab", name="Draw").click()
            for number, thing in enumerate(DRAWN):
                draw_attempt(page, thing, clear=number == 0)
            page.wait_for_timeout(1000)  # until the picture's chat has begun
        for number, question in enumerate(QUESTIONS, start=1):
            page.get_by_placeholder("Ask about the picture; Enter sends").fill(question)
            page.keyboard.press("Enter")
            page.locator("[data-testid=bot]").nth(number - 1).wait_for()
            page.get_by_role("button", name="Regenerate", exact=True).and_(
                page.locator(":enabled")
            ).wait_for()
        for tab in {"caption", "instruct"} & set(words):
            page.get_by_role("tab", name=tab.title()).click()
        if "why" in words:
            page.get_by_role("button", name="Why this answer?").click()
            page.get_by_role("button", name="Look into it").click()
            page.locator("#tokens table").wait_for()
        for tab in {"folder", "search"} & set(words):
            page.get_by_role("tab", name=tab.title()).click()
            pictures = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.png"))
            page.locator(f"#{tab}-files input[type=file]").set_input_files(pictures)
            page.get_by_text(f"{len(pictures)} pictures.").wait_for()
        if "folder" in words:
            page.get_by_role("button", name="Caption all").click()
            page.get_by_text("pictures captioned").wait_for()
        if "search" in words:
            page.get_by_label("What to look for").fill("a large red square and a small red circle")
            page.get_by_role("button", name="Search", exact=True).click()
            page.locator("ol.found li").first.wait_for()
        if "caption" in words:
            page.get_by_role("button", name="Caption the picture").click()
            page.locator("ol.captions li").first.wait_for()
        if "compare" in words:
            page.get_by_role("tab", name="Compare").click()
            page.get_by_label("Question for both").fill(QUESTIONS[1])
            page.get_by_role("button", name="Ask both").click()
            page.get_by_role("button", name="Tie").and_(page.locator(":enabled")).wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(600)  # for gradio's fades
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page="full" in words)
        browser.close()


if __name__ == "__main__":
    main()
