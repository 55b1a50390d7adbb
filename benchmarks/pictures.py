"""Pictures of figures, made like the other pictures of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, path: Path, title: str) -> None:
    """Writes a figure; an SVG gets a title, and a ground of its own to be read on any page. The same figure gives the
    same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pathways"}):
        figure.savefig(path, metadata={"Date": None})
    if path.suffix == ".svg":
        text = path.read_text(encoding="utf-8")
        head = re.search(r'<svg [^>]*?width="([^"]+)" height="([^"]+)"[^>]*>', text)
        assert head is not None
        ground = f'<title>{title}</title><rect width="{head[1]}" height="{head[2]}" fill="#ffffff"/>'
        path.write_text(text[: head.end()] + ground + text[head.end() :], encoding="utf-8")
