"""How good a model is at its tasks: metrics in total, per class and per group, and the examples that went worst.

No row is dropped. A label that training never had counts as wrong in accuracy and token accuracy (the other metrics
are of the known classes), and a word that was cut off counts as wrong.

Axis letters: n examples, C classes, R regression targets.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import jax
import numpy as np

from pathways.counting import free_step, to_counts
from pathways.data import cache_folder, subset
from pathways.model import STATISTICS, beside
from pathways.predictions import Predicted, predict_examples
from pathways.quality import Chosen, metric_values
from pathways.statistics.counts import Phase, merge
from pathways.statistics.writer import StatisticsWriter
from tasks import metrics as measures
from tasks.cache import encode_split
from tasks.errors import UserError
from tasks.fitted import FittedTask

if TYPE_CHECKING:
    from pathways.model import Model
    from pathways.submodel import SubModel

SplitName = Literal["train", "valid", "test"]
Counted = tuple["SubModel", tuple[Any, ...]]
"""A network and the sums of its routing counters."""
SHORT = 160
"""Characters of an example's inputs that are shown."""


@dataclass(frozen=True)
class Mistake:
    """One example that went badly.

    Attributes:
        row: its number in the file, from 1, the header not counted.
        loss: cross-entropy, squared error, or the share of wrong words.
        truth, prediction: as text.
        confidence: the probability of what was predicted (for tags their mean); None for labels and numbers.
        inputs: its columns in short.
    """

    row: int
    loss: float
    truth: str
    prediction: str
    confidence: float | None
    inputs: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one task's split came to.

    Attributes:
        examples: that were run; rows with a label unseen in training are not among them.
        metrics: by name, the task's chief one first; NaN where undefined.
        reasons: why a metric is undefined.
        per_class: `class`, `support`, `precision`, `recall`, `f1`; none for regression.
        per_group: `group`, `examples` and the metrics, for tasks with a group column.
        confusion: `[C, C + 1]` counts, true by predicted, the last column for words cut off; None for numbers and
            for several labels.
        worst: the largest losses, worst first; of classes only those that are wrong.
        counts: rows `truncated`, left out as `bad`, `bad_target`, `missing_target`, and `unseen` labels, which
            accuracy counts as wrong.
        unseen: those labels, with how often they came.
    """

    task: str
    split: str
    examples: int
    metrics: dict[str, float]
    reasons: dict[str, str]
    per_class: list[dict[str, Any]]
    per_group: list[dict[str, Any]]
    confusion: np.ndarray | None
    classes: tuple[str, ...]
    worst: tuple[Mistake, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)

    @property
    def chief(self) -> tuple[str, float]:
        """Name and value of the first metric that is defined; of the first one if none is."""
        defined = [(name, value) for name, value in self.metrics.items() if not np.isnan(value)]
        return defined[0] if defined else next(iter(self.metrics.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; NaN becomes None."""
        content = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        content["confusion"] = None if self.confusion is None else self.confusion.tolist()
        content["worst"] = [dataclasses.asdict(one) for one in self.worst]
        return _plain(content)


def evaluate(
    model: Model,
    tasks: Sequence[str] | None = None,
    split: SplitName = "test",
    *,
    data: str | Path | None = None,
    limit: int = 0,
    statistics: bool = True,
    worst: int = 20,
) -> list[Evaluation]:
    """Evaluates tasks on a split of their own data, or on another file.

    Args:
        tasks: their names; all by default.
        data: a file with the tasks' columns, instead of the split's own.
        limit: at most so many examples of each task, a seeded choice; 0 for all. The unseen labels then count in
            proportion.
        statistics: record the routing of `valid` and `test` with the model's statistics.
        worst: how many of the worst examples to keep.

    Raises:
        UserError: an unknown task, a file that is missing or unfit.
    """
    names = list(model.tasks if tasks is None else tasks)
    entries = [model.entry(name) for name in names]
    where: SplitName = split if data is None else "test"
    fitted = [entry.fitted if data is None else _on_file(entry.fitted, data) for entry in entries]
    tokenizer, settings = model.text_tokenizer, model.config.encoders
    splits = [encode_split(item, where, tokenizer, settings, cache_folder() / "encoded") for item in fitted]
    chosen = [Chosen(one, subset(one, limit)) for one in splits]
    examples = dict(zip(names, chosen, strict=True))
    predicted, counted = dict[str, Predicted](), list[Counted]()
    for together in model.networks(names):
        sub, total = model.submodel(together), Sum()
        counting = total if statistics and split != "train" else None
        predicted |= predict_examples(sub, {name: examples[name] for name in together}, counted=counting)
        if total.total:
            counted.append((sub, total.total))
    if counted:
        record(model, counted, cast(Phase, split))
    return [
        score(item, name, where, rows, predicted[name], worst)
        for item, name, rows in zip(fitted, names, chosen, strict=True)
    ]


class Sum:
    """Adds up the routing counters of batches, in float64."""

    def __init__(self) -> None:
        self.total: tuple[Any, ...] = ()

    def __call__(self, layers: Any) -> None:
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(layers))
        self.total = jax.tree.map(np.add, self.total, wide) if self.total else wide


def record(model: Model, counted: Sequence[Counted], phase: Phase) -> None:
    """Appends the routing of an evaluation to the model's statistics, as one record.

    A folder that cannot be written, or files there that are damaged, are a warning: the results are worth more.

    Args:
        counted: networks of other tasks each, with their counters.
    """
    location = beside(model.path, STATISTICS)
    try:
        tasks = [name for sub, _ in counted for name in sub.names]
        step = free_step(location, phase, tasks, model.config.train.steps)
        StatisticsWriter(location).append(merge([to_counts(sub, total, step, phase) for sub, total in counted]))
    except (OSError, ValueError, UserError) as error:
        warnings.warn(f"routing statistics were not recorded in {location}: {error}", stacklevel=3)


