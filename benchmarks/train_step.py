"""Times whole training steps of a configuration: sparse and dense, by the backends of CPU, statistics on and off,
freed memory kept or not.

    python -m benchmarks.train_step                                  # configs/shared.toml
    python -m benchmarks.train_step --config configs/quickstart.toml --steps 40

A process for each way, since the allocator is set for a process; the ways take turns, several rounds, and the medians
of all their steps are printed with their ratio to the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from experts.compute import OVERRIDE
from pathways.allocator import SWITCH

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "sparse": {},
    "sparse, no statistics": {"counts": "0"},
    "sparse, plain XLA": {OVERRIDE: "buckets"},
    "sparse, memory not kept": {SWITCH: "0"},
    "dense": {"dense": "1"},
    "dense, memory not kept": {"dense": "1", SWITCH: "0"},
    "sparse, bfloat16": {"dtype": "bfloat16"},
}
WARM_UP, BATCHES = 3, 8


def step_times(path: Path, steps: int, dense: bool, counts: bool, dtype: str) -> list[float]:
    """Seconds of each step, the first ones left out."""
    import pathways as pw

    pw.reuse_memory()
    import jax

    from benchmarks.shared_data import dense as as_dense
    from pathways.submodel import initial_submodel
    from pathways.training.joint import prepare
    from pathways.training.loop import batches_of
    from pathways.training.optimizer import make_optimizer
    from pathways.training.step import initial_state, make_step
    from tasks.pipeline import TrainStream

    config = pw.load_config(path, {"model.dtype": dtype, "train.statistics": counts})
    config = as_dense(config) if dense else config
    prepared = prepare(config)
    optimizer = make_optimizer(config.train)
    sub = initial_submodel(config, prepared.entries, prepared.layout, prepared.tokenizer, 0)
    step = make_step(sub, optimizer, config.balance, seed=0, statistics=counts)
    state = initial_state(sub, optimizer, statistics=counts)
    stream = TrainStream(prepared.data.train, prepared.weights, prepared.shape, 0)
    batches = [batches_of(stream, 1) for _ in range(BATCHES)]
    stream.close()
    found = []
    for i in range(WARM_UP + steps):
        began = time.perf_counter()
        state, metrics = step(state, batches[i % BATCHES])
        jax.block_until_ready(metrics)
        found.append(time.perf_counter() - began)
    return found[WARM_UP:]


def measure(way: dict[str, str], options: argparse.Namespace) -> list[float]:
    """The same in a process of its own."""
    flags = ["--dense"] * ("dense" in way) + ["--no-counts"] * ("counts" in way)
    command = [sys.executable, "-m", "benchmarks.train_step", "--one", "--config", str(options.config)]
    command += ["--steps", str(options.steps), "--dtype", way.get("dtype", "float32"), *flags]
    environment = {**os.environ, SWITCH: way.get(SWITCH, "1"), OVERRIDE: way.get(OVERRIDE, "auto")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shared.toml")
    parser.add_argument("--steps", type=int, default=20, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-counts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(
            json.dumps(step_times(options.config, options.steps, options.dense, not options.no_counts, options.dtype))
        )
        return
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(options.rounds):
        for name, way in WAYS.items():
            times[name] += measure(way, options)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    first = statistics.median(next(iter(times.values())))
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:<26}{1e3 * median:8.1f} ms  {median / first:6.2f}")


if __name__ == "__main__":
    main()
