"""A new task with few labels: the found pathway against training from scratch, a linear probe, full fine-tuning and
muNet's rule, on data sets that the model has not seen.

    python -m benchmarks.few_labels --out runs/few                       # the table of docs/benchmarks.md
    python -m benchmarks.few_labels --out runs/few --development --tasks snips --labels 5 --seeds 1
    python -m benchmarks.few_labels --out runs/few --table               # print what is there

One joint model learns six data sets; five others are then added, each to a fresh copy, with `n` labelled rows of every
class (of a regression 5 n rows), with a tenth of the labels, or with all. An arm gets these rows and no others: where
it wants validation it takes it from them. Scores are on at most 1,000 test rows, read once per run. With
`--development` they are on validation rows, by which everything was chosen. What is finished is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.few_labels_arms import full_fine_tuning, munet
from pathways.adding import add_task
from pathways.allocator import reuse_memory
from pathways.config import Config, GateOptions, ModelConfig, TrainConfig
from pathways.training.joint import train
from tasks.encoded import EncoderSettings
from tasks.spec import LOWER_IS_BETTER, Input, Split, Target, TargetKind, Task

TEST_ROWS = 1000
ROWS_OF_REGRESSION = 5
"""Rows that stand for one example a class where there are no classes."""
LABELS = ("1", "2", "5", "10", "10%", "100%")
ARMS = ("ours", "scratch", "probe", "constant", "full", "munet")
BASELINES = {"scratch": "same network from scratch", "probe": "linear probe on the frozen model"}
BASELINES["constant"] = "majority or mean"
TEXT, SMILES, TOKENS = (Input("text", "text"),), (Input("smiles", "text"),), (Input("tokens", "text"),)


def data_set(
    data: Path, name: str, ending: str, target: Sequence[str], kind: TargetKind | None = None, **fields: Any
) -> Task:
    """A task of the shared data, whose folder is its name up to a colon."""
    folder = data / fields.pop("folder", name)
    splits = {split: str(folder / f"{split}.{ending}") for split in ("train", "valid", "test")}
    return Task(name, target=Target(tuple(target), kind), **splits, **fields)


def known_tasks(data: Path) -> tuple[Task, ...]:
    """What the model learns jointly."""
    assays = ("NR-AR", "NR-AhR", "NR-ER", "SR-ARE", "SR-MMP", "SR-p53")
    others = ("instant", "dteday", "casual", "registered")
    return (
        data_set(data, "clinc150", "jsonl", ["label"], inputs=TEXT),
        data_set(data, "sst2", "jsonl", ["label"], "classification", inputs=TEXT),
        data_set(data, "goemotions", "jsonl", ["labels"], "multilabel", inputs=TEXT),
        data_set(data, "tox21", "csv", assays, "multilabel", inputs=SMILES),
        data_set(data, "bike_sharing", "csv", ["cnt"], ignore=others),
        data_set(data, "california_housing", "csv", ["median_house_value"]),
    )


def new_tasks(data: Path) -> dict[str, Task]:
    """What is added."""
    solubility = "measured log solubility in mols per litre"
    tasks = (
        data_set(data, "snips", "jsonl", ["intent"], inputs=TOKENS),
        data_set(data, "sst5", "jsonl", ["label"], "classification", inputs=TEXT),
        data_set(data, "adult", "csv", ["income"]),
        data_set(data, "esol", "csv", [solubility], inputs=SMILES),
        data_set(data, "lipophilicity", "csv", ["exp"], inputs=SMILES),
    )
    return {task.name: task for task in tasks}


def config(data: Path) -> Config:
    """A model that two cores train in some minutes."""
    gate = GateOptions(kind="softmax_top_k", scope="shared", top_k=2)
    return Config(
        model=ModelConfig(width=96, layers=3, heads=4, hidden=128, experts={"mlp": 16}, dropout=0.1, gate=gate),
        encoders=EncoderSettings(vocab_size=4096, max_length=64, column_buckets=512, category_buckets=1024),
        train=TrainConfig(steps=1000, rows=24, learning_rate=2.5e-3, weight_decay=0.2, eval_every=500, eval_rows=200),
        tasks=known_tasks(data),
    )


def with_labels(task: Task, labels: str, seed: int, folder: Path, development: bool) -> Task:
    """The task with so many labelled rows, drawn with the seed, and with a part of its test rows."""
    rng = random.Random(f"{task.name} {labels} {seed}")
    rows = read_rows(task.train)
    rng.shuffle(rows)
    held = read_rows(str(task.valid if development else task.test))
    random.Random(0).shuffle(held)
    files = {"train": list(chosen(task, rows, labels)), "test": held[:TEST_ROWS]}
    paths = {}
    for split, picked in files.items():
        paths[split] = str(folder / f"{split}{Path(task.train).suffix}")
        write_rows(Path(paths[split]), picked)
    split = Split(valid=0.1, test=0.0) if labels.endswith("%") else Split(valid=0.0, test=0.0)
    return replace(task, **paths, valid=None, split=split)


def chosen(task: Task, rows: list[dict[str, Any]], labels: str) -> Iterator[dict[str, Any]]:
    """Rows of a shuffled list: so many of each class, or a part of all."""
    if labels.endswith("%"):
        yield from rows[: max(1, round(len(rows) * float(labels[:-1]) / 100))]
        return
    column, seen = task.target.columns[0], defaultdict(int)
    if isinstance(rows[0][column], str) and numeric(rows[0][column]):
        yield from rows[: int(labels) * ROWS_OF_REGRESSION]
        return
    for row in rows:
        seen[row[column]] += 1
        if seen[row[column]] <= int(labels):
            yield row


def numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a CSV or JSON lines file."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)) if path.endswith(".csv") else [json.loads(line) for line in file]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run(trunk: Path, task: Task, labels: str, seed: int, arms: Sequence[str], folder: Path, development: bool) -> Any:
    """Scores of one task with so many labels, by arm, and what the search cost."""
    made = with_labels(task, labels, seed, folder, development)
    found: dict[str, Any] = {"task": task.name, "labels": labels, "seed": seed, "scores": {}}
    others: dict[str, Callable[..., float]] = {"full": full_fine_tuning, "munet": munet}
    if "ours" in arms:
        model = Path(shutil.copytree(trunk, folder / "model"))
        began = time.monotonic()
        card = add_task(model, made, seed=seed, quiet=True)
        found |= {"metric": card.metric, "seconds": time.monotonic() - began, "notes": card.notes}
        found |= {"parameters": card.new_parameters}
        found["scores"]["ours"] = card.value
        found["scores"] |= {arm: card.baselines[name] for arm, name in BASELINES.items()}
    for arm, function in others.items():
        if arm in arms:
            found["scores"][arm] = function(trunk, made, seed)
    shutil.rmtree(folder)
    return found


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]


def show(found: Sequence[dict[str, Any]], console: Console) -> None:
    """Mean and spread over seeds; then how often ours is ahead."""
    table = Table(title=f"{len(found)} runs: mean over seeds ± deviation")
    for name in ("task", "labels", "metric", "seeds", *ARMS, "cost", "s"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        groups[one["task"], one["labels"]].append(one)
    order = sorted(groups, key=lambda key: (key[0], LABELS.index(key[1])))
    wins: dict[str, list[int]] = defaultdict(list)
    for key in order:
        runs = groups[key]
        metric = runs[0].get("metric", "")
        means = {arm: [one["scores"][arm] for one in runs if arm in one["scores"]] for arm in ARMS}
        cells = [f"{np.mean(v):.3f} ± {np.std(v):.3f}" if v else "–" for v in means.values()]
        sign = -1 if metric in LOWER_IS_BETTER else 1
        for arm in ARMS[1:]:
            if means[arm] and means["ours"]:
                wins[f"{key[1]}: {arm}"].append(int(sign * (np.mean(means["ours"]) - np.mean(means[arm])) > 0))
        cost = next((note.rpartition("cost ")[2] for note in runs[0].get("notes", ()) if "cost" in note), "")
        seconds = f"{np.mean([one.get('seconds', 0) for one in runs]):.0f}"
        table.add_row(*key, metric, str(len(runs)), *cells, cost, seconds)
    console.print(table)
    for name, won in wins.items():
        console.print(f"labels {name}: ours is ahead on {sum(won)} of {len(won)} tasks", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--labels", nargs="+", default=list(LABELS), choices=LABELS)
    parser.add_argument("--arms", nargs="+", default=["ours", "full"], choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--development", action="store_true", help="score on validation rows")
    parser.add_argument("--table", action="store_true", help="print what is there")
    args = parser.parse_args()
    console, out = Console(width=200), args.out / ("development" if args.development else "test")
    if not args.table:
        reuse_memory()
        if not (args.out / "trunk").exists():
            train(config(args.data), args.out / "trunk")
        known = new_tasks(args.data)
        (out / "results").mkdir(parents=True, exist_ok=True)
        for seed in range(args.seeds):
            for labels in args.labels:
                for name in args.tasks or known:
                    path = out / "results" / f"{name}-{labels}-{seed}-{'-'.join(args.arms)}.json"
                    if path.exists():
                        continue
                    work = (out / "work", args.development)
                    found = run(args.out / "trunk", known[name], labels, seed, args.arms, *work)
                    path.write_text(json.dumps(found, indent=1))
                    console.print(name, labels, seed, found["scores"], found.get("notes", [""])[-1], highlight=False)
    show(results(out), console)


if __name__ == "__main__":
    main()
