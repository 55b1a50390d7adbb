"""The main job, whole, in a few minutes on a laptop: train five tasks jointly, add a sixth, ask what the experts did.

    python examples/quickstart.py [FOLDER]

Everything goes to FOLDER (default `quickstart`): the data, the model, the pictures. Run again, it goes on where it was.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from quickstart_data import make_data
from rich.console import Console

import pathways as pw
from tasks.readers import open_reader
from tasks.splits import SPLITS

ROOT = Path(__file__).resolve().parent.parent
ADDED = "library_returns"
ADDED_STEPS = 500
"""Fewer than `add` would take by itself, so that the demo stays short."""

console = Console()


def chapter(number: int, title: str) -> None:
    """A heading."""
    console.print()
    console.rule(f"[bold]{number}. {title}", align="left", style="cyan")


def train(folder: Path) -> pw.Model:
    """Data from this machine, then one model of five tasks."""
    chapter(1, "Six small data sets, made from what is on this machine")
    sets = make_data(folder / "data")
    for name, files in sets.items():
        later = "  [dim](added later)[/dim]" if name == ADDED else ""
        console.print(f"  [bold]{name:<16}[/bold] {files['about']}{later}", soft_wrap=True)

    chapter(2, "One sparse model, five tasks: images, tables and text; classes and numbers")
    config = pw.load_config(ROOT / "configs" / "quickstart.toml")
    tasks = tuple(replace(task, **{split: str(sets[task.name][split]) for split in SPLITS}) for task in config.tasks)
    config = replace(config, tasks=tasks)
    model = pw.train(config, folder / "model", console=console)
    for name in model.tasks:
        metric, value = next(iter(model.entry(name).notes["valid"].items()))
        console.print(f"  [bold]{name:<16}[/bold] {metric} {value:.3g} on validation")
    return model


def add(folder: Path) -> None:
    """A task that was not there, for a fraction of the cost; then proof that nothing old moved."""
    chapter(3, "A week later: a sixth task")
    before = pw.open(folder / "model")
    if ADDED in before.tasks:
        console.print(f"  {ADDED} is there already, from an earlier run")
        before = pw.open(folder / "model", version=_version_before(folder))
    else:
        files = folder / "data" / ADDED
        task = pw.Task(
            ADDED,
            train=str(files / "train.jsonl"),
            valid=str(files / "valid.jsonl"),
            test=str(files / "test.jsonl"),
            target=pw.Target(("result",)),
            inputs=(pw.Input("text", "text"),),
        )
        pw.add_task(folder / "model", task, steps=ADDED_STEPS, console=console)

    chapter(4, "The old tasks are what they were")
    after, changed = pw.open(folder / "model"), []
    for name in before.tasks:
        old, new = (_predictions(model, name) for model in (before, after))
        if not old.equals(new):
            changed.append(name)
        mark = "[red]CHANGED[/red]" if name in changed else "[green]the same, bit for bit[/green]"
        console.print(f"  [bold]{name:<16}[/bold] {old.num_rows:>4} predictions on its test file: {mark}")
    if changed:
        sys.exit(f"old tasks changed: {', '.join(changed)}")


def ask(folder: Path) -> None:
    """Which experts did what."""
    chapter(5, "Ask the routing")
    model = pw.open(folder / "model")
    model.evaluate(split="test", statistics=True)
    statistics = pw.stats(model)
    query = """
        select task, layer, expert, round(100.0 * rows / sum(rows) over (partition by task, layer), 1) as percent
        from routing qualify row_number() over (partition by task, layer order by rows desc) = 1
        order by layer, task
    """
    console.print("  The favourite expert of each task in the last layer, and the percentage of its rows:")
    last = max(statistics.layers.column("layer").to_pylist())
    for row in statistics.latest("test").sql(query).to_pylist():
        if row["layer"] == last:
            console.print(f"    [bold]{row['task']:<16}[/bold] expert {row['expert']:>2}  {row['percent']:>5} %")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    from pathways import plots

    plots.save(plots.heat_map(statistics, last), pictures / "experts.png")
    plots.save(plots.similarity(statistics), pictures / "similarity.png")
    plots.save(plots.load_over_time(statistics), pictures / "load.png")
    console.print(f"  Pictures: [cyan]{pictures}/experts.png[/cyan], similarity.png, load.png")


def _predictions(model: pw.Model, task: str) -> pa.Table:
    """What a model says of every row of a task's test file."""
    path = model.entry(task).fitted.task.test
    assert path is not None
    return model.predict(task, pa.Table.from_batches(open_reader(path).batches()))


def _version_before(folder: Path) -> int:
    """The version before the added task came."""
    versions = pw.Store.open(folder / "model" / "store").log()
    return next(v.parent for v in versions if ADDED in v.message and v.parent is not None)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
    started = time.monotonic()
    pw.reuse_memory()
    train(folder)
    add(folder)
    ask(folder)
    chapter(6, "What to try next")
    console.print(f"  [bold]pathways show {folder}/model {ADDED}[/bold]      the pathway of the new task")
    console.print(f"  [bold]pathways eval {folder}/model digits --worst 5[/bold]     how good, and where it fails")
    console.print(f"  [bold]pathways stats {folder}/model --plot[/bold]              who uses which expert")
    console.print(f"\n  Done in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
