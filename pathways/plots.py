"""Pictures as matplotlib `Figure` objects: no global state, no display, the same look for all.

Colours are safe for the colour-blind (viridis; lines after Okabe and Ito 2008). Labels are thinned where there is no
room for all, so 3 tasks and 160 tasks are both readable.

Axis letters: N tasks, E experts of one layer, R records, Y classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pathways.statistics.reader import Statistics

DPI = 150
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
LABELS = 48
"""The most labels an axis carries; beyond it every n-th is shown."""


@contextmanager
def style() -> Iterator[None]:
    """The one look: thin frames, light grid, small quiet text."""
    import matplotlib as mpl
    from cycler import cycler

    look: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=LINES),
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "image.cmap": "viridis",
    }
    with mpl.rc_context(look):
        yield


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as PNG at 150 dots per inch; the folder is made where absent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(path, dpi=DPI, format="png", facecolor="white")
    return path


def heat_map(statistics: Statistics, layer: int) -> Figure:
    """Task by expert: which share of its choices in this layer each task gives to each expert.

    Similar tasks stand side by side (leaves of an average-linkage tree over the cosine of their shares).
    """
    from pathways.statistics.flags import cosine, shares

    usage = statistics.layer_usage(layer)
    share = 100 * shares(usage.rows)
    order = similar_order(cosine(share))
    tasks = [statistics.task_names[i] for i in order]
    experts = [f"{expert.kind} {expert.index}" for expert in usage.experts]
    with style():
        figure, axes = _grid_figure(len(tasks), len(experts), tasks, experts)
        image = axes.imshow(share[order], aspect="auto", interpolation="nearest", vmin=0)
        _title(figure, f"Which experts each task uses in layer {layer} ({statistics.phase})")
        _label(axes, "x", experts, f"expert ({len(experts)})")
        _label(axes, "y", tasks, f"task ({len(tasks)}), similar ones side by side")
        _colour_bar(figure, axes, image, "share of the task's choices [%]")
    return figure


def similarity(statistics: Statistics, layer: int | None = None) -> Figure:
    """Task by task: the cosine of their shares of experts, similar tasks side by side."""
    names, matrix = statistics.similarity(layer)
    order = similar_order(matrix)
    tasks = [names[i] for i in order]
    where = "all layers" if layer is None else f"layer {layer}"
    with style():
        figure, axes = _grid_figure(len(tasks), len(tasks), tasks, tasks)
        image = axes.imshow(matrix[np.ix_(order, order)], aspect="equal", interpolation="nearest", vmin=0, vmax=1)
        _title(figure, f"Which tasks share experts ({where}, {statistics.phase})")
        _label(axes, "x", tasks, "task")
        _label(axes, "y", tasks, "task")
        if len(tasks) <= 12:
            _write_cells(axes, matrix[np.ix_(order, order)], "{:.2f}", 0.5)
        _colour_bar(figure, axes, image, "cosine of the shares of experts")
    return figure


def load_over_time(statistics: Statistics, layer: int | None = None) -> Figure:
    """Balance over the steps: one line of max/mean load per layer, or for one layer the load of each expert."""
    series = statistics.balance_over_time()
    if layer is not None:
        statistics.layer_usage(layer)
        return _load_map(statistics, layer, *series[layer])
    with style():
        figure, axes = _figure(7.5, 4)
        for i, (number, (steps, load)) in enumerate(series.items()):
            mean = load.mean(axis=1)
            balance = np.divide(load.max(axis=1), mean, out=np.zeros_like(mean), where=mean > 0)
            colour = LINES[i] if len(series) <= len(LINES) else _colours(len(series))[i]
            axes.plot(steps, balance, color=colour, label=f"layer {number}", marker="o" if len(steps) < 3 else None)
        axes.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
        axes.set_ylim(bottom=0.9)
        _title(figure, f"How evenly the experts are loaded ({statistics.phase})")
        axes.set_xlabel("step")
        axes.set_ylabel("largest / mean load (1 = even)")
        _legend(axes, len(series))
    return figure


def _load_map(statistics: Statistics, layer: int, steps: np.ndarray, load: np.ndarray) -> Figure:
    mean = load.mean(axis=1, keepdims=True)
    relative = np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)
    experts = [f"{expert.kind} {expert.index}" for expert in statistics.expert_names[layer]]
    with style():
        figure, axes = _grid_figure(len(experts), max(len(steps), 24), experts, [""])
        image = axes.imshow(relative.T, aspect="auto", interpolation="nearest", vmin=0)
        _title(figure, f"Load of each expert in layer {layer} ({statistics.phase})")
        _label(axes, "x", [f"{step:,}" for step in steps], "step", most=12, vertical=False)
        _label(axes, "y", experts, f"expert ({len(experts)})")
        _colour_bar(figure, axes, image, "load / mean load (1 = even)")
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Which class is taken for which.

    Args:
        matrix: `[Y, Y]` counts, rows the true class, columns the predicted one. Colours are shares of each row; up to
            20 classes the counts stand in the cells.
        classes: the Y names.
    """
    from pathways.statistics.flags import shares

    matrix, names = np.asarray(matrix), [str(name) for name in classes]
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"confusion matrix: expected shape {(len(names), len(names))}, got {matrix.shape}")
    share = 100 * shares(matrix.astype(np.float64))
    total = int(matrix.sum())
    accuracy = f"{100 * np.trace(matrix) / total:.1f}% right of {total:,}" if total else "no rows"
    with style():
        figure, axes = _grid_figure(len(names), len(names), names, names, cell=0.34 if len(names) <= 20 else 0.16)
        image = axes.imshow(share, aspect="equal", interpolation="nearest", vmin=0, vmax=100)
        _title(figure, f"What is taken for what: {accuracy}")
        _label(axes, "x", names, "predicted class")
        _label(axes, "y", names, "true class")
        if len(names) <= 20:
            _write_cells(axes, matrix, "{:.0f}", 50, share)
        _colour_bar(figure, axes, image, "share of the true class [%]")
    return figure


