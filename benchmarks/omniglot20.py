"""Omniglot's 20 alphabets as 20 tasks: the published protocol for a GPU, and a small comparison for two cores.

    python -m benchmarks.omniglot20 full --out runs/omniglot             # 105x105, 3 seeds: for a GPU
    python -m benchmarks.omniglot20 full --out runs/smoke --smoke        # a few steps of it on 2 alphabets, anywhere
    python -m benchmarks.omniglot20 small --out runs/omniglot28          # 28x28: routed, shared and single, 3 seeds
    python -m benchmarks.omniglot20 small --out runs/omniglot28 --table  # print what is there

`full` trains `configs/omniglot20.toml`: the network of Ramachandran and Le 2019 and Maziarz et al. 2019 on 105x105, no
augmentation, of each character 10 drawings for training, 4 for choosing the checkpoint and 6 for the figure, which is
the mean over the alphabets of the test error.

`small` is not that benchmark: 28x28, a network of four layers of `configs/omniglot20_28.toml`. Its arms see as many
examples, in as many steps of the same size, and spend no more operations on one:

- `routed`: the configuration, two experts of seven per layer, chosen by each example through a softmax gate;
- `shared`: the same trunk with two experts per layer, a 3x3 and a 5x5 convolution, through which all tasks go;
- `single`: that trunk once for each task, trained alone on as many of its examples as the joint models see of it.

Settings are chosen with `--split valid`; the test split is read once per trained model. What is finished is not run
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experts.image_kinds import get_image_kind
from pathways.allocator import reuse_memory
from pathways.config import Config, load_config
from pathways.evaluation import SplitName, evaluate
from pathways.model import Model
from pathways.training.joint import train
from pathways.training.run import resolved
from tasks.spec import Task

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ARMS = ("routed", "shared", "single")
Result = dict[str, float]


def located(task: Task, data: Path) -> Task:
    """A task of a configuration, with its files in the folder `data`."""
    alphabet = Path(task.train).parent.name
    splits = {split: str(data / alphabet / split) for split in ("train", "valid", "test")}
    return replace(task, train=splits["train"], valid=splits["valid"], test=splits["test"])


def arm_of(config: Config, arm: str) -> Config:
    """The configuration of an arm."""
    if arm == "routed":
        return config
    model = config.model
    gate = replace(model.gate, kind="softmax_top_k", scope="shared", top_k=2)
    return replace(config, model=replace(model, experts={"conv3x3": 1, "conv5x5": 1}, gate=gate))


def errors(model: Model, split: SplitName) -> Result:
    """Per task the share of wrong answers, in percent."""
    found = evaluate(model, split=split, statistics=False, worst=0)
    return {one.task: 100.0 * (1.0 - one.metrics["accuracy"]) for one in found}


def operations(model: Model) -> float:
    """Floating-point operations of the chosen experts for one example, at most: the mean over the tasks."""
    config, totals = model.config, []
    for name in model.tasks:
        side, total = config.encoders.patch, 0.0
        for stride, layer in zip(config.model.strides, model.entry(name).notes["profile"]["usage"], strict=True):
            side = -(-side // stride)
            for kind, shares in layer.items():
                cost = get_image_kind(kind).operations(config.model.width, side * side)
                total += config.model.gate.top_k * sum(shares.values()) * cost
        totals.append(total)
    return float(np.mean(totals))


def joint(config: Config, folder: Path, split: SplitName) -> tuple[Result, float]:
    """Trains one model on all tasks: its errors and operations."""
    model = train(config, folder, quiet=True)
    return errors(model, split), operations(model)


def singles(config: Config, folder: Path, split: SplitName) -> tuple[Result, float]:
    """Trains one model for each task, on its share of the examples."""
    found: Result = {}
    spent = []
    steps = max(1, round(config.train.steps / len(config.tasks)))
    for task in config.tasks:
        settings = replace(config.train, steps=steps, eval_every=max(steps // 4, 1))
        scores, cost = joint(replace(config, tasks=(task,), train=settings), folder / task.name, split)
        found |= scores
        spent.append(cost)
    return found, float(np.mean(spent))


def run(config: Config, arm: str, out: Path, split: SplitName) -> None:
    """Trains and scores one arm with one seed, if its result is not there yet."""
    seed = config.train.seed
    target, mine = out / f"{split}-{arm}-{seed}.json", arm_of(config, arm)
    asked = json.loads(json.dumps(resolved(mine)))
    if target.exists():
        if json.loads(target.read_text())["config"] != asked:
            raise SystemExit(f"{target} is of another configuration: delete it, or give another --out")
        return
    began = time.monotonic()
    scores, cost = (singles if arm == "single" else joint)(mine, out / f"{arm}-{seed}", split)
    found = {"errors": scores, "operations": cost, "seconds": time.monotonic() - began, "config": asked}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1))
    print(f"{arm}, seed {seed}: mean {split} error {np.mean(list(scores.values())):.2f}%", flush=True)


def show(out: Path, split: SplitName, console: Console) -> None:
    """Prints the mean error of each arm over the seeds that are there."""
    table = Table("arm", "seeds", f"mean {split} error, %", "each", "operations an example", "seconds")
    for arm in ARMS:
        runs = [json.loads(path.read_text()) for path in sorted(out.glob(f"{split}-{arm}-*.json"))]
        if not runs:
            continue
        means = [statistics.fmean(one["errors"].values()) for one in runs]
        spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
        each = ", ".join(f"{mean:.2f}" for mean in means)
        cost, seconds = (statistics.fmean(one[name] for one in runs) for name in ("operations", "seconds"))
        mean = f"{statistics.fmean(means):.2f}{spread}"
        table.add_row(arm, str(len(runs)), mean, each, f"{cost:,.0f}", f"{seconds:.0f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("full", "small"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=CONFIGS.parent.parent / "shared" / "data" / "omniglot20")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="of `small`; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps, by default the configuration's")
    parser.add_argument("--alphabets", type=int, help="only the first of them")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--smoke", action="store_true", help="3 steps of 4 examples, 2 alphabets, one seed")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    args = parser.parse_args(arguments)
    config = load_config(CONFIGS / ("omniglot20.toml" if args.variant == "full" else "omniglot20_28.toml"))
    number = 2 if args.smoke else args.alphabets
    tasks = tuple(located(task, args.data) for task in config.tasks[:number])
    settings = replace(config.train, steps=args.steps or config.train.steps)
    if args.smoke:
        settings = replace(settings, steps=3, rows=4, eval_every=0, checkpoint_every=3)
    reuse_memory()
    arms = args.arms or (ARMS[:1] if args.variant == "full" else ARMS)
    for seed in () if args.table else (args.seeds[:1] if args.smoke else args.seeds):
        for arm in arms:
            run(replace(config, tasks=tasks, train=replace(settings, seed=seed)), arm, args.out, args.split)
    show(args.out, args.split, Console())


if __name__ == "__main__":
    main()
