"""`open_image` on every form of picture and of rubbish; `preprocess` against the reference transform."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import blip2.images
from blip2.fetch import FetchError
from blip2.images import CLIP_MEAN, CLIP_STD, ImageError, open_image, preprocess


def photo(width=40, height=30, seed=0):
    """A smooth RGB test picture with noise, distinct corners and no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 30, (height, width, 3))
    smooth = np.stack([x * 220 // width, y * 220 // height, (x + 2 * y) % 220], axis=-1)
    return Image.fromarray((smooth + noise).astype(np.uint8))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).astype(int)


PNG = encode(photo(), "PNG")


# -- sources


def test_every_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "a picture ü.png"
    path.write_bytes(PNG)

    class Pipe:  # a file object that cannot be rewound, as a socket's
        def read(self, size=-1):
            return PNG

    half_read = io.BytesIO(PNG)
    half_read.read(100)
    sources = [str(path), path, os.fsencode(path).decode(), PNG, bytearray(PNG), half_read, Pipe(), photo()]
    for source in [*sources, np.asarray(photo())]:
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(pixels(image), pixels(photo())), source
    assert not half_read.closed


def test_result_is_independent_of_the_source():
    source = photo()
    before = pixels(source)
    open_image(source).paste((0, 0, 0), (0, 0, 40, 30))
    assert np.array_equal(pixels(source), before)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "MPO", "WEBP", "AVIF"])
def test_file_formats(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    assert np.abs(pixels(open_image(encode(photo(), kind))) - pixels(photo())).mean() < 15


def test_a_url_needs_permission_and_goes_through_the_fetcher(monkeypatch):
    asked = []
    monkeypatch.setattr(blip2.images, "fetch", lambda url: asked.append(url) or PNG)
    with pytest.raises(ImageError, match="URLs are not opened here"):
        open_image("https://example.com/a.png")
    assert asked == []
    assert open_image(" https://example.com/a.png ", allow_url=True).size == (40, 30)
    assert asked == ["https://example.com/a.png"]


def test_a_refused_url_is_an_image_error(monkeypatch):
    def refuse(url):
        raise FetchError("the host is on a private network")

    monkeypatch.setattr(blip2.images, "fetch", refuse)
    with pytest.raises(ImageError, match="private network"):
        open_image("http://169.254.169.254/", allow_url=True)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a.png", "data:image/png;base64,AAAA", "gopher://a"]
)
@pytest.mark.parametrize("allow_url", [True, False])
def test_other_schemes_are_refused(url, allow_url):
    with pytest.raises(ImageError, match="addresses are not read"):
        open_image(url, allow_url=allow_url)


def test_the_example_photographs_are_small_and_credited():
    folder = Path(__file__).parent.parent / "examples"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    photos = sorted((folder / "photos").iterdir())
    assert len(photos) >= 3
    for path in photos:
        assert max(open_image(path).size) <= 512 and path.stat().st_size <= 80_000
        assert f"`photos/{path.name}`" in readme


# -- modes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, kind):
    upright = photo(24, 16)
    # the stored pixels are the upright ones with the inverse of the tag's correction
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(stored, kind, exif=exif, **options)
    opened = open_image(data)
    assert opened.size == (24, 16)
    assert np.abs(pixels(opened) - pixels(upright)).max() <= (12 if kind == "JPEG" else 0)
    assert np.array_equal(pixels(open_image(opened)), pixels(opened))  # not turned a second time
    assert np.array_equal(pixels(open_image(Image.open(io.BytesIO(data)))), pixels(opened))


def test_a_broken_exif_block_does_not_matter():
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\1" * 9)
    assert open_image(data).size == (40, 30)


