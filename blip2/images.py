"""Any picture to RGB, and RGB to the `pixel_values` that the image encoder takes (the left end of Fig. 1).

`open_image` accepts what people have at hand and refuses everything else with one sentence. It reads the
size from the header before it decodes a pixel, opens only common raster formats, and follows a URL only when
asked to. `preprocess` is the transform of the released checkpoints: bicubic resize straight to a square, no
crop, CLIP mean and standard deviation.

Left out on purpose: color profiles are ignored, as the reference transform does, and JPEGs are decoded at
full size, since decoding at a reduced scale changes the resized pixels.
"""

import io
import os
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

from blip2.errors import ImageError
from blip2.fetch import FetchError, fetch

if TYPE_CHECKING:  # to open a picture needs no torch
    from torch import Tensor

MAX_PIXELS = 100_000_000  # 300 MB once decoded to RGB; cameras and phones stay below, bombs do not
MAX_ASPECT = 100  # longer strips turn into noise when resized to a square
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Plain raster decoders only: no EPS (runs Ghostscript), no scientific containers.
# JPEG includes the multi-picture files of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF"

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray


def open_image(source: ImageSource, *, allow_url: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one picture as RGB, upright, alpha over white, first frame of an animation.

    Args:
        source: a path, the bytes of an image file, a binary file object (rewound, left open), a PIL image,
            or an array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16 (0..65535), bool, or
            float (0..1). With `allow_url`, also an http(s) URL.
        allow_url: whether a URL may be downloaded, by `blip2.fetch.fetch` with its limits.
        max_pixels: largest width x height, in pixels, checked before decoding. PIL's own limit
            (2 x `PIL.Image.MAX_IMAGE_PIXELS`, 179 million) stays in force above it.

    Returns:
        A decoded PIL image of mode "RGB" that shares nothing with `source`'s file.

    Raises:
        ImageError: for anything that is not a usable picture.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), "the image data", max_pixels)
    if isinstance(source, str) and (scheme := re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):", source)):
        if scheme[1].lower() in ("http", "https"):
            return _from_url(source.strip(), allow_url, max_pixels)
        if not os.path.exists(source):
            raise ImageError(
                f"cannot open {_shorten(source)!r}: {scheme[1]}: addresses are not read; "
                + ("give a file or an http(s) URL." if allow_url else "give an image file.")
            )
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, max_pixels)
    if hasattr(source, "read"):
        return _from_file(_seekable(source), "the image data", max_pixels)
    raise ImageError(
        f"cannot open a {type(source).__module__}.{type(source).__name__} as an image; "
        "give a path, bytes, a binary file, a PIL image or a numpy array."
    )


def preprocess(
    images: Image.Image | Sequence[Image.Image],
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> "Tensor":
    """Turn RGB pictures into the encoder's input: bicubic resize to a square (no crop), /255, normalize.

    Equal to transformers' `BlipImageProcessorPil` bit for bit.

    Args:
        images: one RGB image or several, of any sizes, as `open_image` returns them.
        size: side of the square, pixels.
        mean: per-channel mean after /255.
        std: per-channel standard deviation after /255.

    Returns:
        `pixel_values`: float32 (B, 3, size, size).

    Raises:
        ImageError: no images, or one that is not RGB.
    """
    import torch

    if isinstance(images, Image.Image):
        images = [images]
    if len(images) == 0:
        raise ImageError("there is no image to process; give at least one.")
    pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        if image.mode != "RGB":
            raise ImageError(f"image {i} has mode {image.mode!r}, not 'RGB'; open it with open_image first.")
        pixels[i] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    # float64 for the division, float32 from there on: the rounding of the reference transform
    scaled = (pixels * np.float64(1 / 255)).astype(np.float32)
    normalized = (scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalized.transpose(0, 3, 1, 2)))


