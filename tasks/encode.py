"""Rows of a file to tokens: every input column by its kind, cut to the longest example the model reads.

Axis letters: n rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.audio import encode_sounds
from tasks.encoded import EncodedRows, EncoderSettings, Ragged, join, share_out, stream_order
from tasks.errors import UserError
from tasks.image import encode_images
from tasks.spec import Input
from tasks.table import encode_table
from tasks.text import encode_texts, encode_words
from tasks.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.fitted import FittedTask
    from tasks.target import EncodedTarget

__all__ = ["EncoderSettings", "encode_batch", "input_columns"]


def input_columns(fitted: FittedTask) -> list[str]:
    """The columns that encoding reads when there is no target."""
    return [column.column for column in fitted.task.inputs]


def encode_batch(
    fitted: FittedTask,
    tokenizer: Tokenizer,
    batch: pa.RecordBatch,
    settings: EncoderSettings,
    *,
    with_target: bool = True,
) -> EncodedRows:
    """Encodes a batch of rows.

    Args:
        fitted: the task, all kinds closed.
        tokenizer: the model's.
        batch: rows as the readers give them; row numbers in `__row__`, else counted from 0.
        settings: the model's sizes.
        with_target: False for rows that have none, as in prediction: `y_mask` is then 0 and all tags are -1.

    Returns:
        The rows that can be used; `row_numbers` says which. A row is left out when its target is missing, and with
        `on_bad="skip"` when an image or sound does not decode.

    Raises:
        UserError: a missing column; with `on_bad="stop"` an image or sound that does not decode, with its row.
    """
    _check(fitted, tokenizer, batch, settings)
    rows = _row_numbers(batch)
    target = _target(fitted, batch) if with_target else None
    if target is not None and not target.keep.all():
        rows, batch, kept_target = rows[target.keep], _filter(batch, target.keep), _kept(target)
    else:
        kept_target = target
    parts, cut, bad, words = _encode_inputs(fitted, tokenizer, batch, settings)
    if bad and fitted.task.on_bad == "stop":
        _stop_at_bad(fitted, batch, rows, bad)
    streams, shortened = _cut_to_length(parts, batch.num_rows, settings.max_length)
    good = np.ones(batch.num_rows, bool)
    good[list(bad)] = False
    y, y_mask, tags = _outputs(fitted, batch.num_rows, kept_target)
    if tags is not None:
        _place_tags(streams["text"], tags)
    counts = {"truncated": int((cut | shortened)[good].sum()), "bad": len(bad)}
    if target is not None:
        counts |= {"missing_target": target.missing, "bad_target": target.bad}
    return EncodedRows(
        streams=streams if good.all() else {name: ragged.take(good) for name, ragged in streams.items()},
        row_numbers=rows[good],
        y=y[good],
        y_mask=y_mask[good],
        words=words[good],
        word_tags=None if tags is None else [row for row, kept in zip(tags, good, strict=True) if kept],
        groups=_groups(fitted, batch, good),
        counts=counts,
        unseen={} if target is None else dict(target.unseen),
    )


def _outputs(
    fitted: FittedTask, rows: int, target: EncodedTarget | None
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray] | None]:
    """`y`, `y_mask` `[n, Y]` float32 (Y is 0 for tagging) and for tagging the tags of each row's words."""
    if fitted.is_token_level or target is None:
        none = np.zeros((rows, 0 if fitted.is_token_level else fitted.num_outputs), np.float32)
        return none, none, None if target is None else target.tags
    return target.y, target.y_mask, None


def _encode_inputs(
    fitted: FittedTask, tokenizer: Tokenizer, batch: pa.RecordBatch, settings: EncoderSettings
) -> tuple[dict[str, list[Ragged]], np.ndarray, dict[int, tuple[str, str]], np.ndarray]:
    """Stream -> the tokens of each of its columns; rows cut already; row -> (column, why) of bad cells; word counts."""
    parts: dict[str, list[Ragged]] = {}
    cut = np.zeros(batch.num_rows, bool)
    bad: dict[int, tuple[str, str]] = {}
    words = np.zeros(batch.num_rows, np.int32)
    table = [column for column in fitted.task.inputs if column.kind in ("number", "category")]
    if table:
        parts["table"] = [_table(fitted, table, batch, settings)]
    for column in fitted.task.inputs:
        name, array = column.column, batch.column(column.column)
        if column.kind == "text" and fitted.is_token_level and name == fitted.tokens_column:
            ragged, shortened, words = encode_words(_word_lists(array), name, tokenizer, settings)
            parts.setdefault("text", []).insert(0, ragged)
            cut |= shortened
        elif column.kind == "text":
            ragged, shortened = encode_texts(_texts(array), name, tokenizer, settings)
            parts.setdefault("text", []).append(ragged)
            cut |= shortened
        elif column.kind == "image":
            ragged, wrong = encode_images(array.to_pylist(), name, _folder(batch), _raw_shape(batch, name), settings)
            parts.setdefault("image", []).append(ragged)
            bad |= {row: (name, why) for row, why in wrong.items()}
        elif column.kind == "audio":
            ragged, shortened, wrong = encode_sounds(array.to_pylist(), name, _folder(batch), settings)
            parts.setdefault("audio", []).append(ragged)
            cut |= shortened
            bad |= {row: (name, why) for row, why in wrong.items()}
    return parts, cut, bad, words


