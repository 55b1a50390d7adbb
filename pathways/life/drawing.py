"""A task's lineage as a picture: its ancestors on the left, its pathway through the layers on the right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pathways.life.ancestry import Lineage, Part
from pathways.plots import LINES, style
from tasks.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN, SHARED, QUIET = LINES[1], LINES[0], "#999999"


def draw(found: Lineage) -> Figure:
    """Ancestors as boxes, their children to the right; each expert of the pathway a dot, as large as its share.

    Its own experts have one colour, those that other tasks can choose too another, with how many do.
    """
    from matplotlib.figure import Figure

    ancestors = list(_placed(found, 0))
    layers = sorted({part.expert.layer for part in found.parts})
    most = max((sum(part.expert.layer == layer for part in found.parts) for layer in layers), default=1)
    height = max(2.5, 0.45 * most + 1, 0.6 * len(ancestors) + 1)
    with style():
        figure = Figure(figsize=(4 + 1.6 * len(layers), height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.5, max(1.6 * len(layers), 2)))
        _draw_ancestors(left, ancestors)
        _draw_pathway(right, found, layers)
        figure.suptitle(f"{found.task}: where it comes from, and its way through the layers", x=0.01, ha="left")
    return figure


def save_drawing(found: Lineage, path: Path) -> Path:
    """Draws to a PNG, SVG or PDF file, by its ending.

    Raises:
        UserError: another ending.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in ("svg", "png", "pdf"):
        raise UserError("No picture has this ending.", where=str(path), expected=".svg, .png or .pdf", got=path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(found)
    with style():
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if ending == "svg" else None)
    return path


Placed = tuple[Lineage, int, int, int | None]
"""A lineage, its generation (0 the task itself), its row, and the row of its child."""


def _placed(found: Lineage, generation: int, row: int = 0, child: int | None = None) -> Iterator[Placed]:
    """Each ancestor on a row of its own, the first parent on that of its child."""
    yield found, generation, row, child
    used = 0
    for parent in found.parents:
        placed = list(_placed(parent, generation + 1, row + used, row))
        yield from placed
        used += 1 + max(place[2] for place in placed) - (row + used)


def _draw_ancestors(axes: Axes, placed: list[Placed]) -> None:
    oldest = max(generation for _, generation, _, _ in placed)
    for one, generation, row, child in placed:
        x = oldest - generation
        if child is not None:
            arrow = {"arrowstyle": "->", "color": QUIET, "shrinkA": 12, "shrinkB": 12}
            axes.annotate("", (x + 1, -child), (x, -row), arrowprops=arrow)
        colour = OWN if generation == 0 else QUIET if one.origin == "removed" else SHARED
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colour}
        axes.text(x, -row, f"{one.task}\n{one.origin}", ha="center", va="center", fontsize=8, bbox=box)
    axes.set(xlim=(-0.6, oldest + 0.6), ylim=(-max(row for _, _, row, _ in placed) - 0.7, 0.7))
    axes.set_axis_off()


def _draw_pathway(axes: Axes, found: Lineage, layers: list[int]) -> None:
    deepest = 0
    for x, layer in enumerate(layers):
        parts = [part for part in found.parts if part.expert.layer == layer]
        deepest = max(deepest, len(parts))
        for row, part in enumerate(sorted(parts, key=lambda part: (not part.own, part.expert))):
            colour = OWN if part.own else SHARED
            axes.scatter(x, -row, s=40 + 400 * (part.share or 0.0), color=colour, zorder=2)
            axes.annotate(_label(part), (x, -row), (14, 0), textcoords="offset points", va="center", fontsize=7)
    for name, colour in (("its own", OWN), ("shared", SHARED)):
        axes.scatter([], [], s=60, color=colour, label=name)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.set(xlim=(-0.4, len(layers) - 0.1), ylim=(-deepest + 0.3, 0.7), yticks=[])
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def _label(part: Part) -> str:
    others = f", {len(part.others)} other task{'s' * (len(part.others) != 1)}" if part.others else ""
    return f"{part.expert.kind} {part.expert.index}{others}"
