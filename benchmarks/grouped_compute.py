"""Times the grouped compute against a dense layer of equal active operations.

    python -m benchmarks.grouped_compute                   # T=4096 D=256 F=1024 K=2, E = 4 to 1024: ten minutes
    python -m benchmarks.grouped_compute --quick           # a minute

For each number of experts, backend and load: the median milliseconds of forward and of forward + backward, and their
ratio to a dense layer with a hidden width of K*F on the same rows, timed in turn with the others, so that a change of
the machine's speed meets all alike. `limit` is what no program on this machine goes below: the dense time plus the time
to read the weights (twice when there is a backward pass) and to write their gradients at the measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.pictures import save
from experts import native
from experts.compute import Placed, apply_experts
from experts.kinds import get_kind
from pathways.allocator import reuse_memory
from routing.plan import Plan

LOADS = ("even", "skewed")
EXPERTS = (4, 16, 64, 256, 1024)
Case = tuple[str, str, str]
Cases = dict[Case, Callable[[], Any]]


def make_plan(key: jax.Array, rows: int, k: int, num: int, load: str) -> Plan:
    """A plan of K distinct slots for each row: about even, or with popularity falling as 1 / rank."""
    scores = jax.random.gumbel(key, (rows, num))
    if load == "skewed":
        scores -= jnp.log1p(jnp.arange(num))
    return Plan(jax.lax.top_k(scores, k)[1].astype(jnp.int32), jnp.full((rows, k), 1 / k, jnp.float32))


def passes(layer: Callable[..., jax.Array], params: Any, x: jax.Array) -> dict[str, Callable[[], Any]]:
    """Forward and forward + backward of `layer(params, x)`, compiled, without arguments."""
    forward = jax.jit(layer)
    gradient = jax.jit(jax.grad(lambda p, x: (layer(p, x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1)))
    return {"forward": lambda: forward(params, x), "both": lambda: gradient(params, x)}


def medians(cases: Cases, repeats: int) -> dict[Case, float]:
    """Median milliseconds of each case, all in turn."""
    for call in cases.values():
        jax.block_until_ready(call())
    times: dict[Case, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidth(repeats: int) -> float:
    """Bytes a millisecond that a sum over a large array reads."""
    data = jnp.ones((64 << 20,), jnp.float32)
    total = jax.jit(jnp.sum)
    return data.nbytes / medians({("read", "-", "-"): lambda: total(data)}, repeats)["read", "-", "-"]


def cases_of(args: argparse.Namespace, num: int) -> tuple[Cases, int]:
    """(backend, load, pass) -> a call, for one number of experts; and the bytes of their weights."""
    kind, dtype = get_kind(args.kind), jnp.dtype(args.dtype)
    key = jax.random.key(0)
    x = jax.random.normal(key, (args.rows, args.width), dtype)
    one = kind.init(key, 1, args.width, args.k * args.hidden, jnp.float32)
    params = kind.init(key, num, args.width, args.hidden, jnp.float32)
    cases: Cases = {}
    for what, call in passes(lambda p, x: kind.apply(p, x[None])[0], one, x).items():
        cases["dense layer", "-", what] = call
    for load in LOADS:
        plan = make_plan(jax.random.key(1), args.rows, args.k, num, load)
        for backend in args.backends:

            def layer(inputs: Any, x: jax.Array, backend: str = backend, slot: jax.Array = plan.slot) -> jax.Array:
                params, weight = inputs
                return apply_experts({args.kind: Placed(params, 0, num)}, x, Plan(slot, weight), backend=backend)

            for what, call in passes(layer, (params, plan.weight), x).items():
                cases[backend, load, what] = call
    return cases, sum(leaf.nbytes for leaf in params.values())


def row(name: str, load: str, num: int, ms: dict[str, float], dense: dict[str, float]) -> dict[str, Any]:
    """A line of the table as a record."""
    ratios = {f"{what} ratio": ms[what] / dense[what] for what in ms}
    return {"E": num, "backend": name, "load": load, **ms, **ratios}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward + backward over the dense layer's, a line for each backend and load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    lines = dict.fromkeys((line["backend"], line["load"]) for line in rows if line["backend"] != "dense layer")
    for backend, load in lines:
        mine = [line for line in rows if (line["backend"], line["load"]) == (backend, load)]
        style = {"even": "-", "skewed": "--", "-": ":"}[load]
        colour = {"native": "tab:blue", "buckets": "tab:orange"}.get(backend, "black")
        label = backend if load == "-" else f"{backend}, {load} load"
        axes.plot([m["E"] for m in mine], [m["both ratio"] for m in mine], style, color=colour, marker=".", label=label)
    axes.set(xscale="log", xlabel="experts", ylabel="forward + backward / dense layer", ylim=(0, None))
    axes.set_xticks(sorted({line["E"] for line in rows}), [str(e) for e in sorted({line["E"] for line in rows})])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path, "Experts and a dense layer")
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS))
    parser.add_argument("--kind", default="mlp")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", nargs="+", default=["native", "buckets"] if native.available() else ["buckets"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--plot", type=Path, help="draw forward + backward against the number of experts here")
    parser.add_argument("--quick", action="store_true", help="fewer rows, experts and repeats")
    args = parser.parse_args(argv)
    reuse_memory()
    if args.quick:
        args.rows, args.experts, args.repeats = 1024, [4, 64], 5
    speed = bandwidth(args.repeats)
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {speed / 1e6:.1f} GB/s read, {args.kind}, {args.dtype}")
    print(f"T={args.rows} D={args.width} F={args.hidden} K={args.k}")
    print(f"{'E':>5} {'backend':<12}{'load':<8}{'forward ms':>12}{'ratio':>7}{'fwd+bwd ms':>12}{'ratio':>7}")
    found = []
    for num in args.experts:
        cases, weights = cases_of(args, num)
        times = medians(cases, args.repeats)
        dense = {what: times["dense layer", "-", what] for what in ("forward", "both")}
        limit = {"forward": dense["forward"] + weights / speed, "both": dense["both"] + 3 * weights / speed}
        named = dict.fromkeys((backend, load) for backend, load, _ in cases)
        rows = [row(name, load, num, {what: times[name, load, what] for what in dense}, dense) for name, load in named]
        rows.append(row("limit", "-", num, limit, dense))
        for line in rows:
            figures = "".join(f"{line[w]:>12.1f}{line[f'{w} ratio']:>7.2f}" for w in ("forward", "both"))
            print(f"{line['E']:>5} {line['backend']:<12}{line['load']:<8}{figures}", flush=True)
        found += rows
        del cases
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
