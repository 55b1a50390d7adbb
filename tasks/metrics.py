"""Metrics of predictions: in total, per class, per group, and the examples that went worst.

Predictions and targets of `n` examples come in one form for each kind of target:

- classification, distribution: probabilities `[n, C]`; targets one-hot or a distribution `[n, C]`
- multilabel: probabilities `[n, C]`; targets 0/1 `[n, C]`, `mask` 0 where unknown
- regression: values `[n, R]` in the target's own units, `mask` 0 where unknown
- tagging: a list of `n` integer arrays, the class of each word; a predicted -1 means that the word was cut off (it
  counts as wrong), a target of -1 means that the word has no tag (it does not count)

An undefined metric (one class only in the split) is NaN, and `reasons` says why.

Axis letters: n examples, C classes, R regression targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.spec import LOWER_IS_BETTER, METRICS

if TYPE_CHECKING:
    from tasks.fitted import FittedTask

Values = np.ndarray | Sequence[np.ndarray]
THRESHOLD = 0.5
"""A label is predicted where its probability is at least this."""


class Undefined(Exception):
    """Why a metric has no value on this data."""


def metric_names(fitted: FittedTask) -> tuple[str, ...]:
    """The task's metrics: those it names, else all of its kind (span F1 only for BIO tags); the first leads."""
    every = METRICS[_kind(fitted)]
    names = fitted.task.metrics or every
    # A closed task lists all metrics of its kind, before its tags are known.
    if names == every and not is_bio(fitted.classes):
        names = tuple(name for name in names if name != "span_f1")
    return names


