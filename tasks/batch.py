"""The batch: examples of any tasks and kinds of input, packed into `B` rows of `S` tokens.

Axis letters: B packed rows, S tokens in a row, N examples in a batch (at most), Y outputs of the widest example head.

Each kind of input ("stream") stands in the batch as a flat list of tokens of fixed capacity; the model encodes each
stream to `[capacity, D]`, concatenates them in the order of `STREAMS`, and `source` says which encoded token stands
at each place of the packed rows. So every batch of a run has one shape, whatever tasks and lengths it mixes, and the
number of compiled functions does not depend on the number of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STREAMS = ("table", "text", "image", "audio")
"""The kinds of input, in the order in which their tokens stand in an example and in the concatenated stream."""

NUMBER, CATEGORY, MISSING = 0, 1, 2
"""States of a table cell."""


@dataclass(frozen=True)
class BatchShape:
    """All sizes of a batch. A stream of capacity 0 is absent from the batch, and its encoder is not run.

    Attributes:
        rows, length: B and S.
        examples: N, the most examples a batch may hold.
        outputs: Y, the width of `y`.
        table, text, image, audio: capacity of each stream in tokens.
        patch, channels: an image token is a `[patch, patch, channels]` window.
        frames, mels: an audio token is a `[frames, mels]` window.
    """

    rows: int
    length: int
    examples: int
    outputs: int
    table: int = 0
    text: int = 0
    image: int = 0
    audio: int = 0
    patch: int = 8
    channels: int = 3
    frames: int = 4
    mels: int = 64

    def capacity(self, stream: str) -> int:
        return int(getattr(self, stream))


Batch = dict[str, dict[str, np.ndarray] | np.ndarray]
"""Arrays of one packed batch, as `empty_batch` lays them out."""


def empty_batch(shape: BatchShape) -> Batch:
    """An all-padding batch.

    Keys:
        table: column `[c]` i32 (hash bucket of the column's name), state `[c]` i32, number `[c]` f32 (standardised),
            category `[c]` i32 (hash bucket of column name and value)
        text: id `[c]` i32, position `[c]` i32 (within its column), column `[c]` i32
        image: patch `[c, patch, patch, channels]` f32 in 0..1, row `[c]` i32, col `[c]` i32, column `[c]` i32
        audio: patch `[c, frames, mels]` f32, position `[c]` i32, column `[c]` i32
        source: `[B, S]` i32, index into the concatenation of the streams present
        segment: `[B, S]` i32, 0 for padding, else 1 + the example's index in this batch
        tag: `[B, S]` i32, the class of a tagged token, -1 where none
        task: `[N]` i32, the task's number, -1 for padding
        y: `[N, Y]` f32 and y_mask: `[N, Y]` f32 (1 where the output exists and its target is known). One-hot or a
            distribution for classification, 0/1 for several labels, standardised values for regression.
    """
    batch: Batch = {
        "source": np.zeros((shape.rows, shape.length), np.int32),
        "segment": np.zeros((shape.rows, shape.length), np.int32),
        "tag": np.full((shape.rows, shape.length), -1, np.int32),
        "task": np.full((shape.examples,), -1, np.int32),
        "y": np.zeros((shape.examples, shape.outputs), np.float32),
        "y_mask": np.zeros((shape.examples, shape.outputs), np.float32),
    }
    for stream in STREAMS:
        capacity = shape.capacity(stream)
        if capacity:
            batch[stream] = {
                name: np.zeros((capacity, *tail), dtype) for name, (tail, dtype) in stream_fields(stream, shape).items()
            }
    return batch


def stream_fields(stream: str, shape: BatchShape) -> dict[str, tuple[tuple[int, ...], type]]:
    """Name -> (shape of one token, dtype) of a stream's fields."""
    i32, f32 = np.int32, np.float32
    window = (shape.patch, shape.patch, shape.channels)
    return {
        "table": {"column": ((), i32), "state": ((), i32), "number": ((), f32), "category": ((), i32)},
        "text": {"id": ((), i32), "position": ((), i32), "column": ((), i32)},
        "image": {"patch": (window, f32), "row": ((), i32), "col": ((), i32), "column": ((), i32)},
        "audio": {"patch": ((shape.frames, shape.mels), f32), "position": ((), i32), "column": ((), i32)},
    }[stream]
