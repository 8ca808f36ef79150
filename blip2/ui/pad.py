"""The sketch pad: a sheet to draw on, in the colors that the embedded models know.

The page draws by itself (pad.js); what it drew is uploaded as a PNG file, as any picture is, and then set as
the picture component's value in the browser. So the server learns of a drawing as of every upload, and in no
other way.
"""

from pathlib import Path

import gradio as gr

COLORS = {
    "red": "#d71e23",
    "green": "#239637",
    "blue": "#234bd7",
    "yellow": "#f8d71e",
    "orange": "#fa820f",
    "purple": "#7d28af",
    "pink": "#fa8cc3",
    "brown": "#73411e",
    "cyan": "#2dcddc",
}
SIDE = 512  # pixels of the sheet, whatever room it gets on the page
BRUSH = (4, 12, 44)  # thinnest, first, thickest line, in those pixels
SCRIPT = Path(__file__).with_name("pad.js").read_text(encoding="utf-8")
_REACH = "document.querySelector('#pad .pad').pad"  # what pad.js offers to the page


def _brush(name: str, color: str, *, first: bool = False) -> str:
    kind, face = ("swatch", "") if color else ("tool", name.title())
    return (
        f'<label class="{kind}" style="--ink: {color}" title="{name}"><input type="radio" name="pad-brush" '
        f'value="{color}" aria-label="{name}"{" checked" if first else ""}>{face}</label>'
    )


def _template() -> str:
    swatches = "".join(_brush(name, color, first=name == "red") for name, color in COLORS.items())
    thinnest, first, thickest = BRUSH
    return f"""<div class="pad">
<div class="row" role="group" aria-label="Colors">{swatches}</div>
<canvas width="{SIDE}" height="{SIDE}" role="img" aria-label="Your drawing"></canvas>
<div class="row tools">
<label class="width" title="Thickness"><input type="range" min="{thinnest}" max="{thickest}" value="{first}"
aria-label="Thickness"></label>
{_brush("eraser", "")}
<button type="button" class="tool undo" aria-label="Undo stroke" disabled>Undo</button>
<button type="button" class="tool clear" aria-label="Clear sheet">Clear</button>
</div>
<p role="status"></p>
</div>"""


def sketch_pad(picture: gr.Image, other: gr.Tab, own: gr.Tab) -> None:
    """Place the pad; while its tab is open, what is drawn is the picture, and an empty sheet is none.

    Args:
        picture: the page's picture component.
        other: the tab of pictures that are not drawn; opened again, it has the picture it had.
        own: the tab around the pad.
    """
    pad = gr.HTML(html_template=_template(), js_on_load=SCRIPT, apply_default_css=False, elem_id="pad")
    pad.input(
        None, pad, picture, js="file => file", trigger_mode="multiple",
        queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    for tab, what in ((own, "open"), (other, "close")):
        tab.select(
            None, picture, None, js=f"file => {{ {_REACH}.{what}(file); }}",
            queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
