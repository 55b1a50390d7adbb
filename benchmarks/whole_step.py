"""A whole training step when the number of experts grows and what is active stays: time, memory, compile time.

    python -m benchmarks.whole_step                     # E = 16 to 1,024 in each of 4 layers; 256 and 4,096 rows
    python -m benchmarks.whole_step --quick             # a minute
    python -m benchmarks.whole_step --ablate            # besides: what the greatest E pays, part by part

The step is that of `pathways train`: loss, gradients, clipping, AdamW, balance, statistics, with idle experts asleep
where `train.lazy = "auto"` says so, and the backend that the platform gets. Every size runs in a process of its own, so
that its peak memory is its own. The processes take turns, several rounds; the medians of all their steps are shown.

Columns: milliseconds of a step and their ratio to those of the fewest experts; peak memory of the process, in the last
round, which compiles nothing; what XLA says that the program takes as arguments and needs besides (temporaries); where
the arguments go; seconds to compile in the first round, whose compilation cache is empty; the size of the program.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import MB, Row, child, peak_memory, print_table, save_picture, seconds, write_json

LAYERS, WIDTH, HIDDEN = 4, 128, 256
WARM_UP, BATCHES = 3, 4
PARTS = ("parameters", "moments", "statistics", "arguments", "temporaries")
ABLATIONS = {
    "as trained": [],
    "no statistics": ["--no-statistics"],
    "idle experts trained densely": ["--lazy", "off"],
    "both": ["--no-statistics", "--lazy", "off"],
}


def measured(args: argparse.Namespace) -> Row:
    """Figures of one size, in this process."""
    import pathways as pw

    pw.reuse_memory()
    import jax

    from benchmarks.synthetic import make_config
    from pathways.submodel import initial_submodel
    from pathways.training.joint import prepare
    from pathways.training.lazy import sleepers_for
    from pathways.training.loop import batches_of
    from pathways.training.optimizer import make_optimizer
    from pathways.training.step import initial_state, make_step
    from tasks.pipeline import TrainStream

    rows, counted = args.rows[0], not args.no_statistics
    with TemporaryDirectory() as folder:
        sizes = {"rows": rows, "layers": args.layers, "width": args.width, "hidden": args.hidden}
        config = make_config(Path(folder), args.experts[0], **sizes)
        config = replace(config, train=replace(config.train, lazy=args.lazy))
        prepared = prepare(config)
        stream = TrainStream(prepared.data.train, prepared.weights, prepared.shape, 0)
        batches = [batches_of(stream, 1) for _ in range(BATCHES)]
        stream.close()
    sub = initial_submodel(config, prepared.entries, prepared.layout, prepared.tokenizer, 0)
    optimizer = make_optimizer(config.train)
    sleepers = sleepers_for(config.train, sub.config.model, sub.params, rows)
    step = make_step(sub, optimizer, config.balance, seed=0, statistics=counted, sleepers=sleepers)
    state = initial_state(sub, optimizer, statistics=counted, sleepers=sleepers)
    held = {"parameters": state.params, "moments": (state.opt_state, state.asleep), "statistics": state.counts}
    where = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in held.items()}
    del held, sub.params
    program: Any = None

    def compile_step() -> None:
        nonlocal program
        program = step.lower(state, batches[0]).compile()  # pyright: ignore[reportFunctionMemberAccess]

    compiled = seconds(compile_step)
    memory, times = program.memory_analysis(), []
    for i in range(WARM_UP + args.steps):
        began = time.perf_counter()
        state, metrics = program(state, batches[i % BATCHES])
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return {
        "times": times[WARM_UP:],
        "sleeping": sleepers is not None,
        "peak": peak_memory(),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        **where,
        "compile": compiled,
        "program": sum(path.stat().st_size for path in args.cache.glob("jit_step-*-cache")),
    }


def run(args: argparse.Namespace, experts: int, rows: int, *more: str) -> Row:
    """`measured` in a process of its own, with a compilation cache of its own that the rounds share."""
    cache = args.cache / "-".join(map(str, [experts, rows, *more]))
    sizes = [
        "--layers",
        args.layers,
        "--width",
        args.width,
        "--hidden",
        args.hidden,
        "--steps",
        args.steps,
        "--cache",
        cache,
    ]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = ["--one", "--experts", experts, "--rows", rows, *sizes, *more]
    return child("benchmarks.whole_step", *words, environment=environment)


def line(name: Row, found: list[Row], first: float | None) -> Row:
    """A line of the table: medians over all rounds."""
    median = statistics.median([t for one in found for t in one["times"]])
    last = found[-1]
    return {
        **name,
        "ms": 1e3 * median,
        "ratio": median / (first or median),
        "idle experts": "sleep" if last["sleeping"] else "dense",
        "peak MB": round(statistics.median(one["peak"] for one in found) / MB),
        **{
            f"{part} MB": last[part] / MB
            for part in ("parameters", "moments", "statistics", "arguments", "temporaries")
        },
        "compile s": statistics.median(one["compile"] for one in found),
        "program kB": round(last["program"] / 1e3),
    }


def table(args: argparse.Namespace) -> list[Row]:
    """A line for each number of rows and experts."""
    cases = [(rows, experts) for rows in args.rows for experts in args.experts]
    found: dict[tuple[int, int], list[Row]] = {case: [] for case in cases}
    for number in range(args.rounds):
        for rows, experts in cases:
            found[rows, experts].append(run(args, experts, rows))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    lines = []
    for rows, experts in cases:
        first = statistics.median([t for one in found[rows, args.experts[0]] for t in one["times"]])
        lines.append(line({"rows": rows, "E": experts}, found[rows, experts], first))
    return lines


def ablations(args: argparse.Namespace) -> list[Row]:
    """What the greatest number of experts pays for, at each number of rows."""
    lines = []
    for rows in args.rows:
        found: dict[str, list[Row]] = {name: [] for name in ABLATIONS}
        for _ in range(args.rounds):
            for name, flags in ABLATIONS.items():
                found[name].append(run(args, max(args.experts), rows, *flags))
        first = statistics.median([t for one in found["as trained"] for t in one["times"]])
        lines += [line({"way": name, "rows": rows, "E": max(args.experts)}, found[name], first) for name in ABLATIONS]
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Time and memory of a step against the number of experts, over those of the fewest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    for number, colour in zip(dict.fromkeys(one["rows"] for one in rows), ("tab:blue", "tab:orange"), strict=False):
        mine = [one for one in rows if one["rows"] == number]
        experts = [one["E"] for one in mine]
        left.plot(experts, [one["ratio"] for one in mine], ".-", color=colour, label=f"{number:,} rows")
        right.plot(experts, [one["peak MB"] / 1e3 for one in mine], ".-", color=colour)
        right.plot(experts, [one["parameters MB"] / 1e3 for one in mine], ":", color="black")
    left.set(ylabel="step time / fewest experts", ylim=(0, None))
    right.set(ylabel="peak memory, GB (dotted: parameters)", ylim=(0, None))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="experts in each layer")
        axes.set_xticks(sorted({one["E"] for one in rows}), [str(e) for e in sorted({one["E"] for one in rows})])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    save_picture(figure, path, "A training step and the number of experts")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 4096], help="tokens of a batch")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--steps", type=int, default=10, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ablate", action="store_true", help="besides, what the greatest number of experts pays for")
    parser.add_argument("--quick", action="store_true", help="narrow experts, two numbers of them, 256 rows, one round")
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    parser.add_argument("--plot", type=Path, help="draw time and memory here")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lazy", choices=("auto", "on", "off"), default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--no-statistics", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(args)))
        return
    if args.quick:
        args.experts, args.rows, args.layers, args.width, args.hidden = [16, 1024], [256], 2, 64, 64
        args.rounds = 1
    with TemporaryDirectory() as made:
        args.cache = Path(made)
        lines = table(args)
        print(f"{args.layers} layers, width {args.width}, experts of {args.hidden}; {args.rounds} x {args.steps} steps")
        print_table(lines)
        found: dict[str, list[Row]] = {"sizes": lines}
        if args.ablate:
            found["ablations"] = ablations(args)
            print()
            print_table(found["ablations"])
    write_json(args.json, found)
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    main()
