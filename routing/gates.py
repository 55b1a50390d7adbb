"""Gates: which candidates each row takes, and with what weights. Pure functions on arrays, in float32 throughout.

Axis letters: T rows, D width, G gates, M candidates of a gate, K candidates chosen per row, E slots.

A layer has a stack of gates `[G, D, M]` and a table `[G, M]` of the slots that the M logits mean. One gate shared by
all tasks is G = 1; shared and conditioned on the task is G = 1 with `task_embedding`; one per task is G = tasks. A
gate with fewer than M candidates has `num_slots` in the table for the rest, and those are never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from routing.blocks import block_layout, collect, sort_by_group, spread
from routing.plan import Plan

GateKind = Literal["noisy_top_k", "softmax_top_k", "sigmoid_top_k", "gumbel_matrix"]


@dataclass(frozen=True)
class GateConfig:
    """How logits become choices and weights.

    Attributes:
        kind:
            `noisy_top_k`: Shazeer et al. 2017 (arXiv:1701.06538) eq. 3-5; both kernels start at zero.
            `softmax_top_k`: the K largest of a softmax over all candidates.
            `sigmoid_top_k`: the K largest of sigmoid + balance bias, weighted by the sigmoids alone, normalised:
                loss-free balancing, Wang et al. 2024 (arXiv:2408.15664).
            `gumbel_matrix`: a learned row of on/off variables for each gate, whatever the rows hold, Maziarz et al.
                2019 (arXiv:1910.04915); it stands in `routing.gumbel` and is not of `route`.
        top_k: K.
        renormalize: whether the weights of `softmax_top_k` and `gumbel_matrix` are divided by their sum (the other
            kinds' always are). With
            K = 1 that makes every weight 1, and the router learns from its balance losses alone.
        noise: multiplies the learned noise of `noisy_top_k`.
        min_noise: added to the learned standard deviation, so that the smooth load always has a slope.
        temperature: of the samples of `gumbel_matrix`.

    Raises:
        ValueError: for an unknown kind, K < 1 or a temperature that is not positive.
    """

    kind: GateKind
    top_k: int
    renormalize: bool = True
    noise: float = 1.0
    min_noise: float = 1e-2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(GateKind):
            raise ValueError(f"unknown kind of gate {self.kind!r}, expected one of {', '.join(get_args(GateKind))}")
        if self.top_k < 1:
            raise ValueError(f"expected top_k of at least 1, got {self.top_k}")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")


class Routing(NamedTuple):
    """What a gate decided, in terms of its own candidates."""

    choice: jax.Array  # [T, K] int32: candidates by falling score, M = nowhere
    weight: jax.Array  # [T, K] float32: 0 where nowhere
    probs: jax.Array  # [T, M] float32: softmax over all candidates, or the sigmoids; 0 where not a candidate
    load: jax.Array  # [T, M] float32: P(x, i), the chance that i is chosen; without noise 1 where chosen, else 0
    logits: jax.Array  # [T, M] float32: as given, -inf where not a candidate


def gate_logits(
    x: jax.Array,
    kernel: jax.Array,
    gate: jax.Array,
    *,
    bias: jax.Array | None = None,
    task_embedding: jax.Array | None = None,
) -> jax.Array:
    """`x[t] @ kernel[gate[t]]`, in float32 and full precision whatever the types.

    The cost follows T, not T * G: rows are sorted by gate into blocks, each multiplied by its gate's kernel.

    Args:
        x: `[T, D]`.
        kernel: `[G, D, M]`.
        gate: `[T]` integers in `0..G-1`; read only if G > 1, where G means no gate (zero logits).
        bias: `[G, M]`, added.
        task_embedding: `[T, D]`, the embedding of each row's task, added to `x`.

    Returns:
        `[T, M]` float32.
    """
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    if task_embedding is not None:
        x = x + task_embedding.astype(jnp.float32)
    num_gates = kernel.shape[0]
    if num_gates == 1:
        logits = jnp.matmul(x, kernel[0], precision=lax.Precision.HIGHEST)
        return logits if bias is None else logits + bias[0].astype(jnp.float32)
    block_size = _block_size(x.shape[0], num_gates)
    layout = block_layout(sort_by_group(gate, num_gates), block_size)
    blocks = spread(x, layout.order, layout.position[:, None]).reshape(-1, block_size, x.shape[1])
    logits = jnp.matmul(blocks, kernel[layout.block_group], precision=lax.Precision.HIGHEST)
    if bias is not None:
        logits += bias.astype(jnp.float32)[layout.block_group][:, None]
    return collect(logits.reshape(-1, kernel.shape[2]), layout.order, layout.position)


def _block_size(rows: int, num_gates: int) -> int:
    """A power of two near the mean number of rows of a gate, from 8 to 128."""
    mean = max(1, rows // num_gates)
    return min(128, max(8, 1 << (mean.bit_length() - 1)))


def route(
    config: GateConfig,
    logits: jax.Array,
    *,
    valid: jax.Array,
    candidates: jax.Array | None = None,
    key: jax.Array | None = None,
    noise_logits: jax.Array | None = None,
    balance_bias: jax.Array | None = None,
    deterministic: bool = False,
) -> Routing:
    """Chooses K candidates for each row. Ties go to the lowest index.

    Args:
        logits: `[T, M]`.
        valid: `[T]` bool; a padding row goes nowhere, and what it holds (even NaN) has no effect.
        candidates: `[T, M]` bool, which candidates exist; or `[T]` integers, how many do (the first). All if None. A
            row with fewer than K goes nowhere with the choices it lacks.
        key, noise_logits: for `noisy_top_k`: the noise is `N(0, 1) * softplus(noise_logits [T, M])`.
        balance_bias: `[M]` or `[T, M]`, for `softmax_top_k` and `sigmoid_top_k`: added for selection only.
        deterministic: no noise.

    Raises:
        ValueError: if K > M, or noise is asked for without its key or logits, or a bias is given to `noisy_top_k`, or
            for `gumbel_matrix`.
    """
    if config.kind == "gumbel_matrix":
        raise ValueError("expected a kind whose logits are of rows, got gumbel_matrix: see routing.gumbel")
    num = logits.shape[1]
    if config.top_k > num:
        raise ValueError(f"expected top_k of at most {num}, the number of candidates, got {config.top_k}")
    if config.kind == "noisy_top_k" and balance_bias is not None:
        raise ValueError("expected no balance_bias for noisy_top_k, which is balanced by its losses, got one")
    exists = _exists(logits, valid, candidates)
    clean = jnp.where(exists, logits.astype(jnp.float32), 0.0)
    if config.kind == "noisy_top_k":
        return _noisy_top_k(config, clean, exists, key, noise_logits, deterministic)
    if config.kind == "softmax_top_k":
        scores = _softmax(clean, exists)
    else:
        scores = jnp.where(exists, jax.nn.sigmoid(clean), 0.0)
    ranking = scores if balance_bias is None else scores + balance_bias.astype(jnp.float32)
    choice = choose_top(ranking, exists, config.top_k)
    weight = _take(scores, choice)
    if config.renormalize or config.kind == "sigmoid_top_k":
        weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-20)
    return Routing(choice, weight, scores, _chosen(choice, num), jnp.where(exists, clean, -jnp.inf))


def _exists(logits: jax.Array, valid: jax.Array, candidates: jax.Array | None) -> jax.Array:
    """`[T, M]` bool."""
    exists = jnp.broadcast_to(valid[:, None], logits.shape)
    if candidates is None:
        return exists
    if candidates.ndim == 1:
        candidates = jnp.arange(logits.shape[1]) < candidates[:, None]
    return exists & candidates


def _softmax(logits: jax.Array, exists: jax.Array) -> jax.Array:
    """Softmax over what exists; all zero, with zero gradients, for a row without candidates."""
    highest = lax.stop_gradient(jnp.where(exists, logits, -jnp.inf).max(1, keepdims=True))
    power = jnp.where(exists, jnp.exp(jnp.where(exists, logits - highest, 0.0)), 0.0)
    return power / jnp.maximum(power.sum(1, keepdims=True), 1e-20)


def choose_top(scores: jax.Array, exists: jax.Array, k: int) -> jax.Array:
    """`[T, k]` int32: the k highest of what exists, M for the choices that a row lacks."""
    choice = lax.top_k(jnp.where(exists, lax.stop_gradient(scores), -jnp.inf), k)[1].astype(jnp.int32)
    return jnp.where(jnp.take_along_axis(exists, choice, 1), choice, scores.shape[1])


def _take(values: jax.Array, choice: jax.Array) -> jax.Array:
    """`values[t, choice[t, k]]`, 0 where nowhere."""
    return jnp.take_along_axis(values, choice, 1, mode="fill", fill_value=0)


def _chosen(choice: jax.Array, num: int) -> jax.Array:
    """`[T, M]` float32: 1 where chosen."""
    return (choice[:, :, None] == jnp.arange(num)).any(1).astype(jnp.float32)


def _noisy_top_k(
    config: GateConfig,
    clean: jax.Array,
    exists: jax.Array,
    key: jax.Array | None,
    noise_logits: jax.Array | None,
    deterministic: bool,
) -> Routing:
    """`H = x W_g + N(0, 1) softplus(x W_noise)` (eq. 4), `G = softmax(KeepTopK(H, k))` (eq. 3 and 5)."""
    num, noisy, deviation = clean.shape[1], clean, None
    if not deterministic:
        if key is None or noise_logits is None:
            missing = "key" if key is None else "noise_logits"
            raise ValueError(f"expected key and noise_logits for noisy_top_k unless deterministic, got no {missing}")
        safe = jnp.where(exists, noise_logits.astype(jnp.float32), 0.0)
        deviation = config.noise * jax.nn.softplus(safe) + config.min_noise
        noisy = clean + jax.random.normal(key, clean.shape, jnp.float32) * deviation
    choice = choose_top(noisy, exists, config.top_k)
    weight = _softmax(_take(noisy, choice), choice < num)
    load = _chosen(choice, num) if deviation is None else _smooth_load(config.top_k, clean, noisy, deviation, exists)
    return Routing(choice, weight, _softmax(noisy, exists), load, jnp.where(exists, clean, -jnp.inf))


def _smooth_load(k: int, clean: jax.Array, noisy: jax.Array, deviation: jax.Array, exists: jax.Array) -> jax.Array:
    """`P(x, i) = Phi((x W_g)_i - kth_excluding(H, k, i)) / softplus((x W_noise)_i))`, eq. 8-9 of the appendix.

    The k-th highest of the others is the (k+1)-th highest of all for i among the top k, else the k-th. A row with no
    more than k candidates takes all of them for certain.
    """
    num = clean.shape[1]
    if k >= num:
        return exists.astype(jnp.float32)
    index = choose_top(noisy, exists, k + 1)
    best = _take(noisy, index)
    inside = noisy > best[:, k, None]
    threshold = jnp.where(inside, best[:, k, None], best[:, k - 1, None])
    probability = jax.scipy.stats.norm.cdf((clean - threshold) / deviation)
    crowded = index[:, k, None] < num
    return jnp.where(exists, jnp.where(crowded, probability, 1.0), 0.0)


def to_slots(routing: Routing, slots: jax.Array, gate: jax.Array, num_slots: int) -> Plan:
    """Turns choices among candidates into slots of the banks.

    Args:
        slots: `[G, M]` int32, the slot that each logit means; `num_slots` where the gate has no candidate.
        gate: `[T]`; read only if G > 1.
    """
    nowhere = jnp.full((slots.shape[0], 1), num_slots, jnp.int32)
    table = jnp.concatenate([slots.astype(jnp.int32), nowhere], 1)
    slot = table[_gate_of(gate, slots)[:, None], routing.choice]
    return Plan(slot, jnp.where(slot < num_slots, routing.weight, 0.0))


def sum_by_slot(values: jax.Array, slots: jax.Array, gate: jax.Array, num_slots: int) -> jax.Array:
    """Sums `values [T, M]` over the rows, by the slot that each candidate means: `[num_slots]` float32."""
    values = values.astype(jnp.float32)
    num_gates = slots.shape[0]
    per_gate = values.sum(0)[None] if num_gates == 1 else jax.ops.segment_sum(values, gate, num_gates)
    return jax.ops.segment_sum(per_gate.reshape(-1), slots.reshape(-1), num_slots + 1)[:num_slots]


def _gate_of(gate: jax.Array, slots: jax.Array) -> jax.Array:
    return jnp.zeros_like(gate) if slots.shape[0] == 1 else gate
