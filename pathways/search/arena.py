"""Where candidates are trained: one network and one compiled step for all of them.

The network holds everything a candidate may use: all candidate experts, own ones, adapters, copied encoders. What a
candidate is, is data: the slots that its gate may take, the rate of each leaf (0 is frozen), and the values it starts
from. So a search compiles as much as one training does, and a copy, an adapter or a skipped layer costs no program.

Axis letters: n own experts of a bank, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pathways.adding.fit import HEAD_RATE, LOSS_WEIGHT, Recipe, head_leaves, own_part
from pathways.adding.start import Start
from pathways.config import TrainConfig
from pathways.monitor import Monitor
from pathways.network.network import Outputs
from pathways.predictions import Predicted, predict_examples
from pathways.quality import metric_values, quality
from pathways.search.head import row_losses
from pathways.submodel import SubModel
from pathways.training.loop import stopping_softly
from pathways.training.optimizer import make_optimizer, make_schedule, names
from pathways.training.step import per_example_loss
from pathways.training.trainable import Trainable
from tasks.encoded import Example
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.metrics import example_losses
from tasks.pack import Packer

DEPTH_RATE = 0.85
"""Times the rate, for each layer further from the head (Howard and Ruder 2018)."""
UNFREEZE = 0.25
"""The part of a training after which all layers train; the uppermost trains from the start."""
MANY = 200
"""Held rows from which the chief metric is trusted to choose; below, losses are, which are less coarse."""

SCALES = tuple(np.geomspace(0.1, 2.0, 14).tolist())
"""What logits may be multiplied by before their losses are compared."""

Rates = Callable[[tuple[str, ...]], Any]
"""A leaf's path -> its rate, a number or one for each of its own rows."""


@dataclass(frozen=True)
class Look:
    """What held rows say of parameters.

    Attributes:
        step: optimizer steps taken.
        score: higher is better, see `Arena.look`.
        quality: the chief metric (R2 for regression).
        losses: `[n]` of each held row.
        params: the network's; None where they were let go, as a network is large.
    """

    step: int
    score: float
    quality: float
    losses: np.ndarray
    params: Any


