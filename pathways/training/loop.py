"""The loop around the compiled step: batches in, metrics out, validation, checkpoints, signals.

Killed at any point and started again, a run ends in the same bits as one that was never killed: a checkpoint holds
the state of the step, the position of the data, the best parameters so far and the count of the patience.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pathways.config import TrainConfig
from pathways.devices import Placement
from pathways.monitor import Monitor
from pathways.submodel import SubModel
from pathways.training.checkpoint import Checkpoints
from pathways.training.profiler import Profiler
from pathways.training.step import Metrics, Step, TrainState
from tasks.errors import UserError


class Stream(Protocol):
    """Endless batches whose position can be kept; the loop closes it."""

    def __next__(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Interrupted(Exception):
    """A signal asked the run to stop; everything was saved."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; saved")
        self.step, self.number = step, number


@dataclass
class Progress:
    """What the loop remembers beside the step's state."""

    best: float | None = None
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    Attributes:
        evaluate: sub-model -> validation figures; `quality` is the one that early stopping looks at.
        record: takes the routing counts (numpy) and the step.
        describe: batch -> the names of its tasks, for the message of a run that diverges.
    """

    evaluate: Callable[[SubModel], dict[str, float]]
    record: Callable[[int, Any], None]
    describe: Callable[[dict[str, Any]], str]


def train(
    sub: SubModel,
    step_fn: Step,
    state: TrainState,
    config: TrainConfig,
    hooks: Hooks,
    monitor: Monitor,
    stream: Callable[[dict[str, Any] | None], Stream],
    checkpoints: Checkpoints | None = None,
    schedule: Callable[[Any], Any] | None = None,
    placement: Placement | None = None,
    profile: Path | None = None,
    settle: Callable[[TrainState], Any] | None = None,
) -> tuple[SubModel, Progress]:
    """Runs `config.steps` steps and leaves the best parameters seen on validation in `sub`.

    Where no validation gives a figure, the newest parameters count as the best.

    Args:
        stream: makes the data, from a saved position or from the start.
        checkpoints: where to resume from and save to; None keeps nothing.
        placement: the devices; the default one if None.
        profile: the folder for a profile of a few steps; None records none.
        settle: state -> the parameters to validate and keep, where they are not the state's own.

    Raises:
        UserError: too many steps in a row were not finite; names the step and the tasks of its batch.
        Interrupted: SIGINT or SIGTERM came; the run is saved and can go on.
    """
    progress, position, best = Progress(), None, (state.params, state.bias)
    if checkpoints is not None and checkpoints.latest() is not None:
        (state, best), notes = checkpoints.load((state, best))
        position = notes.pop("position")
        progress = Progress(**notes)
        monitor.event(f"resumed after step {int(state.step)}")
    if placement is not None:
        state, best = placement.state((state, best))
    # Donation gives the step's buffers back to it, so what is kept for later must be a copy.
    best = jax.tree.map(jnp.copy, best)
    first, started = int(state.step), time.monotonic() - progress.seconds

    def save(step: int) -> None:
        if checkpoints is None:
            return
        progress.seconds = time.monotonic() - started
        checkpoints.save(step, (state, best), {**vars(progress), "position": batches.state()})

    batches = stream(position)
    pending = Pending(monitor, config, hooks, schedule)
    profiler = Profiler(profile, first, config.steps, monitor)
    with closing(batches), closing(profiler), stopping_softly() as asked:
        for step in range(first + 1, config.steps + 1):
            if config.patience and progress.waited >= config.patience:
                monitor.event(f"stopped early: no better mean on validation since step {progress.best_step}")
                break
            batch = batches_of(batches, config.accumulate)
            profiler.before(step)
            state, metrics = step_fn(state, batch if placement is None else placement.batch(batch))
            profiler.after(step, metrics)
            pending.put(step, metrics, batch["task"])
            if (config.eval_every and step % config.eval_every == 0) or step == config.steps:
                pending.flush()
                newest = (state.params if settle is None else settle(state), state.bias)
                best = _validate(sub, newest, step, progress, hooks, monitor, best)
            if config.statistics and step % config.statistics_every == 0:
                hooks.record(step, jax.device_get(state.counts))
                state = state._replace(counts=jax.tree.map(jnp.zeros_like, state.counts))
            if asked or (config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps):
                pending.flush()
                save(step)
            if asked:
                raise Interrupted(step, asked[0])
        pending.flush()
    progress.seconds = time.monotonic() - started
    if state.counts:
        hooks.record(int(state.step), jax.device_get(state.counts))
    sub.params, sub.bias = best
    return sub, progress


class Pending:
    """Metrics of the last step, fetched when the next one is under way, so that the device never waits for the host."""

    def __init__(
        self, monitor: Monitor, config: TrainConfig, hooks: Hooks, schedule: Callable[[Any], Any] | None
    ) -> None:
        self.monitor, self.config, self.hooks, self.schedule = monitor, config, hooks, schedule
        self.waiting: tuple[int, Metrics, np.ndarray] | None = None
        self.examples, self.since = 0.0, time.monotonic()

    def put(self, step: int, metrics: Metrics, task: np.ndarray) -> None:
        """Takes the metrics of a step that was just started, and looks at those of the one before.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        before, self.waiting = self.waiting, (step, metrics, task)
        if before is not None:
            self._look(*before)

    def flush(self) -> None:
        """Looks at the last step; waits for it."""
        before, self.waiting = self.waiting, None
        if before is not None:
            self._look(*before)

    def _look(self, step: int, metrics: Metrics, task: np.ndarray) -> None:
        bad, examples = jax.device_get((metrics.bad, metrics.examples))
        self.examples += float(examples)
        if step % self.config.log_every == 0 or step == self.config.steps or bad >= self.config.max_bad_steps:
            self._log(step, jax.device_get(metrics))
        if bad:
            self._complain(step, int(bad), np.asarray(metrics.task_loss), task)

    def _log(self, step: int, found: Metrics) -> None:
        now = time.monotonic()
        values = {
            "loss": float(found.loss),
            "balance_loss": float(found.balance_loss),
            "grad_norm": float(found.grad_norm),
            "rows": float(found.examples),
            "rows_per_second": self.examples / max(now - self.since, 1e-9),
            "balance": float(np.max(found.imbalance)),
            "bad_steps": float(found.bad_total),
        }
        self.examples, self.since = 0.0, now
        if self.schedule is not None:
            # Skipped steps do not count in the optimizer, so not in its schedule.
            done = int(found.bad_total) + int(found.finite)
            values["learning_rate"] = float(self.schedule(step - done))
        self.monitor.log(step, values)

    def _complain(self, step: int, bad: int, task_loss: np.ndarray, task: np.ndarray) -> None:
        guilty = np.flatnonzero(~np.isfinite(task_loss))
        names = self.hooks.describe({"task": guilty if len(guilty) else task})
        if bad == 1:
            self.monitor.event(f"step {step} was skipped: its loss or gradient was not finite (tasks: {names})")
        if bad >= self.config.max_bad_steps:
            raise UserError(
                f"The loss or its gradient was not finite in {bad} steps in a row.",
                where=f"steps {step - bad + 1} to {step}; tasks of the last batch: {names}",
                expected="finite numbers",
                fix="lower train.learning_rate (see `pathways lr-find`), or look for extreme values in these tasks",
            )


@contextmanager
def stopping_softly() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying; a second one is obeyed at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _validate(
    sub: SubModel, newest: Any, step: int, progress: Progress, hooks: Hooks, monitor: Monitor, best: Any
) -> Any:
    sub.params, sub.bias = newest
    figures = hooks.evaluate(sub)
    quality = figures["quality"]
    monitor.log(step, {f"valid/{name}": value for name, value in figures.items()})
    better = np.isfinite(quality) and (progress.best is None or quality > progress.best)
    if better:
        progress.best, progress.waited = quality, 0
    if better or progress.best is None:
        progress.best_step = step
        return jax.tree.map(jnp.copy, newest)
    progress.waited += 1
    return best


def batches_of(stream: Stream, count: int) -> dict[str, Any]:
    """The next `count` batches, stacked: what a step takes."""
    taken = [next(stream) for _ in range(count)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *taken)
