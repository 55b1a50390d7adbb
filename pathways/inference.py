"""Predictions for rows that a user has: every input row gets one output row, in order.

What comes out, by the kind of target:

    classification, distribution   prediction, confidence, p_<class> for each class
    multilabel                     prediction (the labels with a probability of at least 0.5), p_<label>
    regression                     <target column> for each, in its own units
    tagging                        tags (one per word, null for words past the longest example), confidence

A task with image or audio inputs has a last column `error`: why a row could not be read; its other columns are null.

Axis letters: n rows, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pathways.predictions import Predicted, predict_examples
from tasks.check import listing, nearest
from tasks.encode import encode_batch, input_columns
from tasks.encoded import EncodedRows, EncoderSettings, Example
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.metrics import THRESHOLD
from tasks.splits import ROW
from tasks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathways.model import Model

ROWS_AT_ONCE = 1024
ERROR = "error"


def predict(model: Model, task: str, rows: Any, *, folder: str | Path = ".") -> pa.Table:
    """Predicts one task for some rows.

    Args:
        rows: a `pyarrow.Table` or `RecordBatch`, a pandas `DataFrame`, a list of dicts, or a dict of columns. Columns
            that the task does not use are ignored; a value that a row lacks counts as missing. Images may be paths,
            encoded bytes, PIL images or `[h, w]`, `[h, w, c]` uint8 arrays.
        folder: where relative paths of images and sounds start.

    Returns:
        One row per input row; the columns are those at the head of this module.

    Raises:
        UserError: an unknown task, or a column that is in no row.
    """
    return predict_many(model, {task: rows}, folder=folder)[task]


def predict_many(model: Model, rows: Mapping[str, Any], *, folder: str | Path = ".") -> dict[str, pa.Table]:
    """As `predict` for rows of several tasks; those that were trained together go through the model together."""
    fitted = {task: model.entry(task).fitted for task in rows}
    tables = {task: to_table(fitted[task], value) for task, value in rows.items()}
    tokenizer, settings = model.text_tokenizer, model.config.encoders
    read = {task: read_rows(fitted[task], tables[task], tokenizer, settings, str(folder)) for task in rows}
    said: dict[str, Predicted] = {}
    for names in model.networks(tuple(rows)):
        said |= predict_examples(model.submodel(names), {task: read[task].examples for task in names})
    return {task: output_table(fitted[task], read[task], said[task].values) for task in rows}


@dataclass(frozen=True)
class Rows:
    """The rows of a table that could be read.

    Attributes:
        examples: those rows, encoded; place: where each stands in the table; words: of each, before any cut (tagging).
        errors: place -> why that row could not be read.
        count: rows of the whole table.
    """

    examples: list[Example]
    place: list[int]
    words: list[int]
    errors: dict[int, str]
    count: int


def read_rows(
    fitted: FittedTask, table: pa.Table, tokenizer: Tokenizer, settings: EncoderSettings, folder: str
) -> Rows:
    """Encodes a table; rows with an image or a sound that does not decode are noted, whatever the task's `on_bad`."""
    skipping = replace(fitted, task=replace(fitted.task, on_bad="skip", group=None))
    found = Rows([], [], [], {}, table.num_rows)
    table = table.append_column(ROW, pa.array(np.arange(table.num_rows)))
    metadata = {**(table.schema.metadata or {}), b"folder": folder.encode()}
    for batch in table.replace_schema_metadata(metadata).to_batches(max_chunksize=ROWS_AT_ONCE):
        rows = encode_batch(skipping, tokenizer, batch, settings, with_target=False)
        found.examples.extend(examples_of(rows))
        found.place.extend(rows.row_numbers.tolist())
        found.words.extend(rows.words.tolist())
        first, read = batch.column(ROW)[0].as_py(), set(rows.row_numbers.tolist())
        for place in range(batch.num_rows):
            if first + place not in read:
                found.errors[first + place] = _why(fitted, tokenizer, batch.slice(place, 1), settings)
    return found


def _why(fitted: FittedTask, tokenizer: Tokenizer, row: pa.RecordBatch, settings: EncoderSettings) -> str:
    """Why one row does not decode: the reason that encoding stops with."""
    stopping = replace(fitted, task=replace(fitted.task, on_bad="stop", group=None))
    try:
        encode_batch(stopping, tokenizer, row, settings, with_target=False)
    except UserError as error:
        column = (error.where or "").rpartition("column ")[2]
        return f"{column}: {error.got}"
    return "the file changed while it was read"


def examples_of(rows: EncodedRows) -> list[Example]:
    """Encoded rows as examples, views of them."""
    ends = {stream: np.cumsum(ragged.lengths) for stream, ragged in rows.streams.items()}
    found = []
    for i in range(len(rows)):
        streams, lengths = {}, {}
        for stream, ragged in rows.streams.items():
            length = int(ragged.lengths[i])
            if length:
                end = int(ends[stream][i])
                streams[stream] = {name: values[end - length : end] for name, values in ragged.fields.items()}
                lengths[stream] = length
        found.append(Example(streams, lengths, rows.y[i], rows.y_mask[i]))
    return found


def to_table(fitted: FittedTask, rows: Any) -> pa.Table:
    """The task's input columns of rows in any of the forms that `predict` takes.

    Raises:
        UserError: a column is missing; what there is, and the nearest, are named.
    """
    table, names = rows, input_columns(fitted)
    if isinstance(rows, pa.RecordBatch):
        table = pa.Table.from_batches([rows])
    if isinstance(table, pa.Table):
        check_columns(fitted, table.column_names)
        return table.select(names).combine_chunks()
    columns = _columns(fitted, rows)
    images = {column.column for column in fitted.task.inputs if column.kind == "image"}
    return pa.table({name: _array(columns[name], name in images) for name in names})


