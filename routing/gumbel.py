"""Routing per task by a learned matrix of gates by candidates, with Gumbel noise (Maziarz et al. 2019).

Each cell of the matrix is the logit of an on/off variable: whether the tasks of a gate use a candidate. In training the
variables are sampled once for each gate and call, by the Gumbel-softmax over {on, off}, which is a sigmoid of the logit
plus logistic noise, over the temperature; forward they are 0 or 1, and gradients are those of the sigmoid ("straight
through"). Without noise a candidate is on where its logit is positive.

Unlike the paper (arXiv:1910.04915), at most K candidates of a gate are on at once: the K highest of its samples. So the
cost of an example is bounded, and what is off is not computed. At least one is on: the highest. The weights of what is
on are 1, or with `renormalize` they are divided by their number, so that layers do not grow with it.

Axis letters: T rows, G gates, M candidates, K candidates chosen at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from routing.gates import GateConfig, Routing, choose_top


def gumbel_matrix(
    config: GateConfig,
    matrix: jax.Array,
    gate: jax.Array,
    *,
    valid: jax.Array,
    candidates: jax.Array,
    key: jax.Array | None = None,
) -> Routing:
    """Chooses at most K candidates for each gate, and gives them to all of its rows.

    Args:
        config: `top_k`, `renormalize` and `temperature` are read.
        matrix: `[G, M]` logits.
        gate: `[T]` integers in `0..G-1`.
        valid: `[T]` bool; a padding row goes nowhere.
        candidates: `[G, M]` bool, which candidates exist.
        key: of the samples; None for none, which is deterministic.

    Returns:
        A `Routing` of the rows. `probs` are the chances to be on, before the limit K.

    Raises:
        ValueError: if K > M.
    """
    num = matrix.shape[1]
    if config.top_k > num:
        raise ValueError(f"expected top_k of at most {num}, the number of candidates, got {config.top_k}")
    logits = matrix.astype(jnp.float32)
    noise = jnp.zeros_like(logits) if key is None else jax.random.logistic(key, logits.shape)
    sample = (logits + noise) / config.temperature
    choice = choose_top(sample, candidates, config.top_k)
    soft = jax.nn.sigmoid(jnp.take_along_axis(sample, choice, 1, mode="fill", fill_value=-jnp.inf))
    on = (soft > 0.5).at[:, 0].set(True) & (choice < num)
    weight = jnp.where(on, jax.lax.stop_gradient(1.0 - soft) + soft, 0.0)
    if config.renormalize:
        weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-20)
    choice = jnp.where(on, choice, num)
    chosen = (choice[:, :, None] == jnp.arange(num)).any(1).astype(jnp.float32)
    probs = jnp.where(candidates, jax.nn.sigmoid(logits), 0.0)
    of_gate = Routing(choice, weight, probs, chosen, jnp.where(candidates, logits, -jnp.inf))
    rows = jax.tree.map(lambda leaf: leaf[gate], of_gate)
    padding = Routing(
        *(jnp.asarray(value, leaf.dtype) for value, leaf in zip((num, 0, 0, 0, -jnp.inf), rows, strict=True))
    )
    return jax.tree.map(lambda row, none: jnp.where(valid[:, None], row, none), rows, padding)
