"""The app's own sentences, as HTML; whatever came from a visitor or a model is shown as text."""

import html
import re

from blip2.pictures import counted as counted
from blip2.settings import Generation
from blip2.ui.cards import title

SILENCE = "(the model said nothing)"


def settings_text(generation: Generation) -> str:
    """How an answer was decoded, in a few words."""
    if generation.method == "beam":
        return f"{generation.num_beams} beams, length penalty {generation.length_penalty:g}"
    if generation.method == "nucleus":
        seed = "" if generation.seed is None else f", seed {generation.seed}"
        return f"nucleus {generation.top_p:g}, temperature {generation.temperature:g}{seed}"
    return "greedy"


def receipt(model: str, prompt: str, facts: list[str]) -> str:
    """HTML: the exact text that the language model was sent, and how the answer came about."""
    sent = f"<code>{html.escape(prompt)}</code>" if prompt else "<em>the picture alone</em>"
    return (
        f'<div class="receipt"><div><span>Sent to {html.escape(title(model))}</span>{sent}</div>'
        f"<p>{html.escape(' · '.join(facts))}</p></div>"
    )


def plain(text: str) -> str:
    """Text for the chat component, which takes HTML: what would be a tag or an entity is escaped.

    No more than that, since the component reads the same string to screen readers.
    """
    return re.sub(r"[<&](?=[A-Za-z/!?#])", lambda found: html.escape(found[0]), text)


def note(text: str = "", kind: str = "info") -> str:
    """HTML: a sentence of the app's own; kind is "info" or "error"."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="note {kind}" role="{role}">{html.escape(text)}</div>'
