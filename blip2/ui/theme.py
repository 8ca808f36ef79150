"""How the page looks: a theme of our own on Soft's fonts, which gradio serves itself."""

import os
import tempfile
from pathlib import Path

import gradio as gr

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

# a picture's corner with the three shapes that stand for what is asked of it
LOGO = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48" width="44" height="44"
aria-hidden="true">
<rect x="2" y="2" width="44" height="44" rx="12" fill="#0f766e"/>
<circle cx="17" cy="18" r="7" fill="#fbbf24"/>
<path d="M33 10.5l6.5 13h-13z" fill="#fb7185"/>
<path d="M11 31.5h26M11 38h16" stroke="#fff" stroke-width="3.4" stroke-linecap="round"/>
</svg>"""

HEADER = f"""<header class="brand">{LOGO}<div><h1>BLIP-2</h1>
<p>Show it a picture. Have it described, give it an instruction, or talk about it.</p></div></header>"""

THEME = gr.themes.Soft(
    primary_hue=gr.themes.colors.teal,
    secondary_hue=gr.themes.colors.amber,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_lg,
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    background_fill_primary="white",
    background_fill_primary_dark="*neutral_900",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_border_color="*neutral_200",
    block_border_color_dark="*neutral_800",
    block_shadow="none",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_300",
    block_label_text_size="*text_sm",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_padding="0",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    block_title_text_size="*text_sm",
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
    input_background_fill="white",
    input_background_fill_dark="*neutral_800",
    input_border_color="*neutral_300",
    input_border_color_dark="*neutral_700",
    input_border_width="1px",
    input_shadow="none",
    input_shadow_focus="0 0 0 3px *primary_100",
    input_shadow_focus_dark="0 0 0 3px *primary_900",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    checkbox_label_text_color_selected="white",
    checkbox_label_text_color_selected_dark="white",
    button_primary_shadow="none",
    button_primary_shadow_hover="none",
    button_secondary_background_fill="white",
    button_secondary_background_fill_hover="*neutral_100",
    button_secondary_background_fill_dark="*neutral_800",
    button_secondary_background_fill_hover_dark="*neutral_700",
    button_secondary_border_color="*neutral_300",
    button_secondary_border_color_dark="*neutral_700",
    button_secondary_shadow="none",
    button_secondary_shadow_hover="none",
    button_border_width="1px",
)


def favicon() -> str:
    """The logo as a file, which the server wants."""
    path = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()) / "blip2-icon.svg"
    path.write_text(LOGO, encoding="utf-8")
    return str(path)
