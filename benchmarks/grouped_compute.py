"""Times the grouped compute against a dense layer of equal active operations.

Prints, for each backend and number of experts, the median milliseconds of forward and of forward + backward, and their
ratio to a dense layer with a hidden width of K*F on the same rows. Everything is timed interleaved in one run, so that
a change of the machine's load meets all alike.

    python -m benchmarks.grouped_compute --quick
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experts.compute import Placed, apply_experts
from experts.kinds import get_kind
from routing.plan import Plan

LOADS = ("even", "skewed")


def make_plan(key: jax.Array, rows: int, k: int, num: int, load: str) -> Plan:
    """A plan of K distinct slots for each row: about even, or with popularity falling as 1 / rank."""
    scores = jax.random.gumbel(key, (rows, num))
    if load == "skewed":
        scores -= jnp.log1p(jnp.arange(num))
    return Plan(jax.lax.top_k(scores, k)[1].astype(jnp.int32), jnp.full((rows, k), 1 / k, jnp.float32))


def steps(layer: Callable, params, x: jax.Array, dtype) -> dict[str, Callable]:
    """Forward and forward + backward of `layer(params, x)`, compiled, without arguments."""
    forward = jax.jit(layer)
    gradient = jax.jit(jax.grad(lambda p, x: (layer(p, x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1)))
    x = x.astype(dtype)
    return {"forward": lambda: forward(params, x), "both": lambda: gradient(params, x)}


def medians(cases: dict[tuple, Callable], repeats: int) -> dict[tuple, float]:
    """Median milliseconds of each case, all interleaved."""
    for call in cases.values():
        jax.block_until_ready(call())
    times: dict[tuple, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def build(args: argparse.Namespace) -> dict[tuple, Callable]:
    """(backend, load, E, what) -> a call."""
    kind, dtype = get_kind(args.kind), jnp.dtype(args.dtype)
    key = jax.random.key(0)
    x = jax.random.normal(key, (args.rows, args.width), dtype)
    one = kind.init(key, 1, args.width, args.k * args.hidden, jnp.float32)
    cases: dict[tuple, Callable] = {}
    for what, call in steps(lambda p, x: kind.apply(p, x[None])[0], one, x, dtype).items():
        cases["one dense layer", "-", 1, what] = call
    for num in args.experts:
        params = kind.init(key, num, args.width, args.hidden, jnp.float32)
        for load in LOADS:
            plan = make_plan(jax.random.key(1), args.rows, args.k, num, load)
            for backend in args.backends:
                if backend == "dense" and (num > 8 or load == "skewed"):
                    continue

                def layer(inputs, x, backend=backend, num=num, slot=plan.slot):
                    params, weight = inputs
                    bank = {args.kind: Placed(params, 0, num)}
                    return apply_experts(bank, x, Plan(slot, weight), backend=backend, block_size=args.block_size)

                for what, call in steps(layer, (params, plan.weight), x, dtype).items():
                    cases[backend, load, num, what] = call
    return cases


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--kind", default="mlp")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block-size", type=int, default=None)
    parser.add_argument("--backends", nargs="+", default=["dense", "buckets", "native"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer rows, experts and repeats")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.experts, args.repeats = 512, [8], 5
    times = medians(build(args), args.repeats)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.kind}, {args.dtype},", end=" ")
    print(f"T={args.rows} D={args.width} F={args.hidden} K={args.k}")
    print(f"{'backend':<18}{'load':<8}{'E':>5}{'forward ms':>12}{'ratio':>7}{'fwd+bwd ms':>12}{'ratio':>7}")
    base = {what: times["one dense layer", "-", 1, what] for what in ("forward", "both")}
    for backend, load, num in dict.fromkeys(name[:3] for name in times):
        columns = [(times[backend, load, num, what], base[what]) for what in ("forward", "both")]
        figures = "".join(f"{mine:>12.2f}{mine / dense:>7.2f}" for mine, dense in columns)
        print(f"{backend:<18}{load:<8}{num:>5}{figures}")


if __name__ == "__main__":
    main()
