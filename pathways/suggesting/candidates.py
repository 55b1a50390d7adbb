"""The rows of a pool that may yet be suggested: as many as were asked for times a constant, whatever the pool's size.

Axis letters: m candidates, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """Rows of a pool, in its order.

    Attributes:
        row: `[m]` int64, where each stands in the pool, from 0.
        digest: `[m]` uint64: equal for rows with equal inputs.
        key: `[m]` float64: rows with the largest are kept.
        doubt: `[m]` float64 from 0 to 1.
        x: `[m, D]` float32, the pooled rows.
        answer, sure: `[m]` objects: what the model would say, and the probability of that.
    """

    row: np.ndarray
    digest: np.ndarray
    key: np.ndarray
    doubt: np.ndarray
    x: np.ndarray
    answer: np.ndarray
    sure: np.ndarray

    @classmethod
    def none(cls, width: int) -> Candidates:
        """No candidate yet, of rows `width` wide."""
        whole, real, any_ = np.zeros(0, np.int64), np.zeros(0), np.zeros(0, object)
        return cls(whole, np.zeros(0, np.uint64), real, real, np.zeros((0, width), np.float32), any_, any_)

    def __len__(self) -> int:
        return len(self.row)

    def take(self, places: np.ndarray) -> Candidates:
        """The candidates at these places, in this order."""
        return Candidates(*(getattr(self, field.name)[places] for field in fields(self)))


def objects(values: list[Any]) -> np.ndarray:
    """`[m]` of any values, lists too."""
    return np.fromiter(values, dtype=object, count=len(values))


def merge(old: Candidates, new: Candidates, most: int) -> Candidates:
    """Both, in the order of the pool: of rows with equal inputs the first, and of those at most `most`, with the
    largest keys, earlier rows first among equal ones."""
    both = Candidates(*(np.concatenate([getattr(old, f.name), getattr(new, f.name)]) for f in fields(Candidates)))
    _, first = np.unique(both.digest, return_index=True)
    both = both.take(np.sort(first))
    return both.take(np.sort(np.argsort(-both.key, kind="stable")[:most]))
