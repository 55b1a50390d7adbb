"""Fewer labels for the same accuracy? Rows that `pathways suggest` names against rows drawn at random.

    python -m benchmarks.active_learning --data ../shared/data --out runs/active
    python -m benchmarks.active_learning --data ../shared/data --out runs/active --table  # print what is there

A small model is trained on eight other tasks, once, and kept in `--out`. A task is then learned from a few rows of its
training split, drawn at random; round by round more labels are bought, those that `suggest` would name or random ones,
and the task is learned anew from all of them. Both arms of a seed begin with the same rows. What is learned is a linear
head on the frozen model, the linear probe of an added task's card, not a pathway: of those one takes minutes.

The method and its constants were chosen on the validation split of fashion_mnist.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.active_learners import (
    Learned,
    Learner,
    features,
    head_learner,
    shared_config,
    trunk_config,
)
from benchmarks.measure import save_picture
from pathways.model import Model
from pathways.suggesting.choice import most_doubtful, standardised
from pathways.suggesting.doubt import margin_doubt
from pathways.suggesting.suggest import CANDIDATES
from pathways.training.joint import train
from tasks.spec import Task
from tasks.splits import SplitName

SETS = {
    "fashion_mnist": (50, 50),
    "snips_intent": (30, 30),
    "adult": (50, 50),
    "sst2": (50, 50),
}
"""Labels to begin with, and labels of a round."""
ARMS = ("random", "suggest")
ROUNDS = 8
POOL_ROWS, SCORED_ROWS = 6_000, 4_000
"""At most: a seeded choice of the splits."""


def suggested(learned: Learned, open_rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The rows that `pathways.suggesting` names, of those without a label."""
    doubt = margin_doubt(learned.pool[open_rows])
    top = np.sort(np.argsort(-doubt, kind="stable")[: CANDIDATES * n])
    x = learned.x[open_rows[top]]
    return open_rows[top[most_doubtful(standardised(x, x), doubt[top], n, seed)]]


def curve(arm: str, learn: Learner, n: int, truth: np.ndarray, sizes: Sequence[int], seed: int) -> list[float]:
    """Accuracy with each number of labels, bought from a pool of n rows."""
    rng = np.random.default_rng(seed)
    rows, found = rng.permutation(n)[: sizes[0]], []
    for turn, size in enumerate(sizes):
        learned = learn(rows)
        found.append(float((learned.scored.argmax(axis=1) == truth).mean()))
        if turn + 1 < len(sizes):
            open_rows, more = np.setdiff1d(np.arange(n), rows), sizes[turn + 1] - size
            drawn = rng.choice(open_rows, more, replace=False)
            rows = np.concatenate([rows, drawn if arm == "random" else suggested(learned, open_rows, more, seed)])
    return found


def labels_needed(sizes: Sequence[int], accuracy: np.ndarray, wanted: float) -> float:
    """Labels at which a curve first reaches an accuracy, by lines between its points; infinite where it never does."""
    for i, value in enumerate(accuracy):
        if value >= wanted:
            if i == 0:
                return float(sizes[0])
            part = float((wanted - accuracy[i - 1]) / (value - accuracy[i - 1]))
            return sizes[i - 1] + part * (sizes[i] - sizes[i - 1])
    return np.inf


def run(model: Model, task: Task, split: SplitName, seeds: int, out: Path) -> None:
    """Both arms with every seed that is not there yet, a file for each."""
    start, step = SETS[task.name]
    sizes = [start + step * turn for turn in range(ROUNDS + 1)]
    pool, scored = features(model, task, "train", POOL_ROWS, out), features(model, task, split, SCORED_ROWS, out)
    learn = head_learner(pool, scored)
    for seed in range(seeds):
        for arm in ARMS:
            path = _path(out, task.name, split, arm, seed)
            if not path.exists():
                accuracy = curve(arm, learn, len(pool["y"]), scored["y"], sizes, seed)
                path.write_text(json.dumps({"sizes": sizes, "accuracy": accuracy}))
                print(task.name, arm, seed, " ".join(f"{value:.3f}" for value in accuracy), flush=True)


def _path(out: Path, task: str, split: str, arm: str, seed: int) -> Path:
    return out / f"{task}-{split}-{arm}-{seed}.json"


def curves(out: Path, task: str, split: str, seeds: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """The numbers of labels, and per arm `[seeds, sizes]` accuracies; of the seeds that both arms have."""
    both = [seed for seed in range(seeds) if all(_path(out, task, split, arm, seed).exists() for arm in ARMS)]
    read = {arm: [json.loads(_path(out, task, split, arm, seed).read_text()) for seed in both] for arm in ARMS}
    sizes = read["random"][0]["sizes"] if both else []
    return sizes, {arm: np.array([one["accuracy"] for one in read[arm]]) for arm in ARMS}


def table(out: Path, split: str, seeds: int) -> Table:
    """Accuracies with the last number of labels, and the labels after which `suggest` is as good as random choice then.

    `ahead` is the mean over all rounds of what `suggest` has more than random choice with the same seed and labels.
    """
    shown = Table(title=f"{split} split; mean ± standard deviation over seeds")
    for name in ("task", "seeds", "labels", *ARMS, "ahead", "labels for random's last accuracy"):
        shown.add_column(name)
    for task in SETS:
        sizes, found = curves(out, task, split, seeds)
        if not sizes:
            continue
        ahead = (found["suggest"] - found["random"])[:, 1:].mean(axis=1)
        wanted = float(found["random"][:, -1].mean())
        mean = labels_needed(sizes, found["suggest"].mean(axis=0), wanted)
        needed = np.array([labels_needed(sizes, line, wanted) for line in found["suggest"]])
        reached = np.isfinite(needed)
        by_seed = f"{spread(needed[reached], 0)} in {reached.sum()} of {len(needed)} seeds"
        shown.add_row(
            task,
            str(len(needed)),
            f"{sizes[0]} to {sizes[-1]}",
            *(spread(found[arm][:, -1]) for arm in ARMS),
            spread(ahead),
            f"{mean:.0f} by the mean curve; {by_seed}",
        )
    return shown


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    if not len(values):
        return "none"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"


def draw(out: Path, split: str, seeds: int, path: Path) -> None:
    """Accuracy against labels, a panel for each task; bands are one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in SETS if curves(out, task, split, seeds)[0]]
    figure, panels = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.7), layout="constrained", squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        sizes, found = curves(out, task, split, seeds)
        for arm, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
            mean, spread = found[arm].mean(axis=0), found[arm].std(axis=0, ddof=1)
            axes.plot(sizes, mean, color=colour, marker=".", label=arm)
            axes.fill_between(sizes, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        axes.set(title=task, xlabel="labels")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"accuracy, {split} split")
    panels[0][0].legend(frameon=False, fontsize=8)
    save_picture(figure, path, "Accuracy against labels, suggested rows and random ones")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the model, its features and results are kept")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    args = parser.parse_args(argv)
    if not args.table:
        config, folder = shared_config(args.data), args.out / "trunk"
        model = Model.open(folder) if (folder / "store").exists() else train(trunk_config(config, args.data), folder)
        for task in config.tasks:
            if task.name in args.sets:
                run(model, task, args.split, args.seeds, args.out)
    Console(width=160).print(table(args.out, args.split, args.seeds))
    if args.plot:
        draw(args.out, args.split, args.seeds, args.plot)


if __name__ == "__main__":
    main()
