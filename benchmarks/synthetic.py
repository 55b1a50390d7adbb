"""Made data for benchmarks whose figures do not depend on what is learned: rows of eight numbers, a few tasks, banks of
any size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pathways.config import Config, GateOptions, ModelConfig, TrainConfig
from tasks.encoded import EncoderSettings
from tasks.spec import Target, Task

COLUMNS, CLASSES = 8, 4
SPLITS = {"train": 600, "valid": 40, "test": 40}


def make_task(folder: Path, name: str, seed: int = 0) -> Task:
    """A table of `COLUMNS` numbers and a class, written under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = {}
    for split, rows in SPLITS.items():
        x, y = rng.normal(size=(rows, COLUMNS)), rng.integers(CLASSES, size=rows)
        lines = [",".join([*(f"x{i}" for i in range(COLUMNS)), "y"])]
        lines += [",".join([*(f"{value:.3f}" for value in row), f"c{label}"]) for row, label in zip(x, y, strict=True)]
        files[split] = folder / f"{name}-{split}.csv"
        files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    target = Target(("y",), "classification")
    return Task(name, str(files["train"]), target, valid=str(files["valid"]), test=str(files["test"]))


def make_config(folder: Path, experts: int, *, rows: int, layers: int, width: int, hidden: int) -> Config:
    """Four tasks on a model of `layers` routed layers of `experts` experts, two of them for a token.

    Args:
        rows: T, tokens of a batch, a multiple of the 64 of a packed row.
    """
    length = 64
    return Config(
        model=ModelConfig(
            width=width, layers=layers, heads=4, hidden=hidden, experts={"mlp": experts}, gate=GateOptions(top_k=2)
        ),
        encoders=EncoderSettings(vocab_size=320, max_length=length, column_buckets=64, category_buckets=64),
        train=TrainConfig(rows=rows // length),
        tasks=tuple(make_task(folder, f"task{i}", i) for i in range(4)),
    )
