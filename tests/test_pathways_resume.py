"""Killed at any point and started again, a run ends in the same bits as one that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import make_config, make_tasks

from pathways.config import Config, GateOptions
from pathways.model import Model
from pathways.monitor import read_metrics
from pathways.training.joint import train
from pathways.training.run import prepare_folder, sole_user
from tasks.errors import UserError

PROGRAM = """
import sys
from pathlib import Path
from pathways.config import load_config
from pathways.training.joint import train
from pathways.training.loop import Interrupted
try:
    train(load_config(sys.argv[1]), sys.argv[2], quiet=True)
except Interrupted as stop:
    print(stop)
    sys.exit(3)
"""

# Everything that a resumed run could forget: two batches in a step, a bias, noise, dropout, patience, the best so far.
SECTIONS = {
    "model": {"gate": GateOptions(kind="sigmoid_top_k"), "dropout": 0.1},
    "train": {
        "steps": 60,
        "accumulate": 2,
        "patience": 3,
        "eval_every": 5,
        "checkpoint_every": 4,
        "log_every": 1,
        "learning_rate": 2e-2,
        "statistics_every": 6,
    },
}


def arrays_of(folder: Path) -> dict[str, str]:
    """Digests of all components that training made."""
    digests = Model.open(folder).view.digests()
    kinds = ("banks/", "encoders/", "gates/", "heads/", "norms/", "trunk/", "tokenizer", "probes/")
    return {name: digest for name, digest in digests.items() if name.startswith(kinds)}


def start(config_file: Path, folder: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PROGRAM, str(config_file), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    steps = [row["step"] for row in read_metrics(path)] if path.exists() else []
    return steps[-1] if steps else 0


def stop_at(process: subprocess.Popen, folder: Path, step: int, number: int) -> tuple[int, str]:
    """Sends a signal once the run has logged a step, or waits for its end."""
    limit = time.monotonic() + 300
    while process.poll() is None and last_step(folder) < step:
        assert time.monotonic() < limit
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(number)
    out, error = process.communicate(timeout=300)
    assert process.returncode in (0, 3, -signal.SIGKILL), error
    return process.returncode, out


def config_in(folder: Path, **changes) -> tuple[Config, Path]:
    sections = {name: {**SECTIONS.get(name, {}), **changes.get(name, {})} for name in {*SECTIONS, *changes}}
    config = make_config(make_tasks(folder / "data", ["wine", "words"]), **sections)
    prepare_folder(folder, config)
    return config, folder / "config.toml"


def check_killed_equals_whole(tmp_path, stops, **changes) -> None:
    config, file = config_in(tmp_path, **changes)
    whole = train(config, tmp_path / "whole", quiet=True)
    folder = tmp_path / "killed"
    codes = [stop_at(start(file, folder), folder, step, number)[0] for step, number in stops]
    assert any(codes), "the run was over before any signal came"
    if not (folder / "store").exists():
        train(config, folder, quiet=True)
    mine, theirs = arrays_of(tmp_path / "whole"), arrays_of(folder)
    assert len(mine) > 20
    assert mine == theirs
    resumed = Model.open(folder)
    for task in whole.tasks:
        assert resumed.entry(task).notes["valid"] == whole.entry(task).notes["valid"]
        assert resumed.entry(task).notes["steps"] == whole.entry(task).notes["steps"]
    logs = [read_metrics(path / "metrics.jsonl") for path in (tmp_path / "whole", folder)]
    kept = ("time", "rows_per_second")
    plain = [[{key: row[key] for key in row if key not in kept} for row in log] for log in logs]
    assert plain[0] == plain[1]
    assert not (folder / "checkpoints").exists()


def test_killed_and_resumed_equals_never_killed(tmp_path, cache_folder):
    """Once by SIGTERM, which saves first, once by SIGKILL somewhere between two checkpoints."""
    rng = np.random.default_rng(0)
    stops = [(int(rng.integers(2, 10)), signal.SIGTERM), (int(rng.integers(13, 19)), signal.SIGKILL)]
    check_killed_equals_whole(tmp_path, stops)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_again_and_again(tmp_path, cache_folder, seed):
    rng = np.random.default_rng(seed)
    steps = sorted(rng.choice(np.arange(1, 30), 3, replace=False).tolist())
    stops = [(step, signal.SIGKILL if rng.random() < 0.7 else signal.SIGTERM) for step in steps]
    gate = GateOptions(kind="noisy_top_k", scope="task")
    # Every other time with experts that sleep, which those of scanned layers and of accumulated batches cannot.
    sleeping = bool(seed % 2)
    model = {"gate": gate, "scan_layers": not sleeping}
    asleep = {"lazy": "on", "accumulate": 1, "moments": "bfloat16"}
    train = {"patience": 0, **(asleep if sleeping else {"moments": "factored"})}
    check_killed_equals_whole(tmp_path, stops, model=model, train=train)


def test_a_soft_stop_says_so_and_saves_at_its_step(tmp_path, cache_folder):
    _, file = config_in(tmp_path, train={"checkpoint_every": 0, "eval_every": 0, "steps": 2000})
    folder = tmp_path / "run"
    code, out = stop_at(start(file, folder), folder, 2, signal.SIGTERM)
    assert code == 3
    step = int(out.split("after step ")[1].split(";")[0])
    assert out == f"stopped by SIGTERM after step {step}; saved\n"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"{step:09d}"]
    assert last_step(folder) == step


def stopped(tmp_path, monkeypatch) -> tuple[Config, Path]:
    """A run that was cut off just before its model was committed."""
    import pathways.training.joint as joint

    config, _ = config_in(tmp_path, train={"steps": 6, "accumulate": 1, "eval_every": 3, "checkpoint_every": 3})
    with monkeypatch.context() as patch:
        patch.setattr(joint, "commit", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run", quiet=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{3:09d}"]
    return config, tmp_path / "run"


def test_what_changed_is_named_and_nothing_is_lost(tmp_path, cache_folder, monkeypatch):
    config, folder = stopped(tmp_path, monkeypatch)
    before = (folder / "config.toml").read_bytes()
    wine, words = config.tasks
    changes = {
        "train.learning_rate = 0.02": replace(config, train=replace(config.train, learning_rate=0.5)),
        "tasks.wine.weight = 1.0": replace(config, tasks=(replace(wine, weight=3.0), words)),
        "tasks.words.": replace(config, tasks=(wine,)),
        "tasks.wine.data.train": replace(config, tasks=(replace(wine, max_rows=50), words)),
    }
    for expected, changed in changes.items():
        with pytest.raises(UserError, match="another configuration or other data") as caught:
            train(changed, folder, quiet=True)
        assert expected in caught.value.expected, expected
        assert "--restart" in caught.value.fix
    assert (folder / "config.toml").read_bytes() == before
    model = train(config, folder, quiet=True)
    # A model that is complete is opened; with another configuration it is not taken for it.
    assert train(config, folder, quiet=True).version == model.version
    with pytest.raises(UserError, match="another configuration") as caught:
        train(replace(config, train=replace(config.train, steps=7)), folder, quiet=True)
    assert (caught.value.expected, caught.value.got) == ("train.steps = 6", "train.steps = 7")
    with pytest.raises(UserError, match="another configuration or other data"):
        train(replace(config, tasks=(wine,)), folder, quiet=True)
    # Beginning again looks at the data first: a mistake there costs nothing.
    with pytest.raises(UserError, match="gone"):
        train(
            replace(config, tasks=(replace(wine, train=str(tmp_path / "gone.csv")),)), folder, restart=True, quiet=True
        )
    assert train(config, folder, quiet=True).version == model.version
    other = train(replace(config, train=replace(config.train, seed=1)), folder, restart=True, quiet=True)
    assert other.config.train.seed == 1
    assert arrays_of(folder) != {}


def test_only_a_runs_own_folder_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "mine.txt").write_text("years of work")
    with pytest.raises(UserError, match="nothing was removed"):
        train(make_config(make_tasks(tmp_path / "data", ("wine",))), tmp_path, restart=True, quiet=True)
    assert (tmp_path / "statistics" / "mine.txt").read_text() == "years of work"


def test_training_needs_a_local_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="local folder"):
        train(make_config(make_tasks(tmp_path, ("wine",))), "gs://bucket/model", quiet=True)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    config = make_config(make_tasks(tmp_path / "data", ("wine",)))
    folder = tmp_path / "run"
    prepare_folder(folder)
    with sole_user(folder):
        with pytest.raises(UserError, match=f"(?s)Another process trains in this folder.*process {os.getpid()}"):
            train(config, folder, quiet=True)
        with pytest.raises(UserError, match="Another process trains"):
            train(config, folder, quiet=True, restart=True)
    with sole_user(folder):
        pass
