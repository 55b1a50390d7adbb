"""Encoders: each kind of input to rows `[capacity, D]`, one row a token.

Axis letters: C capacity of a stream in tokens, D width, V vocabulary, P side of an image window, M mel bands.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.batch import CATEGORY, MISSING, NUMBER
from tasks.encoded import EncoderSettings

Fields = dict[str, jax.Array]
EMBEDDING_SCALE = 0.02
FREQUENCIES = 16


def _embedding(rngs: nnx.Rngs, *shape: int, scale: float = EMBEDDING_SCALE) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


def _kernel(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    fan_in = math.prod(shape[:-1])
    return nnx.Param(jax.random.normal(rngs.params(), shape) / math.sqrt(fan_in))


class TextEncoder(nnx.Module):
    """Subword, position in its column, and column, added."""

    def __init__(self, options: EncoderSettings, vocab_size: int, width: int, rngs: nnx.Rngs) -> None:
        self.token = _embedding(rngs, vocab_size, width)
        self.position = _embedding(rngs, options.max_length, width)
        self.column = _embedding(rngs, options.column_buckets, width)

    def __call__(self, fields: Fields) -> jax.Array:
        """Fields `id, position, column [C]` -> `[C, D]`."""
        place = jnp.minimum(fields["position"], self.position.shape[0] - 1)
        return self.token[...][fields["id"]] + self.position[...][place] + self.column[...][fields["column"]]


class TableEncoder(nnx.Module):
    """A token per cell: the column, plus its value.

    Numbers as periodic features (Gorishniy et al. 2022) through a small network, scaled per column; categories by
    hash; a missing value is a learned token of its own.
    """

    def __init__(self, options: EncoderSettings, width: int, rngs: nnx.Rngs) -> None:
        self.column = _embedding(rngs, options.column_buckets, width, scale=1.0)
        self.gain = nnx.Param(jnp.ones((options.column_buckets, width)))
        self.category = _embedding(rngs, options.category_buckets, width, scale=1.0)
        self.missing = _embedding(rngs, width, scale=1.0)
        self.frequency = nnx.Param(jnp.geomspace(0.1, 4.0, FREQUENCIES))
        self.w_in = _kernel(rngs, 2 * FREQUENCIES + 1, width)
        self.b_in = nnx.Param(jnp.zeros((width,)))
        self.w_out = _kernel(rngs, width, width)

    def __call__(self, fields: Fields) -> jax.Array:
        """Fields `column, state, number, category [C]` -> `[C, D]`."""
        column, state = fields["column"], fields["state"][:, None]
        angle = 2 * jnp.pi * fields["number"][:, None] * self.frequency[...]
        features = jnp.concatenate([fields["number"][:, None], jnp.sin(angle), jnp.cos(angle)], axis=-1)
        number = jax.nn.gelu(features @ self.w_in[...] + self.b_in[...]) @ self.w_out[...] * self.gain[...][column]
        value = jnp.where(state == NUMBER, number, 0.0)
        value += jnp.where(state == CATEGORY, self.category[...][fields["category"]], 0.0)
        value += jnp.where(state == MISSING, self.missing[...], 0.0)
        return value + self.column[...][column]


class ImageEncoder(nnx.Module):
    """Overlapping windows through a two-layer convolutional stem, then row, column-of-pixels and column embeddings."""

    STEM = (16, 32)

    def __init__(self, options: EncoderSettings, width: int, rngs: nnx.Rngs) -> None:
        first, second = self.STEM
        side = math.ceil(options.patch / 4)
        self.conv1 = _kernel(rngs, 3, 3, options.channels, first)
        self.conv2 = _kernel(rngs, 3, 3, first, second)
        self.project = _kernel(rngs, side * side * second, width)
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.row = _embedding(rngs, options.image_tokens, width, scale=0.5)
        self.col = _embedding(rngs, options.image_tokens, width, scale=0.5)
        self.column = _embedding(rngs, options.column_buckets, width)

    def __call__(self, fields: Fields) -> jax.Array:
        """Fields `patch [C, P, P, channels]` in 0..1, `row, col, column [C]` -> `[C, D]`."""
        x = fields["patch"] * 2.0 - 1.0
        for kernel in (self.conv1, self.conv2):
            x = jax.lax.conv_general_dilated(x, kernel[...], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.gelu(x)
        rows = x.reshape(x.shape[0], -1) @ self.project[...] + self.bias[...]
        last = self.row.shape[0] - 1
        place = self.row[...][jnp.minimum(fields["row"], last)] + self.col[...][jnp.minimum(fields["col"], last)]
        return rows + place + self.column[...][fields["column"]]


class AudioEncoder(nnx.Module):
    """Log-mel windows through a small network, with the window's place in time."""

    def __init__(self, options: EncoderSettings, width: int, rngs: nnx.Rngs) -> None:
        self.w_in = _kernel(rngs, options.frames * options.mels, width)
        self.b_in = nnx.Param(jnp.zeros((width,)))
        self.w_out = _kernel(rngs, width, width)
        self.position = _embedding(rngs, options.max_length, width, scale=0.5)
        self.column = _embedding(rngs, options.column_buckets, width)

    def __call__(self, fields: Fields) -> jax.Array:
        """Fields `patch [C, frames, M]`, `position, column [C]` -> `[C, D]`."""
        flat = fields["patch"].reshape(fields["patch"].shape[0], -1)
        rows = jax.nn.gelu(flat @ self.w_in[...] + self.b_in[...]) @ self.w_out[...]
        place = jnp.minimum(fields["position"], self.position.shape[0] - 1)
        return rows + self.position[...][place] + self.column[...][fields["column"]]


LOOKUPS = {
    "text": {"token": "id", "position": "position", "column": "column"},
    "table": {"column": "column", "gain": "column", "category": "category"},
    "image": {"row": "row", "col": "col", "column": "column"},
    "audio": {"position": "position", "column": "column"},
}
"""Leaves of each encoder that are tables, and the field whose values are the rows that a token looks up."""


def make_encoder(stream: str, options: EncoderSettings, vocab_size: int, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """The encoder of one stream of `tasks.batch.STREAMS`."""
    if stream == "text":
        return TextEncoder(options, vocab_size, width, rngs)
    kinds = {"table": TableEncoder, "image": ImageEncoder, "audio": AudioEncoder}
    return kinds[stream](options, width, rngs)
