"""The compiled training step.

Axis letters: A batches accumulated in a step, N examples, B packed rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pathways.config import BalanceOptions
from pathways.network.network import Outputs, TaskTable
from pathways.submodel import SubModel
from pathways.training.lazy import Sleepers, bank_key
from pathways.training.trainable import EVERYTHING, Trainable
from routing import counters
from routing.balance import update_balance_bias
from tasks.losses import example_loss, token_loss


class TrainState(NamedTuple):
    """All that a step reads and writes; donated.

    `asleep` is what `lazy.Sleepers` keeps of the banks, or empty. `bad` counts steps in a row that were not finite,
    `bad_total` all of them; `counts` the routing since it was last taken, one per routed layer, or empty.
    """

    params: Any
    bias: Any
    opt_state: Any
    step: jax.Array
    bad: jax.Array
    bad_total: jax.Array
    counts: tuple[counters.Counters, ...]
    asleep: Any = ()


class Metrics(NamedTuple):
    """Of one step: scalars, `task_loss`/`task_rows` `[tasks]` (sums), `imbalance [layers]` (max over mean load).

    `bad` and `bad_total` are those of the state after the step.
    """

    loss: jax.Array
    balance_loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    bad: jax.Array
    bad_total: jax.Array
    examples: jax.Array
    task_loss: jax.Array
    task_rows: jax.Array
    imbalance: jax.Array


Step = Callable[[TrainState, dict[str, Any]], tuple[TrainState, Metrics]]


@jax.named_scope("loss")
def per_example_loss(out: Outputs, batch: dict[str, Any], table: TaskTable) -> tuple[jax.Array, jax.Array]:
    """Loss `[N]` of each example and whether it has one `[N]`.

    A tagged example's is the sum of its tokens': as every cross-entropy, minus the log-likelihood of all its labels. A
    mean would count for so little among other tasks that taggers stay behind (docs/benchmarks.md).
    """
    task = jnp.maximum(batch["task"], 0)
    present = batch["task"] >= 0
    example = batch["segment"] - 1
    num = task.shape[0]
    loss, known = jnp.zeros((num,)), jnp.zeros((num,), bool)
    if out.logits.shape[1]:
        width = out.logits.shape[1]
        loss = example_loss(out.logits, batch["y"][:, :width], batch["y_mask"][:, :width], table.loss[task])
        known = present & ~table.token_level[task] & (jnp.sum(batch["y_mask"], axis=1) > 0)
    if out.token_logits is not None:
        of_token = jnp.maximum(example, 0)
        level = table.token_level[task][of_token] & (example >= 0)
        tag = jnp.where(level, batch["tag"], -1)
        token = token_loss(out.token_logits, tag, table.outputs[task][of_token])
        index = jnp.where(tag >= 0, of_token, num).ravel()
        total = jax.ops.segment_sum(token.ravel(), index, num + 1)[:num]
        count = jax.ops.segment_sum(jnp.ones_like(index), index, num + 1)[:num]
        tagged = table.token_level[task] & (count > 0)
        loss = jnp.where(tagged, total, loss)
        known = known | (tagged & present)
    return jnp.where(known, loss, 0.0), known


def make_step(
    sub: SubModel,
    optimizer: optax.GradientTransformation,
    balance: BalanceOptions,
    *,
    seed: int,
    statistics: bool,
    trainable: Trainable = EVERYTHING,
    sleepers: Sleepers | None = None,
) -> Step:
    """Compiles a step for batches whose every array has a leading axis A.

    The gradient is the mean over the A batches of each one's gradient; a batch's loss is the mean over its examples
    plus its balance losses. The balance bias moves once a step, by the load of all A batches. A step whose loss or
    gradient is not finite leaves parameters, optimizer, bias and counts as they were.

    Args:
        trainable: what gets gradients; the rest is constant, so nothing is spent on it. All by default.
        sleepers: banks whose idle experts sleep; they train besides, and A must be 1.
    """
    graph, table = sub.graph, sub.table
    if sleepers is not None:
        trainable = sleepers.others(trainable)

    def loss_of(trained: Any, rest: Any, bias: Any, batch: dict[str, Any], key: jax.Array):
        (own, deltas), (constant, asleep) = trained, rest
        params = trainable.join(own, constant)
        fetch = None if sleepers is None else sleepers.fetch(params, asleep, deltas)
        network = nnx.merge(graph, params, bias)
        out: Outputs = network(batch, table, balance, key=key, statistics=statistics, fetch=fetch)
        loss, known = per_example_loss(out, batch, table)
        extra = sum((layer.loss for layer in out.layers), jnp.zeros(()))
        mean = jnp.sum(loss) / jnp.maximum(jnp.sum(known.astype(jnp.float32)), 1.0)
        return mean + extra, (loss, known, extra, out.layers)

    grad_of = jax.value_and_grad(loss_of, has_aux=True)

    def micro(carry: Any, batch: dict[str, Any]):
        trained, rest, bias, grads, key = carry
        key, here = jax.random.split(key)
        (total, (loss, known, extra, layers)), new = grad_of(trained, rest, bias, batch, here)
        task = jnp.where(batch["task"] >= 0, batch["task"], table.loss.shape[0])
        rows = table.loss.shape[0]
        sums = (
            jax.ops.segment_sum(loss, task, rows + 1)[:rows],
            jax.ops.segment_sum(known.astype(jnp.float32), task, rows + 1)[:rows],
        )
        load = tuple(layer.load for layer in layers)
        fetched = tuple(layer.fetched for layer in layers)
        routed = tuple(layer.routed for layer in layers)
        grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
        return (trained, rest, bias, grads, key), (total, extra, *sums, load, fetched, routed)

    def step(state: TrainState, batches: dict[str, Any]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        own, constant = trainable.split(state.params)
        deltas = {} if sleepers is None else sleepers.deltas(state.params)
        trained, rest = (own, deltas), (constant, state.asleep)
        num = batches["segment"].shape[0]
        if num == 1:
            start = (trained, rest, state.bias, None, key)
            carry, out = micro(start, jax.tree.map(lambda leaf: leaf[0], batches))
            out = jax.tree.map(lambda leaf: leaf[None], out)
        else:
            zeros = jax.tree.map(jnp.zeros_like, trained)
            carry, out = jax.lax.scan(micro, (trained, rest, state.bias, zeros, key), batches)
        grads = jax.tree.map(lambda g: g / num, carry[3])
        totals, extras, losses, rows, loads, fetched, routed = out
        load = [jnp.sum(layer, axis=0) for layer in loads]
        bias = _new_bias(state.bias, load, table.slots, balance.bias_rate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(totals))

        mine = grads[0] if sleepers is None else sleepers.clipped(grads[0], norm)

        @jax.named_scope("optimizer")
        def apply(_: None):
            updates, opt_state = optimizer.update(mine, state.opt_state, own)
            return optax.apply_updates(own, updates), opt_state, bias

        def skip(_: None):
            return own, state.opt_state, state.bias

        own, opt_state, bias = jax.lax.cond(finite, apply, skip, None)
        counts = ()
        if statistics:
            counts = tuple(_counted(a, layer, finite) for a, layer in zip(state.counts, routed, strict=True))
        bad = jnp.where(finite, 0, state.bad + 1)
        params, asleep = trainable.join(own, constant), state.asleep
        if sleepers is not None:
            chosen = {
                bank_key(block, kind): index[0]
                for block, layer in zip(sub.config.model.routed_layers, fetched, strict=True)
                for kind, index in layer.items()
            }
            params, asleep = sleepers.update(params, asleep, grads[1], chosen, norm, finite)
        total_bad = state.bad_total + jnp.where(finite, 0, 1)
        new = TrainState(params, bias, opt_state, state.step + 1, bad, total_bad, counts, asleep)
        # A layer that a pathway skips has no experts, and no load.
        uneven = [jnp.max(x) / jnp.maximum(jnp.mean(x), 1e-9) for x in load if x.size]
        imbalance = jnp.stack(uneven) if uneven else jnp.ones((1,))
        task_rows = jnp.sum(rows, axis=0)
        metrics = Metrics(
            jnp.mean(totals - extras),
            jnp.mean(extras),
            norm,
            finite,
            bad,
            total_bad,
            jnp.sum(task_rows),
            jnp.sum(losses, axis=0),
            task_rows,
            imbalance,
        )
        return new, metrics

    return jax.jit(step, donate_argnums=(0,))


def initial_state(
    sub: SubModel,
    optimizer: optax.GradientTransformation,
    *,
    statistics: bool,
    trainable: Trainable = EVERYTHING,
    sleepers: Sleepers | None = None,
) -> TrainState:
    """The state before the first step. The sub-model's arrays are copied, so donation leaves them intact."""
    params = sub.params
    if sleepers is not None:
        trainable = sleepers.others(trainable)
    trained, _ = trainable.split(params)
    counts = ()
    if statistics:
        counts = tuple(counters.zeros(sub.layout.size.tasks, num) for num in sub.layout.size.slots)
    zero = jnp.zeros((), jnp.int32)
    asleep = () if sleepers is None else jax.jit(sleepers.init)(params)
    state = TrainState(params, sub.bias, jax.jit(optimizer.init)(trained), zero, zero, zero, counts, asleep)
    # Every donated buffer must be its own. One program for all: one for each shape would have to be loaded at a start.
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)


def _counted(counts: counters.Counters, batches: counters.Routed, finite: jax.Array) -> counters.Counters:
    """With all A batches added, `[A, T, ...]`, if the step counts; in place, outside of what is conditional."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)
    return counters.count(counts, flat, counts=finite)


def _new_bias(bias: Any, loads: Sequence[jax.Array], slots: Sequence[jax.Array], rate: float) -> Any:
    """The balance biases, moved towards an even load: of each routed layer, or stacked where layers are scanned."""
    leaves, treedef = jax.tree.flatten(bias)
    if not leaves:
        return bias
    moves = []
    for load, table in zip(loads, slots, strict=True):
        per_slot = update_balance_bias(jnp.zeros_like(load), load, rate)
        moves.append(jnp.append(per_slot, jnp.zeros((1,)))[table])
    if leaves[0].ndim > moves[0].ndim:
        moves = [jnp.stack(moves)]
    return jax.tree.unflatten(treedef, [old + move for old, move in zip(leaves, moves, strict=True)])
