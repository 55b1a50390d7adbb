"""Balance: losses that spread rows over experts, and the bias that does so without a loss.

Axis letters: T rows, M candidates, E slots, K experts per row.

Each loss has a form that takes sums over rows (`..._from_sums`): add the sums up over the devices (psum) before
calling it, and every mesh gives the numbers of one device. A mean of per-device losses is another quantity. Sums come
from `routing.gates.sum_by_slot` (smooth load, probabilities) and `weight_by_slot`, `count_by_slot` here. Padding rows
add nothing to any sum: their weights, probabilities and loads are zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from routing.plan import Plan


def weight_by_slot(plan: Plan, num_slots: int) -> jax.Array:
    """Importance: the sum of gate values of each slot, `[E]` (Shazeer et al. 2017, eq. 6)."""
    return jax.ops.segment_sum(plan.weight.reshape(-1), plan.slot.reshape(-1), num_slots + 1)[:num_slots]


def count_by_slot(plan: Plan, num_slots: int) -> jax.Array:
    """How many choices fell on each slot, `[E]` float32; not differentiable."""
    ones = jnp.ones((plan.slot.size,), jnp.float32)
    return jax.ops.segment_sum(ones, plan.slot.reshape(-1), num_slots + 1)[:num_slots]


def squared_coefficient_of_variation(sums: jax.Array) -> jax.Array:
    """`variance / mean^2` of non-negative `[E]`; 0 for a single slot or where all are 0."""
    if sums.shape[0] < 2:
        return jnp.zeros((), sums.dtype)
    mean = sums.mean()
    safe = jnp.where(mean > 0, mean, 1.0)
    return jnp.where(mean > 0, jnp.square(sums / safe - 1.0).mean(), 0.0)


def importance_loss_from_sums(importance: jax.Array) -> jax.Array:
    """CV^2 of the importance `[E]`: Shazeer et al. 2017, eq. 7, without its factor."""
    return squared_coefficient_of_variation(importance)


def importance_loss(plan: Plan, num_slots: int) -> jax.Array:
    """`importance_loss_from_sums` of all rows of a plan."""
    return importance_loss_from_sums(weight_by_slot(plan, num_slots))


def load_loss_from_sums(load: jax.Array) -> jax.Array:
    """CV^2 of the smooth load `[E]`, the sum over rows of P(x, i): Shazeer et al. 2017, eq. 11, without its factor."""
    return squared_coefficient_of_variation(load)


def load_loss(load: jax.Array) -> jax.Array:
    """`load_loss_from_sums` of `load [T, E]`, for one gate whose candidates are the slots."""
    return load_loss_from_sums(load.sum(0))


def load_balancing_loss_from_sums(counts: jax.Array, probs: jax.Array, num_rows: jax.Array, top_k: int) -> jax.Array:
    """`E * sum_i f_i P_i`: Fedus et al. 2021 (Switch), eq. 4-6, without its factor; 1 when perfectly balanced.

    Args:
        counts: `[E]`, choices that fell on each slot; `f_i = counts_i / (num_rows * K)`, so that the f sum to 1 for any
            K. No gradient flows through them.
        probs: `[E]`, sums over rows of the router's probabilities; `P_i = probs_i / num_rows`.
        num_rows: how many valid rows all the sums are over.
        top_k: K.
    """
    rows = jnp.maximum(jnp.asarray(num_rows, jnp.float32), 1.0)
    fraction = jax.lax.stop_gradient(counts) / (rows * top_k)
    return counts.shape[0] * jnp.sum(fraction * probs / rows)


def load_balancing_loss(plan: Plan, probs: jax.Array, valid: jax.Array) -> jax.Array:
    """`load_balancing_loss_from_sums` for one gate whose candidates are the slots.

    Args:
        plan: `[T, K]`.
        probs: `[T, E]`.
        valid: `[T]` bool.
    """
    sums = jnp.where(valid[:, None], probs, 0.0).sum(0)
    counts = count_by_slot(plan, probs.shape[1])
    return load_balancing_loss_from_sums(counts, sums, valid.sum(), plan.slot.shape[1])


def router_z_sum(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """The sum over valid rows of `logsumexp(logits)^2`; logits of -inf do not count, nor do rows of nothing else."""
    exists = (logits != -jnp.inf) & valid[:, None]
    some = exists.any(1)
    safe = jnp.where(exists, logits, 0.0)
    # A row without candidates would be log(0), whose gradient is not finite even where it is masked.
    z = jax.nn.logsumexp(safe, axis=1, where=jnp.where(some[:, None], exists, True))
    return jnp.where(some, jnp.square(z), 0.0).sum()


def router_z_loss_from_sums(z_sum: jax.Array, num_rows: jax.Array) -> jax.Array:
    """`router_z_sum` over the number of valid rows."""
    return z_sum / jnp.maximum(jnp.asarray(num_rows, jnp.float32), 1.0)


def router_z_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid rows of `logsumexp(logits [T, M])^2`: Zoph et al. 2022 (ST-MoE, arXiv:2202.08906), eq. 5."""
    return router_z_loss_from_sums(router_z_sum(logits, valid), valid.sum())


def update_balance_bias(bias: jax.Array, counts: jax.Array, rate: float | jax.Array) -> jax.Array:
    """`bias_i + rate * sign(mean(counts) - counts_i)`: loss-free balancing, Wang et al. 2024, algorithm 1.

    Args:
        bias: `[E]`.
        counts: `[E]`, choices of the whole batch.
        rate: u, 0.001 in the paper.
    """
    counts = counts.astype(jnp.float32)
    return bias + rate * jnp.sign(counts.mean() - counts)


def max_violation(counts: jax.Array) -> jax.Array:
    """`max(counts) / mean(counts) - 1` (MaxVio, Wang et al. 2024, eq. 4): 0 when perfectly balanced or empty."""
    counts = counts.astype(jnp.float32)
    mean = counts.mean()
    return jnp.where(mean > 0, counts.max() / jnp.where(mean > 0, mean, 1.0) - 1.0, 0.0)
