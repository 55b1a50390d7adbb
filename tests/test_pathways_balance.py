"""The balance losses in a real run, as in Shazeer et al. 2017, Table 6: without them a few experts take nearly all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import balance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(cache_folder):
    """64 experts, 2 for each row, float32, 300 steps; about ten seconds a row."""
    names = (
        "importance 0, load 0",
        "importance 0.1, load 0.1",
        "softmax, no balancing",
        "softmax, Switch loss 1",
        "sigmoid, bias step 0.005",
    )
    found = balance.run(steps=300, wanted=lambda setting: setting.name in names)
    return {setting.name: result for setting, result in found}


def test_importance_and_load_losses_spread_the_load(table):
    without, with_both = table["importance 0, load 0"], table["importance 0.1, load 0.1"]
    assert without.max_over_mean > 5
    assert with_both.max_over_mean < 1.5
    assert without.cv_load > 0.8 > 0.2 > with_both.cv_load
    assert without.cv_importance > 0.8 > 0.2 > with_both.cv_importance


def test_the_switch_loss_spreads_the_load(table):
    assert table["softmax, no balancing"].max_over_mean > 3
    assert table["softmax, Switch loss 1"].max_over_mean < 1.5


def test_the_bias_alone_spreads_the_load(table):
    assert table["sigmoid, bias step 0.005"].max_over_mean < 1.5
