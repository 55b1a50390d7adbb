"""From task specs to encoded splits: expand, infer, fit, train the tokenizer, encode, choose the batch's shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experts.native import user_cache
from pathways.config import Config
from tasks.batch import STREAMS, BatchShape
from tasks.cache import EncodedSplit, encode_split
from tasks.cache_size import trim
from tasks.check import check_name
from tasks.encoded import EncoderSettings
from tasks.errors import UserError
from tasks.fitted import FittedTask, fit_all
from tasks.infer import infer
from tasks.pack import shape_for
from tasks.pipeline import sampling_weights
from tasks.registry import Registry, distinct_values, expand
from tasks.spec import Task
from tasks.splits import SplitName, rows
from tasks.tokenizer import Tokenizer, train_tokenizer
from tasks.values import text_column

STREAM_OF = {"number": "table", "category": "table", "text": "text", "image": "image", "audio": "audio"}
TOKENIZER_ROWS = 20_000
"""Rows of each task that the tokenizer is trained on, at most."""


def cache_folder() -> Path:
    """Where encoded data and compiled programs are kept: `$PATHWAYS_CACHE`, else the user's cache folder."""
    return user_cache()


def cache_bytes() -> int:
    """The most that encoded data may take: `$PATHWAYS_CACHE_GB` times 10^9, by default 20."""
    given = os.environ.get("PATHWAYS_CACHE_GB", "20")
    try:
        return int(float(given) * 1e9)
    except ValueError:
        raise UserError("The size of the cache must be a number.", where="$PATHWAYS_CACHE_GB", got=given) from None


def fit_tasks(specs: Sequence[Task], say: Callable[[str], None] = lambda line: None) -> list[FittedTask]:
    """Expands families, infers what is open (and says what was inferred), and fits each on its training split.

    Raises:
        UserError: no tasks, a duplicate name, a mistake in a file.
    """
    if not specs:
        raise UserError("There are no tasks.", fix="give the configuration at least one [[tasks]] table")
    registry: Registry[Task] = Registry("task")
    for spec in specs:
        check_name(spec.name)
        # A family is inferred once, on the whole file, so that its tasks agree on the kinds of their columns.
        closed, lines = infer(spec)
        for line in lines:
            say(f"{spec.name}: {line}")
        members = [closed] if closed.each is None else expand(closed, distinct_values(closed, closed.each))
        for task in members:
            registry.register(task.name, task)
    return fit_all(list(registry))


def streams_of(fitted: FittedTask) -> tuple[str, ...]:
    """The encoders that the task's inputs need, in order."""
    found = {STREAM_OF[column.kind] for column in fitted.task.inputs if column.kind is not None}
    return tuple(stream for stream in STREAMS if stream in found)


def fit_tokenizer(fitted: Sequence[FittedTask], settings: EncoderSettings) -> str:
    """A byte-level BPE trained on the training texts of all tasks; plain bytes where there are none."""
    return train_tokenizer(_texts(fitted), settings.vocab_size)


def _texts(fitted: Sequence[FittedTask]) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    for item in fitted:
        for column in item.task.inputs:
            if column.kind != "text" or (item.task.train, column.column) in seen:
                continue
            seen.add((item.task.train, column.column))
            # Tasks that are rows of one file share its texts, so all of its rows are read, not this task's alone.
            yield from _column_texts(replace(item.task, where=None), column.column)


def _column_texts(task: Task, column: str) -> Iterator[str]:
    left = TOKENIZER_ROWS
    for batch in rows(task, "train", columns=[column]):
        array = batch.column(column)
        values = (
            array.to_pylist() if str(array.type).startswith(("list", "large_list")) else text_column(array).to_pylist()
        )
        for value in values[:left]:
            if value is not None:
                yield value if isinstance(value, str) else " ".join(word or "" for word in value)
        left -= len(values)
        if left <= 0:
            return


@dataclass(frozen=True)
class Data:
    """The encoded splits of some tasks, in the order of their integers."""

    train: tuple[EncodedSplit, ...]
    valid: tuple[EncodedSplit, ...]

    def warnings(self, names: Sequence[str]) -> list[str]:
        """What was cut or left out, a line for each kind and task."""
        what = {
            "truncated": "longer than a row of the batch; cut",
            "bad": "with an image or sound that does not decode; left out",
            "bad_target": "with a target that is not a number; left out",
            "missing_target": "without a target; left out",
        }
        lines = []
        for split_name, splits in (("train", self.train), ("valid", self.valid)):
            for name, split in zip(names, splits, strict=True):
                for key, text in what.items():
                    if split.counts.get(key):
                        lines.append(f"{name}: {split.counts[key]} rows of {split_name} {text}")
                if split.unseen:
                    labels = ", ".join(list(split.unseen)[:5])
                    lines.append(
                        f"{name}: {sum(split.unseen.values())} labels of {split_name} unseen in training: {labels}"
                    )
        return lines


def encode_tasks(
    fitted: Iterable[FittedTask], split: SplitName, tokenizer: str, settings: EncoderSettings, folder: Path
) -> tuple[EncodedSplit, ...]:
    """One split of each task, encoded, from the cache where it is there; then the cache is kept within its size."""
    made = Tokenizer(tokenizer)
    found = tuple(encode_split(item, split, made, settings, folder) for item in fitted)
    trim(folder, cache_bytes())
    return found


def task_weights(fitted: Sequence[FittedTask], splits: Sequence[EncodedSplit], temperature: float) -> np.ndarray:
    """The probability of each task in training."""
    for item, split in zip(fitted, splits, strict=True):
        if len(split) == 0:
            raise UserError("No usable rows are left to train on.", where=f"task {item.task.name}: {item.task.train}")
    return sampling_weights([len(split) for split in splits], temperature, [item.task.weight for item in fitted])


def train_shape(config: Config, splits: Sequence[EncodedSplit], weights: np.ndarray, outputs: int) -> BatchShape:
    """The shape of every training batch of a run."""
    length = config.encoders.max_length
    shape = shape_for([split.token_use() for split in splits], weights, config.train.rows, length, config.encoders)
    return BatchShape(**{**vars(shape), "outputs": max(outputs, 1)})


def subset(split: EncodedSplit, most: int, seed: int = 0) -> Sequence[int]:
    """At most `most` places of a split: all, or a seeded choice, in order."""
    if most <= 0 or len(split) <= most:
        return range(len(split))
    return np.sort(np.random.default_rng(seed).choice(len(split), most, replace=False)).tolist()
