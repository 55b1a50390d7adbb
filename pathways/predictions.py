"""Running examples through a sub-model: shapes, batches, and outputs in the task's own terms.

Evaluation and prediction never drop a row. Batches have few shapes, one per combination of input kinds and two sizes,
so that asking many tasks compiles few programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pathways.submodel import SubModel
from tasks.batch import Batch, BatchShape
from tasks.encoded import Example
from tasks.fitted import FittedTask
from tasks.pack import Packer
from tasks.target import decode_outputs

SMALL_ROWS = 4
"""Packed rows of a batch when there is little to run."""


@dataclass
class Predicted:
    """What a sub-model said of one task's examples, in their order.

    Attributes:
        values: probabilities `[n, C]`, values in the target's units `[n, R]`, or for tagging a list of `[words, C]`.
        targets: as `values`: one-hot or shares, 0/1, values in the target's units, or a list of `[words]` classes.
        mask: `[n, C]` which targets are known; None for tagging.
    """

    values: Any
    targets: Any
    mask: np.ndarray | None


Examples = Sequence[Example]


def run_shape(sub: SubModel, streams: Iterable[str], small: bool = False) -> BatchShape:
    """The batch shape for examples with these kinds of input."""
    config, size = sub.config, sub.layout.size
    rows, length = (SMALL_ROWS if small else max(config.train.rows, SMALL_ROWS)), config.encoders.max_length
    return BatchShape(
        rows=rows,
        length=length,
        examples=rows * max(length // 8, 1),
        outputs=max(size.outputs, 1),
        patch=config.encoders.patch,
        channels=config.encoders.channels,
        frames=config.encoders.frames,
        mels=config.encoders.mels,
        **dict.fromkeys(streams, rows * length),
    )


def is_little(sub: SubModel, examples: int, tokens: int) -> bool:
    """Whether so many examples, of so many tokens in all, are run in the small shape."""
    return examples < 2 * SMALL_ROWS * 16 and tokens <= SMALL_ROWS * sub.config.encoders.max_length // 2


def packed(
    sub: SubModel, shape: BatchShape, examples: Iterable[tuple[str, Example]]
) -> Iterator[tuple[Batch, list[Example]]]:
    """Batches of (task, example), in their order, and the examples that each batch holds.

    Raises:
        ValueError: an example that no batch of this shape can hold.
    """
    packer, held = Packer(shape), []
    for task, example in examples:
        number = sub.number(task)
        if not packer.add(number, example):
            if held:
                yield packer.batch(), held
                packer, held = Packer(shape), []
            if not packer.add(number, example):
                raise ValueError(f"an example of task {task} fits no batch: {packer.explain(number, example)}")
        held.append(example)
    if held:
        yield packer.batch(), held


def predict_examples(
    sub: SubModel,
    examples: Mapping[str, Examples],
    *,
    counted: Callable[[Any], None] | None = None,
    embedded: Callable[[np.ndarray], None] | None = None,
) -> dict[str, Predicted]:
    """Runs examples of several tasks, rows of tasks with the same kinds of input in one batch.

    Args:
        examples: task -> its examples.
        counted: takes the routing counters (per routed layer, on the device) of each batch.
        embedded: takes the pooled rows `[n, D]` of each batch's examples; those of one task come in their order.
    """
    by_streams: dict[frozenset[str], list[str]] = {}
    for task in examples:
        streams = frozenset(sub.entries[sub.number(task)].pathway.streams)
        by_streams.setdefault(streams, []).append(task)
    results: dict[str, Predicted] = {}
    for streams, tasks in by_streams.items():
        results.update(_run_group(sub, streams, {task: examples[task] for task in tasks}, counted, embedded))
    return {task: results[task] for task in examples}


def _run_group(
    sub: SubModel,
    streams: frozenset[str],
    examples: Mapping[str, Examples],
    counted: Callable[[Any], None] | None,
    embedded: Callable[[np.ndarray], None] | None,
) -> dict[str, Predicted]:
    flat = [(task, i) for task, items in examples.items() for i in range(len(items))]
    found: dict[str, list[Any]] = {task: [] for task in examples}
    # No more are looked at than it takes to see that they are not few.
    tokens = sum(examples[task][i].length for task, i in flat[: 2 * SMALL_ROWS * sub.config.encoders.max_length])
    shape = run_shape(sub, streams, is_little(sub, len(flat), tokens))
    for batch, held in packed(sub, shape, ((task, examples[task][i]) for task, i in flat)):
        out = sub.run(batch, statistics=counted is not None)
        if counted is not None:
            counted(sub.count(out))
        if embedded is not None:
            embedded(np.asarray(jax.device_get(out.pooled))[: len(held)])
        rows = _rows(sub, batch, jax.device_get((out.logits, out.token_logits)), held)
        for number, row in zip(np.asarray(batch["task"]), rows, strict=False):  # it may have room for more
            found[sub.names[number]].append(row)
    return {task: _finish(sub.entries[sub.number(task)].fitted, rows, examples[task]) for task, rows in found.items()}


def _rows(sub: SubModel, batch: Any, outputs: tuple[np.ndarray, np.ndarray | None], held: list[Example]) -> list[Any]:
    """Raw logits of each example: `[Y]`, or `[words, Y]`."""
    logits, token_logits = outputs
    segment = batch["segment"].reshape(-1)
    order = np.argsort(segment, kind="stable")
    starts = np.searchsorted(segment[order], np.arange(1, len(held) + 2))
    rows = []
    for i, example in enumerate(held):
        fitted = sub.entries[int(batch["task"][i])].fitted
        if not fitted.is_token_level:
            rows.append(logits[i, : fitted.num_outputs])
            continue
        assert token_logits is not None
        places = order[starts[i] : starts[i + 1]]
        first = example.lengths.get("table", 0)
        word = example.streams["text"]["word"]
        chosen = places[first : first + len(word)][word >= 0]
        rows.append(token_logits.reshape(len(segment), -1)[chosen, : fitted.num_outputs])
    return rows


def _finish(fitted: FittedTask, rows: list[Any], examples: Examples) -> Predicted:
    if fitted.is_token_level:
        targets = [_tags(example) for example in examples]
        return Predicted([softmax(row) for row in rows], targets, None)
    raw = np.stack(rows) if rows else np.zeros((0, fitted.num_outputs), np.float32)
    y = np.stack([e.y[: fitted.num_outputs] for e in examples]) if rows else raw
    mask = np.stack([e.y_mask[: fitted.num_outputs] for e in examples]) if rows else raw
    return Predicted(probabilities(fitted, raw), decode_outputs(fitted, y), mask)


def probabilities(fitted: FittedTask, logits: np.ndarray) -> np.ndarray:
    """Logits `[..., C]` as probabilities; regression values in the target's units."""
    kind = fitted.task.target.kind
    if kind == "regression":
        return decode_outputs(fitted, logits)
    if kind == "multilabel":
        return 1.0 / (1.0 + np.exp(-np.asarray(logits, np.float64)))
    return softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    wide = np.asarray(logits, np.float64)
    wide = np.exp(wide - wide.max(axis=-1, keepdims=True, initial=-np.inf))
    return wide / wide.sum(axis=-1, keepdims=True)


def _tags(example: Example) -> np.ndarray:
    text = example.streams["text"]
    return text["tag"][text["word"] >= 0]
