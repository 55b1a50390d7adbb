"""Kinds of experts for images: convolutions of several shapes, pooling, and the identity, all with a stride.

Axis letters: E experts in a bank, b examples, H and W height and width, C channels (of input and output alike).

An image expert maps whole examples `[b, H, W, C]` to `[b, ceil(H / stride), ceil(W / stride), C]`, so experts of all
kinds can stand in one layer and their outputs be added. Edges are padded as in "SAME". A convolution is followed by a
group norm and a ReLU; the norm looks at one example alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experts.convolution import convolve
from experts.kinds import Bank, choose

GROUPS = 4
"""Groups of channels of each group norm."""
EPSILON = 1e-5
SQUARE = (1, 3, 3, 1)


@dataclass(frozen=True)
class ImageKind:
    """A kind of image expert, in two steps: the second is cheap, so a backward pass computes it again from the first.

    Attributes:
        name: its key in `IMAGE_KINDS`.
        init: `(key, num, channels, dtype) -> Bank`.
        spatial: `(one expert, x [b, H, W, C], stride) -> [b, H', W', C]`, the part that mixes pixels.
        finish: `(one expert, that) -> [b, H', W', C]`, the norm and the ReLU.
        parameters: `(channels) -> int`, of one expert.
        operations: `(channels, places) -> int`, floating-point operations for one example of `H' * W'` places.
    """

    name: str
    init: Callable[[jax.Array, int, int, Any], Bank]
    spatial: Callable[[Bank, jax.Array, int], jax.Array]
    finish: Callable[[Bank, jax.Array], jax.Array]
    parameters: Callable[[int], int]
    operations: Callable[[int, int], int]

    def apply(self, expert: Bank, x: jax.Array, stride: int) -> jax.Array:
        """Both steps."""
        return self.finish(expert, self.spatial(expert, x, stride))


IMAGE_KINDS: dict[str, ImageKind] = {}
"""The registry of image kinds; add to it with `register_image`."""


def register_image(kind: ImageKind) -> ImageKind:
    """Adds a kind.

    Raises:
        ValueError: if the name is taken.
    """
    if kind.name in IMAGE_KINDS:
        raise ValueError(
            f"image kind {kind.name!r} is registered already; registered: {', '.join(sorted(IMAGE_KINDS))}"
        )
    IMAGE_KINDS[kind.name] = kind
    return kind


def get_image_kind(name: str) -> ImageKind:
    """The image kind of this name.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    return choose(IMAGE_KINDS, name, "image kind")


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Group norm (Wu and He 2018) over `GROUPS` groups of the channels of `x [b, H, W, C]`; in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    grouped = wide.reshape(*x.shape[:3], GROUPS, -1)
    grouped = grouped - jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    grouped *= lax.rsqrt(jnp.mean(grouped * grouped, axis=(1, 2, 4), keepdims=True) + EPSILON)
    return (grouped.reshape(x.shape) * scale + bias).astype(x.dtype)


def he_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal of variance 2 / fan-in (He et al. 2015), for kernels `[E, h, w, C, Z]`."""
    fan_in = shape[1] * shape[2] * shape[3]
    return (jax.random.normal(key, shape, jnp.float32) * (2.0 / fan_in) ** 0.5).astype(dtype)


def _norm_and_relu(expert: Bank, x: jax.Array) -> jax.Array:
    return jax.nn.relu(group_norm(x, expert["scale"], expert["bias"]))


def _norm_leaves(num: int, channels: int, dtype: Any) -> Bank:
    return {"scale": jnp.ones((num, channels), dtype), "bias": jnp.zeros((num, channels), dtype)}


def _convolution(name: str, *sizes: tuple[int, int]) -> ImageKind:
    """One convolution after another without anything between, then the norm and the ReLU.

    The first one takes the stride's columns or both, the last one its rows, so that no place is computed in vain.
    """
    leaves = ("kernel", "kernel2")[: len(sizes)]

    def init(key: jax.Array, num: int, channels: int, dtype: Any) -> Bank:
        keys = jax.random.split(key, len(sizes))
        kernels = zip(leaves, keys, sizes, strict=True)
        made = {leaf: he_normal(k, (num, *size, channels, channels), dtype) for leaf, k, size in kernels}
        return made | _norm_leaves(num, channels, dtype)

    def spatial(expert: Bank, x: jax.Array, stride: int) -> jax.Array:
        strides = [(stride, stride)] if len(sizes) == 1 else [(1, stride), (stride, 1)]
        for leaf, step in zip(leaves, strides, strict=True):
            x = convolve(x, expert[leaf].astype(x.dtype), step)
        return x

    taps = sum(h * w for h, w in sizes)
    return ImageKind(
        name,
        init,
        spatial,
        _norm_and_relu,
        parameters=lambda channels: taps * channels * channels + 2 * channels,
        operations=lambda channels, places: 2 * taps * channels * channels * places,
    )


def _fixed(name: str, spatial: Callable[[jax.Array, int], jax.Array], taps: int) -> ImageKind:
    """A kind without parameters."""
    return ImageKind(
        name,
        init=lambda key, num, channels, dtype: {},
        spatial=lambda expert, x, stride: spatial(x, stride),
        finish=lambda expert, x: x,
        parameters=lambda channels: 0,
        operations=lambda channels, places: taps * channels * places,
    )


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, SQUARE, (1, stride, stride, 1), "SAME")


def _average_pool(x: jax.Array, stride: int) -> jax.Array:
    """The mean over the pixels that are there: what lies outside the image counts in neither sum nor number."""
    steps = (1, stride, stride, 1)
    total = lax.reduce_window(x, 0.0, lax.add, SQUARE, steps, "SAME")
    number = lax.reduce_window(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, lax.add, SQUARE, steps, "SAME")
    return total / number


CONV3 = register_image(_convolution("conv3x3", (3, 3)))
CONV5 = register_image(_convolution("conv5x5", (5, 5)))
CONV7 = register_image(_convolution("conv7x7", (7, 7)))
CONV_CROSS = register_image(_convolution("conv1x7_7x1", (1, 7), (7, 1)))
MAX_POOL = register_image(_fixed("max_pool", _max_pool, taps=9))
AVERAGE_POOL = register_image(_fixed("average_pool", _average_pool, taps=9))
IDENTITY = register_image(_fixed("identity", lambda x, stride: x[:, ::stride, ::stride], taps=0))
"""With a stride, every stride-th pixel of both axes."""
