"""Training over several devices: the numbers of one device, and clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import make_config, make_tasks
from tolerance import assert_close

from pathways.config import Config, MeshOptions
from pathways.devices import mesh_of
from pathways.monitor import read_metrics
from pathways.training.joint import train
from tasks.errors import UserError


def config_on(folder: Path, devices: int) -> Config:
    tasks = make_tasks(folder, ("wine", "words"))
    config = make_config(tasks, train={"steps": 4, "rows": 4, "log_every": 1, "eval_every": 0, "checkpoint_every": 0})
    return replace(config, mesh=MeshOptions(devices))


def test_four_devices_give_the_numbers_of_one(tmp_path: Path) -> None:
    models, logs = [], []
    for devices in (1, 4):
        models.append(train(config_on(tmp_path, devices), tmp_path / f"on{devices}", quiet=True))
        logs.append([row for row in read_metrics(tmp_path / f"on{devices}" / "metrics.jsonl") if "loss" in row])
    for key in ("loss", "balance_loss", "grad_norm", "balance"):
        assert_close([row[key] for row in logs[1]], [row[key] for row in logs[0]])
    one, four = (model.view for model in models)
    for name in one.digests():
        if name.startswith(("banks/", "gates/", "heads/", "trunk/", "norms/")) and "candidates" not in name:
            # Adam divides by the root of a second moment that starts at zero: 4 steps of 1e-2 can differ by a few 1e-5.
            assert_close(four.read(name), one.read(name), scale=10.0)
    counted = [np.asarray([row["rows"] for row in log]) for log in logs]
    assert np.array_equal(*counted)


@pytest.mark.parametrize(("devices", "rows", "expected"), [(9, 4, "1 to 8"), (0, 4, "1 to 8"), (3, 4, "3 or 6")])
def test_impossible_meshes_are_refused(tmp_path: Path, devices: int, rows: int, expected: str) -> None:
    config = config_on(tmp_path, devices)
    with pytest.raises(UserError, match=expected):
        mesh_of(replace(config, train=replace(config.train, rows=rows)))


def test_all_devices_are_taken_when_asked_for(tmp_path: Path) -> None:
    config = config_on(tmp_path, -1)
    assert mesh_of(replace(config, train=replace(config.train, rows=16))).size == len(jax.devices())
