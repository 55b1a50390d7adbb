"""A convolution whose gradients are fast inside loops.

XLA's CPU backend brings only convolutions of the outermost computation to the form that its fast routine takes. The
two of a backward pass are of other forms, so inside a loop they fall to a routine that is tens of times slower. Here,
on CPU, they are written in that form by hand; elsewhere they are autodiff's.

Axis letters: b examples, H, W height and width, h, w those of a kernel, C channels, Z output channels, s stride.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
Stride = tuple[int, int]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """`x [b, H, W, C]`, `kernel [h, w, C, Z]` of one type -> `[b, ceil(H / s), ceil(W / s), Z]`, padded as in SAME."""
    return lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=LAYOUT)


def _forward(x, kernel, stride):
    return convolve(x, kernel, stride), (x, kernel)


def _backward(stride, residual, dy):
    return lax.platform_dependent(*residual, dy, cpu=partial(_canonical, stride), default=partial(_autodiff, stride))


convolve.defvjp(_forward, _backward)


def _autodiff(stride: Stride, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=LAYOUT)

    return jax.vjp(plain, x, kernel)[1](dy)


def _canonical(stride: Stride, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients by convolutions of stride 1 without padding, dilation or swapped axes.

    A stride becomes channels first: s x s pixels are one place of s * s * C channels, and the kernel likewise.
    """
    sizes = [-(-n // s) for n, s in zip(x.shape[1:3], stride, strict=True)]
    taps = [-(-n // s) for n, s in zip(kernel.shape[:2], stride, strict=True)]

    def fold_x(x: jax.Array) -> jax.Array:
        pads = [(0, 0), *_pads(x.shape[1:3], kernel.shape[:2], stride), (0, 0)]
        x = jnp.pad(x, pads)
        room = [(n + t - 1) * s for n, t, s in zip(sizes, taps, stride, strict=True)]
        # What lies past the last place that a kernel reaches is cut off; what a padded kernel reaches besides is zero.
        x = x[:, : room[0], : room[1]]
        return _fold(jnp.pad(x, [(0, 0), (0, room[0] - x.shape[1]), (0, room[1] - x.shape[2]), (0, 0)]), stride)

    def fold_kernel(kernel: jax.Array) -> jax.Array:
        more = [(0, t * s - n) for t, s, n in zip(taps, stride, kernel.shape[:2], strict=True)]
        padded = jnp.pad(kernel, [*more, (0, 0), (0, 0)])
        return jnp.moveaxis(_fold(jnp.moveaxis(padded, 3, 0), stride), 0, 3)

    folded, pull_x = jax.vjp(fold_x, x)
    small, pull_kernel = jax.vjp(fold_kernel, kernel)
    # dx: the padded gradient against the kernel turned around, its inputs and outputs swapped.
    border = [(0, 0), *((t - 1, t - 1) for t in taps), (0, 0)]
    d_folded = _valid(jnp.pad(dy, border), jnp.swapaxes(small[::-1, ::-1], 2, 3))
    # dkernel: channels as examples, and examples as channels.
    d_small = _valid(jnp.transpose(folded, (3, 1, 2, 0)), jnp.transpose(dy, (1, 2, 0, 3)))
    return pull_x(d_folded)[0], pull_kernel(jnp.transpose(d_small, (1, 2, 0, 3)))[0]


def _valid(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # The barrier keeps XLA from folding the flips and transposes back into the convolution.
    x, kernel = lax.optimization_barrier((x, kernel))
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)


def _pads(sizes: tuple[int, ...], taps: tuple[int, ...], stride: Stride) -> list[tuple[int, int]]:
    """What SAME adds before and after; where it is odd, the larger part comes after."""
    found = []
    for size, tap, step in zip(sizes, taps, stride, strict=True):
        more = max((-(-size // step) - 1) * step + tap - size, 0)
        found.append((more // 2, more - more // 2))
    return found


def _fold(x: jax.Array, stride: Stride) -> jax.Array:
    """`[b, H s, W t, C]` -> `[b, H, W, s t C]`."""
    b, height, width, channels = x.shape
    s, t = stride
    cells = x.reshape(b, height // s, s, width // t, t, channels)
    return jnp.transpose(cells, (0, 1, 3, 2, 4, 5)).reshape(b, height // s, width // t, s * t * channels)
