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

    def __call__(self, x: jax.Array, pathway: jax.Array) -> jax.Array:
        """Normalises rows `x [..., D]` with the scale of each row's `pathway [...]`; computed in float32."""
        scale = self.scale[...]
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
        chosen = scale[0] if scale.shape[0] == 1 else scale[pathway]
        return (wide * chosen).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention inside segments: a token sees the tokens of its own example and no other."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        self.heads = heads
        self.qkv = nnx.Param(init(rngs.params(), (width, 3 * width)))
        self.output = nnx.Param(init(rngs.params(), (width, width)))

    def __call__(self, x: jax.Array, segment: jax.Array) -> jax.Array:
        """`x [B, S, D]`, `segment [B, S]` (0 is padding) -> `[B, S, D]`."""
        qkv = x @ self.qkv[...].astype(x.dtype)
        query, key, value = rearrange(qkv, "b s (three h z) -> three b s h z", three=3, h=self.heads)
        visible = (segment[:, :, None] == segment[:, None, :])[:, None]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible)
        return rearrange(mixed, "b s h z -> b s (h z)") @ self.output[...].astype(x.dtype)


class DenseFeedForward(nnx.Module):
    """The unrouted layer: one two-layer perceptron for all rows."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        self.w_in = nnx.Param(init(rngs.params(), (width, hidden)))
        self.b_in = nnx.Param(jnp.zeros((hidden,)))
        self.w_out = nnx.Param(init(rngs.params(), (hidden, width)))
        self.b_out = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`."""
        dtype = x.dtype
        hidden = jax.nn.gelu(x @ self.w_in[...].astype(dtype) + self.b_in[...].astype(dtype))
        return hidden @ self.w_out[...].astype(dtype) + self.b_out[...].astype(dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def segment_mean(x: jax.Array, example: jax.Array, num_examples: int) -> jax.Array:
    """Mean of the rows `x [T, D]` of each example; `example [T]` is -1 for padding -> `[N, D]` float32."""
    index = jnp.where(example < 0, num_examples, example)
    total = jax.ops.segment_sum(x.astype(jnp.float32), index, num_examples + 1)[:num_examples]
    count = jax.ops.segment_sum(jnp.ones(index.shape, jnp.float32), index, num_examples + 1)[:num_examples]
    return total / jnp.maximum(count, 1.0)[:, None]
