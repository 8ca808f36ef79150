"""Captions and images as training takes them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from blip2.errors import ImageError
from blip2.images import open_image, preprocess
from train.data.transforms import TrainTransform, clean_caption, clean_question, decode, normalize


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('A man, riding a "horse" (brown)!\n', "a man, riding a horse brown"),
        ("It's a well-known place: isn't it?", "it's a well-known place isn't it?"),
        ("a\n\nb", "a b"),
        ("word " * 60, " ".join(["word"] * 50)),
        ("", ""),
    ],
)
def test_captions_are_cleaned(text, cleaned):
    assert clean_caption(text) == cleaned


def test_questions_lose_signs_without_a_gap():
    assert clean_question("What is U.S.A. (here)? ") == "what is usa here?"


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_crops_have_the_shares_that_were_asked_for():
    transform, random = TrainTransform(), np.random.default_rng(1)
    boxes = np.array([transform.box(500, 400, random) for _ in range(4000)])
    wide, tall = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 400
    share, aspect = wide * tall / 200_000, wide / tall
    assert 0.49 < share.min() < 0.52 and share.max() > 0.95
    assert 0.74 < aspect.min() < 0.78 and 1.25 < aspect.max() < 1.34
    assert len(np.unique(boxes[:, 0])) > 100 and (boxes[:, 0] == 0).any()


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 10), (494, 0, 507, 10)), ((10, 1000), (0, 494, 10, 507)), ((4, 3), (0, 0, 4, 3))],
)
def test_shapes_that_no_crop_fits_give_their_middle(size, box):
    transform = TrainTransform(scale=(1.0, 1.0))
    found = transform.box(*size, np.random.default_rng(0))
    assert np.abs(np.subtract(found, box)).max() <= 1


def test_the_whole_image_is_what_evaluation_sees():
    image = picture(64, 48)
    transform = TrainTransform(image_size=32, scale=(1.0, 1.0), ratio=(64 / 48, 64 / 48), flip=0.0)
    seen = transform(image, np.random.default_rng(0))
    torch.testing.assert_close(seen, preprocess([image], 32)[0])
    mirrored = TrainTransform(image_size=32, scale=(1.0, 1.0), ratio=(64 / 48, 64 / 48), flip=1.0)
    torch.testing.assert_close(mirrored(image, np.random.default_rng(0)), seen.flip(-1))


def test_the_same_generator_gives_the_same_crop():
    image, transform = picture(64, 48), TrainTransform(image_size=16)
    one, two, other = (transform(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_normalizing_is_bitwise_that_of_evaluation():
    image = picture(24, 24)
    whole = TrainTransform(image_size=24, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    assert torch.equal(whole(image, np.random.default_rng(0)), preprocess([image], 24)[0])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    ours = normalize(image, mean, std, mirror=True)
    assert torch.equal(ours, preprocess([image], 24, mean, std)[0].flip(-1))


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    transform = TrainTransform(image_size=64, flip=0.0)
    small, whole = decode(file.getvalue(), transform.wanted), open_image(file.getvalue())
    assert whole.size == (1600, 1200) and small.size == (400, 300)
    difference = np.subtract(*(np.asarray(i.resize((64, 64), 3), np.int16) for i in (small, whole)))
    assert np.abs(difference).mean() < 0.5  # of 255
    assert decode(file.getvalue(), 300).size == (400, 300) and decode(file.getvalue(), 301).size == (800, 600)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0 no picture", b"<html>"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError):
        decode(data, 100)


def test_no_crop_keeps_everything():
    transform = TrainTransform(image_size=32, scale=None, flip=0.0)
    assert transform.box(64, 20, np.random.default_rng(0)) == (0, 0, 64, 20) and transform.wanted >= 64
    image = picture(64, 20)
    seen = transform(image, np.random.default_rng(0))
    torch.testing.assert_close(seen, preprocess([image], 32)[0])
