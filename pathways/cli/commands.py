"""What each command does, with what the parser understood. Every command prints results to standard output only."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathways import report
from pathways.cli import lives
from pathways.cli.lives import show_removal
from pathways.cli.suggestions import run_suggest

Command = Callable[[Namespace], int | None]


def set_up_jax() -> None:
    """Keeps compiled programs between runs, unless `JAX_COMPILATION_CACHE_DIR` already says where.

    Raises:
        UserError: `$PATHWAYS_BACKEND` names no way to compute experts, or one that is not there.
    """
    _check_backend()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    from pathways.data import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _check_backend() -> None:
    """Refuses a backend that there is not, before anything is compiled."""
    from experts.compute import OVERRIDE, wanted_backend
    from tasks.errors import UserError

    try:
        wanted_backend()
    except ValueError as error:
        raise UserError(str(error), where=f"${OVERRIDE}", fix=f"unset {OVERRIDE}, or choose another backend") from error


def run_train(args: Namespace) -> None:
    from pathways.training.joint import train

    set_up_jax()
    model = train(_config(args), args.out, restart=args.restart, quiet=args.quiet, profile=args.profile)
    if not args.quiet:
        _print_tasks(model, "table")
        if curves := _draw_curves(Path(args.out)):
            print(f"Curves: {curves}")
        print(f"Next: pathways eval {args.out}, pathways show {args.out}, pathways stats {args.out} --plot")


def _draw_curves(folder: Path) -> Path | None:
    """The picture's path; the model is committed by now, so what goes wrong here is a warning."""
    from pathways import plots
    from pathways.monitor import CURVES, METRICS, read_metrics

    try:
        return plots.save(plots.learning_curves(read_metrics(folder / METRICS)), folder / CURVES)
    except OSError as error:
        warnings.warn(f"the curves were not drawn: {error}", stacklevel=2)
        return None


def run_lr_find(args: Namespace) -> None:
    from pathways.training.lr_find import lr_find

    set_up_jax()
    _, _, suggestion = lr_find(_config(args), args.out)
    if suggestion is None:
        print("No rate can be suggested: the loss never fell. Look at the picture.")
    else:
        print(f"Suggested: --train.learning_rate {suggestion:.1e}")
    print(f"The curve is in {Path(args.out) / 'lr_find.png'}")


def _config(args: Namespace) -> Any:
    from pathways.cli.overrides import parse_value
    from pathways.config import load_config

    given = {key.removeprefix("set:"): value for key, value in vars(args).items() if key.startswith("set:")}
    return load_config(args.config, {name: parse_value(text) for name, text in given.items()})


def run_add(args: Namespace) -> None:
    from pathways.adding import add_task, plan_task
    from tasks.config import task_from_flags

    set_up_jax()
    names = ("kind", "valid", "test", "group", "where", "encoding", "on_bad")
    keys: dict[str, Any] = {name: getattr(args, name) for name in names}
    keys["ignore"] = args.ignore or None
    task = task_from_flags(args.name, args.data, args.target, inputs=args.inputs, base=Path.cwd(), **keys)
    names = ("new_experts", "candidates", "steps", "search", "effort", "max_parameters", "seed")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options["own_encoder"] = not args.no_own_encoder
    if args.dry_run:
        print(*plan_task(args.model, task, **options), sep="\n")
        return
    # It prints the card itself unless it is to be quiet.
    card = add_task(args.model, task, **options, quiet=args.quiet)
    if args.quiet:
        card.render()


def run_remove(args: Namespace) -> None:
    from pathways.adding import remove_task

    if args.dry_run:
        show_removal(args.model, args.task)
        return
    set_up_jax()
    done = remove_task(args.model, args.task)
    print(f"Version {done.number}: {done.message}. `pathways undo {args.model}` brings it back.")


def run_undo(args: Namespace) -> None:
    from pathways.adding import undo

    set_up_jax()
    done = undo(args.model, args.to)
    print(f"Version {done.number}: {done.message}")


def run_predict(args: Namespace) -> None:
    from pathways.inference_files import predict_file

    set_up_jax()
    model = _open(args)
    options = {"format": args.format, "keep": args.keep, "encoding": args.encoding}
    count = predict_file(model, args.task, args.file, args.output, **options)
    if args.output not in (None, "-"):
        print(f"{report.integer(count)} rows in {args.output}", file=sys.stderr)


