"""A data set larger than what may be held: encoded, trained on and evaluated in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("harbour", "lantern", "meadow", "quarry", "thistle", "anchor", "bramble", "cinder", "ember", "furrow")
PROGRAM = """
import re, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny import make_config
import pathways as pw
task = pw.Task("big", sys.argv[1], pw.Target(("y",)), inputs=(pw.Input("x0", "number"), pw.Input("words", "text")))
config = make_config((task,), train={"steps": 6, "eval_every": 3, "eval_rows": 200, "checkpoint_every": 3})
# The process's own pages: those of mapped files are the system's to drop, and how many it keeps is not ours to say.
most = 0
def watch():
    global most
    while True:
        most = max(most, int(re.search("RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
model = pw.train(config, Path(sys.argv[2]), quiet=True)
print(model.entry("big").fitted.train_rows, most / 1024)
"""


def peak(folder: Path, rows: int) -> tuple[int, int, float]:
    """Bytes of a made CSV, its training rows, and the most memory in MB that a process needed to train on it."""
    folder.mkdir()
    path = folder / "big.csv"
    with path.open("w") as file:
        file.write("x0,words,y\n")
        for i in range(rows):
            text = " ".join(WORDS[(i * 7 + j * j) % 10] for j in range(60))
            file.write(f"{i * 0.37 % 9:.4f},row {i} {text},{'yes' if i % 3 else 'no'}\n")
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(folder / "model"), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert out.returncode == 0, out.stderr
    trained, most = out.stdout.split()
    return path.stat().st_size, int(trained), float(most)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory was needed")
def test_training_on_eighty_times_the_data_takes_hardly_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATHWAYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    peak(tmp_path / "first", 5_000)  # what compiling takes would hide the difference
    small_bytes, small_rows, small = peak(tmp_path / "small", 5_000)
    large_bytes, large_rows, large = peak(tmp_path / "large", 400_000)
    assert large_rows > 79 * small_rows > 300_000
    grown = (large_bytes - small_bytes) / 2**20
    assert grown > 150
    # The file, and its encoding of about the same size again, would be twice `grown`.
    assert large - small < 0.6 * grown, f"{grown:.0f} MB more data took {large - small:.0f} MB more memory"
