"""Earlier conversations: kept in the visitor's own browser, opened again, and exported; none stay here."""

import base64
import binascii
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr

from blip2.conversation import Turn
from blip2.images import ImageError, open_image
from blip2.ui.errors import question
from blip2.ui.session import Session

MAX_TURNS, MAX_TEXT = 200, 20_000  # of a conversation that comes back
JPEG = "data:image/jpeg;base64,"
SCRIPT = Path(__file__).with_name("history.js").read_text(encoding="utf-8")
# its own <details>: what is in a closed gr.Accordion does not exist yet, and could keep nothing
TEMPLATE = """<details><summary>Earlier conversations</summary>
<p class="none">Nothing yet: conversations appear here as they go on.</p>
<ul></ul>
<p role="status"></p>
<p>Kept in this browser alone, with small pictures; the server keeps none.
<button type="button" class="all" data-act="all" hidden>Forget all</button></p>
</details>"""


def panel() -> gr.HTML:
    """The list of earlier conversations; its value is `record`'s, or what `opened` takes."""
    return gr.HTML(html_template=TEMPLATE, js_on_load=SCRIPT, apply_default_css=False, elem_id="history")


def record(session: Session, model: str) -> dict[str, Any]:
    """The conversation, for the visitor's browser: plain JSON; without turns it is to be forgotten there."""
    kept = {
        "id": session.subject.conversation.id,
        "time": round(time.time()),
        "model": model,
        "name": session.subject.name,
        "turns": [{"question": turn.question, "answer": turn.answer} for turn in session.turns],
    }
    if session.turns:
        kept["picture"] = JPEG + base64.b64encode(session.subject.small()).decode()
    return {"record": kept}


def opened(value: Any) -> tuple[str, bytes, str, list[Turn]]:
    """A conversation that comes back from a browser: its id, the picture's JPEG file and name, the turns.

    Raises:
        ValueError: it is not what `record` made.
    """
    kept = value.get("open") if isinstance(value, dict) else None
    try:
        name, turns, picture = str(kept["name"])[:200], kept["turns"], kept["picture"]  # type: ignore[index]
        if len(turns) > MAX_TURNS or not picture.startswith(JPEG):
            raise ValueError
        data = base64.b64decode(picture.removeprefix(JPEG), validate=True)
        open_image(data)
        said = [Turn(question(turn["question"]), str(turn["answer"])) for turn in turns]
        if sum(len(turn.question) + len(turn.answer) for turn in said) > MAX_TEXT:
            raise ValueError
        return str(kept["id"])[:64], data, f"{Path(name).stem or 'picture'}.jpg", said  # type: ignore[index]
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error, ImageError):
        raise ValueError("This conversation cannot be opened: what the browser kept is damaged.") from None


def export(session: Session, model: str) -> tuple[str, bytes]:
    """A conversation to keep: the name and the bytes of a zip file of Markdown, JSON and the picture.

    Raises:
        ValueError: there is none yet.
        ImageError: the picture is no longer here.
    """
    if not session.turns:
        raise ValueError("There is no conversation to export yet: ask something first.")
    subject = session.subject
    picture = io.BytesIO()
    subject.image().save(picture, "PNG")
    facts = {"model": model, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "name": subject.name}
    turns = [
        {"question": turn.question, "answer": turn.answer, "prompt": turn.prompt} for turn in session.turns
    ]
    name = _markdown(subject.name)
    lines = [f"# {name}", f"![{name}](picture.png)"]
    for turn in session.turns:
        lines += [f"**You:** {_markdown(turn.question)}", f"**{model}:** {_markdown(turn.answer)}"]
    document = json.dumps(facts | {"picture": "picture.png", "turns": turns}, ensure_ascii=False, indent=2)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("conversation.md", "\n\n".join(lines) + "\n")
        pack.writestr("conversation.json", document + "\n")
        pack.writestr("picture.png", picture.getvalue())
    return "blip2-conversation.zip", file.getvalue()


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|!" else letter for letter in text)
