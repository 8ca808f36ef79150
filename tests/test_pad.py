"""The sketch pad without a browser: its colors are the drawn world's, its template plain text."""

import gradio as gr
from hand import ATTEMPTS, SHAPES, attempts, strokes
from PIL import ImageColor

from blip2.ui import pad
from train.scenes import world


def test_colors_are_those_of_the_drawn_world():
    assert {name: ImageColor.getrgb(color) for name, color in pad.COLORS.items()} == world.PALETTE


def test_nothing_for_gradio_to_fill_in():
    template = pad._template()
    assert not any(mark in template for mark in ("{{", "${", "`", "\\"))
    assert "http" not in template + pad.SCRIPT


def test_pad_adds_nothing_to_the_server():
    with gr.Blocks() as demo:
        picture = gr.Image()
        with gr.Tabs():
            with gr.Tab("a") as other:
                pass
            with gr.Tab("b") as own:
                pad.sketch_pad(picture, other, own)
    assert len(demo.fns) == 3 and all(function.fn is None for function in demo.fns.values())


def test_attempts_show_every_shape_and_color():
    assert len(ATTEMPTS) == 10 and attempts() == ATTEMPTS
    assert {one.shape for one in ATTEMPTS} == set(SHAPES) == set(world.SHAPES)
    assert {one.color for one in ATTEMPTS} == set(world.COLORS)
    for one in ATTEMPTS:
        assert strokes(one) == strokes(one)
        assert all(0 < value < 1 for line in strokes(one) for point in line for value in point)
