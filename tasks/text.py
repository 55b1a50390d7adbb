"""Text columns to tokens: byte pairs, their place in the column, and for tagged words where each word begins.

Axis letters: n rows, t tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.encoded import EncoderSettings, Ragged, bucket
from tasks.tokenizer import MAX_TOKEN_BYTES, Tokenizer

EMPTY = "\x00"
"""What an empty or missing text is read as, so that every text has at least one token."""


def encode_texts(
    values: Sequence[str | None], column: str, tokenizer: Tokenizer, settings: EncoderSettings
) -> tuple[Ragged, np.ndarray]:
    """Tokens of one text column, at most `max_length` each.

    A text is cut to `16 * max_length` characters before it is encoded, which is never too few, so that a text of any
    size costs the same.

    Returns:
        (tokens, cut `[n]` bool: True where something was left out).
    """
    reach = settings.max_length * MAX_TOKEN_BYTES
    pieces = tokenizer.encode_many([(value or EMPTY)[:reach] for value in values])
    cut = np.array([len(value or "") > reach for value in values], bool)
    return _ragged(pieces, None, column, settings, cut)


def encode_words(
    values: Sequence[Sequence[str] | None], column: str, tokenizer: Tokenizer, settings: EncoderSettings
) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Tokens of a column of word lists; `word` holds the word's number on its first token and -1 on the others.

    Returns:
        (tokens, cut `[n]` bool, words `[n]` int32: how many words each row had before any cut).
    """
    reach = settings.max_length * MAX_TOKEN_BYTES
    lists = [list(value or ())[: settings.max_length] for value in values]
    counts = np.array([len(words) for words in lists], np.int64)
    row_ends = np.cumsum(counts)
    ids, first = tokenizer.encode_words([(word or "")[:reach] for words in lists for word in words])
    token_ends = np.append(first, len(ids))[row_ends]
    token_starts = np.append(first, len(ids))[row_ends - counts]
    number = np.full(len(ids), -1, np.int32)
    number[first] = np.arange(len(first)) - np.repeat(row_ends - counts, counts)
    empty = tokenizer.encode(EMPTY)
    pieces = [ids[a:b] if b > a else empty for a, b in zip(token_starts, token_ends, strict=True)]
    marks = [
        number[a:b] if b > a else np.full(len(empty), -1, np.int32)
        for a, b in zip(token_starts, token_ends, strict=True)
    ]
    words = np.array([len(value or ()) for value in values], np.int32)
    cut = (words > counts) | np.array([any(len(w or "") > reach for w in words) for words in lists], bool)
    ragged, cut = _ragged(pieces, marks, column, settings, cut)
    return ragged, cut, words


def _ragged(
    pieces: list[np.ndarray],
    marks: list[np.ndarray] | None,
    column: str,
    settings: EncoderSettings,
    cut: np.ndarray,
) -> tuple[Ragged, np.ndarray]:
    full = np.array([len(piece) for piece in pieces], np.int64)
    lengths = np.minimum(full, settings.max_length)
    total = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    fields = {
        "id": _flat(pieces, settings.max_length),
        "position": (np.arange(total) - np.repeat(starts, lengths)).astype(np.int32),
        "column": np.full(total, bucket(column, settings.column_buckets), np.int32),
        "tag": np.full(total, -1, np.int32),
        "word": np.full(total, -1, np.int32) if marks is None else _flat(marks, settings.max_length),
    }
    return Ragged(fields, lengths), cut | (full > lengths)


def _flat(pieces: list[np.ndarray], longest: int) -> np.ndarray:
    return np.concatenate([piece[:longest] for piece in pieces]) if pieces else np.zeros(0, np.int32)