def _columns(fitted: FittedTask, rows: Any) -> dict[str, Sequence[Any]]:
    """The input columns of a data frame, a dict of columns, or a list of dicts."""
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("list")
    if isinstance(rows, Mapping):
        check_columns(fitted, list(rows))
        found = {name: rows[name] for name in input_columns(fitted)}
        if any(isinstance(values, str) or not hasattr(values, "__len__") for values in found.values()):
            raise _wrong_form(fitted, "a dict of single values; put it in a list if it is one row")
        lengths = {name: len(values) for name, values in found.items()}
        if len(set(lengths.values())) > 1:
            raise _wrong_form(
                fitted, "columns of different lengths: " + listing(f"{k} {n}" for k, n in lengths.items())
            )
        return found
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        raise _wrong_form(fitted, f"a {type(rows).__name__}")
    if not all(isinstance(row, Mapping) for row in rows):
        raise _wrong_form(fitted, "a list in which not every row is a dict")
    if rows:
        check_columns(fitted, list(dict.fromkeys(name for row in rows for name in row)))
    return {name: [row.get(name) for row in rows] for name in input_columns(fitted)}


def _wrong_form(fitted: FittedTask, got: str) -> UserError:
    return UserError(
        "these are not rows to predict",
        where=f"task {fitted.task.name}",
        expected="a table, a data frame, a list of dicts, or a dict of columns of one length",
        got=got,
    )


def check_columns(fitted: FittedTask, there: Sequence[str], where: str | None = None) -> None:
    """Raises UserError for the first input column that is not there, with the nearest one that is."""
    for name in input_columns(fitted):
        if name not in there:
            guess = nearest(name, there)
            raise UserError(
                f"there is no column {name!r}",
                where=f"task {fitted.task.name}" + (f", {where}" if where else ""),
                expected=f"the columns {listing(input_columns(fitted))}",
                got=listing(there) or "no column",
                fix=f"is {guess!r} meant? Rename it to {name!r}" if guess else None,
            )


def _array(values: Sequence[Any], image: bool) -> pa.Array:
    """A column of Python values; a mix of types becomes text, as in a file. NaN is missing."""
    plain = [_plain(value, image) for value in values]
    try:
        return pa.array(plain, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        missing = [value is None or (isinstance(value, float) and np.isnan(value)) for value in plain]
        return pa.array([None if gone else str(value) for value, gone in zip(plain, missing, strict=True)], pa.string())


def _plain(value: Any, image: bool) -> Any:
    """numpy scalars and arrays as Python's own, pictures as the bytes of a PNG."""
    if image and not isinstance(value, str | bytes) and value is not None:
        from PIL import Image

        file = io.BytesIO()
        picture = value if hasattr(value, "save") else Image.fromarray(np.asarray(value, np.uint8))
        picture.save(file, format="PNG")
        return file.getvalue()
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def output_table(fitted: FittedTask, rows: Rows, values: Any) -> pa.Table:
    """What the network said of the rows that could be read, spread over all rows."""
    kind, columns = fitted.task.target.kind, dict[str, pa.Array]()
    place = np.array(rows.place, np.int64)
    if kind == "tagging":
        tags, confidence = _tags(fitted, rows, values)
        columns["tags"] = _spread_lists(rows, tags, pa.string())
        columns["confidence"] = _spread_lists(rows, confidence, pa.float64())
    elif kind == "regression":
        for i, name in enumerate(fitted.task.target.columns):
            columns[name] = _spread(rows.count, place, values[:, i])
    else:
        if kind == "multilabel":
            on = [[n for n, p in zip(fitted.classes, row, strict=True) if p >= THRESHOLD] for row in values]
            columns["prediction"] = _spread_lists(rows, on, pa.string())
        else:
            best = values.argmax(axis=1) if len(values) else np.zeros(0, np.int64)
            at = _spread(rows.count, place, best).cast(pa.int64())
            columns["prediction"] = pa.array(fitted.classes, pa.string()).take(at)
            columns["confidence"] = _spread(rows.count, place, values.max(axis=1, initial=0.0))
        for i, name in enumerate(fitted.classes):
            columns[f"p_{name}"] = _spread(rows.count, place, values[:, i])
    if any(column.kind in ("image", "audio") for column in fitted.task.inputs):
        columns[ERROR] = pa.array([rows.errors.get(i) for i in range(rows.count)], pa.string())
    return pa.table(columns)


def _spread(count: int, place: np.ndarray, values: np.ndarray) -> pa.Array:
    """`[n]` numbers at their places of a column, null elsewhere."""
    column, gone = np.zeros(count), np.ones(count, bool)
    column[place], gone[place] = values, False
    return pa.array(column, mask=gone)


def _spread_lists(rows: Rows, values: Sequence[Sequence[Any]], item: pa.DataType) -> pa.Array:
    column: list[Any] = [None] * rows.count
    for place, value in zip(rows.place, values, strict=True):
        column[place] = value
    return pa.array(column, pa.list_(item))


def _tags(fitted: FittedTask, rows: Rows, values: Sequence[np.ndarray]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Per row the tag of each word and its probability; None for a word that was cut off."""
    tags, confidence = [], []
    for example, words, probabilities in zip(rows.examples, rows.words, values, strict=True):
        row: list[Any] = [None] * words
        sure: list[Any] = [None] * words
        word = example.streams["text"]["word"]
        for at, p in zip(word[word >= 0].tolist(), probabilities, strict=True):
            row[at], sure[at] = fitted.classes[int(p.argmax())], float(p.max())
        tags.append(row)
        confidence.append(sure)
    return tags, confidence
