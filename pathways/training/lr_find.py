"""The learning-rate finder: the loss while the rate rises exponentially (Smith 2017, arXiv:1506.01186, section 3.3)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pathways import plots
from pathways.config import Config, check
from pathways.monitor import Monitor
from pathways.submodel import initial_submodel
from pathways.training.joint import Prepared, prepare
from pathways.training.loop import batches_of
from pathways.training.optimizer import make_optimizer
from pathways.training.run import prepare_folder
from pathways.training.step import initial_state, make_step
from tasks.errors import UserError
from tasks.pipeline import TrainStream

SMOOTHING = 0.9
"""Of the exponential mean of the loss, which is corrected for its start."""

DIVERGED = 4.0
"""The sweep ends when the smoothed loss is so many times its least value."""

SKIPPED = 0.1
"""Part of the sweep at its beginning in which no slope is trusted: the mean has seen few losses."""

FEWEST = 8
"""A sweep that ends before so many steps says nothing."""


class LrCurve(NamedTuple):
    """Learning rates tried, the smoothed loss at each, and the rate suggested; None where the loss never fell."""

    rates: np.ndarray
    losses: np.ndarray
    suggestion: float | None


def lr_find(
    config: Config, out: str | Path, *, steps: int = 100, low: float = 1e-5, high: float = 1.0, quiet: bool = False
) -> LrCurve:
    """Trains a fresh model for a while as the rate rises from `low` to `high`; nothing of it is kept but the curve.

    The sweep ends early when a loss is not finite or the smoothed loss exceeds 4 times its minimum. Writes
    `out/lr_find.csv` (rate, loss) and `out/lr_find.png`.

    Raises:
        UserError: a mistake in the configuration or the data, a range that is none, or a loss that diverges at once.
    """
    check(config)
    if not 0 < low < high or steps < FEWEST:
        raise UserError(
            "The sweep needs a range of rates and some steps.",
            expected=f"0 < low < high and steps >= {FEWEST}",
            got=f"low = {low}, high = {high}, steps = {steps}",
        )
    folder = Path(out)
    prepare_folder(folder)
    with Monitor(folder / "lr_find", steps, quiet=quiet) as monitor:
        prepared = prepare(config, monitor.event)
        rates, losses = _sweep(prepared, np.geomspace(low, high, steps), monitor)
    if len(losses) < FEWEST:
        raise UserError(
            "The loss diverged at the start of the sweep.",
            got=f"{len(losses)} steps from a rate of {low}",
            fix="begin at a lower rate, or look for extreme values in the data",
        )
    curve = LrCurve(rates, losses, suggest(rates, losses))
    with (folder / "lr_find.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("rate", "loss"))
        writer.writerows(zip(rates.tolist(), losses.tolist(), strict=True))
    plots.save(plots.lr_curve(rates, losses, curve.suggestion), folder / "lr_find.png")
    return curve


def _sweep(prepared: Prepared, rates: np.ndarray, monitor: Monitor) -> tuple[np.ndarray, np.ndarray]:
    config = prepared.config.train
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    optimizer = make_optimizer(config, lambda count: float(rates[0]) * float(ratio) ** count)
    sub = initial_submodel(prepared.config, prepared.entries, prepared.layout, prepared.tokenizer, config.seed)
    step = make_step(sub, optimizer, prepared.config.balance, seed=config.seed, statistics=False)
    state = initial_state(sub, optimizer, statistics=False)
    stream = TrainStream(prepared.data.train, prepared.weights, prepared.shape, config.seed)
    losses: list[float] = []
    try:
        for number, rate in enumerate(rates, start=1):
            state, metrics = step(state, batches_of(stream, config.accumulate))
            loss, finite = jax.device_get((metrics.loss, metrics.finite))
            monitor.log(number, {"loss": float(loss), "learning_rate": float(rate)})
            if not finite:
                break
            losses.append(float(loss))
            smooth = smoothed(losses)
            if smooth[-1] > DIVERGED * smooth.min():
                break
    finally:
        stream.close()
    return rates[: len(losses)], smoothed(losses)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Exponential mean, divided by the weight it has seen so far (Kingma and Ba 2015, section 3)."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**count))
    return np.array(found)


def suggest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate, before its minimum.

    Args:
        rates: rising; losses: smoothed, one for each.
    """
    slope = np.gradient(losses, np.log(rates))
    first, last = int(SKIPPED * len(rates)), int(np.argmin(losses)) + 1
    if last <= first or slope[first:last].min() >= 0:
        return None
    return float(rates[first + int(np.argmin(slope[first:last]))])