def _table(fitted: FittedTask, table: Sequence[Input], batch: pa.RecordBatch, settings: EncoderSettings) -> Ragged:
    from tasks.values import label_column, number_column

    numbers = {c.column: number_column(batch.column(c.column)) for c in table if c.kind == "number"}
    categories = {c.column: label_column(batch.column(c.column)).to_pylist() for c in table if c.kind == "category"}
    order = [column.column for column in table]
    return encode_table(numbers, categories, order, fitted.number_mean, fitted.number_std, settings)


def _cut_to_length(parts: dict[str, list[Ragged]], rows: int, max_length: int) -> tuple[dict[str, Ragged], np.ndarray]:
    """Joins the columns of each stream, cut together to `max_length`: the table stays, the longest others give way."""
    streams: dict[str, Ragged] = {}
    shortened = np.zeros(rows, bool)
    budget = np.full(rows, max_length, np.int64)
    if "table" in parts:
        table = parts["table"][0]
        keep = np.minimum(table.lengths, budget)
        shortened |= keep < table.lengths
        streams["table"] = table.cut(keep)
        budget -= keep
    others = [(stream, ragged) for stream in stream_order(set(parts)) if stream != "table" for ragged in parts[stream]]
    if others:
        lengths = np.stack([ragged.lengths for _, ragged in others])
        kept = share_out(lengths, budget)
        shortened |= (kept < lengths).any(axis=0)
        cut = [(stream, ragged.cut(keep)) for (stream, ragged), keep in zip(others, kept, strict=True)]
        for stream in dict.fromkeys(stream for stream, _ in cut):
            streams[stream] = join([ragged for name, ragged in cut if name == stream])
    return streams, shortened


def _place_tags(text: Ragged, tags: Sequence[np.ndarray]) -> None:
    """Writes each word's tag on its first token; words beyond the list of tags stay without one."""
    word, owner = text.fields["word"], np.repeat(np.arange(len(text.lengths)), text.lengths)
    counts = np.array([len(row) for row in tags], np.int64)
    flat = np.concatenate([np.zeros(0, np.int32), *tags]).astype(np.int32)
    first = np.flatnonzero((word >= 0) & (word < counts[owner]))
    text.fields["tag"][first] = flat[(np.cumsum(counts) - counts)[owner[first]] + word[first]]


def _check(fitted: FittedTask, tokenizer: Tokenizer, batch: pa.RecordBatch, settings: EncoderSettings) -> None:
    missing = [name for name in input_columns(fitted) if name not in batch.schema.names]
    if missing:
        raise UserError(
            f"there is no column {missing[0]!r}",
            where=f"task {fitted.task.name}",
            expected=f"the columns {', '.join(input_columns(fitted))}",
            got=", ".join(name for name in batch.schema.names if name != "__row__"),
        )
    if tokenizer.vocab_size > settings.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model reads {settings.vocab_size}")


def _stop_at_bad(fitted: FittedTask, batch: pa.RecordBatch, rows: np.ndarray, bad: dict[int, tuple[str, str]]) -> None:
    first = min(bad)
    column, why = bad[first]
    file = (batch.schema.metadata or {}).get(b"file", fitted.task.train.encode()).decode()
    value = batch.column(column)[first].as_py()
    raise UserError(
        "an image or a sound cannot be decoded",
        where=f"task {fitted.task.name}, {file}, data row {rows[first] + 1}, column {column}",
        got=f"{value!r}: {why}" if isinstance(value, str) else why,
        fix="mend the file, or leave such rows out with on_bad = 'skip'",
    )


def _target(fitted: FittedTask, batch: pa.RecordBatch) -> EncodedTarget:
    from tasks.target import encode_target

    return encode_target(fitted, batch)


def _kept(target: EncodedTarget) -> EncodedTarget:
    tags = target.tags
    return replace(
        target,
        y=target.y[target.keep],
        y_mask=target.y_mask[target.keep],
        tags=None if tags is None else [row for row, kept in zip(tags, target.keep, strict=True) if kept],
    )


def _filter(batch: pa.RecordBatch, keep: np.ndarray) -> pa.RecordBatch:
    import pyarrow as pa

    return batch.filter(pa.array(keep))


def _row_numbers(batch: pa.RecordBatch) -> np.ndarray:
    if "__row__" in batch.schema.names:
        return batch.column("__row__").to_numpy().astype(np.int64)
    return np.arange(batch.num_rows, dtype=np.int64)


def _groups(fitted: FittedTask, batch: pa.RecordBatch, good: np.ndarray) -> list[str] | None:
    from tasks.values import label_column

    if fitted.task.group is None or fitted.task.group not in batch.schema.names:
        return None
    values = label_column(batch.column(fitted.task.group)).to_pylist()
    return ["" if value is None else value for value, kept in zip(values, good, strict=True) if kept]


def _texts(array: pa.Array) -> list[str | None]:
    from tasks.values import is_list, text_column

    if is_list(array):
        return [None if row is None else " ".join(str(word) for word in row) for row in array.to_pylist()]
    return text_column(array).to_pylist()


def _word_lists(array: pa.Array) -> list[list[str] | None]:
    from tasks.values import is_list

    if is_list(array):
        return [None if row is None else ["" if w is None else str(w) for w in row] for row in array.to_pylist()]
    return [None if text is None else text.split() for text in _texts(array)]


def _folder(batch: pa.RecordBatch) -> Path:
    return Path((batch.schema.metadata or {}).get(b"folder", b".").decode())


def _raw_shape(batch: pa.RecordBatch, name: str) -> tuple[int, ...] | None:
    shape = (batch.schema.field(name).metadata or {}).get(b"shape")
    return tuple(int(part) for part in shape.decode().split(",")) if shape else None
