"""The grouped compute against other implementations of it, on the same rows, widths, threads and activation (SwiGLU).

    python3.11 -m venv peers && peers/bin/pip install torch transformers        # the CPU build of torch
    python -m benchmarks.peers --torch peers/bin/python
    python -m benchmarks.peers --quick                                          # 16 experts, the peers in jax alone

Peers: the expert blocks of Hugging Face transformers in torch (the loop over experts and `grouped_mm`), a layer that
dispatches with one-hot einsums into buckets and drops what overflows (as GShard does), and `lax.ragged_dot` on sorted
rows. Every implementation runs in a process of its own; the processes take turns, several rounds, and the medians of
all their passes are printed. T=4096, D=256, F=1024, K=2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS, WIDTH, HIDDEN, K = 4096, 256, 1024, 2
OURS, TORCH = ("native", "buckets"), ("eager", "grouped_mm")
MOST = {"einsum": 16, "ragged": 16, "eager": 64}
"""The most experts that an implementation is asked for: beyond, it takes minutes or more memory than there is."""
WARM_UP = 2


def jax_passes(name: str, num: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Forward and forward + backward of a layer in jax."""
    import pathways as pw

    pw.reuse_memory()
    import jax
    import jax.numpy as jnp

    from benchmarks.grouped_compute import make_plan, passes
    from experts.compute import Placed, apply_experts
    from experts.kinds import get_kind
    from routing.plan import Plan

    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH), dtype)
    bank = get_kind("swiglu").init(jax.random.key(0), num, WIDTH, HIDDEN, jnp.float32)
    plan = make_plan(jax.random.key(1), ROWS, K, num, "even")

    def einsum(inputs: Any, x: jax.Array) -> jax.Array:
        bank, weight = inputs
        capacity = -(-5 * ROWS * K // (4 * num))
        chosen = jax.nn.one_hot(plan.slot.reshape(-1), num, dtype=jnp.int32)
        place = ((jnp.cumsum(chosen, 0) - 1) * chosen).sum(1).reshape(ROWS, K)
        at = jax.nn.one_hot(place, capacity, dtype=x.dtype)
        combine = jnp.einsum("tke,tkc,tk->tec", jax.nn.one_hot(plan.slot, num, dtype=x.dtype), at, weight)
        rows = jnp.einsum("tec,td->ecd", (combine > 0).astype(x.dtype), x)
        return jnp.einsum("tec,ecd->td", combine, get_kind("swiglu").apply(bank, rows))

    def layer(inputs: Any, x: jax.Array) -> jax.Array:
        bank, weight = inputs
        return apply_experts({"swiglu": Placed(bank, 0, num)}, x, Plan(plan.slot, weight), backend=name)

    found = passes(einsum if name == "einsum" else layer, (bank, plan.weight), x)
    return {what: lambda call=call: jax.block_until_ready(call()) for what, call in found.items()}


def torch_passes(name: str, num: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """The same of a block of transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers.models.mixtral import modeling_mixtral as mixtral  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = mixtral.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=num, num_experts_per_tok=K
    )
    config._experts_implementation = name
    block = mixtral.MixtralExperts(config).to(getattr(torch, dtype))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(ROWS, WIDTH, dtype=getattr(torch, dtype), requires_grad=True)
    slot = torch.rand(ROWS, num).topk(K).indices
    weight = torch.full((ROWS, K), 1 / K, dtype=x.dtype)

    def forward() -> None:
        with torch.no_grad():
            block(x, slot, weight)

    def both() -> None:
        block.zero_grad()
        (block(x, slot, weight).float() ** 2).sum().backward()

    return {"forward": forward, "both": both}


def times(name: str, num: int, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each pass."""
    calls = (torch_passes if name in TORCH else jax_passes)(name, num, dtype)
    found: dict[str, list[float]] = {}
    for what, call in calls.items():
        for i in range(WARM_UP + repeats):
            start = time.perf_counter()
            call()
            if i >= WARM_UP:
                found.setdefault(what, []).append(1e3 * (time.perf_counter() - start))
    return found


def measure(python: str, name: str, num: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """`times` in a process of its own."""
    command = [python, str(Path(__file__).resolve()), "--one", name, "--experts", str(num), "--dtype", options.dtype]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "--repeats", str(options.repeats)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", help="a Python with torch and transformers; without it the peers in jax alone")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="timed in each round")
    parser.add_argument("--quick", action="store_true", help="16 experts, two passes")
    parser.add_argument("--json", type=Path, help="write the lines here, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.experts, options.rounds, options.repeats = [16], 1, 2
    if options.one:
        print(json.dumps(times(options.one, options.experts[0], options.dtype, options.repeats)))
        return
    pythons: dict[str, str] = dict.fromkeys((*OURS, "einsum", "ragged"), sys.executable)
    if options.torch:
        pythons |= dict.fromkeys(TORCH, str(options.torch))
    print(f"{options.dtype}, SwiGLU, T={ROWS} D={WIDTH} F={HIDDEN} K={K}")
    print(f"{'E':>5} {'implementation':<16}{'forward ms':>12}{'fwd+bwd ms':>12}")
    lines = []
    for num in options.experts:
        names = [name for name in pythons if num <= MOST.get(name, num)]
        found: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in names}
        for _ in range(options.rounds):
            for name in names:
                for what, values in measure(pythons[name], name, num, options).items():
                    found[name][what] += values
        for name in names:
            forward, both = (statistics.median(found[name][what]) for what in ("forward", "both"))
            print(f"{num:>5} {name:<16}{forward:>12.1f}{both:>12.1f}", flush=True)
            lines.append({"E": num, "implementation": name, "forward": forward, "both": both})
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
