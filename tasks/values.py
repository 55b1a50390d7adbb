"""Cells as text and as numbers, whatever the column's type; what counts as missing."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MISSING_MARKERS = frozenset({"", "?", "NA", "N/A", "n/a", "<NA>", "nan", "NaN", "NAN", "null", "NULL", "None"})
"""Texts, after trimming, that mean: no value."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_MARKERS = pa.array(sorted(MISSING_MARKERS))


class Numbers(NamedTuple):
    """A column as numbers: NaN in `value` wherever `missing` or `bad`, which exclude each other."""

    value: np.ndarray  # [n] float64
    missing: np.ndarray  # [n] bool: null or a missing marker
    bad: np.ndarray  # [n] bool: NaN, infinite, or not a number at all


def is_missing(value: str | None) -> bool:
    return value is None or value.strip() in MISSING_MARKERS


def parse_number(text: str | None) -> float | None:
    """The finite decimal number that `text` spells; None for a missing marker, NaN, an infinity or anything else."""
    text = "" if text is None else text.strip()
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def spells_number(text: str) -> bool:
    """Whether the text is a number in the widest sense, NaN and infinities too: it speaks for a column of numbers."""
    return bool(_NUMBER.fullmatch(text.strip()) or _NOT_FINITE.fullmatch(text.strip()))


def is_list(array: pa.Array) -> bool:
    return pa.types.is_list(array.type) or pa.types.is_large_list(array.type)


def is_numeric(array: pa.Array) -> bool:
    kind = array.type
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    )


def text_column(array: pa.Array) -> pa.StringArray:
    """Each cell as trimmed text, null kept; a whole float reads as an integer (`1`, not `1.0`), as labels need."""
    kind = array.type
    if pa.types.is_floating(kind):
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return pa.array([None if math.isnan(v) else _float_text(v) for v in values.tolist()], pa.string())
    if is_list(array) or pa.types.is_struct(kind) or pa.types.is_map(kind):
        return pa.array([None if v is None else str(v) for v in array.to_pylist()], pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([None if v is None else v.decode("utf-8", "replace") for v in array.to_pylist()], pa.string())
    return pc.utf8_trim_whitespace(array.cast(pa.string()))


def label_column(array: pa.Array) -> pa.StringArray:
    """As `text_column`, with missing markers as null."""
    text = text_column(array)
    return pc.if_else(pc.is_in(text, value_set=_MARKERS), pa.scalar(None, pa.string()), text)


def number_column(array: pa.Array) -> np.ndarray:
    """`[n]` float64; NaN for missing, infinite and unreadable cells."""
    return target_numbers(array).value


def target_numbers(array: pa.Array) -> Numbers:
    """As numbers, telling a missing value from one that must not stand in a target."""
    if is_numeric(array):
        if pa.types.is_boolean(array.type):
            array = array.cast(pa.int8())
        missing = np.asarray(array.is_null(nan_is_null=False))
        value = array.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    else:
        text = text_column(array)
        if len(text) and text.null_count == len(text):
            return Numbers(np.full(len(text), np.nan), np.ones(len(text), bool), np.zeros(len(text), bool))
        marker = pc.is_in(text, value_set=_MARKERS)
        not_finite = np.asarray(pc.fill_null(pc.match_substring_regex(text, r"^[+-]?(?i:nan|inf|infinity)$"), False))
        missing = np.asarray(pc.or_(pc.fill_null(marker, False), text.is_null())) & ~not_finite
        value = _parse(text)
    bad = ~missing & ~np.isfinite(value)
    return Numbers(np.where(np.isfinite(value), value, np.nan), missing, bad)


def _parse(text: pa.StringArray) -> np.ndarray:
    known = pc.if_else(pc.is_in(text, value_set=_MARKERS), pa.scalar(None, pa.string()), text)
    try:
        return known.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    except pa.ArrowInvalid:
        parsed = [parse_number(value) for value in known.to_pylist()]
        return np.array([math.nan if value is None else value for value in parsed], np.float64)


def _float_text(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)


def natural_order(texts: Any) -> list[str]:
    """Sorted: by value if all of them are numbers, else as text."""
    texts = list(texts)
    numbers = {text: parse_number(text) for text in texts}
    if texts and all(number is not None for number in numbers.values()):
        return sorted(texts, key=lambda text: (numbers[text], text))
    return sorted(texts)
