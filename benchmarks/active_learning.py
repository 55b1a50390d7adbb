"""Fewer labels for the same accuracy? Rows that `pathways suggest` names against rows drawn at random.

python -m benchmarks.active_learning --data ../shared/data --out runs/active
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pathways.adding.baselines import pooled
from pathways.adding.search import reference
from pathways.adding.start import reference_submodel
from pathways.config import Config, load_config
from pathways.data import cache_folder, encode_tasks, fit_tasks, streams_of, subset
from pathways.model import Model
from pathways.training.joint import train
from tasks.spec import Target, Task

TRUNK_TASKS = ("goemotions", "ewt_pos", "california_housing", "bike_sharing", "tox21")
ALPHABETS = ("Korean", "Tibetan", "Keble")
TRUNK = {
    "model.width": 128,
    "model.experts": {"mlp": 16},
    "train.steps": 800,
    "train.rows": 8,
    "train.eval_every": 400,
    "train.checkpoint_every": 400,
}
POOL_ROWS, SCORED_ROWS = 6_000, 4_000


def trunk_config(config: Config, data: Path) -> Config:
    """The tasks that the trunk is trained on; none shares a row with those that are learned later."""
    tasks = [task for task in config.tasks if task.name in TRUNK_TASKS]
    for name in ALPHABETS:
        place = data / "omniglot20" / name
        files = {split: str(place / split) for split in ("train", "valid", "test")}
        tasks.append(Task(name.lower(), target=Target(("label",)), **files))
    return replace(config, tasks=tuple(tasks))


def shared_config(data: Path) -> Config:
    """`configs/shared.toml` with the trunk's sizes and the data where they are."""
    config = load_config(Path(__file__).parent.parent / "configs" / "shared.toml", TRUNK)
    return replace(config, tasks=tuple(_moved(task, data) for task in config.tasks))


def _moved(task: Task, data: Path) -> Task:
    places = {split: getattr(task, split) for split in ("train", "valid", "test") if getattr(task, split)}
    return replace(task, **{s: str(data / p.partition("shared/data/")[2]) for s, p in places.items()})


def features(model: Model, task: Task, split: str, most: int, folder: Path) -> dict[str, np.ndarray]:
    """Pooled rows `x [n, D]` on the frozen reference pathway and their classes `y [n]`; kept in a file."""
    path = folder / f"{task.name}-{split}.npz"
    if not path.exists():
        fitted = fit_tasks([task])[0]
        (rows,) = encode_tasks([fitted], split, model.tokenizer, model.config.encoders, cache_folder() / "encoded")
        sub = reference_submodel(model, fitted, streams_of(fitted), reference(model), 0)
        chosen = subset(rows, most)
        np.savez(path, x=pooled(sub, rows, chosen), y=rows.y[chosen].argmax(axis=1), classes=len(fitted.classes))
    return dict(np.load(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    config = shared_config(args.data)
    folder = args.out / "trunk"
    model = Model.open(folder) if (folder / "store").exists() else train(trunk_config(config, args.data), folder)
    for task in config.tasks:
        if task.name in ("fashion_mnist", "clinc150", "sst2", "snips_intent", "adult"):
            for split, most in (("train", POOL_ROWS), ("valid", SCORED_ROWS), ("test", SCORED_ROWS)):
                found = features(model, task, split, most, args.out)
                print(task.name, split, found["x"].shape, flush=True)


if __name__ == "__main__":
    main()
