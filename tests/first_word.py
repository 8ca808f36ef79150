"""How long from Enter to the first streamed word, on the embedded model: `tests/first_word.py [times]`.

In Chromium, on the page as it opens: "first" questions begin a conversation about a picture, which the model
then encodes, and describes to itself before it answers; "next" ones go on with it. JSON lines, seconds.
"""

import json
import os
import statistics
import sys

from browsing import CHROMIUM, QUIET, box, expect, sync_api
from serving import embedded, serving

THINGS = [
    f"{color} {shape}"
    for shape in ("circle", "star", "ring", "cross")
    for color in ("red", "green", "blue", "pink", "brown")
]
# the clock runs in the page, from the key to the text
WATCH = """() => {
  addEventListener('keydown', (event) => {
    if (event.key === 'Enter') window.pressed = performance.now();
  }, true);
  window.seen = () => {
    const before = document.querySelectorAll('[data-testid=bot]').length;
    window.took = new Promise((done) => {
      const look = () => {
        const said = document.querySelectorAll('[data-testid=bot]');
        if (said.length > before && said[before].innerText.trim()) {
          watcher.disconnect();
          done((performance.now() - window.pressed) / 1000);
        }
      };
      const watcher = new MutationObserver(look);
      watcher.observe(document.body, {childList: true, subtree: true, characterData: true});
    });
  };
}"""


def timed(page, question: str) -> float:
    """Ask, and wait until the page can be asked again."""
    box(page).fill(question)
    page.evaluate("window.seen()")
    box(page).press("Enter")
    took = page.evaluate("Promise.race([window.took, new Promise((_, no) => setTimeout(no, 30000))])")
    expect(page.locator("#chat-receipt code")).to_contain_text(question)
    return took


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    if not embedded():
        raise SystemExit("the embedded checkpoints are not here")
    took: dict[str, list[float]] = {"first": [], "next": []}
    with serving(tiny=False) as app, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page()
        page.goto(app.url)
        box(page).wait_for()
        page.evaluate(WATCH)
        timed(page, "how many things are there?")  # warm-up: the model is loaded
        for number in range(times):
            page.reload()  # a new visitor: the picture is encoded and described anew
            box(page).wait_for()
            page.wait_for_load_state()
            page.evaluate(WATCH)
            page.wait_for_timeout(1000)  # nobody types sooner
            thing = THINGS[number % len(THINGS)]
            for kind, question in (("first", f"is there a {thing}?"), ("next", f"how many {thing}s?")):
                took[kind].append(timed(page, question))
            print(json.dumps({kind: round(values[-1], 3) for kind, values in took.items()}), flush=True)
        browser.close()
    for kind, values in took.items():
        figures = {"median_s": statistics.median(values), "worst_s": max(values)}
        rounded = {name: round(value, 3) for name, value in figures.items()}
        print(json.dumps({"question": kind, **rounded, "times": len(values), "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