def run_eval(args: Namespace) -> None:
    from pathways.cli.evaluations import draw, show
    from pathways.evaluation import evaluate

    set_up_jax()
    found = evaluate(
        _open(args),
        args.tasks or None,
        args.split,
        data=args.data,
        limit=args.limit,
        statistics=not args.no_statistics and args.data is None,
        worst=args.worst,
    )
    show(found, args.format, details=args.details or len(found) == 1, worst=args.worst)
    if args.plots:
        for path in draw(found, Path(args.plots)):
            print(path, file=sys.stderr)


def run_tasks(args: Namespace) -> None:
    _print_tasks(_open(args), args.format)


def _print_tasks(model: Any, format: str) -> None:
    from pathways.describe import compact, task_rows

    columns, rows = task_rows(model)
    if format == "table":
        columns, rows = compact(rows)
    report.table(f"{len(rows)} tasks in {model.path}", columns, rows, format=format)


def run_show(args: Namespace) -> None:
    from pathways import describe

    set_up_jax()
    model = _open(args)
    if args.task is None:
        _facts(str(model.path), describe.model_facts(model))
        return
    _facts(args.task, describe.task_facts(model, args.task))
    print(describe.drawing(model, args.task) + "\n")
    card = describe.card_of(model, args.task)
    if card is not None:
        card.render()


def _facts(title: str, facts: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 3))
    for name, value in facts:
        grid.add_row(Text(name, "dim"), Text(value))
    console = Console()
    console.print(Text(title, "bold"))
    console.print(grid)
    console.print()


def run_stats(args: Namespace) -> None:
    from pathways import stats
    from pathways.cli.statistics import draw, show
    from pathways.model import beside

    found = stats(args.model, args.phase)
    if args.plot is not None:
        for path in draw(found, Path(args.plot or beside(args.model, "plots"))):
            print(path)
    elif args.sql:
        report.arrow_table("", found.sql(args.sql), format=args.format)
    else:
        show(found, args.table, args.format)


def run_log(args: Namespace) -> None:
    from pathways.describe import log_rows
    from pathways.model import Model

    columns, rows = log_rows(Model.open(args.model))
    report.table(f"versions of {args.model}", columns, rows, format=args.format)


def run_compact(args: Namespace) -> None:
    from pathways.model import open_for_writing
    from tasks.errors import UserError

    store, _ = open_for_writing(args.model)
    keep = {*args.keep, *store.pins().values(), store.version}
    gone = [version for version in store.log() if version.number not in keep]
    if gone and not args.keep and not args.yes:
        for version in gone:
            print(f"version {version.number} would go: {version.message}")
        raise UserError(
            "Nothing was dropped yet: there is no way back to a version that is gone.",
            where=args.model,
            expected="--yes to keep the newest version only, or --keep VERSION for those to keep beside it",
            got=f"{len(gone)} versions to drop",
        )
    done = store.compact(keep=sorted(keep))
    for version in gone:
        print(f"version {version.number} is gone: {version.message}")
    kept = ", ".join(map(str, sorted(keep)))
    print(f"{report.size(done.before)} before, {report.size(done.after)} now; kept version {kept}")


def run_verify(args: Namespace) -> int:
    from pathways.model import STORE, beside
    from pathways.store import Store

    store = Store.open(beside(args.model, STORE), args.at)
    damaged = store.verify()
    for name in damaged:
        print(name)
    if damaged:
        print(f"{len(damaged)} components of version {store.version} are damaged", file=sys.stderr)
        return 1
    print(f"version {store.version} is whole: {report.integer(len(store.names()))} components match their digests")
    return 0


def _open(args: Namespace) -> Any:
    from pathways.model import Model

    return Model.open(args.model, args.at)


COMMANDS: dict[str, Command] = {
    "train": run_train,
    "lr-find": run_lr_find,
    "add": run_add,
    "remove": run_remove,
    "undo": run_undo,
    "predict": run_predict,
    "eval": run_eval,
    "suggest": run_suggest,
    "tasks": run_tasks,
    "show": run_show,
    "stats": run_stats,
    "log": run_log,
    "compact": run_compact,
    "verify": run_verify,
    **lives.COMMANDS,
}


def print_json(content: Any) -> None:
    """One JSON document on standard output."""
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
