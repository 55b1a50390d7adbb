"""One sparse model for sixteen data sets against a dense one, one model per task, and plain scikit-learn.

    python -m benchmarks.shared_data --out runs/shared              # all arms, one seed
    python -m benchmarks.shared_data --out runs/shared --seeds 3
    python -m benchmarks.shared_data --out runs/shared --table      # print what is there

Arms, all on the same splits with the same tokenizer settings, optimizer and number of examples seen per task:

- `sparse`: the configuration as it is;
- `dense`: the same trunk with every feed-forward layer dense and as wide as the experts that a row visits;
- `single`: one dense model of that size per task, trained on as many of its examples as the joint models see of it, in
  batches of a quarter of the size, and never fewer than `LEAST_STEPS` steps (so small tasks get more than their share);
- `sklearn`: `benchmarks/baselines.py`.

Settings were chosen on the validation split; the test split is read once per trained model, for the table. A run that
was stopped goes on where it was; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.baselines import BASELINES, baseline
from pathways.allocator import reuse_memory
from pathways.config import Config, load_config
from pathways.evaluation import evaluate
from pathways.model import Model
from pathways.training.joint import Prepared, prepare, train
from pathways.training.run import resolved

ARMS = ("sparse", "dense", "single", "sklearn")
LEAST_STEPS = 200
SINGLE_ROWS = 8
SCHOOLS_EVERY = 10
"""Of the 139 schools every tenth gets a model of its own; the row `school_sample` is over these, for all arms."""
BASELINE_NAMES = {"ewt_pos": "ud_pos"}

Scores = dict[str, dict[str, float]]


def test_scores(model: Model) -> Scores:
    """The metrics of each task of a model on its test split; cut words and labels unseen in training count as wrong."""
    scores: Scores = {}
    for found in evaluate(model, split="test", statistics=False, worst=0):
        if not found.examples:
            continue
        regression = model.entry(found.task).fitted.task.target.kind == "regression"
        chief = found.metrics["r2"] if regression else next(iter(found.metrics.values()))
        scores[found.task] = {**found.metrics, "quality": chief}
    return scores


def joint(config: Config, folder: Path) -> Scores:
    """Trains one model on all tasks and scores it."""
    return test_scores(train(config, folder, quiet=True))


def dense(config: Config) -> Config:
    """The same trunk without routing, at equal active compute."""
    return replace(config, model=replace(config.model, routed_every=config.model.layers + 1))


def singles(config: Config, prepared: Prepared, folder: Path) -> Iterator[tuple[str, Scores]]:
    """Trains and scores a dense model for each task (of the schools, a sample)."""
    schools = [item.task.name for item in prepared.fitted if item.task.name.startswith("school/")]
    skipped = set(schools) - set(schools[::SCHOOLS_EVERY])
    per_batch = config.train.rows * config.encoders.max_length * 0.98
    mean_length = [float(split.lengths.mean()) for split in prepared.data.train]
    examples = per_batch / float(np.dot(prepared.weights, mean_length)) * config.train.steps
    for item, weight, length in zip(prepared.fitted, prepared.weights, mean_length, strict=True):
        name = item.task.name
        if name in skipped:
            continue
        steps = max(LEAST_STEPS, round(examples * weight * length / (SINGLE_ROWS * config.encoders.max_length)))
        own = replace(
            dense(config),
            tasks=(item.task,),
            train=replace(config.train, rows=SINGLE_ROWS, steps=steps, eval_every=max(steps // 3, 1), statistics=False),
        )
        yield name, joint(own, folder / name.replace("/", "_"))


def run(config: Config, arm: str, seed: int, out: Path, data: Path) -> None:
    """Runs one arm with one seed, if its result is not there yet."""
    target = out / f"{arm}-{seed}.json"
    seeded = replace(config, train=replace(config.train, seed=seed))
    asked = resolved(seeded)
    if target.exists():
        if json.loads(target.read_text())["config"] != json.loads(json.dumps(asked)):
            raise SystemExit(f"{target} is of another configuration: delete it, or give another --out")
        return
    started = time.monotonic()
    if arm == "sklearn":
        scores = {task: baseline(task, data, "test") for task in BASELINES if task != "omniglot20"}
    elif arm == "single":
        scores = {}
        for name, found in singles(seeded, prepare(seeded), out / f"single-{seed}"):
            scores.update(found)
            print(f"single {name}: {found[name]}", flush=True)
    else:
        scores = joint(seeded if arm == "sparse" else dense(seeded), out / f"{arm}-{seed}")
    target.write_text(json.dumps({"config": asked, "seconds": time.monotonic() - started, "scores": scores}, indent=1))
    print(f"{arm} seed {seed}: {time.monotonic() - started:.0f} s", flush=True)


def table(config: Config, out: Path, seeds: Sequence[int]) -> Table:
    """Every task's chief metric per arm, mean and spread (sample standard deviation) over seeds."""
    results: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        for seed in seeds:
            path = out / f"{arm}-{seed}.json"
            if path.exists():
                results[arm].append(_grouped(json.loads(path.read_text())["scores"]))
    made = Table(title="test split; school rows: mean over schools")
    for column in ("task", "metric", *ARMS):
        made.add_column(column, justify="left" if column in ("task", "metric") else "right")
    if not results["sparse"]:
        raise SystemExit(f"there is no result of the sparse model in {out} yet")
    sparse = results["sparse"][0]
    for task, metrics in sparse.items():
        metric = next(iter(metrics))
        named = BASELINE_NAMES.get(task, task)
        cells = [
            _cell([s[key][metric] for s in results[arm] for key in (named if arm == "sklearn" else task,) if key in s])
            for arm in ARMS
        ]
        made.add_row(task, metric, *cells)
    shared = [t for t in sparse if t != "school" and all(t in s for arm in ARMS[:3] for s in results[arm])]
    means = [
        _cell([float(np.mean([s[t]["quality"] for t in shared])) for s in results[arm]])
        for arm in ARMS
        if arm != "sklearn"
    ]
    made.add_section()
    made.add_row(f"mean of {len(shared)}", "quality", *means, "")
    return made


def _grouped(scores: Scores) -> Scores:
    """The schools as two rows: their mean, and that of the sample which has models of its own."""
    schools = {name: values for name, values in scores.items() if name.startswith("school/")}
    others = {name: values for name, values in scores.items() if name not in schools}
    if not schools:
        return others
    sample = sorted(schools)[::SCHOOLS_EVERY] if len(schools) > 20 else sorted(schools)
    if len(schools) > 20:
        others["school"] = _mean(list(schools.values()))
    others["school_sample"] = _mean([schools[name] for name in sample])
    return others


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "shared.toml")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    reuse_memory()
    config = load_config(options.config)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in range(options.seeds):
            for arm in options.arms:
                if arm != "sklearn" or seed == 0:
                    run(config, arm, seed, options.out, options.data)
    Console(width=110).print(table(config, options.out, range(options.seeds)))


if __name__ == "__main__":
    main()
