"""Where the time of a training step goes, part by part: attention, gates, experts, optimizer, ...

    python -m benchmarks.step_profile                                # configs/shared.toml
    python -m benchmarks.step_profile --plot docs/pictures/step-profile.svg
    python -m benchmarks.step_profile --quick                        # a small model and made data

Records some steps with jax's profiler. The network and the trainer name their parts (`jax.named_scope`), the compiled
program keeps the names, and the trace says when each of its operations ran: their own time, without that of operations
inside them, adds up to the table. The picture shows the median step as it ran. An operation that uses several cores is
recorded once, so milliseconds are of operations and not of cores; `not in an operation` is what is left of the step:
starting operations, waiting for one another, and operations too short to be recorded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import ROOT, Row, print_table, save_picture, write_json
from benchmarks.train_step import loaded, prepared_step
from pathways.allocator import reuse_memory

PARTS = (
    "encoders",
    "norms",
    "attention",
    "feed_forward",
    "gate",
    "experts",
    "balance",
    "dropout",
    "pooling",
    "heads",
    "loss",
    "waking",
    "optimizer",
    "statistics",
)
"""The names that the network and the trainer give (`jax.named_scope`)."""
OTHER, LEFT = "other", "not in an operation"
WARM_UP, BATCHES = 3, 4


@dataclass(frozen=True)
class Span:
    """When an operation ran, in milliseconds from the start of its step; `own` are those not spent in one inside it."""

    part: str
    thread: int
    start: float
    length: float
    own: float


def part_of(scope: str) -> str:
    """The innermost known name in an operation's scope, such as `jit(step)/transpose(jvp(experts))/dot_general`."""
    found = [word for word in re.findall(r"\w+", scope) if word in PARTS]
    return found[-1] if found else OTHER


def parts_of_program(text: str) -> dict[str, str]:
    """Operation -> part, from the text of a compiled program."""
    named = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', text, re.MULTILINE)
    return {name: part_of(scope) for name, scope in named}


def spans_of(events: list[dict[str, Any]], parts: dict[str, str]) -> dict[str, list[Span]]:
    """Run of the program -> its operations, in time."""
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("ph") == "X" and args.get("hlo_op") and args.get("hlo_module") == "jit_step":
            runs.setdefault(args["run_id"], {}).setdefault(event["tid"], []).append(event)
    return {run: _own_times(threads, parts) for run, threads in runs.items()}


def _own_times(threads: dict[int, list[dict[str, Any]]], parts: dict[str, str]) -> list[Span]:
    first = min(event["ts"] for events in threads.values() for event in events)
    spans = []
    for number, thread in enumerate(sorted(threads, key=lambda t: -sum(e.get("dur", 0) for e in threads[t]))):
        ordered = sorted(threads[thread], key=lambda e: (e["ts"], -e.get("dur", 0)))
        own = [float(event.get("dur", 0)) for event in ordered]
        outer: list[int] = []
        for i, event in enumerate(ordered):
            while outer and ordered[outer[-1]]["ts"] + ordered[outer[-1]].get("dur", 0) <= event["ts"]:
                outer.pop()
            if outer:
                own[outer[-1]] -= event.get("dur", 0)
            outer.append(i)
        for event, left in zip(ordered, own, strict=True):
            part = parts.get(event["args"]["hlo_op"], OTHER)
            start, length = (event["ts"] - first) / 1e3, event.get("dur", 0) / 1e3
            spans.append(Span(part, number, start, length, max(left, 0.0) / 1e3))
    return spans


def recorded(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The events of some steps, and the parts of their program."""
    import jax

    make, batches = prepared_step(loaded(options, folder))
    step, state = make(True)
    program = step.lower(state, batches[0]).compile()  # pyright: ignore[reportFunctionMemberAccess]
    for i in range(WARM_UP):
        state, _ = program(state, batches[i % BATCHES])
    jax.block_until_ready(state)
    trace = folder / "trace"
    jax.profiler.start_trace(trace, create_perfetto_trace=True)
    for i in range(options.steps):
        state, _ = program(state, batches[i % BATCHES])
        jax.block_until_ready(state)
    jax.profiler.stop_trace()
    (path,) = trace.rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        found = json.load(file)
    return found["traceEvents"] if isinstance(found, dict) else found, parts_of_program(program.as_text())


def length_of(spans: list[Span]) -> float:
    """Milliseconds from the first operation to the end of the last."""
    return max(span.start + span.length for span in spans)


def table(runs: list[list[Span]]) -> list[Row]:
    """A line for each part: mean milliseconds in a step and share of it, most first."""
    total = sum(map(length_of, runs))
    time = dict[str, float]()
    for spans in runs:
        for span in spans:
            time[span.part] = time.get(span.part, 0.0) + span.own
    ranked = sorted(time.items(), key=lambda item: -item[1])
    lines = [{"part": part, "ms": took / len(runs), "share": took / total} for part, took in ranked]
    left = total - sum(time.values())
    if left > 0:
        lines.append({"part": LEFT, "ms": left / len(runs), "share": left / total})
    return [*lines, {"part": "step", "ms": total / len(runs), "share": 1.0}]


def draw(spans: list[Span], lines: list[Row], path: Path) -> None:
    """The step as it ran, a line for each thread, and the share of each part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [line["part"] for line in lines if line["part"] not in (LEFT, "step")]
    colours = dict(zip(shown, plt.get_cmap("tab20").colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    figure, (top, below) = plt.subplots(2, 1, figsize=(7.5, 4.2), height_ratios=[2, 3], layout="constrained")
    threads = sorted({span.thread for span in spans if span.own > 0.1})
    for part in shown:
        for thread in threads:
            bars = [(s.start, s.length) for s in spans if (s.part, s.thread) == (part, thread) and s.own > 0.1]
            if bars:
                top.broken_barh(bars, (thread - 0.4, 0.8), color=colours[part], linewidth=0)
    top.set(xlim=(0, length_of(spans)), xlabel="milliseconds of one step")
    top.set_yticks(threads, [f"thread {thread + 1}" for thread in threads])
    top.invert_yaxis()
    ordered = lines[:-1][::-1]
    bars = [line["ms"] for line in ordered]
    below.barh(
        [line["part"] for line in ordered], bars, color=[colours.get(line["part"], "#cccccc") for line in ordered]
    )
    below.set(xlabel="milliseconds in a step, mean")
    below.tick_params(labelsize=8)
    save_picture(figure, path, "Where the time of a training step goes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shared.toml")
    parser.add_argument("--steps", type=int, default=10, help="recorded")
    parser.add_argument("--dtype", default="float32", help="of the network's compute")
    parser.add_argument("--dense", action="store_true", help="the dense model of equal active compute")
    parser.add_argument("--quick", action="store_true", help="a small model and made data")
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    parser.add_argument("--plot", type=Path, help="draw the median step here")
    options = parser.parse_args()
    reuse_memory()
    with TemporaryDirectory() as folder:
        events, parts = recorded(options, Path(folder))
    runs = sorted(spans_of(events, parts).values(), key=length_of)
    lines = table(runs)
    print_table(lines)
    write_json(options.json, lines)
    if options.plot:
        draw(runs[len(runs) // 2], lines, options.plot)


if __name__ == "__main__":
    main()