def compute(
    fitted: FittedTask,
    predictions: Values,
    targets: Values,
    mask: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """The metrics of some predictions, by name; NaN where undefined. `names` defaults to the task's own."""
    return compute_with_reasons(fitted, predictions, targets, mask, names)[0]


def compute_with_reasons(
    fitted: FittedTask,
    predictions: Values,
    targets: Values,
    mask: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """As `compute`, and for each undefined metric the reason."""
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    kind = _kind(fitted)
    for name in metric_names(fitted) if names is None else names:
        try:
            if len(targets) == 0:
                raise Undefined("there are no examples")
            values[name] = float(_FUNCTIONS[kind][name](predictions, targets, mask, fitted.classes))
        except Undefined as why:
            values[name], reasons[name] = float("nan"), str(why)
    return values, reasons


def score(fitted: FittedTask, metrics: dict[str, float]) -> float:
    """One number, higher is better: the first of the task's metrics that is defined; minus infinity if none is."""
    for name in metric_names(fitted):
        value = metrics.get(name, float("nan"))
        if not np.isnan(value):
            return -value if name in LOWER_IS_BETTER else value
    return float("-inf")


def per_class(
    fitted: FittedTask, predictions: Values, targets: Values, mask: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """A row for each class: `class`, `support`, `precision`, `recall`, `f1` (0 where there is nothing to divide by).

    Regression has no classes and gives no rows.
    """
    kind = _kind(fitted)
    if kind == "regression" or len(targets) == 0:
        return []
    if kind == "multilabel":
        hit, predicted, support = _label_counts(predictions, targets, mask)
    else:
        matrix = confusion(fitted, predictions, targets)
        hit, predicted, support = np.diag(matrix), matrix[:, :-1].sum(axis=0), matrix.sum(axis=1)
    precision, recall = _ratio(hit, predicted), _ratio(hit, support)
    f1 = _ratio(2 * hit, predicted + support)
    return [
        {"class": str(name), "support": int(s), "precision": float(p), "recall": float(r), "f1": float(f)}
        for name, s, p, r, f in zip(fitted.classes, support, precision, recall, f1, strict=True)
    ]


def per_group(
    fitted: FittedTask,
    predictions: Values,
    targets: Values,
    groups: Sequence[str],
    mask: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """A row for each value of the group column, largest first: `group`, `examples` and the metrics."""
    labels = np.array([str(group) for group in groups], object)
    rows = []
    for group in sorted(set(labels)):
        chosen = np.flatnonzero(labels == group)
        part = compute(
            fitted, _take(predictions, chosen), _take(targets, chosen), None if mask is None else mask[chosen], names
        )
        rows.append({"group": group, "examples": len(chosen), **part})
    return sorted(rows, key=lambda row: -row["examples"])


def confusion(fitted: FittedTask, predictions: Values, targets: Values) -> np.ndarray:
    """Counts `[C, C + 1]`: rows are true classes, columns predicted ones; the last column counts words cut off."""
    true, predicted = _classes_of(_kind(fitted), predictions, targets)
    size = len(fitted.classes)
    matrix = np.zeros((size, size + 1), np.int64)
    np.add.at(matrix, (true, np.where(predicted < 0, size, predicted)), 1)
    return matrix


def example_losses(
    fitted: FittedTask, predictions: Values, targets: Values, mask: np.ndarray | None = None
) -> np.ndarray:
    """`[n]`: cross-entropy (mean over known labels), squared error (mean), or the part of wrong words."""
    kind = _kind(fitted)
    if kind == "tagging":
        return np.array([_wrong_part(p, t) for p, t in zip(predictions, targets, strict=True)])
    p, t = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    known = np.ones(t.shape, bool) if mask is None else np.asarray(mask) > 0
    if kind == "regression":
        return _ratio(np.where(known, (p - t) ** 2, 0).sum(axis=1), known.sum(axis=1))
    log = np.log(np.clip(p, 1e-12, 1))
    if kind == "multilabel":
        loss = -(t * log + (1 - t) * np.log(np.clip(1 - p, 1e-12, 1)))
        return _ratio(np.where(known, loss, 0).sum(axis=1), known.sum(axis=1))
    return -np.where(known, t * log, 0).sum(axis=1)


def worst(
    fitted: FittedTask, predictions: Values, targets: Values, mask: np.ndarray | None = None, count: int = 20
) -> np.ndarray:
    """The indices of the `count` examples with the largest loss, worst first."""
    return np.argsort(-example_losses(fitted, predictions, targets, mask), kind="stable")[:count]


def is_bio(classes: Sequence[str]) -> bool:
    """Whether tags mark spans: all are `O`, `B-x` or `I-x`, and some mark one."""
    names = [str(name) for name in classes]
    return any(n != "O" for n in names) and all(n == "O" or n[:2] in ("B-", "I-") for n in names)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The (begin, end, type) spans of BIO tags, as conlleval counts them.

    A span begins at `B-x`, and also at an `I-x` that follows `O` or another type (Tjong Kim Sang and Buchholz, 2000).
    """
    found, begin, current = set(), 0, ""
    for at, tag in enumerate([*tags, "O"]):
        kind = tag[2:]
        if current and (tag[0] != "I" or kind != current):
            found.add((begin, at, current))
            current = ""
        if tag != "O" and not current:
            begin, current = at, kind
    return found


def _accuracy(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    true, predicted = _classes_of("classification", p, t)
    return float((true == predicted).mean())


def _macro_f1(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    true, predicted = _classes_of("classification", p, t)
    size = max(int(np.shape(p)[1]), 1)
    support, guessed = np.bincount(true, minlength=size), np.bincount(predicted, minlength=size)
    hit = np.bincount(true[true == predicted], minlength=size)
    present = support + guessed > 0
    return float(_ratio(2 * hit, support + guessed)[present].mean())


def _class_auc(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    p, t = np.asarray(p), np.asarray(t)
    true = np.eye(t.shape[1])[t.argmax(axis=1)]
    if t.shape[1] == 2:
        p, true = p[:, 1:], true[:, 1:]
    return _mean_auc(p, true, np.ones(true.shape, bool), "class")


def _label_auc(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    t = np.asarray(t)
    return _mean_auc(np.asarray(p), t, np.ones(t.shape, bool) if mask is None else mask > 0, "label")


def _mean_auc(p: np.ndarray, t: np.ndarray, known: np.ndarray, what: str) -> float:
    from sklearn.metrics import roc_auc_score

    areas = []
    for column in range(t.shape[1]):
        rows = known[:, column]
        true = t[rows, column] > 0.5
        if true.any() and not true.all():
            areas.append(roc_auc_score(true, p[rows, column]))
    if not areas:
        raise Undefined(f"no {what} has both positive and negative examples in this split")
    return float(np.mean(areas))


def _cross_entropy(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    return float(-(np.asarray(t, np.float64) * np.log(np.clip(np.asarray(p, np.float64), 1e-12, 1))).sum(1).mean())


def _label_macro_f1(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    hit, predicted, support = _label_counts(p, t, mask)
    known = np.ones(len(hit), bool) if mask is None else (mask > 0).any(axis=0)
    if not known.any():
        raise Undefined("no label is known in this split")
    return float(_ratio(2 * hit, predicted + support)[known].mean())


def _label_micro_f1(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    hit, predicted, support = _label_counts(p, t, mask)
    if predicted.sum() + support.sum() == 0:
        raise Undefined("no label is true or predicted in this split")
    return float(2 * hit.sum() / (predicted.sum() + support.sum()))


def _label_counts(p: Values, t: Values, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per label: true positives, predicted positives, true ones, among the known."""
    t = np.asarray(t) > 0.5
    known = np.ones(t.shape, bool) if mask is None else np.asarray(mask) > 0
    guess = (np.asarray(p) >= THRESHOLD) & known
    return (guess & t).sum(axis=0), guess.sum(axis=0), (t & known).sum(axis=0)


def _regression(measure: str) -> Any:
    def metric(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
        p, t = np.asarray(p, np.float64), np.asarray(t, np.float64)
        known = np.ones(t.shape, bool) if mask is None else np.asarray(mask) > 0
        values = []
        for column in range(t.shape[1]):
            rows = known[:, column]
            if rows.any():
                values.append(_one_regression(measure, p[rows, column], t[rows, column]))
        defined = [value for value in values if value is not None]
        if not defined:
            raise Undefined("no target is known, or each has a single value, in this split")
        return float(np.mean(defined))

    return metric


def _one_regression(measure: str, p: np.ndarray, t: np.ndarray) -> float | None:
    if measure == "rmse":
        return float(np.sqrt(((p - t) ** 2).mean()))
    if measure == "mae":
        return float(np.abs(p - t).mean())
    spread = ((t - t.mean()) ** 2).sum()
    return float(1 - ((p - t) ** 2).sum() / spread) if spread > 0 else None


def _token_accuracy(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    true, predicted = _classes_of("tagging", p, t)
    if len(true) == 0:
        raise Undefined("no word has a tag in this split")
    return float((true == predicted).mean())


def _span_f1(p: Values, t: Values, mask: np.ndarray | None, classes: Sequence[str]) -> float:
    if not is_bio(classes):
        raise Undefined("the tags are not of the form B-x, I-x, O")
    hit = total = 0
    for guess, true in zip(p, t, strict=True):
        guess = np.where(np.asarray(true) < 0, -1, guess)
        guessed, wanted = (spans(_tag_names(row, classes)) for row in (guess, np.asarray(true)))
        hit += len(guessed & wanted)
        total += len(guessed) + len(wanted)
    if total == 0:
        raise Undefined("no span is tagged or predicted in this split")
    return 2 * hit / total


def _classes_of(kind: str, p: Values, t: Values) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted class of each example, or of each tagged word."""
    if kind == "tagging":
        true = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, np.int64) for row in t)])
        predicted = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, np.int64) for row in p)])
        return true[true >= 0], predicted[true >= 0]
    return np.asarray(t).argmax(axis=1), np.asarray(p).argmax(axis=1)


def _wrong_part(predicted: np.ndarray, true: np.ndarray) -> float:
    tagged = np.asarray(true) >= 0
    return float((np.asarray(predicted) != true)[tagged].mean()) if tagged.any() else 0.0


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.maximum(below, 1), 0.0)


def _tag_names(row: np.ndarray, classes: Sequence[str]) -> list[str]:
    return [classes[int(i)] if i >= 0 else "O" for i in row]


def _take(values: Values, rows: np.ndarray) -> Values:
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]


def _kind(fitted: FittedTask) -> Any:
    return fitted.task.target.kind


_CLASSES = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "roc_auc": _class_auc,
    "cross_entropy": _cross_entropy,
}
_FUNCTIONS: dict[str, dict[str, Any]] = {
    "classification": _CLASSES,
    "distribution": _CLASSES,
    "multilabel": {"roc_auc": _label_auc, "macro_f1": _label_macro_f1, "micro_f1": _label_micro_f1},
    "regression": {name: _regression(name) for name in ("rmse", "mae", "r2")},
    "tagging": {"token_accuracy": _token_accuracy, "span_f1": _span_f1},
}
