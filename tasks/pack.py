"""Packing: examples of any length, kind and task into one batch of fixed shape, and the shape that suits a mix.

First-fit: an example takes the first row with room for all its tokens. Placing only notes numbers; the arrays are
filled once per batch, in whole-array operations.

Axis letters: B rows, S tokens in a row, N examples, Y outputs, r runs (one per example and stream).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.batch import STREAMS, Batch, BatchShape, empty_batch
from tasks.encoded import EncoderSettings, Example

MULTIPLE = 64
"""Capacities chosen here are multiples of this."""


class Packer:
    """Fills one batch, example by example.

    `add` returns False, and changes nothing, when the example does not fit; `batch` lays out what was added.
    """

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self._bases = stream_bases(shape)
        self._examples: list[tuple[int, Example]] = []
        self._free = [shape.length] * shape.rows
        self._used: dict[str, int] = dict.fromkeys(STREAMS, 0)
        self._runs: dict[str, list[tuple[int, int, int, int]]] = {stream: [] for stream in STREAMS}

    def __len__(self) -> int:
        return len(self._examples)

    def add(self, task: int, example: Example) -> bool:
        """Places an example of task number `task`, if there is room in a row, in its streams and among the examples."""
        if len(self._examples) >= self.shape.examples:
            return False
        used, length = self._used, 0
        for stream, count in example.lengths.items():
            if used[stream] + count > getattr(self.shape, stream):
                return False
            length += count
        row = next((i for i, free in enumerate(self._free) if free >= length), None)
        if row is None:
            return False
        place = (row + 1) * self.shape.length - self._free[row]
        number = len(self._examples)
        for stream in STREAMS:
            count = example.lengths.get(stream, 0)
            if count:
                self._runs[stream].append((number, place, self._bases[stream] + used[stream], count))
                place += count
                used[stream] += count
        self._free[row] -= length
        self._examples.append((task, example))
        return True

    def batch(self) -> Batch:
        """The packed batch, as `tasks.batch.empty_batch` describes it; each call makes new arrays."""
        out = empty_batch(self.shape)
        source, segment, tag = (out[name].reshape(-1) for name in ("source", "segment", "tag"))  # type: ignore[union-attr]
        for stream, runs in self._runs.items():
            if not runs:
                continue
            owner, place, start, count = np.array(runs, np.int32).T
            step = np.arange(int(count.sum()), dtype=np.int32) - np.repeat(np.cumsum(count) - count, count)
            where = np.repeat(place, count) + step
            source[where] = np.repeat(start, count) + step
            segment[where] = np.repeat(owner + 1, count)
            sources = [self._examples[number][1].streams[stream] for number in owner.tolist()]
            if stream == "text":
                tag[where] = np.concatenate([fields["tag"] for fields in sources])
            _fill(out[stream], sources, len(where))  # type: ignore[arg-type]
        _fill_targets(out, self._examples)
        return out

    def explain(self, task: int, example: Example) -> str:
        """Why `example` does not fit an empty batch of this shape, with both numbers."""
        for stream, count in example.lengths.items():
            if count > self.shape.capacity(stream):
                return f"task {task}: {count} {stream} tokens, the batch holds {self.shape.capacity(stream)}"
        return f"task {task}: an example of {example.length} tokens, a row of the batch holds {self.shape.length}"


def pack(examples: Iterable[tuple[int, Example]], shape: BatchShape) -> Batch:
    """One batch of all `examples`, each with its task's number.

    Raises:
        ValueError: if they do not fit `shape`.
    """
    packer = Packer(shape)
    for task, example in examples:
        if not packer.add(task, example):
            reason = packer.explain(task, example) if not len(packer) else f"{len(packer)} examples filled it"
            raise ValueError(f"the examples do not fit a batch of shape {shape}: {reason}")
    return packer.batch()


def unpack(batch: Batch, shape: BatchShape, index: int) -> Example:
    """The example at `index` of a batch, read back through `source`; the inverse of packing, for tests and tools."""
    row, col = np.nonzero(np.asarray(batch["segment"]) == index + 1)
    source, tags = batch["source"][row, col], batch["tag"][row, col]  # type: ignore[index]
    bases = stream_bases(shape)
    streams, lengths = {}, {}
    for stream in STREAMS:
        local = source - bases[stream]
        mine = (local >= 0) & (local < shape.capacity(stream))
        if mine.any():
            streams[stream] = {name: values[local[mine]] for name, values in batch[stream].items()}  # type: ignore[union-attr]
            lengths[stream] = int(mine.sum())
            if stream == "text":
                streams[stream]["tag"] = tags[mine]
    return Example(streams, lengths, batch["y"][index], batch["y_mask"][index])  # type: ignore[index]


def stream_bases(shape: BatchShape) -> dict[str, int]:
    """Where each stream begins in the concatenation of the streams present."""
    bases, total = {}, 0
    for stream in STREAMS:
        bases[stream] = total
        total += shape.capacity(stream)
    return bases


@dataclass(frozen=True)
class TokenUse:
    """What a task's examples need: mean and largest number of tokens of each stream, and its example-level outputs."""

    mean: Mapping[str, float]
    largest: Mapping[str, int]
    outputs: int = 0


