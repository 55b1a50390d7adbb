"""What the commands about the life of a task do, with what the parser understood."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pathways import report

MOST = 30
"""Lines of one kind that a difference shows as text; JSON has all."""


def run_update(args: Namespace) -> None:
    from pathways.cli.commands import set_up_jax
    from pathways.life import update_task
    from pathways.model import Model

    set_up_jax()
    options = {name: getattr(args, name) for name in ("valid", "test", "steps", "seed", "force", "quiet")}
    card = update_task(args.model, args.task, args.data, **options)
    if args.quiet:
        card.render()
    print(f"Version {Model.open(args.model).version}: {args.task} updated")


def run_copy(args: Namespace) -> None:
    from pathways.cli.commands import set_up_jax
    from pathways.life import copy_task

    set_up_jax()
    done = copy_task(args.model, args.task, args.new)
    print(f"Version {done.number}: {done.message}")


def run_rename(args: Namespace) -> None:
    from pathways.cli.commands import set_up_jax
    from pathways.life import rename_task

    set_up_jax()
    done = rename_task(args.model, args.task, args.new)
    print(f"Version {done.number}: {done.message}")


def run_lineage(args: Namespace) -> None:
    from pathways.life.ancestry import as_text, lineage
    from pathways.model import Model

    found = lineage(Model.open(args.model, args.at), args.task)
    if args.plot:
        from pathways.life.drawing import save_drawing

        print(save_drawing(found, Path(args.plot)))
    elif args.format == "json":
        _json(found.to_json())
    else:
        print(as_text(found))


def run_who_uses(args: Namespace) -> None:
    from pathways.life.users import check_expert, read_expert, who_uses
    from pathways.model import Model

    model = Model.open(args.model, args.at)
    expert = check_expert(model, read_expert(" ".join(args.expert)))
    rows = [[use.task, use.share, "its own" if use.own else "shared"] for use in who_uses(model, expert)]
    if not rows and args.format == "table":
        print(f"No task can choose {expert}.")
        return
    columns = [report.Column("task", "word"), report.Column("share of its choices", "percent"), report.Column("as")]
    report.table(f"tasks that can choose {expert}", columns, rows, format=args.format)


def run_diff(args: Namespace) -> None:
    from pathways.life import diff
    from pathways.model import Model

    found = diff(Model.open(args.model, args.a), Model.open(args.model, args.b), args.task)
    if args.format == "json":
        _json(found.to_json())
        return
    _list("tasks", [f"{what:<8} {task}" for task, what in found.tasks.items()])
    _list("experts", [f"{what:<8} {expert}" for expert, what in found.experts.items()])
    metrics = found.metrics.items()
    _list("scores on cards", [f"{task}: {name} {_number(a)} to {_number(b)}" for task, (name, a, b) in metrics])
    sized = [(one, "" if one.bytes is None else f"  {report.size(one.bytes)}") for one in found.components]
    _list("components", [f"{one.what:<8} {one.name}{size}" for one, size in sized])
    if not found.components:
        print("no difference")


def _list(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"{report.integer(len(lines))} {title}")
        print("\n".join(f"  {line}" for line in lines[:MOST]))
        if len(lines) > MOST:
            print(f"  and {report.integer(len(lines) - MOST)} more")


def _number(value: float | None) -> str:
    return "–" if value is None else report.number(value)


def run_pin(args: Namespace) -> None:
    from pathways.model import open_for_writing
    from pathways.store.pins import pinned

    store, _ = open_for_writing(args.model)
    if args.remove:
        store.unpin(args.name)
        print(f"No version is called {args.name} any more.")
        return
    at = pinned(store.path, store.pins(), args.at) if isinstance(args.at, str) else args.at
    number = store.pin(args.name, at)
    print(f"Version {number} is called {args.name}: `--at {args.name}` opens it, and compaction keeps it.")


def run_collect(args: Namespace) -> None:
    from pathways.cli.commands import set_up_jax
    from pathways.life.garbage import collect, garbage
    from pathways.model import Model

    set_up_jax()
    if args.dry_run:
        found, version = garbage(Model.open(args.model)), None
    else:
        found, version = collect(args.model)
    _list("experts that no gate can choose", [str(expert) for expert in found.experts])
    _list("components that no task needs", found.components)
    if not found.experts and not found.components:
        print("Everything is needed.")
    elif version is not None:
        print(f"Version {version.number}: {version.message}. `pathways undo {args.model}` brings it back.")


def show_removal(model: str, task: str) -> None:
    """What `pathways remove --dry-run` prints."""
    from pathways.life import plan_removal
    from pathways.model import Model

    found = plan_removal(Model.open(model), task)
    print(f"{task} would go: {report.count(found.parameters)} parameters, {report.size(found.bytes)}")
    _list("experts that would be free", [str(expert) for expert in found.freed])
    _list("experts made for it that stay", [f"{expert}: {', '.join(who)}" for expert, who in found.kept.items()])
    _list("tasks that started from it, and go on without", found.children)
    _list("components", found.components)
    print("Nothing was removed. Other tasks compute what they did before, bit for bit: the removal checks it.")


def _json(content: object) -> None:
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


COMMANDS = {
    "update": run_update,
    "copy": run_copy,
    "rename": run_rename,
    "lineage": run_lineage,
    "who-uses": run_who_uses,
    "diff": run_diff,
    "pin": run_pin,
    "collect": run_collect,
}
