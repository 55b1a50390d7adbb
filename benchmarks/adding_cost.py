"""What a step of a new task's training costs when the model around it grows.

    python -m benchmarks.adding_cost                    # 128, 1,024 and 4,096 experts in each layer
    python -m benchmarks.adding_cost --quick            # a minute

Models of any size are made with fresh parameters and committed to a store in a temporary folder. A task is then laid
out as `pathways add` does it, with 16 experts in each layer's pathway, two of them fresh, and trained for some steps.
Beside that: what the search pays that chooses those experts (it runs a sample of rows through the gate over all
experts, so it reads the whole model once), and a step of joint training of the whole model on as many tokens.

Every figure comes from a process of its own, so that its peak memory and its bytes read are its own; the processes take
turns, several rounds. Columns: milliseconds of a step, peak memory of the process, bytes read from the store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks.measure import MB, Row, bytes_read, child, peak_memory, print_table, seconds, write_json

if TYPE_CHECKING:
    from pathways.adding.fit import Recipe
    from pathways.model import Model
    from pathways.submodel import SubModel
    from tasks.cache import EncodedSplit
    from tasks.fitted import FittedTask

LAYERS, ROWS = 2, 512
PATHWAY, FRESH = 16, 2
WARM_UP, BATCHES = 3, 4
TASK = "added"


def make(args: argparse.Namespace) -> Row:
    """Writes a model with fresh parameters."""
    from benchmarks.synthetic import make_config
    from pathways.submodel import initial_submodel
    from pathways.training.joint import commit, prepare
    from pathways.training.loop import Progress

    sizes = {"width": args.width, "hidden": args.hidden}
    config = make_config(args.folder / "data", args.experts, rows=ROWS, layers=LAYERS, **sizes)
    prepared = prepare(config)
    sub = initial_submodel(config, prepared.entries, prepared.layout, prepared.tokenizer, 0)
    commit(prepared, sub, Progress(), args.folder / "model")
    return {}


def new_task(model: Model, folder: Path) -> tuple[FittedTask, EncodedSplit, Recipe]:
    """A task that the model does not know, its training rows, and how it is trained."""
    from benchmarks.synthetic import make_task
    from pathways.adding.fit import make_recipe
    from pathways.data import cache_folder, encode_tasks, fit_tasks

    fitted = fit_tasks([make_task(folder / "data", TASK, 100)])[0]
    train = encode_tasks([fitted], "train", model.tokenizer, model.config.encoders, cache_folder() / "encoded")[0]
    return fitted, train, make_recipe(model.config, train, None, None, 0)


def search(args: argparse.Namespace) -> Row:
    """What choosing the experts pays."""
    from pathways.adding.search import choose, reference
    from pathways.adding.start import reference_submodel
    from pathways.data import streams_of
    from pathways.model import Model

    model = Model.open(args.folder / "model")
    fitted, train, _ = new_task(model, args.folder)
    before = bytes_read()
    began = time.perf_counter()
    borrowed = reference_submodel(model, fitted, streams_of(fitted), reference(model), 0)
    loaded, read = time.perf_counter() - began, bytes_read() - before
    first = seconds(lambda: choose(model, borrowed, train, per_layer=PATHWAY - FRESH, seed=0))
    again = seconds(lambda: choose(model, borrowed, train, per_layer=PATHWAY - FRESH, seed=0))
    return {"times": [again], "ready": loaded + first, "read": read, "peak": peak_memory()}


def step(args: argparse.Namespace) -> Row:
    """Steps of the new task's training."""
    from pathways.adding.fit import HEAD_RATE, head_leaves, own_part
    from pathways.adding.search import Choice, reference
    from pathways.adding.start import prepare, touched
    from pathways.data import streams_of
    from pathways.model import Model
    from pathways.pathway import Pathway
    from pathways.submodel import TaskEntry
    from pathways.training.optimizer import make_optimizer

    model = Model.open(args.folder / "model")
    fitted, train, recipe = new_task(model, args.folder)
    # What a search would give, without its memory: experts evenly spread over the bank.
    index = tuple(range(0, args.experts, args.experts // (PATHWAY - FRESH)))[: PATHWAY - FRESH]
    ranked = tuple(("mlp", i) for i in index)
    choice = Choice(({"mlp": index},) * LAYERS, (ranked,) * LAYERS, (), (), (), ())
    entry = TaskEntry(fitted, Pathway(TASK, streams_of(fitted), *reference(model)), {})
    before, began = bytes_read(), time.perf_counter()
    # Of the reference sub-model, which holds all experts, only the entry is looked at here.
    borrowed = cast("SubModel", SimpleNamespace(entries=(entry,)))
    start = prepare(model, borrowed, choice, FRESH, 0, touched(model, train))
    ready, read = time.perf_counter() - began, bytes_read() - before
    optimizer = make_optimizer(recipe.config, None, lambda path: HEAD_RATE if head_leaves(path) else 1.0)
    times = steps(start.sub, optimizer, [train], recipe.shape, args.steps, trainable=own_part(start))
    return {"times": times, "ready": ready, "read": read, "peak": peak_memory()}


def whole(args: argparse.Namespace) -> Row:
    """Steps of joint training of all tasks and experts, on batches of as many tokens."""
    from pathways.data import cache_folder, encode_tasks, train_shape
    from pathways.model import Model
    from pathways.training.lazy import sleepers_for
    from pathways.training.optimizer import make_optimizer

    model = Model.open(args.folder / "model")
    *_, recipe = new_task(model, args.folder)
    config = replace(model.config, train=replace(model.config.train, rows=recipe.config.rows))
    before, began = bytes_read(), time.perf_counter()
    sub = model.submodel(model.tasks)
    ready, read = time.perf_counter() - began, bytes_read() - before
    fitted = [entry.fitted for entry in sub.entries]
    splits = encode_tasks(fitted, "train", model.tokenizer, config.encoders, cache_folder() / "encoded")
    weights = np.full(len(splits), 1 / len(splits))
    shape = train_shape(config, splits, weights, sub.layout.size.outputs)
    sleepers = sleepers_for(config.train, config.model, sub.params, recipe.config.rows * config.encoders.max_length)
    times = steps(sub, make_optimizer(config.train), splits, shape, args.steps, sleepers=sleepers)
    return {"times": times, "ready": ready, "read": read, "peak": peak_memory()}


def steps(sub: Any, optimizer: Any, splits: Any, shape: Any, count: int, **options: Any) -> list[float]:
    """Seconds of each step, the first ones left out."""
    import jax

    from pathways.training.loop import batches_of
    from pathways.training.step import initial_state, make_step
    from tasks.pipeline import TrainStream

    stream = TrainStream(splits, [1 / len(splits)] * len(splits), shape, 0)
    batches = [batches_of(stream, 1) for _ in range(BATCHES)]
    stream.close()
    state = initial_state(sub, optimizer, statistics=False, **options)
    step = make_step(sub, optimizer, sub.config.balance, seed=0, statistics=False, **options)
    sub.params, found = None, []
    for i in range(WARM_UP + count):
        began = time.perf_counter()
        state, metrics = step(state, batches[i % BATCHES])
        jax.block_until_ready((state, metrics))
        found.append(time.perf_counter() - began)
    return found[WARM_UP:]


ROLES: dict[str, Callable[[argparse.Namespace], Row]] = {"make": make, "step": step, "search": search, "whole": whole}


def run(args: argparse.Namespace, role: str, experts: int) -> Row:
    """One role in a process of its own."""
    words = ["--one", role, "--experts", experts, "--width", args.width, "--hidden", args.hidden]
    words += ["--steps", args.steps, "--folder", args.folder / str(experts)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(args.folder / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return child("benchmarks.adding_cost", *words, environment=cache)


def table(args: argparse.Namespace) -> list[Row]:
    """A line for each role and number of experts."""
    cases = [("step", experts) for experts in args.experts] + [("search", experts) for experts in args.experts]
    cases.append(("whole", args.whole))
    found: dict[tuple[str, int], list[Row]] = {case: [] for case in cases}
    for experts in sorted({*args.experts, args.whole}):
        run(args, "make", experts)
    # What is compiled in a round takes memory and time that later starts do not: such a round does not count.
    for number in range(-args.rehearsals, args.rounds):
        for role, experts in cases:
            one = run(args, role, experts)
            if number >= 0:
                found[role, experts].append(one)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    first = statistics.median([t for one in found["step", args.experts[0]] for t in one["times"]])
    names = {"step": "step of a new task", "search": "search's sample", "whole": "step of the whole model"}
    lines = []
    for (role, experts), all_of in found.items():
        median = statistics.median([t for one in all_of for t in one["times"]])
        lines.append(
            {
                "what": names[role],
                "E": experts,
                "ms": 1e3 * median,
                "ratio": median / first,
                "peak MB": round(statistics.median(one["peak"] for one in all_of) / MB),
                "read MB": all_of[-1]["read"] / MB,
                "until ready s": statistics.median(one["ready"] for one in all_of),
            }
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--whole", type=int, default=1024, help="experts of the model that is trained whole")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rehearsals", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--quick", action="store_true", help="two sizes, one round")
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    parser.add_argument("--one", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="make the models here, on the disk to measure")
    args = parser.parse_args(argv)
    if args.one:
        import pathways as pw

        pw.reuse_memory()
        args.experts = args.experts[0]
        print(json.dumps(ROLES[args.one](args)))
        return
    if args.quick:
        args.experts, args.width, args.hidden, args.rounds, args.rehearsals = [128, 1024], 64, 128, 1, 0
    with TemporaryDirectory(dir=args.folder) as made:
        args.folder = Path(made)
        lines = table(args)
    print(f"{LAYERS} layers, width {args.width}, experts of {args.hidden}, {ROWS} tokens; {PATHWAY} in the pathway")
    print_table(lines)
    write_json(args.json, lines)


if __name__ == "__main__":
    main()
