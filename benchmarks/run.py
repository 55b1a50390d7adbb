"""Every benchmark of speed, one after the other: `make bench`, `make bench-quick`.

    python -m benchmarks.run --out runs/bench             # most of an hour on an idle machine with two cores
    python -m benchmarks.run --out runs/bench --quick     # a small size of each
    python -m benchmarks.run --out runs/bench --only store startup

What each prints goes to the screen and to `<out>/<name>.txt`, its figures to `<out>/<name>.json`. One that fails is
reported at the end and does not stop the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import ROOT

BENCHMARKS: dict[str, list[str]] = {
    "startup": [],
    "store": [],
    "train_step": ["--statistics", "--steps", "60"],
    "step_profile": ["--plot", "{out}/step-profile.svg"],
    "adding_cost": [],
    "whole_step": ["--ablate", "--plot", "{out}/whole-step.svg"],
    "grouped_compute": ["--plot", "{out}/grouped-compute.svg"],
    "peers": [],
}
"""Module -> its arguments at full size. `--quick` replaces them, and `--json` is added to both."""


def run(name: str, arguments: list[str], out: Path) -> bool:
    """Runs one benchmark, showing and keeping what it prints; whether it ended well."""
    command = [sys.executable, "-u", "-m", f"benchmarks.{name}", *arguments, "--json", str(out / f"{name}.json")]
    began = time.monotonic()
    print(f"== {name} {' '.join(arguments)}", flush=True)
    with (out / f"{name}.txt").open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        status = process.wait()
    print(
        f"== {name}: {'done' if status == 0 else f'failed ({status})'} in {time.monotonic() - began:.0f} s\n",
        flush=True,
    )
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--quick", action="store_true", help="a small size of each")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help="these; all by default")
    parser.add_argument("--torch", help="a Python with torch and transformers, for `peers`")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    # Without torch the peers are all jax, which a quick look can do without.
    usual = [name for name in BENCHMARKS if name != "peers" or options.torch or not options.quick]
    for name in options.only or usual:
        arguments = ["--quick"] if options.quick else [word.format(out=out) for word in BENCHMARKS[name]]
        if name == "peers" and options.torch:
            arguments += ["--torch", options.torch]
        if not run(name, arguments, out):
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
