"""Losses of examples and of tagged tokens, chosen per example by an integer: one compiled function for all tasks.

Every loss is computed for every example and one is selected, so no task's name or kind enters the program. Logits and
targets are float32 (or wider). A masked output takes no part: its gradient is exactly zero and never NaN.

Axis letters: N examples, Y outputs of the widest head, B rows, S tokens in a row, K classes of the widest tagger.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOSS_CODE: dict[str, int] = {
    "softmax_cross_entropy": 0,
    "sigmoid_cross_entropy": 1,
    "squared_error": 2,
    "absolute_error": 3,
    "huber": 4,
}
"""The integer that stands for each loss of `tasks.spec.LOSSES`."""

HUBER_DELTA = 1.0
"""Where the Huber loss turns from quadratic to linear, in standard deviations of the target."""


def example_loss(logits: jax.Array, y: jax.Array, y_mask: jax.Array, code: jax.Array) -> jax.Array:
    """The loss of each example.

    Args:
        logits: `[N, Y]`, the head's outputs; for regression the standardised prediction.
        y: `[N, Y]`, one-hot or a distribution, 0/1, or standardised values.
        y_mask: `[N, Y]`, 1 where the output exists and its target is known.
        code: `[N]` int, of `LOSS_CODE`.

    Returns:
        `[N]`: cross-entropies summed over the known outputs (minus the log-likelihood of all that is known), errors of
        regression averaged over them; 0 where nothing is known.
    """
    known = y_mask > 0
    count = jnp.maximum(known.sum(axis=-1), 1).astype(logits.dtype)
    logits = jnp.where(known, logits, 0.0)
    y = jnp.where(known, y, 0.0)

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(known, values, 0.0).sum(axis=-1)

    error = logits - y
    size = jnp.abs(error)
    huber = jnp.where(size <= HUBER_DELTA, 0.5 * jnp.square(error), HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
    losses = jnp.stack(
        [
            _softmax_cross_entropy(logits, y, known),
            total(jax.nn.softplus(logits) - logits * y),
            total(jnp.square(error)) / count,
            total(size) / count,
            total(huber) / count,
        ]
    )
    return jnp.take_along_axis(losses, code[None, :].astype(jnp.int32), axis=0)[0]


def token_loss(logits: jax.Array, tag: jax.Array, width: jax.Array) -> jax.Array:
    """Cross-entropy of each tagged token.

    Args:
        logits: `[B, S, K]`.
        tag: `[B, S]` int, the class, negative where the token has none.
        width: `[B, S]` int, how many of the K classes the token's task has.

    Returns:
        `[B, S]`, 0 where `tag` is negative.
    """
    tagged = tag >= 0
    valid = (jnp.arange(logits.shape[-1]) < width[..., None]) & tagged[..., None]
    target = jax.nn.one_hot(tag, logits.shape[-1], dtype=logits.dtype)
    return _softmax_cross_entropy(jnp.where(valid, logits, 0.0), target, valid)


def _softmax_cross_entropy(logits: jax.Array, y: jax.Array, known: jax.Array) -> jax.Array:
    """`-sum y log softmax` over the known outputs of the last axis; 0 where none is known."""
    low = jnp.finfo(logits.dtype).min
    top = jax.lax.stop_gradient(jnp.max(jnp.where(known, logits, low), axis=-1, keepdims=True))
    shifted = jnp.where(known, logits - jnp.maximum(top, low / 2), 0.0)
    total = jnp.where(known, jnp.exp(shifted), 0.0).sum(axis=-1, keepdims=True)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(known, y * (log_total - shifted), 0.0).sum(axis=-1)
