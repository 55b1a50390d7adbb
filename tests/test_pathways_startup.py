"""A second start compiles nothing: every program of `train`, `predict` and `eval` comes from the compilation cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from pathways.training.run import resolved

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, sys
import jax
from pathways.cli import main
found = {"/jax/core/compile/backend_compile_duration": 0, "/jax/compilation_cache/cache_hits": 0}
def note(event, *_, **__):
    if event in found:
        found[event] += 1
jax.monitoring.register_event_listener(note)
jax.monitoring.register_event_duration_secs_listener(note)
status = main(sys.argv[1:])
print("\\n" + json.dumps([status, *found.values()]))
"""


def start(cache: Path, *words: object) -> tuple[int, int]:
    """Programs that a command asked XLA for, in a process of its own, and how many of them were compiled."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=ROOT,
        env={**kept, "PATHWAYS_CACHE": str(cache), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    status, programs, loaded = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return programs, programs - loaded


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    from tiny import make_config, make_tasks

    config = make_config(make_tasks(tmp_path / "data", ("wine", "words")), train={"steps": 3}, model={"layers": 1})
    path, cache = tmp_path / "config.toml", tmp_path / "cache"
    path.write_text(tomli_w.dumps(resolved(config)), encoding="utf-8")
    train = ("train", path, "--quiet", "--out")
    predict = ("predict", tmp_path / "first", "wine", tmp_path / "data" / "wine-test.csv", "-o", tmp_path / "out.csv")
    evaluate = ("eval", tmp_path / "first")
    first = [start(cache, *words) for words in ((*train, tmp_path / "first"), predict, evaluate)]
    assert first[0][1] > 20  # the count is one: a first start compiles
    second = [start(cache, *words) for words in ((*train, tmp_path / "second"), predict, evaluate)]
    assert [compiled for _, compiled in second] == [0, 0, 0]
    # Programs of one operation each, run one by one, are loaded one by one: a start should not gather many.
    assert second[0][0] < 60