def shape_for(
    uses: Sequence[TokenUse],
    weights: Sequence[float] | np.ndarray,
    rows: int,
    length: int,
    settings: EncoderSettings,
    *,
    slack: float = 0.25,
    examples: int | None = None,
) -> BatchShape:
    """Capacities for a mix of tasks.

    A stream gets its expected share of the `rows * length` tokens under the sampling weights, plus `slack`, and room
    for the largest single example, in multiples of 64 and never more than all tokens. With one task this is also the
    shape to evaluate it with.

    Args:
        uses: one per task.
        weights: the tasks' sampling probabilities.
        rows, length: B and S.
        settings: window sizes.
        slack: the part added to each expected share.
        examples: N; by default what fits on average, plus `slack`, in multiples of 8.

    Raises:
        ValueError: if some example is longer than a row.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    longest = max(sum(use.largest.values()) for use in uses)
    if longest > length:
        raise ValueError(f"rows of {length} tokens cannot hold an example of {longest}: use length >= {longest}")
    expected = {s: sum(p * use.mean.get(s, 0.0) for p, use in zip(share, uses, strict=True)) for s in STREAMS}
    per_example = max(sum(expected.values()), 1.0)
    total = rows * length
    fitting = total / per_example * (1 + slack)
    capacities = {}
    for stream in STREAMS:
        largest = max(use.largest.get(stream, 0) for use in uses)
        if largest:
            wanted = max(total * expected[stream] / per_example * (1 + slack), largest)
            capacities[stream] = min(_up(wanted, MULTIPLE), _up(total, MULTIPLE))
    shape = BatchShape(
        rows=rows,
        length=length,
        examples=examples or min(_up(fitting, 8), total),
        outputs=max(1, *(use.outputs for use in uses)) if uses else 1,
        **capacities,
    )
    return replace(shape, patch=settings.patch, channels=settings.channels, frames=settings.frames, mels=settings.mels)


def _up(value: float, multiple: int) -> int:
    return int(-(-value // multiple)) * multiple


def _fill(out: dict[str, np.ndarray], sources: list[dict[str, np.ndarray]], total: int) -> None:
    for name, values in out.items():
        joined = np.concatenate([fields[name] for fields in sources])
        values[:total] = joined
        if joined.dtype == np.uint8:
            values[:total] *= np.float32(1 / 255)


def _fill_targets(out: Batch, examples: list[tuple[int, Example]]) -> None:
    task, y, y_mask = out["task"], out["y"], out["y_mask"]
    for i, (number, example) in enumerate(examples):
        task[i] = number  # type: ignore[index]
        width = len(example.y)
        if width:
            y[i, :width] = example.y  # type: ignore[index]
            y_mask[i, :width] = example.y_mask  # type: ignore[index]
