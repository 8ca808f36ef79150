"""Another renderer's pictures: what they show is what they say, and the embedded model names it."""

from collections import Counter

import numpy as np
import pytest
from PIL import ImageColor

from blip2 import checkpoint
from train.scenes.svg import NAMES, SIDE, figures, svg_pictures, svg_texts
from train.scenes.world import COLORS, SHAPES

pytest.importorskip("resvg_py")


def test_every_pair_is_there_and_can_be_asked_for():
    truths = [truth for _, truth in svg_texts()]
    assert svg_texts() == svg_texts() and len(truths) == 80
    pairs = Counter(pair for truth in truths for pair in truth)
    assert set(pairs) == {(color, shape) for color in COLORS for shape in SHAPES}
    for truth in truths:
        for part in zip(*truth, strict=True):  # colors, shapes
            assert len(set(part)) == len(part)
    assert Counter(len(truth) for truth in truths) == {1: 40, 2: 40}


def test_pictures_hold_the_colors_of_their_truth():
    for picture, truth in svg_pictures():
        assert picture.size == (SIDE, SIDE) and picture.mode == "RGB"
        pixels = np.asarray(picture, np.int32).reshape(-1, 3)
        for color, shape in truth:
            near = [np.abs(pixels - ImageColor.getrgb(name)).max(1) < 30 for name in NAMES[color]]
            assert 0.002 < np.any(near, 0).mean() < 0.2, (color, shape)


@pytest.mark.long
def test_the_embedded_model_names_them(capsys):
    found = figures(checkpoint.load("scenes-opt", precision="float32", device="cpu"))
    with capsys.disabled():
        print("\n", {name: round(value, 3) for name, value in found.items()})
    assert found["color"] >= 0.85 and found["shape"] >= 0.85, found