class Arena:
    """Trains any candidate of one new task.

    Args:
        start: the network that holds all candidates.
        recipe: how it is trained; `recipe.config.steps` is a whole fine-tuning.
        monitor: gets the loss now and then; its steps are those of all candidates together.
    """

    def __init__(self, start: Start, recipe: Recipe, monitor: Monitor | None = None) -> None:
        self.sub, self.recipe, self._monitor = start.sub, recipe, monitor
        self.own: Trainable = own_part(start)
        self.spent = 0
        # The sign is that of a descent; the schedule comes with each step, so that trainings of any length share it.
        self._optimizer = make_optimizer(recipe.config, lambda count: 1.0)

    @cached_property
    def _begin(self) -> Any:
        def begin(params: Any) -> Any:
            trained, rest = self.own.split(params)
            return (trained, rest), (jax.tree.map(jnp.copy, trained), self._optimizer.init(trained))

        return jax.jit(begin)

    @cached_property
    def _join(self) -> Any:
        return jax.jit(self.own.join)

    @cached_property
    def _step(self) -> Any:
        sub, own, optimizer, seed = self.sub, self.own, self._optimizer, self.recipe.config.seed
        balance = sub.config.balance

        def loss_of(trained: Any, rest: Any, bias: Any, table: Any, batch: Any, key: jax.Array) -> jax.Array:
            network = nnx.merge(sub.graph, own.join(trained, rest), bias)
            out: Outputs = network(batch, table, balance, key=key)
            loss, known = per_example_loss(out, batch, table)
            extra = sum((layer.loss for layer in out.layers), jnp.zeros(()))
            return jnp.sum(loss) / jnp.maximum(jnp.sum(known.astype(jnp.float32)), 1.0) + extra

        def step(state: Any, constant: Any, rates: Any, rate: jax.Array, at: jax.Array, batch: Any) -> Any:
            trained, opt_state = state
            key = jax.random.fold_in(jax.random.key(seed), at)
            loss, grads = jax.value_and_grad(loss_of)(trained, *constant, batch, key)
            grads = jax.tree.map(lambda g, r: jnp.where(r > 0, g, 0.0), grads, rates)
            fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            updates, new = optimizer.update(grads, opt_state, trained)
            # A leaf that is frozen must not decay either; nothing moves in a step that is not finite.
            updates = jax.tree.map(lambda u, r: jnp.where(fine & (r > 0), u * r * rate, 0.0), updates, rates)
            kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, opt_state)
            return (optax.apply_updates(trained, updates), kept), loss, fine

        return jax.jit(step, donate_argnums=(0,))

    def train(
        self,
        candidate: SubModel,
        rates: Rates,
        rows: Sequence[Example],
        held: Sequence[Example],
        steps: int,
        looks: Sequence[int],
        *,
        seed: int = 0,
        patience: int | None = None,
    ) -> list[Look]:
        """Trains a candidate and looks at held rows after the steps `looks`; only the best look keeps its parameters.

        Args:
            steps: that the schedule is made for; training stops after the last look.
            patience: looks without a better one after which it stops.

        Raises:
            UserError: it was stopped by a signal.
        """
        (trained, rest), state = self._begin(candidate.params)
        constant = (rest, candidate.bias, candidate.table)
        schedule, tree = make_schedule(_lasting(self.recipe.config, steps)), self._rates(trained, rates)
        stream, found, bad = self.batches(rows, seed), [], 0
        with stopping_softly() as asked:
            for at in range(1, looks[-1] + 1):
                now = self._unfrozen(tree, at / steps)
                rate = jnp.asarray(schedule(at - 1), jnp.float32)
                state, loss, fine = self._step(state, constant, now, rate, np.int32(at), next(stream))
                self.spent += 1
                if self._monitor is not None and self.spent % self.recipe.config.log_every == 0:
                    self._monitor.log(self.spent, {"train/loss": float(loss)})
                if at in looks:
                    bad = 0 if bool(fine) else bad + 1
                    params = self._join(state[0], rest)
                    found.append(self.look(with_params(candidate, params), held, at))
                    best = best_of(found)
                    found = [look if look is best else replace(look, params=None) for look in found]
                    if bad > 1 or not _hopeful(found, patience):
                        break
                if asked:
                    raise UserError(
                        "Stopped before the new task was committed; the model is as it was.", where=f"after step {at}"
                    )
        return found

    def look(self, candidate: SubModel, held: Sequence[Example], step: int = 0) -> Look:
        """Scores parameters on held rows, by `calibrated_losses`.

        The score is the chief metric, where losses decide between equals; of fewer than `MANY` rows, minus the mean
        loss. Without rows every step counts as better than the one before.
        """
        if not len(held):
            return Look(step, float(step), float("nan"), np.zeros(0), candidate.params)
        fitted, task = candidate.entries[0].fitted, candidate.names[0]
        found = predict_examples(candidate, {task: held})[task]
        value = quality(fitted, found, held)
        losses = calibrated_losses(fitted, found, held)
        loss = float(np.mean(losses))
        coarse = (value if np.isfinite(value) else -1.0) - LOSS_WEIGHT * loss / (1 + loss)
        return Look(step, coarse if len(held) >= MANY else -loss, value, losses, candidate.params)

    def batches(self, rows: Sequence[Example], seed: int) -> Iterator[Any]:
        """Endless packed batches: epochs of the rows, each in an order of its own."""
        rng = np.random.default_rng([self.recipe.config.seed, seed, 7])
        order: list[int] = []
        while True:
            packer = Packer(self.recipe.shape)
            while True:
                if not order:
                    order = rng.permutation(len(rows)).tolist()
                if not packer.add(0, rows[order[-1]]):
                    break
                order.pop()
                # A few rows are not repeated within one batch.
                if len(packer) >= len(rows):
                    break
            yield packer.batch()

    def _rates(self, trained: Any, rates: Rates) -> Any:
        def rate(path: Any, leaf: jax.Array) -> np.ndarray:
            found = np.asarray(rates(names(path)), np.float32)
            # Every candidate's rates have one shape, or each would be another program.
            rows = leaf.shape[:1] if names(path) in self.own.rows else (1,)
            wide = np.broadcast_to(found, rows).reshape(rows + (1,) * (leaf.ndim - 1))
            return wide * _place_rate(names(path), self.sub.config.model.layers)

        return jax.tree_util.tree_map_with_path(rate, trained)

    def _unfrozen(self, tree: Any, progress: float) -> Any:
        """Rates of a step: from the top, one layer after the other begins to train (Howard and Ruder 2018)."""
        layers = self.sub.config.model.layers
        if progress >= UNFREEZE:
            return tree

        def rate(path: Any, rates: np.ndarray) -> np.ndarray:
            depth = _depth(names(path), layers)
            return rates if progress >= UNFREEZE * depth / (layers + 1) else np.zeros_like(rates)

        return jax.tree_util.tree_map_with_path(rate, tree)


