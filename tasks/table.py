"""Number and category columns to tokens: one token a column.

Columns and categories are hashed, so that a new table needs no new vocabulary. A missing value is a state of its own.

Axis letters: n rows, c columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tasks.batch import CATEGORY, MISSING, NUMBER
from tasks.encoded import EncoderSettings, Ragged, bucket

CLIP = 10.0
"""Standardised numbers are clipped to this many standard deviations."""


def encode_table(
    numbers: Mapping[str, np.ndarray],
    categories: Mapping[str, Sequence[str | None]],
    order: Sequence[str],
    mean: Mapping[str, float],
    std: Mapping[str, float],
    settings: EncoderSettings,
) -> Ragged:
    """Tokens of a table's rows.

    Args:
        numbers: column -> `[n]` float64; what is not finite is missing.
        categories: column -> `[n]` texts; None is missing.
        order: the names of all these columns, in the order in which their tokens stand.
        mean, std: of the training rows, by column; a column that never varies (std 0) gives 0.
        settings: hash sizes.

    Returns:
        `c` tokens for every row.
    """
    rows = len(next(iter([*numbers.values(), *categories.values()])))
    shape = (rows, len(order))
    fields = {
        "column": np.empty(shape, np.int32),
        "state": np.empty(shape, np.int32),
        "number": np.zeros(shape, np.float32),
        "category": np.zeros(shape, np.int32),
    }
    for at, name in enumerate(order):
        fields["column"][:, at] = bucket(name, settings.column_buckets)
        if name in numbers:
            values, known = _standardise(numbers[name], mean[name], std[name])
            fields["number"][:, at] = values
            fields["state"][:, at] = np.where(known, NUMBER, MISSING)
        else:
            codes, known = _category_buckets(name, categories[name], settings.category_buckets)
            fields["category"][:, at] = codes
            fields["state"][:, at] = np.where(known, CATEGORY, MISSING)
    lengths = np.full(rows, len(order), np.int64)
    return Ragged({name: values.reshape(-1) for name, values in fields.items()}, lengths)


def _standardise(values: np.ndarray, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(values)
    scale = std if np.isfinite(std) and std > 0 else 1.0
    centred = np.where(known, values, mean) - mean
    return np.clip(centred / scale, -CLIP, CLIP).astype(np.float32), known


def _category_buckets(name: str, values: Sequence[str | None], buckets: int) -> tuple[np.ndarray, np.ndarray]:
    known = np.array([value is not None for value in values], bool)
    codes = {value: 0 if value is None else bucket(f"{name}={value}", buckets) for value in set(values)}
    return np.array([codes[value] for value in values], np.int32), known
