"""AdamW for a bank of experts of which a step wakes only a few.

Dense AdamW touches every expert in every step: an idle one still moves by what is left of its momentum, its moments
fade and its weights decay. All of that follows from two arrays and a few numbers for each expert, so it can wait until
the expert is next needed. Here an idle expert costs its numbers, not its arrays; when a row wakes it, the steps it
slept through are made up for in closed form, before the row is computed. The result is that of dense AdamW up to
rounding.

With `m`, `v` the moments when the expert fell asleep, step `t` of its sleep (the s-th) would move a weight by

    a_t m / (k_t sqrt(v) + epsilon),   a_t = rate_t beta1^s / (1 - beta1^t),   k_t = sqrt(beta2^s / (1 - beta2^t))

and shrink it by `1 - rate_t decay`. Where `epsilon` weighs nothing the moves add up to `m / sqrt(v)` times the sum of
`a_t / k_t`, and where it outweighs `v`, to `m / epsilon` times the sum of `a_t`; between the two the sum is taken as
`m / (sqrt(v) / to_root + epsilon / to_epsilon)`, which is both ends exactly. Each later step's shrinking applies to the
moves before it.

Axis letters: E experts of a bank, A experts that a step may wake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pathways.config import ModelConfig, TrainConfig
from pathways.training.moments import adam_direction
from pathways.training.optimizer import DECAYED, bank_leaf, make_schedule, names
from pathways.training.trainable import Trainable
from tasks.errors import UserError

Key = str
"""A bank: the number of its block and its kind, as `bank_key` joins them. A name, since checkpoints store by names."""


@dataclass(frozen=True)
class Rule:
    """AdamW's constants."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


class Sleep(NamedTuple):
    """What each expert of a bank has missed since its last row; every leaf `[E]`, float32.

    `fade1`, `fade2`: what its moments are to be multiplied by. `shrink`: what its decaying weights are. `to_root`,
    `to_epsilon`: the sums of the moves, `[2, E]`, of leaves that do not decay and of those that do.
    """

    fade1: jax.Array
    fade2: jax.Array
    shrink: jax.Array
    to_root: jax.Array
    to_epsilon: jax.Array


class Rows(NamedTuple):
    """A parameter and its moments: of a bank `[E, ...]`, or of some of its experts `[A, ...]`."""

    value: jax.Array
    first: jax.Array
    second: jax.Array


class SleepState(NamedTuple):
    """Of all banks: both moments by leaf, who sleeps, and how many steps were taken."""

    moments: dict[Key, dict[str, tuple[jax.Array, jax.Array]]]
    sleep: dict[Key, Sleep]
    count: jax.Array


def awake(num: int) -> Sleep:
    """Of experts that have missed nothing."""
    one, none = jnp.ones((num,)), jnp.zeros((2, num))
    return Sleep(one, one, one, none, none)


def sleep_on(sleep: Sleep, rule: Rule, step: jax.Array, rate: jax.Array) -> Sleep:
    """One more step missed by every expert.

    Args:
        step: t, from 1.
        rate: the learning rate of this step.
    """
    fade1, fade2 = sleep.fade1 * rule.beta1, sleep.fade2 * rule.beta2
    a = rate * fade1 / (1 - rule.beta1**step)
    k = jnp.sqrt(fade2 / (1 - rule.beta2**step))
    keep = 1 - rate * rule.weight_decay
    kept = jnp.stack([jnp.ones(()), keep])[:, None]
    # A sleep so long that the second moment has faded to zero moves nothing more: the first has, long before.
    by_root = jnp.where(k > 0, a / jnp.where(k > 0, k, 1), 0)
    return Sleep(fade1, fade2, sleep.shrink * keep, sleep.to_root * kept + by_root, sleep.to_epsilon * kept + a)


def woken(rows: Rows, sleep: Sleep, rule: Rule, decays: bool) -> Rows:
    """Experts with all that they missed made up for, their moments in the parameters' type.

    Args:
        rows: `[A, ...]`, as they fell asleep.
        sleep: theirs, `[A]`.
        decays: whether weight decay shrinks this leaf.
    """
    shape = (-1,) + (1,) * (rows.value.ndim - 1)
    rows = jax.tree.map(lambda leaf: leaf.astype(rows.value.dtype), rows)
    to_root, to_epsilon = (sums[int(decays)].reshape(shape) for sums in (sleep.to_root, sleep.to_epsilon))
    # A decay that has shrunk one of the sums to nothing has shrunk the moves to nothing, too.
    missed = (to_epsilon > 0) & (to_root > 0)
    below = jnp.sqrt(rows.second) / jnp.where(missed, to_root, 1) + rule.epsilon / jnp.where(missed, to_epsilon, 1)
    move = jnp.where(missed, rows.first / below, 0)
    shrink = sleep.shrink.reshape(shape) if decays else 1.0
    return Rows(
        shrink * rows.value - move,
        sleep.fade1.reshape(shape) * rows.first,
        sleep.fade2.reshape(shape) * rows.second,
    )


