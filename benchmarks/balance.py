"""The balance losses at work: the table of Shazeer et al. 2017 (arXiv:1701.06538, Table 6), on generated tasks.

    python -m benchmarks.balance [--experts 64] [--top-k 2] [--steps 300] [--seed 0]

Each row trains the same small model on the same batches with other weights of the balance losses and prints, over the
last quarter of the steps: the loss without the balance losses; the coefficients of variation of importance (summed gate
values per expert) and of load (choices per expert); and the largest load over the mean load. The last three are of the
worst layer. Two more rows balance other gates: the Switch loss, and the bias of loss-free balancing. 300 steps take
about ten seconds a row on two cores.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pathways.config import BalanceOptions, Config, GateOptions, ModelConfig, TrainConfig
from pathways.submodel import initial_submodel
from pathways.training.joint import Prepared, prepare
from pathways.training.loop import batches_of
from pathways.training.optimizer import make_optimizer
from pathways.training.step import initial_state, make_step
from tasks.encoded import EncoderSettings
from tasks.pipeline import TrainStream
from tasks.spec import Target, Task

NONE = BalanceOptions(load_balancing=0.0, z=0.0, bias_rate=0.0)
TASKS, ROWS, COLUMNS, CLASSES = 6, 400, 6, 5


@dataclass(frozen=True)
class Setting:
    """A row of the table: how it is called, the gate, and what balances it."""

    name: str
    gate: str
    balance: BalanceOptions


WEIGHTS = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1), (0.01, 0.01), (1.0, 1.0))
"""Of the importance and the load loss, as in the paper's table."""

SWITCH_WEIGHTS = (0.1, 0.3, 1.0)

SETTINGS = (
    *(Setting(f"importance {i:g}, load {j:g}", "noisy_top_k", replace(NONE, importance=i, load=j)) for i, j in WEIGHTS),
    Setting("softmax, no balancing", "softmax_top_k", NONE),
    *(Setting(f"softmax, Switch loss {i:g}", "softmax_top_k", replace(NONE, load_balancing=i)) for i in SWITCH_WEIGHTS),
    Setting("sigmoid, no balancing", "sigmoid_top_k", NONE),
    Setting("sigmoid, bias step 0.005", "sigmoid_top_k", replace(NONE, bias_rate=0.005)),
)


@dataclass(frozen=True)
class Result:
    """What a row shows. `max_over_mean` and the coefficients of variation are of the worst layer."""

    loss: float
    cv_importance: float
    cv_load: float
    max_over_mean: float


def make_tasks(folder: Path, seed: int) -> tuple[Task, ...]:
    """Tables of clusters: each task has its own centres, so that rows of many kinds meet the gate."""
    rng = np.random.default_rng(seed)
    tasks = []
    for number in range(TASKS):
        centres = 1.5 * rng.normal(size=(2 * CLASSES, COLUMNS))
        path = folder / f"table{number}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*(f"t{number}x{i}" for i in range(COLUMNS)), "label"])
            for row in range(ROWS):
                cluster = row % len(centres)
                values = centres[cluster] + rng.normal(size=COLUMNS)
                writer.writerow([*(f"{value:.4f}" for value in values), f"c{cluster % CLASSES}"])
        tasks.append(Task(f"table{number}", str(path), Target(("label",), "classification")))
    return tuple(tasks)


def make_config(tasks: tuple[Task, ...], experts: int, top_k: int, steps: int, seed: int) -> Config:
    """A model of two routed layers, in float32."""
    model = ModelConfig(width=32, layers=2, heads=2, hidden=32, experts={"mlp": experts}, gate=GateOptions(top_k=top_k))
    encoders = EncoderSettings(vocab_size=256, max_length=32, column_buckets=256, category_buckets=256)
    return Config(model, encoders, NONE, TrainConfig(steps=steps, rows=16, learning_rate=1e-2, seed=seed), tasks=tasks)


def measure(prepared: Prepared, setting: Setting) -> Result:
    """Trains once and accounts for the last quarter of the steps."""
    config = prepared.config.train
    gate = replace(prepared.config.model.gate, kind=setting.gate)
    whole = replace(prepared.config, model=replace(prepared.config.model, gate=gate), balance=setting.balance)
    sub = initial_submodel(whole, prepared.entries, prepared.layout, prepared.tokenizer, config.seed)
    optimizer = make_optimizer(config)
    step = make_step(sub, optimizer, setting.balance, seed=config.seed, statistics=True)
    state = initial_state(sub, optimizer, statistics=True)
    losses = []
    with closing(TrainStream(prepared.data.train, prepared.weights, prepared.shape, config.seed)) as stream:
        for number in range(config.steps):
            if number == config.steps - config.steps // 4:
                state = state._replace(counts=jax.tree.map(lambda leaf: 0 * leaf, state.counts))
                losses.clear()
            state, metrics = step(state, batches_of(stream, 1))
            losses.append(metrics.loss)
    counts = jax.device_get(state.counts)
    importance, load = ([getattr(layer, name).sum(axis=0) for layer in counts] for name in ("weight", "rows"))
    return Result(
        float(np.mean(jax.device_get(losses))),
        max(_variation(layer) for layer in importance),
        max(_variation(layer) for layer in load),
        max(float(layer.max() / layer.mean()) for layer in load),
    )


def _variation(sums: np.ndarray) -> float:
    return float(sums.std() / sums.mean())


def run(
    experts: int = 64,
    top_k: int = 2,
    steps: int = 300,
    seed: int = 0,
    wanted: Callable[[Setting], bool] = lambda setting: True,
) -> Iterator[tuple[Setting, Result]]:
    """Yields each wanted row of the table as it is done."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(make_config(make_tasks(Path(folder), seed), experts, top_k, steps, seed))
        for setting in SETTINGS:
            if wanted(setting):
                yield setting, measure(prepared, setting)


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--experts", 64), ("--top-k", 2), ("--steps", 300), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args(arguments)
    print(f"{options.experts} experts, {options.top_k} for each row, {options.steps} steps, seed {options.seed}")
    print(f"{'':<28}{'loss':>8}{'CV importance':>15}{'CV load':>9}{'max/mean load':>15}")
    for setting, found in run(options.experts, options.top_k, options.steps, options.seed):
        columns = f"{found.loss:>8.3f}{found.cv_importance:>15.2f}{found.cv_load:>9.2f}{found.max_over_mean:>15.2f}"
        print(f"{setting.name:<28}{columns}", flush=True)


if __name__ == "__main__":
    main()
