"""Pictures: what they show is read back from the figure; every one can be written as PNG, from 1 task to 160."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathways import plots
from pathways.statistics.counts import SCHEMAS, ExpertName, LayerCounts, RoutingCounts, join, record
from pathways.statistics.reader import Statistics
from tasks.errors import UserError


def statistics(rows: np.ndarray, layers: int = 1, records: int = 1, names: list[str] | None = None) -> Statistics:
    n, e = rows.shape
    experts = [ExpertName("mlp", i) for i in range(e)]
    tables = []
    for step in range(records):
        counts = []
        for layer in range(layers):
            routed = rows.sum(axis=1)
            zeros = np.zeros(n, int)
            counts.append(LayerCounts(layer, experts, rows, rows, zeros, np.zeros((e, e), int), routed, routed))
        tables.append(record(RoutingCounts(step, "train", names or [f"task {i}" for i in range(n)], counts)))
    joined = {name: join(name, [one[name] for one in tables]) for name in SCHEMAS}
    return Statistics(**joined, experts=dict.fromkeys(range(layers), experts))


def pixels(figure, tmp_path) -> Image.Image:
    with Image.open(plots.save(figure, tmp_path / "plots" / "picture.png")) as image:
        image.load()
    return image


def overlapping(figure, axis: str) -> int:
    """How many neighbouring tick labels overlap, in a figure that was saved and so laid out."""
    axes = figure.axes[0]
    labels = axes.get_xticklabels() if axis == "x" else axes.get_yticklabels()
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    boxes.sort(key=lambda box: box.x0 if axis == "x" else box.y0)
    return sum(a.overlaps(b) for a, b in pairwise(boxes))


def test_similar_tasks_stand_side_by_side():
    # Tasks 0 and 2 are alike, 1 and 3 are alike: each pair must be neighbours.
    matrix = np.array([[1, 0, 0.9, 0], [0, 1, 0, 0.8], [0.9, 0, 1, 0], [0, 0.8, 0, 1]])
    order = plots.similar_order(matrix)
    assert sorted(order) == [0, 1, 2, 3]
    assert abs(order.index(0) - order.index(2)) == 1
    assert abs(order.index(1) - order.index(3)) == 1
    assert plots.similar_order(np.eye(2)) == [0, 1]


def test_the_heat_map_shows_shares_in_percent():
    figure = plots.heat_map(statistics(np.array([[3, 1], [0, 5]])), 0)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert dict(zip(names, shown.tolist(), strict=True)) == {"task 0": [75.0, 25.0], "task 1": [0.0, 100.0]}
    with pytest.raises(UserError, match="layers 0"):
        plots.heat_map(statistics(np.eye(2)), 5)


@pytest.mark.parametrize("number", [1, 3, 160])
def test_pictures_of_routing_are_readable(number, tmp_path):
    rows = np.random.default_rng(0).poisson(3, (number, 64 if number > 100 else 8)) + 1
    names = [f"schools/{i}_$x_" for i in range(number)]
    data = statistics(rows, layers=2, records=3, names=names)
    for figure in (plots.heat_map(data, 1), plots.similarity(data)):
        image = pixels(figure, tmp_path)
        assert overlapping(figure, "x") == 0
        assert overlapping(figure, "y") == 0
        assert len(figure.axes[0].get_yticks()) <= plots.LABELS
        assert round(image.info["dpi"][0]) == 150
        assert max(image.size) < 2600


def test_load_over_time(tmp_path):
    # Loads 3 and 1: mean 2, so 1.5 in every record.
    data = statistics(np.array([[2, 0], [1, 1]]), layers=2, records=3)
    figure = plots.load_over_time(data)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines[:2]] == ["layer 0", "layer 1"]
    assert np.asarray(lines[0].get_ydata()).tolist() == [1.5, 1.5, 1.5]
    single = plots.load_over_time(data, 1)
    assert np.asarray(single.axes[0].images[0].get_array()).tolist() == [[1.5] * 3, [0.5] * 3]
    pixels(single, tmp_path)
    assert overlapping(single, "y") == 0


@pytest.mark.parametrize("classes", [2, 10, 77])
def test_confusion(classes, tmp_path):
    matrix = np.eye(classes, dtype=int) * 3
    matrix[0, 1] = 1
    figure = plots.confusion(matrix, [f"class {i}" for i in range(classes)])
    assert np.asarray(figure.axes[0].images[0].get_array())[0, :2].tolist() == [75.0, 25.0]
    pixels(figure, tmp_path)
    assert overlapping(figure, "x") == overlapping(figure, "y") == 0
    written = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(written) == (["1", *["3"] * classes] if classes <= 20 else [])


def test_confusion_needs_a_name_for_each_class():
    with pytest.raises(ValueError, match=r"expected shape \(3, 3\), got \(2, 2\)"):
        plots.confusion(np.eye(2), ["a", "b", "c"])


def test_lr_curve(tmp_path):
    rates = np.logspace(-5, 0, 50)
    losses = np.where(rates > 0.3, np.nan, 2 - np.minimum(rates, 0.1) * 5)
    figure = plots.lr_curve(rates, losses, 1e-2)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert np.isfinite(np.asarray(axes.get_lines()[0].get_ydata())).all()
    assert "1.0e-02" in axes.texts[0].get_text()
    pixels(figure, tmp_path)
    pixels(plots.lr_curve(rates, np.full(50, np.nan), None), tmp_path)


def test_learning_curves(tmp_path):
    rows = []
    for step in range(0, 100, 10):
        row = {"step": step, "time": 0.0, "loss": 1.0, "bad_steps": 0.0, "learning_rate": step / 100}
        row["valid/loss"] = None if step == 50 else 2.0
        rows.append(row | {f"valid/quality/task {i}": i / 30 for i in range(30)})
    figure = plots.learning_curves(rows)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["loss", "quality", "learning rate"]
    assert [len(np.asarray(line.get_xdata())) for line in panels["loss"].get_lines()] == [10, 9]
    median = panels["quality"].get_lines()[-1]  # 30 tasks at 0/30 .. 29/30: the median is 14.5/30
    assert np.allclose(np.asarray(median.get_ydata()), 14.5 / 30)
    pixels(figure, tmp_path)
    pixels(plots.learning_curves([]), tmp_path)
    pixels(plots.learning_curves([{"step": 1, **{f"loss/{i}": None for i in range(20)}, "loss/20": 1.0}]), tmp_path)


def test_no_global_state():
    code = """
import sys
import matplotlib as mpl
from pathways import plots
def look():  # asking for the backend would itself load pyplot
    return [mpl.rcParams[key] for key in mpl.rcParams if "backend" not in key]
before = look()
plots.confusion([[1, 0], [0, 1]], ["a", "b"])
print(look() == before, "matplotlib.pyplot" in sys.modules)
"""
    root = Path(plots.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
