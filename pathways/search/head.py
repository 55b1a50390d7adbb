"""The head start: a new task's head in closed form, on the frozen rows of every layer, before anything is trained.

A ridge regression of the targets on cached activations, with its penalty and its features chosen by leave-one-out
losses, is folded into the arrays of a head with taps (`pathways.network`): so what is committed begins at the best
linear probe rather than at zero. Reading all layers and not the last alone is after Evci et al. 2022 (Head2Toe).

Axis letters: n examples, D width, L layers, F features, Y outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathways.search.features import Features
from pathways.search.ridge import Ridge, ridge_path
from tasks.fitted import FittedTask

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Strongest first; in units of the mean squared norm of a row."""
USUAL = 1.0
"""The penalty that served handfuls of rows best on the data sets of docs/benchmarks.md."""
SLOPES = tuple(np.geomspace(1.0, 64.0, 13).tolist())
"""What regression outputs between 0 and 1 may be multiplied by to become logits."""
LEAST_SPREAD = 0.1
"""No feature is divided by less than so much of the mean deviation: a handful of rows may hardly vary in it."""


@dataclass(frozen=True)
class Head:
    """A head, and what it would say of rows that it was not fitted on.

    Attributes:
        features: `last rows` or `all layers`.
        penalty: of the ridge.
        kernel: `[Y, D]`; bias: `[Y]`; taps: `[Y, L D]`.
        out: `[n, Y]`, logits of each row by the fit to all others.
        losses: `[n]` of them.
    """

    features: str
    penalty: float
    kernel: np.ndarray
    bias: np.ndarray
    taps: np.ndarray
    out: np.ndarray
    losses: np.ndarray

    def logits(self, found: Features) -> np.ndarray:
        """`[n, Y]` for other rows."""
        return found.levels @ self.taps.T + found.pooled @ self.kernel.T + self.bias

    def components(self, task: str) -> dict[str, np.ndarray]:
        """Its arrays by their names in the store."""
        leaves = {"kernel": self.kernel, "bias": self.bias, "taps": self.taps}
        return {f"heads/{task}/{leaf}": value.astype(np.float32) for leaf, value in leaves.items()}


def head_start(fitted: FittedTask, found: Features) -> Head:
    """The head that leave-one-out losses prefer.

    Of the fits whose mean loss is within one standard error (of the paired difference) of the least, on the same
    features, the one whose penalty is nearest to `USUAL` is taken: with few rows the least loss is mostly luck (after
    the rule of Breiman et al. 1984).
    """
    heads = list(candidates(fitted, found))
    best = min(heads, key=lambda head: float(head.losses.mean()))
    as_good = [head for head in heads if head.features == best.features and _as_good(head, best)]
    return min(as_good, key=lambda head: abs(np.log(head.penalty / USUAL)))


def candidates(fitted: FittedTask, found: Features) -> Iterator[Head]:
    """Every head that is tried, those of strong penalties first."""
    kind = fitted.task.target.kind
    for name, values in (("all layers", found.all), ("last rows", found.pooled)):
        if name == "all layers" and not found.levels.shape[1]:
            continue
        mean, spread = _scale(values)
        for ridge in _ridges((values - mean) / spread, found.y, found.y_mask):
            kernel = ridge.kernel / spread[:, None]
            bias, slope, out = _as_logits(kind, ridge.bias - mean @ kernel, ridge.out, found)
            kernel = (kernel * slope).T
            width = found.levels.shape[1]
            taps = kernel[:, :width] if name == "all layers" else np.zeros((len(kernel), width))
            last = kernel[:, width:] if name == "all layers" else kernel
            yield Head(name, ridge.penalty, last, bias, taps, out, row_losses(kind, out, found.y, found.y_mask))


def row_losses(kind: str | None, logits: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[n]`: cross-entropy, that of each known label summed, or the mean squared error of the known columns.

    Args:
        kind: of the target.
        logits, y, mask: `[n, Y]`.
    """
    z, known = np.asarray(logits, np.float64), mask > 0
    if kind == "regression":
        return np.where(known, (z - y) ** 2, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    if kind == "multilabel":
        return np.where(known, np.logaddexp(0.0, z) - z * y, 0.0).sum(axis=1)
    top = z.max(axis=1, keepdims=True)
    return -(y * (z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True)))).sum(axis=1)


def _as_good(head: Head, best: Head) -> bool:
    worse = head.losses - best.losses
    return float(worse.mean()) <= float(worse.std(ddof=1)) / np.sqrt(len(worse)) if len(worse) > 1 else True


def _scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    spread = values.std(axis=0, dtype=np.float64)
    return values.mean(axis=0, dtype=np.float64), np.maximum(spread, max(LEAST_SPREAD * float(spread.mean()), 1e-6))


def _ridges(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> Iterator[Ridge]:
    """Fits of all columns: those that are known in the same rows together."""
    patterns, group = np.unique(mask > 0, axis=1, return_inverse=True)
    if patterns.all():
        yield from ridge_path(x, y, PENALTIES)
        return
    parts = [_known_rows(x, y[:, group == g], patterns[:, g]) for g in range(patterns.shape[1])]
    for at, penalty in enumerate(PENALTIES):
        kernel, bias, out = np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape[1]), np.zeros(y.shape)
        for g, path in enumerate(parts):
            kernel[:, group == g], bias[group == g] = path[at].kernel, path[at].bias
            out[np.ix_(patterns[:, g], group == g)] = path[at].out
        yield Ridge(penalty, kernel, bias, out)


def _known_rows(x: np.ndarray, y: np.ndarray, known: np.ndarray) -> list[Ridge]:
    if known.any():
        return list(ridge_path(x[known], y[known], PENALTIES))
    return [Ridge(p, np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape[1]), y[known]) for p in PENALTIES]


def _as_logits(kind: str | None, bias: np.ndarray, out: np.ndarray, found: Features) -> tuple[np.ndarray, Any, Any]:
    """Bias, slope and leave-one-out outputs as logits; the slope is the one of least loss.

    Labels are shifted first, so that an output at a label's share means that share.
    """
    if kind == "regression":
        return bias, 1.0, out
    known = np.maximum((found.y_mask > 0).sum(axis=0), 1)
    share = np.clip((found.y * (found.y_mask > 0)).sum(axis=0) / known, 0.5 / known, 1 - 0.5 / known)
    several = kind == "multilabel"
    centre, shift = (share, np.log(share / (1 - share))) if several else (0.0, 0.0)
    losses = [row_losses(kind, (out - centre) * a + shift, found.y, found.y_mask).mean() for a in SLOPES]
    slope = SLOPES[int(np.argmin(losses))]
    return (bias - centre) * slope + shift, slope, (out - centre) * slope + shift