def updated(rows: Rows, grad: jax.Array, rule: Rule, decays: bool, step: jax.Array, rate: jax.Array) -> Rows:
    """AdamW's step of awake experts: as `optax.adamw`, decay inside the rate."""
    first = rule.beta1 * rows.first + (1 - rule.beta1) * grad
    second = rule.beta2 * rows.second + (1 - rule.beta2) * jnp.square(grad)
    direction = adam_direction(first, second, rule.beta1, rule.beta2, rule.epsilon, step)
    if decays:
        direction = direction + rule.weight_decay * rows.value
    return Rows(rows.value - rate * direction, first, second)


def take(bank: Any, index: jax.Array) -> Any:
    """The experts at `index` `[A]` of every leaf `[E, ...]`; where the index is E, some expert, to be ignored."""
    return jax.tree.map(lambda leaf: leaf.at[index].get(mode="clip"), bank)


def take_sleep(sleep: Sleep, index: jax.Array) -> Sleep:
    """As `take`; the experts are the last axis here."""
    return jax.tree.map(lambda leaf: leaf.at[..., index].get(mode="clip"), sleep)


def put(bank: Any, index: jax.Array, rows: Any) -> Any:
    """The bank with its experts at `index` replaced; an index of E puts nothing."""
    return jax.tree.map(
        lambda leaf, new: leaf.at[index].set(new.astype(leaf.dtype), mode="drop", unique_indices=False), bank, rows
    )


def wake(sleep: Sleep, index: jax.Array) -> Sleep:
    """The experts at `index` have missed nothing now."""
    fresh = awake(sleep.fade1.shape[-1])
    return jax.tree.map(lambda old, new: old.at[..., index].set(new[..., :1], mode="drop"), sleep, fresh)


