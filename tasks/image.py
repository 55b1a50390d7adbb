"""Image columns to tokens: overlapping windows of pixels, which the model reads with a small convolutional stem.

An image of `h x w` pixels has `ceil(h / stride) * ceil(w / stride)` windows of `patch x patch` pixels, each centred on
its cell of the stride's grid; beyond the edge the nearest pixel is repeated. Larger images are first scaled down.

Axis letters: R, C rows and columns of windows, p patch, c channels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.encoded import EncoderSettings, Ragged, bucket

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Undecodable(ValueError):
    """A cell that is not an image (or a sound); the message says why."""


def encode_images(
    values: Sequence[str | bytes | None],
    column: str,
    folder: Path,
    raw_shape: tuple[int, ...] | None,
    settings: EncoderSettings,
) -> tuple[Ragged, dict[int, str]]:
    """Windows of one image column.

    Args:
        values: paths (relative to `folder`), encoded bytes, or with `raw_shape` the bytes of `[h, w]` or `[h, w, c]`.
        column: the column's name.
        folder: where relative paths start.
        raw_shape: the shape of raw arrays.
        settings: window sizes and channels.

    Returns:
        (tokens, bad: row -> why it could not be decoded; such a row has no tokens).
    """
    windows: list[np.ndarray] = []
    grids: list[tuple[int, int]] = []
    bad: dict[int, str] = {}
    for i, value in enumerate(values):
        try:
            pixels = fit(open_image(value, folder, raw_shape), settings)
        except Undecodable as error:
            bad[i] = str(error)
            grids.append((0, 0))
            continue
        cut = cut_windows(pixels, settings.patch, settings.stride)
        grids.append(cut.shape[:2])
        windows.append(cut.reshape(-1, *cut.shape[2:]))
    lengths = np.array([rows * cols for rows, cols in grids], np.int64)
    empty = np.zeros((0, settings.patch, settings.patch, settings.channels), np.uint8)
    places = [_grid(rows, cols) for rows, cols in grids]
    fields = {
        "patch": np.concatenate([empty, *windows]),
        "row": np.concatenate([np.zeros(0, np.int32), *(row for row, _ in places)]),
        "col": np.concatenate([np.zeros(0, np.int32), *(col for _, col in places)]),
        "column": np.full(int(lengths.sum()), bucket(column, settings.column_buckets), np.int32),
    }
    return Ragged(fields, lengths), bad


def open_image(value: str | bytes | None, folder: Path, raw_shape: tuple[int, ...] | None) -> Image.Image:
    """Decodes one cell, turned upright as its EXIF data says.

    Raises:
        Undecodable: for an empty cell, a missing file, or bytes that are no image.
    """
    from PIL import Image, ImageOps

    if value is None or len(value) == 0:
        raise Undecodable("no image in this row")
    if raw_shape is not None and isinstance(value, bytes):
        if len(value) != int(np.prod(raw_shape)):
            raise Undecodable(f"{len(value)} bytes where an array of shape {raw_shape} was expected")
        array = np.frombuffer(value, np.uint8).reshape(raw_shape)
        return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    try:
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else folder / value)
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise many types for broken bytes: OSError, SyntaxError, struct.error, ...
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def fit(image: Image.Image, settings: EncoderSettings) -> np.ndarray:
    """Scales an image down until its windows are at most `image_tokens`, and brings it to `[h, w, channels]` uint8.

    Deep images (16 bits, floats) are brought to 8 bits; what is transparent becomes white unless there are 4 channels.
    """
    from PIL import Image

    mode = MODES[settings.channels]
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if mode != "RGBA" and (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image if image.mode == mode else image.convert(mode)
    width, height = image.size
    target = fitting_size(height, width, settings.stride, settings.image_tokens)
    if target != (height, width):
        image = image.resize((target[1], target[0]), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image, np.uint8).reshape(*target, settings.channels)


@functools.lru_cache(4096)
def fitting_size(height: int, width: int, stride: int, tokens: int) -> tuple[int, int]:
    """The largest size of the same proportions (never larger than it is) that has at most `tokens` windows."""
    scale = min(1.0, (tokens * stride * stride / (height * width)) ** 0.5)
    while True:
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        if -(-h // stride) * -(-w // stride) <= tokens:
            return h, w
        scale *= 0.99


def cut_windows(pixels: np.ndarray, patch: int, stride: int) -> np.ndarray:
    """`[h, w, c]` -> windows `[R, C, p, p, c]`, with the edge's pixels repeated beyond it."""
    rows = _window_index(pixels.shape[0], patch, stride)
    cols = _window_index(pixels.shape[1], patch, stride)
    return pixels[rows[:, None, :, None], cols[None, :, None, :]]


@functools.lru_cache(4096)
def _window_index(size: int, patch: int, stride: int) -> np.ndarray:
    starts = np.arange(-(-size // stride)) * stride - (patch - stride) // 2
    return np.clip(starts[:, None] + np.arange(patch), 0, size - 1)


@functools.lru_cache(4096)
def _grid(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    row, col = np.divmod(np.arange(rows * cols, dtype=np.int32), max(cols, 1))
    return row.astype(np.int32), col.astype(np.int32)


def _to_8_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        full = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    else:
        full = 65535.0
    return Image.fromarray(np.clip(values / full * 255 + 0.5, 0, 255).astype(np.uint8))
