"""The drawn world and the pretraining of its image encoder."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import Blip2VisionModel

from train.scenes import __main__ as command
from train.scenes import encoder, world
from train.scenes.world import (
    COLORS,
    HELD_OUT,
    PALETTE,
    RADII,
    SHAPES,
    Thing,
    labels,
    relation,
    render,
    sample,
)


def thing(x=0.5, y=0.5, **changes):
    fields = {
        "shape": "square",
        "color": "red",
        "size": "large",
        "radius": 0.18,
        "rotation": 0.0,
        "style": "filled",
    }
    return Thing(**{**fields, "rgb": PALETTE["red"], "x": x, "y": y, **changes})


def scene(*things):
    white = (255, 255, 255)
    return world.Scene(1, things, world.Background("plain", white, white, 0.0), noise=0.0)


@pytest.fixture(scope="module")
def scenes():
    return [sample(seed) for seed in range(1500)]


def test_sampling_is_deterministic_and_splits_differ():
    assert sample(7) == sample(7)
    assert np.array_equal(render(sample(7)), render(sample(7)))
    assert len({sample(7, split).seed for split in world.SPLITS}) == 3
    assert sample(7).things != sample(7, "test").things


@pytest.mark.parametrize(("seed", "split"), [(0, "val"), (-1, "train"), (10**9, "train")])
def test_sampling_refuses_what_would_mix_the_splits(seed, split):
    with pytest.raises(ValueError, match="must be"):
        sample(seed, split)


def test_held_out_pairs_are_only_outside_training(scenes):
    shown = {(t.color, t.shape) for s in scenes for t in s.things}
    assert len(shown) == len(COLORS) * len(SHAPES) - len(HELD_OUT)
    assert not shown & HELD_OUT
    tested = {(t.color, t.shape) for seed in range(500) for t in sample(seed, "test").things}
    assert tested >= HELD_OUT


def test_scenes_keep_their_promises(scenes):
    for s in scenes:
        kinds = [(t.color, t.shape) for t in s.things]
        assert 1 <= len(kinds) == len(set(kinds)) <= world.MAX_THINGS
        xs = [t.x for t in s.things]
        assert all(b - a >= world.MIN_STEP_X for a, b in itertools.pairwise(xs))
        for t in s.things:
            assert RADII[t.size][0] <= t.radius <= RADII[t.size][1]
            others = [other for other in s.things if other is not t]
            assert not others or any(relation(t, other) for other in others)
            least = 1 - world.OVERLAP
            assert all(np.hypot(t.x - o.x, t.y - o.y) >= least * (t.radius + o.radius) for o in others)
            assert np.linalg.norm(np.subtract(t.rgb, s.background.first)) > 60
    assert {len(s.things) for s in scenes} == {1, 2, 3, 4}
    assert {s.background.kind for s in scenes} == set(world.BACKGROUNDS)
    assert RADII["large"][0] > 1.3 * RADII["small"][1]


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-0.3, 0.1, "left of"),
        (0.3, 0.1, "right of"),
        (0.1, -0.3, "above"),
        (0.1, 0.3, "below"),
        (0.3, 0.3, None),
    ],
)
def test_relation(dx, dy, expected):
    assert relation(thing(0.5 + dx, 0.5 + dy), thing()) == expected
    opposite = dict(zip(world.RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    assert relation(thing(), thing(0.5 + dx, 0.5 + dy)) == opposite.get(expected)


@pytest.mark.parametrize("size", [64, 224])
def test_a_thing_is_drawn_where_the_scene_says(size):
    pixels = render(scene(thing(0.3, 0.6)), size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[0, -1]) == (255, 255, 255)
    y, x = np.nonzero((pixels == PALETTE["red"]).all(-1))
    assert abs((x.mean() + 0.5) / size - 0.3) < 0.01 and abs((y.mean() + 0.5) / size - 0.6) < 0.01
    side = 2 * 0.78 * 0.18  # of the square in the circle of radius 0.18
    assert len(x) / size**2 == pytest.approx(side**2, rel=0.15)


def test_a_ring_has_a_hole_and_a_circle_none():
    for style in ("filled", "bordered"):
        middle = [render(scene(thing(shape=shape, style=style)))[32, 32] for shape in ("ring", "circle")]
        assert tuple(middle[0]) == (255, 255, 255) and tuple(middle[1]) == PALETTE["red"]


def test_labels_name_the_thing_under_each_patch():
    left, right = thing(0.25, 0.25), thing(0.75, 0.75, shape="ring", color="blue", size="small", radius=0.1)
    found = labels(scene(left, right), size=64, patch=8)
    grid = {name: value.reshape(8, 8, *value.shape[1:]) for name, value in found.items()}
    assert grid["thing"][2, 2] == 0 and grid["thing"][6, 6] == 1 and grid["thing"][0, 7] == -1
    assert grid["shape"][2, 2] == 1 + SHAPES.index("square") and grid["shape"][6, 6] == 1 + SHAPES.index(
        "ring"
    )
    assert (
        grid["color"][6, 6] == 1 + COLORS.index("blue")
        and grid["size"][6, 6] == 1
        and grid["size"][2, 2] == 2
    )
    assert grid["shape"][0, 7] == grid["color"][0, 7] == grid["size"][0, 7] == 0
    middle = np.array([2 + 0.5, 1 + 0.5]) / 8  # x, y of the patch in row 1, column 2
    np.testing.assert_allclose(grid["offset"][1, 2] + middle, (0.25, 0.25), atol=1e-6)
    with pytest.raises(ValueError, match="divide"):
        labels(scene(left), size=64, patch=7)


def test_show_writes_a_sheet(tmp_path, capsys):
    command.main(["show", "--out", str(tmp_path / "new" / "sheet.png"), "--rows", "1", "--columns", "2"])
    assert (tmp_path / "new" / "sheet.png").stat().st_size > 1000
    assert "2 scenes" in capsys.readouterr().out


SMALL = {"batch_size": 4, "validation_scenes": 8, "final_scenes": 8, "warmup": 2, "save_every_s": 1e9}


def test_pretraining_goes_on_exactly_where_it_stopped(tmp_path, monkeypatch):
    whole = encoder.pretrain_encoder(tmp_path / "whole", steps=4, **SMALL)

    class Stopped(Exception):
        pass

    real = encoder.batch

    def stop_at_step_3(seeds, split):
        if split == "train" and seeds.start == 3 * 4:
            raise Stopped
        return real(seeds, split)

    monkeypatch.setattr(encoder, "batch", stop_at_step_3)
    with pytest.raises(Stopped):
        encoder.pretrain_encoder(tmp_path / "parts", steps=4, **{**SMALL, "save_every_s": 0.0})
    monkeypatch.setattr(encoder, "batch", real)
    assert encoder.pretrain_encoder(tmp_path / "parts", steps=4, **SMALL) == whole

    one, two = (encoder.load_encoder(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    history = json.loads((tmp_path / "parts" / "figures.json").read_text())["history"]
    assert [row["step"] for row in history] == [0, 4]
    with pytest.raises(ValueError, match="batch size 4"):
        encoder.pretrain_encoder(tmp_path / "parts", steps=4, **{**SMALL, "batch_size": 2})
    with pytest.raises(ValueError, match="4 steps"):
        encoder.pretrain_encoder(tmp_path / "parts", steps=3, **SMALL)


def test_the_encoder_loads_in_transformers(tmp_path):
    encoder.pretrain_encoder(tmp_path, steps=1, **SMALL)
    ours = encoder.load_encoder(tmp_path)
    theirs = Blip2VisionModel(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    pixel_values = encoder.normalize(torch.from_numpy(render(sample(3)))[None])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixel_values), theirs(pixel_values).last_hidden_state, rtol=1e-4, atol=1e-5
        )


def test_patches_are_asked_where_their_thing_is():
    left, right = thing(0.2, 0.5), thing(0.8, 0.5, shape="ring", color="blue")
    names = (*SHAPES, *COLORS)
    of_left, of_right = (
        dict(zip(names, encoder.neighbors(t, (left, right)), strict=True)) for t in (left, right)
    )
    assert {name for name in names if of_left[name]} == {"ring", "blue"}
    assert of_left["ring"] == of_left["blue"] == 1 + world.RELATIONS.index("left of")
    assert {of_right[name] for name in ("square", "red")} == {1 + world.RELATIONS.index("right of")}
    other = thing(0.5, 0.9, shape="ring", color="green")  # neither left nor right of, nor above or below
    assert relation(left, other) is None
    asked = dict(zip(names, encoder.neighbors(left, (left, right, other)), strict=True))
    assert (asked["ring"], asked["blue"], asked["green"]) == (-100, of_left["blue"], 0)


def test_recolored_pictures_ask_for_no_color():
    target = encoder.batch(range(8), "train")
    changed = encoder.recolor(target, seed=0)
    rows = (changed["color"] == -100).all(1)
    assert rows.sum() == int(encoder.RECOLORED * 8)
    assert torch.equal(
        changed["pixels"].sum(-1), target["pixels"].sum(-1)
    )  # the same values in another order
    assert torch.equal(changed["pixels"][~rows], target["pixels"][~rows])
    assert torch.equal(changed["has"].isnan().any(1), rows) and not target["has"].isnan().any()
    model = encoder.PatchLabeler(encoder.encoder_config())
    loss = encoder.loss_of(encoder.forward(model, changed["pixels"]), changed)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, target = encoder.PatchLabeler(encoder.encoder_config()), encoder.batch(range(8), "train")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        losses.append(encoder.loss_of(encoder.forward(model, target["pixels"]), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_no_encoder_in_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no finished encoder"):
        encoder.load_encoder(tmp_path)
