"""Times whole training steps of a configuration: sparse and dense, by the backends of CPU, statistics on and off,
freed memory kept or not.

    python -m benchmarks.train_step                                  # configs/shared.toml
    python -m benchmarks.train_step --config configs/quickstart.toml --steps 40
    python -m benchmarks.train_step --statistics --steps 60          # what counting costs, to a per cent or so

A process for each way, since the allocator is set for a process; the ways take turns, several rounds, and the medians
of all their steps are printed with their ratio to the first row. Processes differ by more than a few per cent, so
`--statistics` compares steps that count with steps that do not in one process, in turn and on the same batches, and
prints the median over all pairs of their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.measure import ROOT, Row, child, in_turn, median_ratio, print_table, write_json
from experts.compute import OVERRIDE
from pathways.allocator import SWITCH, reuse_memory

if TYPE_CHECKING:
    from pathways.config import Config

WAYS: dict[str, dict[str, str]] = {
    "sparse": {},
    "sparse, no statistics": {"counts": "0"},
    "sparse, plain XLA": {OVERRIDE: "buckets"},
    "sparse, memory not kept": {SWITCH: "0"},
    "dense": {"dense": "1"},
    "dense, memory not kept": {"dense": "1", SWITCH: "0"},
    "sparse, bfloat16": {"dtype": "bfloat16"},
}
WARM_UP, BATCHES = 3, 8


def prepared_step(config: Config) -> tuple[Callable[[bool], tuple[Any, Any]], list[Any]]:
    """What makes the step and its first state, for counting routing statistics or not; and batches."""
    from pathways.submodel import initial_submodel
    from pathways.training.joint import prepare
    from pathways.training.lazy import sleepers_for
    from pathways.training.loop import batches_of
    from pathways.training.optimizer import make_optimizer
    from pathways.training.step import initial_state, make_step
    from tasks.pipeline import TrainStream

    prepared = prepare(config)
    optimizer = make_optimizer(config.train)
    sub = initial_submodel(config, prepared.entries, prepared.layout, prepared.tokenizer, 0)
    sleepers = sleepers_for(config.train, config.model, sub.params, prepared.shape.rows * prepared.shape.length)
    stream = TrainStream(prepared.data.train, prepared.weights, prepared.shape, 0)
    batches = [batches_of(stream, 1) for _ in range(BATCHES)]
    stream.close()

    def make(counts: bool) -> tuple[Any, Any]:
        step = make_step(sub, optimizer, config.balance, seed=0, statistics=counts, sleepers=sleepers)
        return step, initial_state(sub, optimizer, statistics=counts, sleepers=sleepers)

    return make, batches


def steppers(config: Config, counted: Sequence[bool]) -> dict[bool, Callable[[], None]]:
    """For counting routing statistics and for not: a call that takes a step and waits for it.

    Each has a state of its own; the batches are the same.
    """
    import jax

    make, batches = prepared_step(config)

    def stepper(counts: bool) -> Callable[[], None]:
        (step, state), taken = make(counts), 0

        def take() -> None:
            nonlocal state, taken
            state, metrics = step(state, batches[taken % BATCHES])
            jax.block_until_ready((state, metrics))
            taken += 1

        return take

    return {counts: stepper(counts) for counts in counted}


def loaded(options: argparse.Namespace, folder: Path) -> Config:
    """The configuration, or that of `--quick`, whose data are written under `folder`."""
    from benchmarks.shared_data import dense
    from benchmarks.synthetic import make_config
    from pathways.config import load_config

    if options.quick:
        return make_config(folder, 64, rows=1024, layers=1, width=64, hidden=128)
    config = load_config(options.config, {"model.dtype": options.dtype})
    return dense(config) if options.dense else config


def measure(way: dict[str, str], options: argparse.Namespace) -> list[float]:
    """Seconds of each step, in a process of its own."""
    flags = ["--dense"] * ("dense" in way) + ["--no-counts"] * ("counts" in way)
    words = ["--one", "--config", options.config, "--steps", options.steps, "--dtype", way.get("dtype", "float32")]
    environment = {SWITCH: way.get(SWITCH, "1"), OVERRIDE: way.get(OVERRIDE, os.environ.get(OVERRIDE, "auto"))}
    return child("benchmarks.train_step", *words, *flags, environment=environment)


def ways(options: argparse.Namespace) -> list[Row]:
    """A line for each way."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(options.rounds):
        for name, way in WAYS.items():
            times[name] += measure(way, options)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in times.items()}
    first = next(iter(medians.values()))
    return [{"way": name, "ms": 1e3 * median, "ratio": median / first} for name, median in medians.items()]


def counting(options: argparse.Namespace) -> list[Row]:
    """Steps that count routing statistics, and steps that do not, in turn."""
    with TemporaryDirectory() as folder:
        calls = steppers(loaded(options, Path(folder)), (False, True))
        times = in_turn(calls, options.steps, WARM_UP)
    ratio = median_ratio(times[True], times[False])
    return [
        {"way": "no statistics", "ms": 1e3 * statistics.median(times[False]), "ratio of pairs": 1.0},
        {"way": "statistics", "ms": 1e3 * statistics.median(times[True]), "ratio of pairs": ratio},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shared.toml")
    parser.add_argument("--steps", type=int, default=20, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--statistics", action="store_true", help="only statistics counted and not, step by step")
    parser.add_argument("--quick", action="store_true", help="as --statistics, on a small model and made data")
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-counts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.statistics or options.quick:
        reuse_memory()
    if options.one:
        counts = not options.no_counts
        calls = steppers(loaded(options, Path()), (counts,))
        print(json.dumps(in_turn(calls, options.steps, WARM_UP)[counts]))
        return
    lines = counting(options) if options.statistics or options.quick else ways(options)
    print_table(lines)
    write_json(options.json, lines)


if __name__ == "__main__":
    main()