def test_alpha_is_laid_over_white():
    rgba = np.zeros((2, 4, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 1, 3], rgba[:, 2, 3], rgba[:, 3, 3] = 128, 255, 0
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0], [255, 255, 255]]
    for source in (rgba, Image.fromarray(rgba), encode(Image.fromarray(rgba), "PNG")):
        assert np.abs(pixels(open_image(source))[0] - expected).max() <= 1
    gray = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8).repeat(2, 0), "LA")
    assert pixels(open_image(encode(gray, "PNG")))[0].tolist() == [[255] * 3, [0] * 3]


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1, 1, 0])
    assert pixels(open_image(encode(palette, "PNG")))[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    for kind in ("PNG", "GIF"):
        clear = open_image(encode(palette, kind, transparency=1))
        assert pixels(clear)[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    partly = open_image(encode(palette, "PNG", transparency=bytes([255, 128])))
    assert np.abs(pixels(partly)[0, 1] - [127, 127, 255]).max() <= 1


def test_transparent_color_of_a_gray_png():
    gray = Image.fromarray(np.array([[7, 200], [7, 90]], np.uint8))
    assert pixels(open_image(encode(gray, "PNG", transparency=7)))[:, 0].tolist() == [[255] * 3] * 2


def test_cmyk_gray_and_one_bit():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(open_image(encode(cmyk, "JPEG")))[4, 4]
    assert red[0] > 240 and red[1:].max() < 15
    assert pixels(open_image(Image.new("L", (2, 2), 77)))[0, 0].tolist() == [77] * 3
    assert pixels(open_image(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255] * 3
    assert pixels(open_image(Image.new("LAB", (2, 2), (255, 128, 128))))[0, 0].min() > 200


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_use_the_full_scale(kind):
    levels = np.array([[0, 257, 25700], [32768, 65278, 65535]], np.uint16)
    expected = [[0, 1, 100], [128, 254, 255]]
    for source in (encode(Image.fromarray(levels), kind), levels, Image.fromarray(levels)):
        assert pixels(open_image(source))[..., 0].tolist() == expected
    dark = np.full((2, 2), 100, np.uint16)  # stays dark: no stretching
    assert pixels(open_image(encode(Image.fromarray(dark), kind))).max() == 0


def test_sixteen_bit_color_array():
    array = np.zeros((2, 2, 3), np.uint16)
    array[..., 1] = 65535
    assert pixels(open_image(array))[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
    ],
)
def test_float_tiff(values, expected):
    data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert np.abs(pixels(open_image(data))[0, :, 0] - expected).max() <= 1


def test_thirty_two_bit_gray():
    for values, expected in (([0, 9, 255], [0, 9, 255]), ([0, 25700, 65535], [0, 100, 255])):
        image = Image.fromarray(np.array([values], np.int32))
        assert pixels(open_image(image))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixels(open_image(data))[0, 0].tolist() == [255, 0, 0]


def test_arrays():
    assert pixels(open_image(np.full((2, 3), 9, np.uint8)))[0, 0].tolist() == [9] * 3
    assert open_image(np.zeros((2, 3, 1), np.uint8)).size == (3, 2)
    assert pixels(open_image(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]
    for dtype in (np.float16, np.float32, np.float64):
        assert pixels(open_image(np.array([[0, 0.5, 1]], dtype)))[0, :, 0].tolist() == [0, 128, 255]
    flipped = np.asarray(photo())[::-1, ::-1]  # negative strides
    assert np.array_equal(pixels(open_image(flipped)), flipped)


# -- bad input


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((0,), np.uint8), "shape 0"),
        (np.zeros((3, 40, 40), np.uint8), "channels last"),
        (np.zeros((4, 4, 2), np.uint8), "shape 4x4x2"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape 2x4x4x3"),
        (np.float32(1), "single number|cannot open"),
        (np.full((4, 4), np.nan, np.float32), "NaN"),
        (np.full((4, 4), np.inf, np.float32), "NaN or infinite"),
        (np.full((4, 4), 255.0), "from 255 to 255, not 0 to 1"),
        (np.full((4, 4), -0.1), "not 0 to 1"),
        (np.zeros((4, 4), np.int64), "dtype int64"),
        (np.zeros((4, 4), complex), "dtype complex128"),
        (np.array([["a", "b"]]), "dtype <U1"),
        (np.array([[None]]), "dtype object"),
        (np.zeros((1, 500), np.uint8), "strip of 500 x 1"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "400.0 million pixels"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        open_image(array)


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty \(zero bytes\)"),
        (b"hello, this is text", "not an image"),
        (bytes(5000), "not an image"),
        (SVG, "SVG drawing; rasterize it first"),
        (b"\n<!DOCTYPE html><html><svg></svg></html>", "web page"),
        (b"\xef\xbb\xbf<html>", "web page"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (PNG[:20], "truncated or damaged"),
        (PNG[:200], "truncated or damaged"),
        (encode(photo(200, 200), "JPEG")[:1500], "truncated or damaged"),
        (encode(photo(), "WEBP")[:60], "truncated or damaged"),
        (encode(photo(), "PCX"), "not an image that can be opened"),  # Pillow could; not on our list
    ],
)
def test_bad_files(data, message, tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bad_paths(tmp_path):
    with pytest.raises(ImageError, match="no file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="no file"):
        open_image("nul\0byte.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="path is empty"):
        open_image("")
    with pytest.raises(ImageError, match=r"no file|cannot read"):
        open_image("x" * 5000)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ImageError, match="not a regular file"):
            open_image(tmp_path / "pipe")


@pytest.mark.parametrize("source", [None, 3, {}, [photo()], io.StringIO("text"), torch.zeros(3, 4, 4)])
def test_bad_types(source):
    with pytest.raises(ImageError, match=r"cannot open a|binary mode"):
        open_image(source)


def png_header(width, height):
    """A PNG whose header promises a size; its data are a few bytes."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10_001, 10_000), "100.0 million pixels, above the limit of 100"),
        ((60_000, 60_000), "too large to open safely|million"),
    ],
)
def test_a_bomb_is_refused_from_its_header(size, message, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=message):
        open_image(png_header(*size))


def test_pixel_cap_can_be_set():
    assert open_image(PNG, max_pixels=1200).size == (40, 30)
    for source in (PNG, photo(), np.asarray(photo())):
        with pytest.raises(ImageError, match="above the limit"):
            open_image(source, max_pixels=1199)


@pytest.mark.filterwarnings("error")
def test_a_photo_of_fifty_megapixels():
    large = Image.new("RGB", (8688, 5792), (10, 200, 30))
    assert large.width * large.height > 50e6
    opened = open_image(encode(large, "JPEG"))
    assert opened.size == large.size
    assert preprocess(opened, 224).shape == (1, 3, 224, 224)


def test_damaged_files_never_raise_anything_else():
    """Cut and flipped bytes of every format: a picture or an ImageError."""
    chance = random.Random(0)
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]
    outcomes = {True: 0, False: 0}
    for kind in kinds:
        good = encode(photo(), kind)
        for _ in range(60):
            data = bytearray(good[: chance.randrange(1, len(good) + 1)] if chance.random() < 0.4 else good)
            for _ in range(chance.randrange(0, 6)):
                data[chance.randrange(min(len(data), 300))] = chance.randrange(256)
            try:
                outcomes[open_image(bytes(data)).mode == "RGB"] += 1
            except ImageError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 20


# -- preprocess


@pytest.mark.parametrize("size", [64, 224, 364])
@pytest.mark.parametrize("shape", [(40, 30), (640, 427), (31, 500), (1, 1), (224, 224)])
def test_preprocess_equals_the_reference_bit_for_bit(size, shape):
    image = photo(*shape)
    reference = BlipImageProcessorPil(size={"height": size, "width": size})
    expected = reference(image, return_tensors="pt").pixel_values
    actual = preprocess(image, size)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_opening_and_preprocessing_equals_the_reference_in_other_modes(mode):
    image = photo(90, 70).convert(mode)
    expected = BlipImageProcessorPil(size={"height": 64, "width": 64})(
        image, return_tensors="pt"
    ).pixel_values
    assert torch.equal(preprocess(open_image(image), 64), expected)


def test_preprocess_batches_rows_of_any_size():
    images = [photo(40, 30), photo(100, 20, seed=1)]
    both = preprocess(images, 32)
    assert torch.equal(both, torch.cat([preprocess(i, 32) for i in images]))


def test_preprocess_uses_mean_and_std():
    white = Image.new("RGB", (4, 4), (255, 255, 255))
    expected = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.allclose(preprocess(white, 2)[0, :, 0, 0], expected)
    assert torch.allclose(preprocess(white, 2, (0.5,) * 3, (0.25,) * 3), torch.full((1, 3, 2, 2), 2.0))


def test_preprocess_refuses_what_was_not_opened():
    with pytest.raises(ImageError, match="mode 'RGBA'"):
        preprocess(Image.new("RGBA", (4, 4)), 8)
    with pytest.raises(ImageError, match="at least one"):
        preprocess([], 8)
