"""The model, the features and the learner of `benchmarks/active_learning.py`.

Axis letters: n rows of the pool, t rows to score on, k labelled rows, C classes, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pathways.adding.baselines import pooled
from pathways.adding.search import reference
from pathways.adding.start import reference_submodel
from pathways.config import Config, load_config
from pathways.data import cache_folder, encode_tasks, fit_tasks, streams_of, subset
from pathways.model import Model
from tasks.spec import Target, Task
from tasks.splits import SplitName

TRUNK_TASKS = ("goemotions", "ewt_pos", "california_housing", "bike_sharing", "tox21")
ALPHABETS = ("Korean", "Tibetan", "Keble")
TRUNK = {
    "model.experts": {"mlp": 16},
    "train.steps": 800,
    "train.rows": 8,
    "train.eval_every": 400,
    "train.checkpoint_every": 400,
}


class Learned(NamedTuple):
    """`pool [n, C]`, `x [n, D]`, `scored [t, C]`."""

    pool: np.ndarray
    x: np.ndarray
    scored: np.ndarray


Learner = Callable[[np.ndarray], Learned]
"""Learns from the rows of the pool at these places `[k]`."""


def shared_config(data: Path) -> Config:
    """`configs/shared.toml` with the trunk's sizes, and the data where they are."""
    config = load_config(Path(__file__).parent.parent / "configs" / "shared.toml", TRUNK)
    return replace(config, tasks=tuple(_moved(task, data) for task in config.tasks))


def _moved(task: Task, data: Path) -> Task:
    train, valid, test = (
        None if path is None else str(data / path.partition("shared/data/")[2])
        for path in (task.train, task.valid, task.test)
    )
    assert train is not None
    return replace(task, train=train, valid=valid, test=test)


def trunk_config(config: Config, data: Path) -> Config:
    """The tasks that the model is trained on: none shares a text, a picture or a table with those learned later."""
    tasks = [task for task in config.tasks if task.name in TRUNK_TASKS]
    for name in ALPHABETS:
        train, valid, test = (str(data / "omniglot20" / name / split) for split in ("train", "valid", "test"))
        tasks.append(Task(name.lower(), train, Target(("label",)), valid=valid, test=test))
    return replace(config, tasks=tuple(tasks))


def features(model: Model, task: Task, split: SplitName, most: int, folder: Path) -> dict[str, np.ndarray]:
    """`x [n, D]`, the pooled rows of at most `most` rows on the frozen reference pathway, their classes `y [n]` and
    how many `classes` there are; kept in a file."""
    path = folder / f"{task.name}-{split}.npz"
    if not path.exists():
        fitted = fit_tasks([task])[0]
        (rows,) = encode_tasks([fitted], split, model.tokenizer, model.config.encoders, cache_folder() / "encoded")
        sub = reference_submodel(model, fitted, streams_of(fitted), reference(model), 0)
        chosen = subset(rows, most)
        np.savez(path, x=pooled(sub, rows, chosen), y=rows.y[chosen].argmax(axis=1), classes=len(fitted.classes))
    return dict(np.load(path))


def head_learner(pool: dict[str, np.ndarray], scored: dict[str, np.ndarray]) -> Learner:
    """A linear head on the frozen trunk: the model of `pathways.adding.baselines.probe`."""
    mean, std = pool["x"].mean(axis=0), pool["x"].std(axis=0) + 1e-6
    x, held = (pool["x"] - mean) / std, (scored["x"] - mean) / std

    def learn(rows: np.ndarray) -> Learned:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            head = LogisticRegression(max_iter=300).fit(x[rows], pool["y"][rows])
        return Learned(_all_classes(head, x, pool), pool["x"], _all_classes(head, held, pool))

    return learn


def _all_classes(head: Any, x: np.ndarray, pool: dict[str, np.ndarray]) -> np.ndarray:
    p = np.zeros((len(x), int(pool["classes"])))
    p[:, head.classes_] = head.predict_proba(x)
    return p
