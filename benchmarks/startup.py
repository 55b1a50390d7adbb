"""How long a start takes: `--help`, the first step of training, a prediction; with empty caches and with full ones.

    python -m benchmarks.startup                # two minutes
    python -m benchmarks.startup --quick        # half of that

The commands are run as a user runs them, on a small model of made data. `first step` is the time from the start of the
process to the first step's metrics in `metrics.jsonl`. `cold` has empty caches: it encodes the data and compiles all
programs, those of C++ too; `cached` is the same command again, for another folder. The programs of a start are
counted in runs of their own: how many were asked for, and how many of those were compiled and not loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import ROOT, Row, child, print_table, seconds, spread, surroundings, write_json

PROGRAMS, LOADED = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


def count(words: Sequence[str]) -> Row:
    """Runs a command in this process and counts the programs it asked XLA for."""
    import jax

    from pathways.cli import main

    found = {PROGRAMS: 0, LOADED: 0}

    def note(event: str, *_: object, **__: object) -> None:
        if event in found:
            found[event] += 1

    jax.monitoring.register_event_listener(note)
    jax.monitoring.register_event_duration_secs_listener(note)
    status = main(words)
    if status:
        raise SystemExit(status)
    return {"programs": found[PROGRAMS], "compiled": found[PROGRAMS] - found[LOADED]}


def of_user(cache: Path) -> dict[str, str | None]:
    """What the environment of a user whose caches are under `cache` has otherwise."""
    return {**{name: None for name in os.environ if name.startswith("JAX_")}, "PATHWAYS_CACHE": str(cache)}


def run(words: Sequence[object], cache: Path) -> float:
    """Runs `pathways words` to its end; the time it was started."""
    command, began = [sys.executable, "-m", "pathways", *map(str, words)], time.time()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=surroundings(of_user(cache)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return began


def write_config(folder: Path, quick: bool) -> Path:
    """A configuration of two steps, of about the size of the quickstart's."""
    import tomli_w

    from benchmarks.synthetic import make_config
    from pathways.training.run import resolved

    layers, width, rows = (1, 32, 256) if quick else (3, 96, 1536)
    tables = resolved(make_config(folder / "data", 16, rows=rows, layers=layers, width=width, hidden=2 * width))
    tables["train"] |= {"steps": 2, "log_every": 1}
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def starts(folder: Path, config: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds by what was measured."""
    cache, model, rows = folder / "cache", folder / "model0", folder / "data" / "task0-test.csv"
    found: dict[str, list[float]] = {}

    def train(number: int, when: str) -> None:
        out = folder / f"model{number}"
        began = run(["train", config, "--out", out, "--quiet"], cache)
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["time"] - began
        found.setdefault(f"train, first step, {when}", []).append(first)
        found.setdefault(f"train, whole command, {when}", []).append(time.time() - began)

    def predict(when: str) -> None:
        words = ["predict", model, "task0", rows, "-o", folder / "predictions.csv"]
        found.setdefault(f"predict {when}", []).append(seconds(lambda: run(words, cache)))

    train(0, "cold")
    predict("cold")
    for number in range(1, repeats + 1):
        found.setdefault("--help", []).append(seconds(lambda: run(["--help"], cache)))
        train(number, "cached")
        predict("cached")
    return found


def counted(folder: Path, config: Path) -> list[Row]:
    """The programs of each command, started for the second time."""
    environment, lines = of_user(folder / "cache"), []
    commands = {
        "train": ["train", config, "--out", folder / "counted", "--quiet"],
        "predict": ["predict", folder / "model0", "task0", folder / "data" / "task0-test.csv", "-o", folder / "p.csv"],
    }
    for name, words in commands.items():
        lines.append({"command": name, **child("benchmarks.startup", "--count", *words, environment=environment)})
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--count"]:
        print(json.dumps(count(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smaller model, three repeats")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    with TemporaryDirectory() as made:
        folder = Path(made)
        config = write_config(folder, options.quick)
        found = starts(folder, config, 3 if options.quick else options.repeats)
        programs = counted(folder, config)
    print_table([{"what": name, "seconds": spread(values, 2)} for name, values in found.items()])
    print("\nPrograms at a second start:")
    print_table(programs)
    write_json(options.json, {"seconds": found, "programs": programs})


if __name__ == "__main__":
    main()
