"""Time of a layer of image experts, forward and backward: chosen experts only, against every expert on every example.

    python -m benchmarks.image_experts
    python -m benchmarks.image_experts --examples 64 --side 28 --channels 32 --stride 2

Two of seven experts (two 3x3, two 5x5 and one 7x7 convolution, two pools) for each example, drawn evenly. CPU time of
the process is printed beside the wall's, as it says more on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experts.image_kinds import get_image_kind
from experts.images import apply_image_experts
from pathways.allocator import reuse_memory
from routing.plan import Plan

SIZES = {"conv3x3": 2, "conv5x5": 2, "conv7x7": 1, "max_pool": 1, "average_pool": 1}
SLOTS = sum(SIZES.values())
K = 2


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Milliseconds of one call after the first, by the wall and of CPU."""
    jax.block_until_ready(run())
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - wall) / repeats * 1e3, (time.process_time() - cpu) / repeats * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args(arguments)
    reuse_memory()
    key, rng = jax.random.key(0), np.random.default_rng(0)
    params, starts, start = {}, {}, 0
    for kind, num in SIZES.items():
        params[kind], starts[kind] = get_image_kind(kind).init(key, num, args.channels, jnp.float32), start
        start += num
    x = jax.random.normal(key, (args.examples, args.side, args.side, args.channels))
    slot = np.stack([rng.permutation(SLOTS)[:K] for _ in range(args.examples)])
    plan = Plan(jnp.asarray(slot, jnp.int32), jnp.full(slot.shape, 1.0 / K))
    for dense in (False, True):

        def loss(params: Any, x: jax.Array, weight: jax.Array, slot: jax.Array, dense: bool = dense) -> jax.Array:
            banks = {kind: (params[kind], starts[kind], num) for kind, num in SIZES.items()}
            return jnp.sum(apply_image_experts(banks, x, Plan(slot, weight), stride=args.stride, dense=dense) ** 2)

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        wall, cpu = timed(lambda step=step: step(params, x, plan.weight, plan.slot), args.repeats)
        print(f"{'every expert' if dense else 'chosen experts'}: {wall:.1f} ms, {cpu:.1f} ms of CPU", flush=True)


if __name__ == "__main__":
    main()
