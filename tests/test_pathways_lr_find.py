"""The learning-rate finder: the smoothing and the suggestion by hand, a small sweep whole."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from tiny import make_config, make_tasks
from tolerance import assert_close

from pathways.training.lr_find import lr_find, smoothed, suggest
from tasks.errors import UserError


def test_smoothing_by_hand():
    # Means 0.1*2 = 0.2 and 0.9*0.2 + 0.1*4 = 0.58, over the weights 0.1 and 0.19.
    assert_close(smoothed([2.0, 4.0]), [2.0, 0.58 / 0.19])


def test_the_suggestion_is_where_the_loss_falls_fastest():
    rates = np.geomspace(1e-5, 1.0, 101)
    # A sigmoid in log10(rate), steepest at 1e-2, that turns and rises after 1e-1.
    at = np.log10(rates)
    losses = 1 / (1 + np.exp(4 * (at + 2))) + np.where(at > -1, 5 * (at + 1) ** 2, 0.0)
    assert suggest(rates, losses) == pytest.approx(1e-2, rel=1e-6)


@pytest.mark.parametrize("losses", [np.linspace(1, 2, 50), np.ones(50)])
def test_nothing_is_suggested_where_the_loss_never_falls(losses):
    assert suggest(np.geomspace(1e-5, 1.0, 50), losses) is None


def test_a_sweep_ends_when_the_loss_explodes_and_writes_its_curve(tmp_path, cache_folder):
    config = make_config(make_tasks(tmp_path / "data", ["wine"]), train={"clip": 1e9, "accumulate": 2})
    curve = lr_find(config, tmp_path / "out", steps=60, low=1e-4, high=1e6, quiet=True)
    assert 8 <= len(curve.rates) == len(curve.losses) < 60
    ratio = curve.rates[1:] / curve.rates[:-1]
    assert_close(ratio, np.full(len(ratio), 1e10 ** (1 / 59)))
    assert curve.suggestion is not None
    assert 1e-4 < curve.suggestion < 10
    with (tmp_path / "out" / "lr_find.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert_close([float(row["loss"]) for row in rows], curve.losses)
    assert (tmp_path / "out" / "lr_find.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [{"low": 1.0, "high": 0.1}, {"low": 0.0}, {"steps": 2}])
def test_a_range_that_is_none_is_refused(tmp_path, arguments):
    with pytest.raises(UserError, match="needs a range"):
        lr_find(make_config(), tmp_path, **arguments)
