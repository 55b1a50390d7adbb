"""Norms, attention and dense pieces of the trunk.

Axis letters: B packed rows, S tokens of a row, T = B*S, D width, F hidden width, H heads, Z width of a head,
P pathways (stacks of norms).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

EPSILON = 1e-6


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) with one scale per pathway."""

    def __init__(self, pathways: int, width: int) -> None:
        self.scale = nnx.Param(jnp.ones((pathways, width)))

    @jax.named_scope("norms")
    def __call__(self, x: jax.Array, pathway: jax.Array) -> jax.Array:
        """Normalises rows `x [..., D]` with the scale of each row's `pathway [...]`; computed in float32."""
        scale = self.scale[...]
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
        chosen = scale[0] if scale.shape[0] == 1 else scale[pathway]
        return (wide * chosen).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention inside segments: a token sees the tokens of its own example and no other.

    Before the projections each token takes in `neighbours` tokens on either side, scaled per channel (a depthwise
    convolution, as in Primer, So et al. 2021; zero at the start). Local order, which attention learns slowly from few
    texts, is there from the first steps.
    """

    def __init__(self, width: int, heads: int, neighbours: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        self.heads = heads
        self.offsets = tuple(i for i in range(-neighbours, neighbours + 1) if i)
        self.neighbours = nnx.Param(jnp.zeros((len(self.offsets), width))) if neighbours else None
        self.qkv = nnx.Param(init(rngs.params(), (width, 3 * width)))
        self.output = nnx.Param(init(rngs.params(), (width, width)))

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, segment: jax.Array) -> jax.Array:
        """`x [B, S, D]`, `segment [B, S]` (0 is padding) -> `[B, S, D]`."""
        if self.neighbours is not None:
            x = add_neighbours(x, segment, self.neighbours[...], self.offsets)
        qkv = x @ self.qkv[...].astype(x.dtype)
        query, key, value = rearrange(qkv, "b s (three h z) -> three b s h z", three=3, h=self.heads)
        visible = (segment[:, :, None] == segment[:, None, :])[:, None]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible)
        return rearrange(mixed, "b s h z -> b s (h z)") @ self.output[...].astype(x.dtype)


def add_neighbours(x: jax.Array, segment: jax.Array, scale: jax.Array, offsets: tuple[int, ...]) -> jax.Array:
    """`x[b, s] + sum_i scale[i] * x[b, s + offsets[i]]` over the neighbours in the same segment.

    `x [B, S, D]`, `segment [B, S]`, `scale [len(offsets), D]` -> `[B, S, D]`.
    """
    reach, length = max(map(abs, offsets)), x.shape[1]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    # No segment has a negative number: what lies outside the row is no one's neighbour.
    around = jnp.pad(segment, ((0, 0), (reach, reach)), constant_values=-1)
    mixed = x
    for weight, offset in zip(scale.astype(x.dtype), offsets, strict=True):
        window = slice(reach + offset, reach + offset + length)
        mixed += jnp.where((around[:, window] == segment)[..., None], padded[:, window] * weight, 0)
    return mixed


class DenseFeedForward(nnx.Module):
    """The unrouted layer: one two-layer perceptron for all rows."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        self.w_in = nnx.Param(init(rngs.params(), (width, hidden)))
        self.b_in = nnx.Param(jnp.zeros((hidden,)))
        self.w_out = nnx.Param(init(rngs.params(), (hidden, width)))
        self.b_out = nnx.Param(jnp.zeros((width,)))

    @jax.named_scope("feed_forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`."""
        dtype = x.dtype
        hidden = jax.nn.gelu(x @ self.w_in[...].astype(dtype) + self.b_in[...].astype(dtype))
        return hidden @ self.w_out[...].astype(dtype) + self.b_out[...].astype(dtype)


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


@jax.named_scope("pooling")
def segment_mean(x: jax.Array, example: jax.Array, num_examples: int) -> jax.Array:
    """Mean of the rows `x [T, D]` of each example; `example [T]` is -1 for padding -> `[N, D]` float32."""
    index = jnp.where(example < 0, num_examples, example)
    total = jax.ops.segment_sum(x.astype(jnp.float32), index, num_examples + 1)[:num_examples]
    count = jax.ops.segment_sum(jnp.ones(index.shape, jnp.float32), index, num_examples + 1)[:num_examples]
    return total / jnp.maximum(count, 1.0)[:, None]