def lr_curve(
    rates: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray, suggestion: float | None
) -> Figure:
    """The learning-rate finder's sweep: smoothed loss against the rate, the suggestion marked."""
    x, y = np.asarray(rates, np.float64), np.asarray(losses, np.float64)
    finite = np.isfinite(y)
    with style():
        figure, axes = _figure(7, 4)
        axes.plot(x[finite], y[finite], color=LINES[0])
        axes.set_xscale("log")
        if finite.any():
            low, start = y[finite].min(), y[finite][0]
            axes.set_ylim(low - 0.1 * (start - low) - 1e-9, max(start, low) + 0.5 * (start - low) + 1e-9)
        if suggestion is not None:
            axes.axvline(suggestion, color=LINES[1], linestyle="--")
            label = f" suggested {suggestion:.1e}"
            axes.text(suggestion, 0.96, label, transform=axes.get_xaxis_transform(), color=LINES[1], va="top")
        _title(figure, "Loss while the learning rate grows")
        axes.set_xlabel("learning rate (log scale)")
        axes.set_ylabel("loss, smoothed")
    return figure


def learning_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A run's `metrics.jsonl` as panels: one per metric, the curves of phases and tasks together.

    Names are `<phase>/<metric>/<task>`, of which phase and task may be absent: `loss` and `valid/loss` share a panel,
    and so do `valid/quality` and that of every task. What never changes is left out. At most eight panels are drawn:
    loss and quality, then the most often logged.
    """
    panels: dict[str, list[str]] = {}
    for row in rows:
        for name in row:
            panel = panels.setdefault(name.removeprefix("valid/").partition("/")[0], [])
            if name not in panel:
                panel.append(name)
    values = {
        key: {row[name] for row in rows for name in names if row.get(name) is not None} for key, names in panels.items()
    }
    panels = {key: names for key, names in panels.items() if key not in ("step", "time") and len(values[key]) > 1}
    often = {key: sum(name in row for row in rows for name in names[:1]) for key, names in panels.items()}
    shown = sorted(panels, key=lambda key: (key != "loss", key != "quality", -often[key]))[:8]
    columns = min(len(shown), 2) or 1
    height = -(-len(shown) // columns) or 1
    with style():
        figure, _ = _figure(5 * columns + 0.5, 2.9 * height)
        figure.clear()
        for i, key in enumerate(shown):
            _panel(figure.add_subplot(height, columns, i + 1), key, panels[key], rows)
    return figure


def _panel(axes: Axes, key: str, names: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    many = len(names) > len(LINES)
    for i, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            colour: dict[str, Any] = (
                {"color": "#999999", "alpha": 0.4, "linewidth": 0.8} if many else {"color": LINES[i]}
            )
            axes.plot(steps, values, label=name, marker="o" if len(points) < 3 else None, markersize=3, **colour)
    if many:
        by_step: dict[int, list[float]] = {}
        for row in rows:
            by_step.setdefault(row["step"], []).extend(row[name] for name in names if row.get(name) is not None)
        points = [(step, float(np.median(values))) for step, values in sorted(by_step.items()) if values]
        axes.plot(*zip(*points, strict=True), color=LINES[0], label=f"median of {len(names)}")
        handles = axes.get_lines()[-1:]
        axes.legend(handles=handles, loc="best")
    elif len(names) > 1:
        axes.legend(loc="best")
    axes.set_title(key.replace("_", " "))
    axes.set_xlabel("step")
    if key == "quality":
        # A bad R2 has no bottom and would flatten all other curves; nothing is better than 1.
        axes.set_ylim(max(axes.get_ylim()[0], -0.2), 1.02)


def similar_order(matrix: np.ndarray) -> list[int]:
    """Positions so that similar ones are neighbours: the leaves of an average-linkage tree.

    Args:
        matrix: `[N, N]` similarities, 1 on the diagonal.
    """
    if len(matrix) < 3:
        return list(range(len(matrix)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - (matrix + matrix.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=len(matrix) <= 500)
    return [int(i) for i in leaves_list(tree)]


def _title(figure: Figure, text: str) -> None:
    """A title over the whole figure, so that narrow axes do not cut it."""
    figure.suptitle(_short([text], 90)[0], x=0.01, ha="left", fontsize=11, fontweight="bold")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _grid_figure(
    rows: int, columns: int, row_names: Sequence[str], column_names: Sequence[str], cell: float = 0.2
) -> tuple[Figure, Axes]:
    """A figure for a `[rows, columns]` image: cells of `cell` inches as long as it stays between 3 and 9 inches."""
    left, below = (0.07 * max(map(len, _short(names)), default=0) for names in (row_names, column_names))
    width = float(np.clip(cell * columns, 3, 9)) + left + 1.6
    height = float(np.clip(cell * rows, 2, 9)) + below + 1.0
    figure, axes = _figure(max(width, 5.6), height)
    axes.grid(False)
    return figure, axes


def _short(names: Sequence[str], most: int = 32) -> list[str]:
    """Long names cut in the middle; a dollar sign is a dollar sign, not mathematics."""
    names = [name.replace("$", r"\$") for name in names]
    return [name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}" for name in names]


def _label(axes: Axes, axis: str, names: Sequence[str], title: str, most: int = LABELS, vertical: bool = True) -> None:
    """Ticks with names on one axis, every n-th where there are more than `most`."""
    stride = -(-len(names) // most) or 1
    at = list(range(0, len(names), stride))
    shown = _short([names[i] for i in at])
    title = f"{title}; every {_ordinal(stride)} named" if stride > 1 and vertical else title
    if axis == "x":
        axes.set_xticks(at, shown, rotation=90 if vertical and max(map(len, shown), default=0) > 2 else 0)
        axes.set_xlabel(title)
    else:
        axes.set_yticks(at, shown)
        axes.set_ylabel(title)
    axes.tick_params(length=2)


def _ordinal(value: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(value, f"{value}th")


def _write_cells(axes: Axes, values: np.ndarray, form: str, half: float, colours: np.ndarray | None = None) -> None:
    """Writes the values into the cells, dark on light and light on dark; `half` is the middle of the colour scale."""
    colours = values if colours is None else colours
    for i, j in np.ndindex(*values.shape):
        if values[i, j]:
            colour = "black" if colours[i, j] > half else "white"
            text = form.format(values[i, j].item())
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)


def _colour_bar(figure: Figure, axes: Axes, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, shrink=0.9, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _colours(count: int) -> np.ndarray:
    import matplotlib as mpl

    return mpl.colormaps["viridis"](np.linspace(0, 0.95, count))


def _legend(axes: Axes, count: int) -> None:
    if 1 < count <= 40:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=-(-count // 14))