def score(
    fitted: FittedTask, name: str, split: SplitName, examples: Chosen, predicted: Predicted, worst: int = 0
) -> Evaluation:
    """The figures of one task from what the model said of its examples."""
    kind = fitted.task.target.kind
    (values, targets), mask = metric_values(fitted, predicted, examples), predicted.mask
    found, reasons = measures.compute_with_reasons(fitted, values, targets, mask)
    encoded = examples.split
    unseen = sum(encoded.unseen.values())
    _count_unseen_as_wrong(fitted, found, examples, targets)
    groups = encoded.groups
    classed = kind in ("classification", "distribution", "tagging")
    return Evaluation(
        task=name,
        split=split,
        examples=len(examples),
        metrics=found,
        reasons=reasons,
        per_class=measures.per_class(fitted, values, targets, mask),
        per_group=[]
        if groups is None
        else measures.per_group(fitted, values, targets, [groups[int(i)] for i in examples.places], mask),
        confusion=measures.confusion(fitted, values, targets) if classed and len(examples) else None,
        classes=fitted.classes,
        worst=_worst(fitted, split, examples, values, targets, mask, predicted.values, worst),
        counts={**encoded.counts, "unseen": unseen},
        unseen=dict(encoded.unseen),
    )


def _count_unseen_as_wrong(fitted: FittedTask, found: dict[str, float], examples: Chosen, targets: Any) -> None:
    """Lowers accuracy (by row) or token accuracy (by word): right / (known + unseen)."""
    if fitted.is_token_level:
        name, known = "token_accuracy", sum(int((row >= 0).sum()) for row in targets)
        unseen = sum(int((row < 0).sum()) for row in targets)
    else:
        name, known = "accuracy", len(examples)
        unseen = round(sum(examples.split.unseen.values()) * known / max(len(examples.split), 1))
    if name in found and fitted.task.target.kind in ("classification", "tagging") and known:
        found[name] *= known / (known + unseen)


def _on_file(fitted: FittedTask, data: str | Path) -> FittedTask:
    return dataclasses.replace(fitted, task=dataclasses.replace(fitted.task, test=str(data), format=None))


def _worst(
    fitted: FittedTask,
    split: SplitName,
    examples: Chosen,
    values: Any,
    targets: Any,
    mask: np.ndarray | None,
    probabilities: Any,
    count: int,
) -> tuple[Mistake, ...]:
    if count <= 0 or not len(examples):
        return ()
    losses = measures.example_losses(fitted, values, targets, mask)
    places = measures.worst(fitted, values, targets, mask, len(losses))
    if fitted.task.target.kind in ("classification", "distribution"):
        places = places[np.argmax(values, axis=1)[places] != np.argmax(targets, axis=1)[places]]
    places = places[losses[places] > 0][:count]
    rows = [int(examples.split.row_numbers[int(examples.places[int(i)])]) for i in places]
    texts = input_texts(fitted, split, rows)
    found = []
    for i, row in zip(places.tolist(), rows, strict=True):
        truth, prediction = (_text(fitted, one[i], None if mask is None else mask[i]) for one in (targets, values))
        confidence = _confidence(fitted, probabilities[i])
        found.append(Mistake(row + 1, float(losses[i]), truth, prediction, confidence, texts.get(row, "")))
    return tuple(found)


def _text(fitted: FittedTask, value: np.ndarray, mask: np.ndarray | None) -> str:
    """A target or a prediction in words."""
    kind, classes = fitted.task.target.kind, fitted.classes
    if kind in ("classification", "distribution"):
        return classes[int(np.argmax(value))]
    if kind == "tagging":
        return " ".join(classes[int(tag)] if tag >= 0 else "–" for tag in value)
    known = np.ones(len(value), bool) if mask is None else np.asarray(mask) > 0
    if kind == "multilabel":
        on = [name for name, p, k in zip(classes, value, known, strict=True) if k and p >= measures.THRESHOLD]
        return ", ".join(on) or "none"
    return ", ".join(f"{v:.4g}" if k else "–" for v, k in zip(value, known, strict=True))


def _confidence(fitted: FittedTask, probabilities: np.ndarray) -> float | None:
    kind = fitted.task.target.kind
    if kind in ("classification", "distribution"):
        return float(np.max(probabilities))
    if kind == "tagging" and len(probabilities):
        return float(np.max(probabilities, axis=1).mean())
    return None


def input_texts(fitted: FittedTask, split: SplitName, numbers: Sequence[int]) -> dict[int, str]:
    """Row number -> its input columns in short, read from the split's file, no further than needed."""
    from tasks.splits import ROW, rows

    wanted, found = set(numbers), dict[int, str]()
    columns = [column.column for column in fitted.task.inputs]
    for batch in rows(fitted.task, split, columns=columns):
        for place, number in enumerate(batch.column(ROW).to_pylist()):
            if number in wanted:
                cells = (f"{name}={_cell(batch.column(name)[place].as_py())}" for name in columns)
                found[number] = _short(" ".join(cells))
        if len(found) == len(wanted):
            break
    return found


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    words = [str(word) for word in value] if isinstance(value, list) else str("" if value is None else value).split()
    return " ".join(words)[: SHORT + 1]


def _short(text: str) -> str:
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
