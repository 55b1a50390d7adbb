"""The forms that examples take between a file and a batch: settings, ragged tokens of many rows, one example.

Axis letters: n rows, t tokens of all rows together, Y outputs of the task.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from tasks.batch import STREAMS, BatchShape, stream_fields


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes of the input side, the same for all tasks of a model.

    Attributes:
        vocab_size: rows of the text embedding; a tokenizer may not be larger.
        max_length: the most tokens of one example; what is longer is cut and counted.
        patch, stride: an image token is a window of `patch` pixels, one window every `stride` pixels.
        image_tokens: larger images are scaled down until they have at most this many windows.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        mels, frames: an audio token is `frames` successive log-mel frames of `mels` bands.
        sample_rate: every sound is resampled to this many samples per second.
        column_buckets, category_buckets: hash buckets of column names and of (column, value) pairs.
    """

    vocab_size: int = 8192
    max_length: int = 128
    patch: int = 8
    stride: int = 4
    image_tokens: int = 64
    channels: int = 3
    mels: int = 64
    frames: int = 4
    sample_rate: int = 8000
    column_buckets: int = 16384
    category_buckets: int = 65536

    def __post_init__(self) -> None:
        if self.channels not in (1, 3, 4):
            raise ValueError(f"channels must be 1, 3 or 4, got {self.channels}")
        if not 0 < self.stride <= self.patch or (self.patch - self.stride) % 2:
            raise ValueError(f"patch - stride must be even and not negative, got {self.patch} and {self.stride}")
        sizes = (self.max_length, self.image_tokens, self.mels, self.frames, self.sample_rate)
        if min(*sizes, self.column_buckets, self.category_buckets) < 1:
            raise ValueError(f"sizes must be at least 1, got {self}")

    def window_shape(self) -> BatchShape:
        """A batch shape with these windows and no capacity, for `batch.stream_fields`."""
        return BatchShape(0, 0, 0, 0, patch=self.patch, channels=self.channels, frames=self.frames, mels=self.mels)


STORED_DTYPES = {"image": {"patch": np.dtype(np.uint8)}, "audio": {"patch": np.dtype(np.float16)}}
"""Fields kept smaller in memory and on disk than in the batch: pixels as 0..255, log-mel as half floats."""


def stored_fields(stream: str, settings: EncoderSettings) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape of one token, stored dtype) of a stream's fields, for text also the tag and the word."""
    fields = {
        name: (tail, STORED_DTYPES.get(stream, {}).get(name, np.dtype(dtype)))
        for name, (tail, dtype) in stream_fields(stream, settings.window_shape()).items()
    }
    if stream == "text":
        fields |= {"tag": ((), np.dtype(np.int32)), "word": ((), np.dtype(np.int32))}
    return fields


@dataclass(frozen=True)
class Ragged:
    """Tokens of `n` rows laid end to end: each field `[t, ...]`, `lengths` `[n]` with `sum(lengths) == t`."""

    fields: dict[str, np.ndarray]
    lengths: np.ndarray

    def cut(self, keep: np.ndarray) -> Ragged:
        """The first `keep[i]` tokens of each row."""
        if np.array_equal(keep, self.lengths):
            return self
        place = np.arange(int(self.lengths.sum())) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        chosen = place < np.repeat(keep, self.lengths)
        return Ragged({name: values[chosen] for name, values in self.fields.items()}, np.minimum(keep, self.lengths))

    def take(self, rows: np.ndarray) -> Ragged:
        """The rows of a boolean mask `[n]`."""
        chosen = np.repeat(rows, self.lengths)
        return Ragged({name: values[chosen] for name, values in self.fields.items()}, self.lengths[rows])


def join(parts: list[Ragged]) -> Ragged:
    """Row by row, the tokens of all parts one after another: `[a0 b0 a1 b1 ...]`."""
    if len(parts) == 1:
        return parts[0]
    rows = len(parts[0].lengths)
    owner = np.concatenate([np.repeat(np.arange(rows), part.lengths) for part in parts])
    order = np.argsort(owner, kind="stable")
    fields = {name: np.concatenate([part.fields[name] for part in parts])[order] for name in parts[0].fields}
    return Ragged(fields, np.sum([part.lengths for part in parts], axis=0))


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows of one task.

    Attributes:
        streams: the streams that this task has, in any order; the text stream carries `tag` and `word` too (-1 where a
            token is not the first of a word).
        row_numbers: `[n]` int64, where the rows stood in their file.
        y, y_mask: `[n, Y]` float32.
        words: `[n]` int32, words of each row before any cut (0 unless tokens are tagged).
        word_tags: for tagging, the class of each word before any cut, -1 where it is unseen; else None.
        groups: `[n]` the values of the group column, "" where missing; None without such a column.
        counts: rows `truncated` (kept, but cut), and left out for `bad` inputs, `bad_target`, `missing_target` or, of
            classification, an unseen label.
        unseen: labels that training never had, with how often they came.
    """

    streams: dict[str, Ragged]
    row_numbers: np.ndarray
    y: np.ndarray
    y_mask: np.ndarray
    words: np.ndarray
    word_tags: list[np.ndarray] | None = None
    groups: list[str] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row_numbers)


@dataclass(frozen=True, slots=True)
class Example:
    """One example as views: per stream its fields `[t, ...]` and its length in tokens; targets `y`, `y_mask` `[Y]`."""

    streams: dict[str, dict[str, np.ndarray]]
    lengths: dict[str, int]
    y: np.ndarray
    y_mask: np.ndarray

    @property
    def length(self) -> int:
        return sum(self.lengths.values())

    @property
    def tags(self) -> np.ndarray | None:
        """The class of each text token, -1 where none; None where the example has no text."""
        return self.streams["text"]["tag"] if "text" in self.streams else None


def bucket(text: str, buckets: int) -> int:
    """A hash bucket of a text: the same in every process, on every platform, for ever (BLAKE2b, 8 bytes)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % buckets


def share_out(lengths: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Cuts several columns to a common budget, the longest first, so that no column starves another.

    Args:
        lengths: `[columns, n]` tokens of each column in each row.
        budget: `[n]` tokens that each row may keep.

    Returns:
        `[columns, n]` tokens kept; a column shorter than an equal share stays whole.
    """
    order = np.argsort(lengths, axis=0, kind="stable")
    keep = np.zeros_like(lengths)
    left = budget.copy()
    rows = np.arange(lengths.shape[1])
    for rank in range(len(lengths)):
        column = order[rank]
        keep[column, rows] = np.minimum(lengths[column, rows], left // (len(lengths) - rank))
        left = left - keep[column, rows]
    return keep


def stream_order(names: set[str] | dict[str, object]) -> list[str]:
    """The streams among `names`, in the order in which an example's tokens stand."""
    return [stream for stream in STREAMS if stream in names]
