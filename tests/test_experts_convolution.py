"""The convolution's own gradients against autodiff's, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from experts.convolution import _autodiff, _canonical, convolve

SHAPES = [((5, 6), (3, 3), (2, 2)), ((7, 4), (1, 7), (1, 2)), ((4, 4), (7, 7), (2, 2)), ((5, 5), (5, 5), (1, 1))]
SHAPES += [((6, 6), (1, 1), (2, 2)), ((3, 2), (7, 1), (3, 1))]


@pytest.mark.parametrize(("size", "taps", "stride"), SHAPES)
def test_both_ways_to_the_gradients_agree(size: tuple, taps: tuple, stride: tuple) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(2, *size, 3))), jnp.asarray(rng.normal(size=(*taps, 3, 2)))
        out = convolve(x, kernel, stride)
        dy = jnp.asarray(rng.normal(size=out.shape))
        by_hand, by_autodiff = jax.jit(lambda *a: (_canonical(stride, *a), _autodiff(stride, *a)))(x, kernel, dy)
        taken = jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)[1](dy)
    for one, other, used in zip(by_hand, by_autodiff, taken, strict=True):
        assert_close(one, other, "float64", scale=10.0)
        assert_close(used, other, "float64", scale=10.0)