class Sleepers:
    """The banks of a network whose experts sleep: what a step keeps of them, fetches from them and puts back.

    Args:
        config: AdamW's constants and the clipping.
        schedule: step, from 0 -> learning rate.
        params: of the network, or their shapes; which leaves are banks follows from their paths.
        room: the most experts of a bank that a step can wake, T * K.
    """

    def __init__(self, config: TrainConfig, schedule: Callable[[Any], Any], params: Any, room: int) -> None:
        self.rule = Rule(config.beta1, config.beta2, config.epsilon, config.weight_decay)
        self.schedule, self.clip = schedule, config.clip
        self.kept_in = jnp.bfloat16 if config.moments == "bfloat16" else jnp.float32
        self.room = {key: min(num, room) for key, num in _sizes(params).items()}

    def init(self, params: Any) -> SleepState:
        """Nothing moved yet, nobody asleep."""

        def nothing(p: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.zeros(p.shape, self.kept_in), jnp.zeros(p.shape, self.kept_in)

        moments = jax.tree.map(nothing, _banks(params))
        sleep = {key: awake(num) for key, num in _sizes(params).items()}
        return SleepState(moments, sleep, jnp.zeros((), jnp.int32))

    def deltas(self, params: Any) -> Any:
        """Zeros in the place of what is fetched: the gradient of a step is with respect to them."""
        return {
            key: {leaf: jnp.zeros((self.room[key], *p.shape[1:]), p.dtype) for leaf, p in bank.items()}
            for key, bank in _banks(params).items()
        }

    def fetch(self, params: Any, state: SleepState, deltas: Any) -> Callable[[int], Any]:
        """Where each block's experts come from (`pathways.network.routed.Fetch`): woken, plus the deltas."""
        banks = self._rows(params, state)

        def of_block(block: int) -> Any:
            @jax.named_scope("waking")
            def of_kind(kind: str, index: jax.Array) -> dict[str, jax.Array]:
                key = bank_key(block, kind)
                rows = self._woken(banks[key], state.sleep[key], index)
                return {leaf: jax.lax.stop_gradient(own.value) + deltas[key][leaf] for leaf, own in rows.items()}

            return of_kind

        return of_block

    def others(self, trainable: Trainable) -> Trainable:
        """What of `trainable` an ordinary optimizer trains: all but the banks."""
        return Trainable(lambda path: trainable.leaf(path) and not bank_leaf(path), trainable.rows)

    def clipped(self, grads: Any, norm: jax.Array) -> Any:
        """The other gradients, clipped by the norm of all; what clips them once more finds nothing left to do."""
        return jax.tree.map(lambda grad: self._scale(norm) * grad, grads)

    def _scale(self, norm: jax.Array) -> jax.Array:
        return jnp.where(norm < self.clip, 1.0, self.clip / norm)

    @jax.named_scope("optimizer")
    def update(
        self, params: Any, state: SleepState, grads: Any, fetched: dict[Key, jax.Array], norm: jax.Array, use: jax.Array
    ) -> tuple[Any, SleepState]:
        """AdamW's step for what was fetched, one more step of sleep for the others; nothing at all unless `use`.

        Args:
            grads: of the deltas.
            norm: of the whole gradient, for the clipping.
        """
        step, rate, scale = state.count + 1, self.schedule(state.count), self._scale(norm)
        banks, sleep = self._rows(params, state), {}
        for key, bank in banks.items():
            asleep = state.sleep[key]
            # An index past the end puts nothing, so that no bank need be copied for a step that is not used.
            index = jnp.where(use, fetched[key], asleep.fade1.shape[0])
            for leaf, own in self._woken(bank, asleep, fetched[key]).items():
                new = updated(own, scale * grads[key][leaf], self.rule, leaf in DECAYED, step, rate)
                bank[leaf] = put(bank[leaf], index, new)
            after = wake(sleep_on(asleep, self.rule, step, rate), index)
            sleep[key] = jax.tree.map(lambda now, old: jnp.where(use, now, old), after, asleep)
        values = {key: {leaf: rows.value for leaf, rows in bank.items()} for key, bank in banks.items()}
        moments = {key: {leaf: (rows.first, rows.second) for leaf, rows in bank.items()} for key, bank in banks.items()}
        return _with_banks(params, values), SleepState(moments, sleep, jnp.where(use, step, state.count))

    def settle(self, params: Any, state: SleepState) -> Any:
        """The parameters with every expert woken: what dense AdamW would have now."""
        values = {
            key: {leaf: woken(rows, state.sleep[key], self.rule, leaf in DECAYED).value for leaf, rows in bank.items()}
            for key, bank in self._rows(params, state).items()
        }
        return _with_banks(params, values)

    def _rows(self, params: Any, state: SleepState) -> dict[Key, dict[str, Rows]]:
        return {
            key: {leaf: Rows(p, *state.moments[key][leaf]) for leaf, p in bank.items()}
            for key, bank in _banks(params).items()
        }

    def _woken(self, bank: dict[str, Rows], sleep: Sleep, index: jax.Array) -> dict[str, Rows]:
        asleep = take_sleep(sleep, index)
        return {leaf: woken(take(rows, index), asleep, self.rule, leaf in DECAYED) for leaf, rows in bank.items()}


def sleepers_for(config: TrainConfig, model: ModelConfig, params: Any, rows: int) -> Sleepers | None:
    """The banks that may sleep in this training, or None where dense AdamW serves it better.

    Args:
        params: of the network.
        rows: T, that a step routes.

    Raises:
        UserError: `train.lazy` is on where it cannot be.
    """
    hindrances = {
        "model.trunk": model.trunk == "conv",
        "model.scan_layers": model.scan_layers,
        "train.accumulate": config.accumulate > 1,
        "train.moments": config.moments == "factored",
        # The moves of a sleep must fade while epsilon is still small beside the second moment.
        "these train.beta1 and train.beta2": config.beta1**2 > 0.9 * config.beta2,
    }
    cannot = next((name for name, on in hindrances.items() if on), None)
    if config.lazy == "on" and cannot:
        raise UserError("Idle experts cannot sleep here.", where="train.lazy", got=f"on, and {cannot}", fix="drop one")
    room, sizes = rows * model.gate.top_k, _sizes(params)
    few = bool(sizes) and all(2 * room <= num for num in sizes.values())
    if cannot or config.lazy == "off" or not sizes or (config.lazy == "auto" and not few):
        return None
    return Sleepers(config, make_schedule(config), params, room)


def bank_key(block: int | str, kind: str) -> Key:
    """The name of a bank."""
    return f"{block}-{kind}"


def _banks(params: Any) -> dict[Key, dict[str, jax.Array]]:
    """Bank -> leaf -> parameter."""
    found: dict[Key, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = names(path)
        if bank_leaf(place) and leaf.shape[0]:
            found.setdefault(bank_key(place[1], place[-2]), {})[place[-1]] = leaf
    return found


def _sizes(params: Any) -> dict[Key, int]:
    return {key: next(iter(bank.values())).shape[0] for key, bank in _banks(params).items()}


def _with_banks(params: Any, banks: dict[Key, dict[str, jax.Array]]) -> Any:
    def replaced(path: Any, old: jax.Array) -> jax.Array:
        place = names(path)
        return banks[bank_key(place[1], place[-2])][place[-1]] if bank_leaf(place) and old.shape[0] else old

    return jax.tree_util.tree_map_with_path(replaced, params)
