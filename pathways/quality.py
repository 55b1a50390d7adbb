"""One number per task that rises with its quality, comparable enough between tasks to be averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pathways.predictions import Predicted
from tasks import metrics
from tasks.cache import EncodedSplit
from tasks.encoded import Example
from tasks.fitted import FittedTask


class Chosen(Sequence[Example]):
    """Some examples of an encoded split, read when asked for.

    Attributes:
        split: the split; places: where each example stands in it.
    """

    def __init__(self, split: EncodedSplit, places: Sequence[int]) -> None:
        self.split, self.places = split, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Chosen(self.split, self.places[i])
        return self.split.example(int(self.places[i]))


def metric_values(fitted: FittedTask, predicted: Predicted, examples: Sequence[Example] | None = None) -> Any:
    """Predictions and targets in the form that `tasks.metrics` takes: for tagging the class of each word.

    Args:
        examples: what was predicted. Where they are `Chosen`, words that were cut off count too, as wrong.
    """
    if not fitted.is_token_level:
        return predicted.values, predicted.targets
    if isinstance(examples, Chosen):
        return word_classes(examples, predicted.values)
    values = [np.argmax(row, axis=-1) if len(row) else np.zeros(0, np.int64) for row in predicted.values]
    return values, predicted.targets


def word_classes(examples: Chosen, values: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predicted class of every word, -1 for one that was cut off, and the true one, -1 for a tag unseen in training.

    Args:
        values: `[words, C]` of each example, of the words that were not cut off.
    """
    predicted, targets = [], []
    for i, probabilities in zip(examples.places, values, strict=True):
        tags = examples.split.word_tags(int(i))
        classes = np.full(len(tags), -1, np.int64)
        classes[kept_words(examples.split.example(int(i)))] = probabilities.argmax(axis=1)
        predicted.append(classes)
        targets.append(tags)
    return predicted, targets


def kept_words(example: Example) -> np.ndarray:
    """The numbers of a tagged example's words that were not cut off."""
    word = example.streams["text"]["word"]
    return word[word >= 0]


def figures(
    fitted: FittedTask,
    predicted: Predicted,
    names: tuple[str, ...] | None = None,
    examples: Sequence[Example] | None = None,
) -> dict[str, float]:
    """The task's metrics of some predictions; NaN where undefined. `examples`: see `metric_values`."""
    values, targets = metric_values(fitted, predicted, examples)
    return metrics.compute(fitted, values, targets, predicted.mask, names)


def quality(fitted: FittedTask, predicted: Predicted, examples: Sequence[Example] | None = None) -> float:
    """The task's chief metric, or R2 for regression (whose error depends on the target's unit); NaN where undefined.

    `examples`: see `metric_values`.
    """
    name = "r2" if fitted.task.target.kind == "regression" else metrics.metric_names(fitted)[0]
    value = figures(fitted, predicted, (name,), examples)[name]
    return -value if name == "cross_entropy" else value


def mean_quality(of_tasks: Mapping[str, float], rows: Mapping[str, int]) -> float:
    """The mean over tasks that have one, each weighed by the rows it was seen on; minus infinity if none has.

    By rows, since a figure's variance falls with them: a hundred tasks of a handful of rows would otherwise drown the
    others in their noise. For the same reason one hopeless R2 counts as -1.
    """
    known = [name for name, value in of_tasks.items() if np.isfinite(value) and rows[name]]
    if not known:
        return float("-inf")
    values = np.clip([of_tasks[name] for name in known], -1.0, 1.0)
    return float(np.average(values, weights=[rows[name] for name in known]))