def _from_path(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    name = repr(_shorten(os.fsdecode(path)))
    if name == "''":
        raise ImageError("the path is empty; give an image file.")
    try:
        path = Path(os.fsdecode(path))
        if path.is_dir():
            raise ImageError(f"{name} is a folder; give one image file.")
        if not path.exists():
            raise ImageError(f"there is no file {name}; check the path.")
        if not path.is_file():  # a device or a pipe could block for ever
            raise ImageError(f"{name} is not a regular file; give an image file.")
        file = path.open("rb")
    except OSError as error:  # no permission, name too long
        raise ImageError(f"cannot read {name}: {error.strerror or error}.") from error
    with file:
        return _from_file(file, name, max_pixels)


def _from_url(url: str, allow_url: bool, max_pixels: int) -> Image.Image:
    if not allow_url:
        raise ImageError(
            f"URLs are not opened here ({_shorten(url)!r}); download the picture and give the file."
        )
    try:
        data = fetch(url)
    except FetchError as error:
        raise ImageError(str(error)) from error
    return _from_file(io.BytesIO(data), repr(_shorten(url)), max_pixels)


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Rewind the file, as PIL does, or read it into memory if it cannot be rewound; it must be binary."""
    try:
        file.seek(0)
        start = file.read(0)
    except (AttributeError, io.UnsupportedOperation):
        start = file.read()
        file = io.BytesIO(start) if isinstance(start, bytes) else file
    except (OSError, ValueError) as error:
        raise ImageError(f"the file object cannot be read: {error}.") from error
    if not isinstance(start, bytes):
        raise ImageError("the file object was opened as text; open it in binary mode ('rb').")
    return file


def _from_file(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    file.seek(0)
    start = file.read(1024)
    file.seek(0)
    if not start:
        raise ImageError(f"{name} is empty (zero bytes); save or download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size decides
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to open safely: {error}") from error
    except Exception as error:  # decoders meet hostile headers with almost any exception
        raise ImageError(_not_an_image(name, start)) from error
    return _to_rgb(image, name, max_pixels)


def _not_an_image(name: str, start: bytes) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"{name} is a web page (HTML), not an image; use the picture's own address or file."
    if b"<svg" in text:
        return f"{name} is an SVG drawing; rasterize it first, for example export it as PNG."
    if text.startswith((b"%pdf", b"%!ps")):
        return f"{name} is a PDF or PostScript document; export the page as PNG first."
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"heim", b"hevc", b"msf1"):
        return f"{name} is a HEIC photo; save it as JPEG or PNG first."
    signatures = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    if start.startswith(signatures):
        return f"{name} starts like an image but is truncated or damaged; save or download it again."
    return f"{name} is not an image that can be opened; give a {_FORMAT_NAMES} file."


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}); give a picture with at least one.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height / 1e6:.1f} million pixels, "
            f"above the limit of {max_pixels / 1e6:g} million; make it smaller first."
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name} is a strip of {width} x {height} pixels; crop it so that no side is more than "
            f"{MAX_ASPECT} times the other."
        )


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode, convert and turn upright; never changes `image`'s pixels."""
    _check_size(image.size, name, max_pixels)
    try:
        image.load()
        rgb = _mode_to_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # damaged data makes decoders raise almost anything
        raise ImageError(
            f"{name} is truncated or damaged ({_shorten(str(error))}); save or download it again."
        ) from error
    if (transpose := _ORIENTATIONS.get(_orientation(image))) is not None:  # a flip's value is 0
        rgb = rgb.transpose(transpose)
    rgb.info.clear()  # opened again, it must not be turned twice
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # a broken EXIF block is no reason to refuse a sound picture


def _mode_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_gray_levels(np.asarray(image), name)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _gray_levels(values: np.ndarray, name: str) -> np.ndarray:
    """Map an image file's 16-bit, 32-bit or float grays (H, W) to uint8.

    16-bit files use the full scale. 32-bit and float files do not state theirs, so the smallest usual one
    that holds all values is taken: 0..1 (float only), 0..255, 0..65535, else the values' own range.
    """
    if values.dtype == np.uint16:
        return _from_uint16(values)
    if not np.isfinite(values).all():
        raise ImageError(f"{name} holds NaN or infinite values; replace them first.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    else:
        top = 1 if high <= 1 and values.dtype.kind == "f" else 255 if high <= 255 else 65535
        scaled = values.astype(np.float64) * (255 / top)
    return np.rint(scaled).astype(np.uint8)


def _from_uint16(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    shape = "x".join(map(str, array.shape)) or "a single number"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        hint = (
            "transpose it to channels last"
            if array.ndim == 3 and array.shape[0] in (1, 3, 4)
            else "reshape it"
        )
        raise ImageError(f"the array has shape {shape}; {hint}: (H, W), (H, W, 3) or (H, W, 4) is needed.")
    _check_size((array.shape[1], array.shape[0]), "the array", max_pixels)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ImageError("the array holds NaN or infinite values; replace them first.")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise ImageError(
                f"the float array has values from {low:g} to {high:g}, not 0 to 1; "
                "scale it, or pass uint8 for 0 to 255."
            )
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _from_uint16(array)
    elif array.dtype != np.uint8:
        raise ImageError(
            f"the array has dtype {array.dtype}; uint8, uint16, bool or float (0 to 1) is needed."
        )
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "the array", max_pixels)


def _shorten(text: str, limit: int = 200) -> str:
    text = str(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
