"""What the baselines read and how they are scored: files as rows, columns as numbers, metrics by name."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)
from sklearn.preprocessing import OrdinalEncoder

from tasks.metrics import spans

Scores = dict[str, float]
Row = dict[str, Any]


# Files


def number(cell: str) -> float | None:
    """The number in a cell, NaN for a blank or `?`, None for anything else."""
    if cell.strip() in ("", "?"):
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        return None


def jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def csv_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def conllu(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences as (words, universal tags); multi-word ranges and empty nodes are no words."""
    sentences = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        cells = [line.split("\t") for line in block.splitlines() if not line.startswith("#")]
        words = [cell for cell in cells if cell[0].isdigit()]
        sentences.append(([cell[1] for cell in words], [cell[3] for cell in words]))
    return sentences


def idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in a gzipped IDX file."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


class Columns:
    """Turns rows of strings into numbers: a column is numeric when every training value but blanks and `?` is."""

    def __init__(self, rows: list[Row], drop: Iterable[str]) -> None:
        self.names = [name for name in rows[0] if name not in set(drop)]
        self.category = [any(number(row[name]) is None for row in rows) for name in self.names]
        self._encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, dtype=float)
        if any(self.category):
            self._encoder.fit(self._part(rows, category=True))

    def _part(self, rows: list[Row], category: bool) -> np.ndarray:
        names = [name for name, is_category in zip(self.names, self.category, strict=True) if is_category == category]
        convert: Callable[[str], Any] = str if category else number
        return np.array([[convert(row[name]) for name in names] for row in rows], object if category else float)

    def __call__(self, rows: list[Row]) -> np.ndarray:
        out = np.empty((len(rows), len(self.names)))
        mask = np.array(self.category)
        out[:, ~mask] = self._part(rows, category=False)
        if mask.any():
            out[:, mask] = self._encoder.transform(self._part(rows, category=True))
        return out


# Scores


def class_scores(right: ArrayLike, guess: ArrayLike) -> Scores:
    macro = f1_score(right, guess, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(right, guess)), "macro_f1": float(macro)}


def label_scores(right: np.ndarray, chance: np.ndarray) -> Scores:
    """Means over labels, each on the rows where it is known; a label with one class only has no ROC-AUC."""
    auc, f1, flat = [], [], []
    for truth, guess in zip(right.T, chance.T, strict=True):
        known = ~np.isnan(truth)
        if np.unique(truth[known]).size == 2:
            auc.append(roc_auc_score(truth[known], guess[known]))
        f1.append(f1_score(truth[known], guess[known] > 0.5, zero_division=0))
        flat.append((truth[known], guess[known] > 0.5))
    micro = f1_score(np.concatenate([t for t, _ in flat]), np.concatenate([g for _, g in flat]))
    return {"roc_auc": float(np.mean(auc)), "macro_f1": float(np.mean(f1)), "micro_f1": float(micro)}


def number_scores(right: np.ndarray, guess: np.ndarray) -> Scores:
    """Of several targets the plain mean over targets."""
    return {
        "rmse": float(root_mean_squared_error(right, guess)),
        "mae": float(mean_absolute_error(right, guess)),
        "r2": float(r2_score(right, guess)) if len(right) > 1 else float("nan"),
    }


def span_f1(right: Sequence[Sequence[str]], guessed: Sequence[Sequence[str]]) -> float:
    """F1 of exact spans; an `I-` that continues nothing of its kind opens a span, as in conlleval."""
    pairs = [(spans(a), spans(b)) for a, b in zip(right, guessed, strict=True)]
    hits, total = sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs)
    return 2 * hits / total if total else 1.0