def calibrated_losses(fitted: FittedTask, found: Predicted, held: Sequence[Example]) -> np.ndarray:
    """`[n]`: losses of the predictions, their logits multiplied by the one number that makes the mean least.

    So that what learned more is not refused for being too sure, which few rows teach quickly (Guo et al. 2017).
    Squared errors are in deviations of the target; of tagging, the part of wrong words is the loss.
    """
    kind = fitted.task.target.kind
    if kind == "tagging":
        values, targets = metric_values(fitted, found, held)
        return example_losses(fitted, values, targets)
    mask = np.ones_like(found.targets) if found.mask is None else found.mask
    if kind == "regression":
        spread = np.maximum(np.array(fitted.target_std), 1e-12)
        return row_losses(kind, found.values / spread, found.targets / spread, mask)
    p = np.clip(np.asarray(found.values, np.float64), 1e-12, 1 - 1e-12)
    logits = np.log(p) - (np.log1p(-p) if kind == "multilabel" else 0.0)
    tried = [row_losses(kind, logits * scale, found.targets, mask) for scale in SCALES]
    return min(tried, key=lambda losses: float(losses.mean()))


def with_params(sub: SubModel, params: Any) -> SubModel:
    """The same network with other parameters."""
    made = copy.copy(sub)
    made.params = params
    return made


def between(start: Any, end: Any, part: float) -> Any:
    """Parameters on the straight line from `start` to `end` (Wortsman et al. 2022, WiSE-FT)."""
    return end if part == 1 else _between(start, end, np.float32(part))


@jax.jit
def _between(start: Any, end: Any, part: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(a == b, a, a + part * (b - a)).astype(a.dtype), start, end)


def best_of(looks: Sequence[Look]) -> Look:
    """The first of those with the highest score."""
    return max(looks, key=lambda look: look.score)


def _hopeful(looks: Sequence[Look], patience: int | None) -> bool:
    best = max(range(len(looks)), key=lambda i: looks[i].score)
    return patience is None or len(looks) - 1 - best < patience


def _lasting(config: TrainConfig, steps: int) -> TrainConfig:
    return replace(config, steps=steps, schedule="one_cycle")


def _depth(path: tuple[str, ...], layers: int) -> int:
    """How far from the head a leaf stands: 0 the head, 1 the last layer, L + 1 the encoders."""
    if path[0] == "blocks":
        return layers - int(path[1])
    return layers + 1 if path[0] == "encoders" else 0


def _place_rate(path: tuple[str, ...], layers: int) -> float:
    return HEAD_RATE if head_leaves(path) else DEPTH_RATE ** max(_depth(path, layers) - 1, 0)
