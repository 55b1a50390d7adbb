"""pathways: one large model, sparsely activated, that holds many tasks.

    import pathways as pw

    model = pw.train(pw.load_config("configs/quickstart.toml"), "runs/demo")
    model.predict("library_area", [{"text": "connect(host, port): opens a socket"}])
    pw.add_task("runs/demo", pw.Task("spam", "spam.csv", pw.Target(("label",))))
    pw.stats(model).tasks

Light to import: what stands behind a name is loaded when the name is first used.
"""

from __future__ import annotations

import importlib.util
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathways.adding import add_task, remove_task, undo
    from pathways.allocator import reuse_memory
    from pathways.config import BalanceOptions, Config, GateOptions, ModelConfig, TrainConfig, load_config
    from pathways.evaluation import Evaluation, evaluate
    from pathways.inference import predict, predict_many
    from pathways.inference_files import predict_file
    from pathways.life import copy_task, diff, lineage, rename_task, update_task, who_uses
    from pathways.model import Model
    from pathways.report import Card
    from pathways.statistics.reader import Statistics
    from pathways.store import Store, Version
    from pathways.training.joint import train
    from pathways.training.lr_find import lr_find
    from tasks.encoded import EncoderSettings
    from tasks.errors import UserError
    from tasks.spec import Input, Split, Target, Task

__all__ = [
    "BalanceOptions",
    "Card",
    "Config",
    "EncoderSettings",
    "Evaluation",
    "GateOptions",
    "Input",
    "Model",
    "ModelConfig",
    "Split",
    "Statistics",
    "Store",
    "Target",
    "Task",
    "TrainConfig",
    "UserError",
    "Version",
    "add_task",
    "copy_task",
    "diff",
    "evaluate",
    "lineage",
    "load_config",
    "lr_find",
    "open",
    "predict",
    "predict_file",
    "predict_many",
    "remove_task",
    "rename_task",
    "reuse_memory",
    "stats",
    "train",
    "undo",
    "update_task",
    "who_uses",
]

_HOME = {
    "BalanceOptions": "pathways.config",
    "Card": "pathways.report",
    "Config": "pathways.config",
    "EncoderSettings": "tasks.encoded",
    "Evaluation": "pathways.evaluation",
    "GateOptions": "pathways.config",
    "Input": "tasks.spec",
    "Model": "pathways.model",
    "ModelConfig": "pathways.config",
    "Split": "tasks.spec",
    "Statistics": "pathways.statistics.reader",
    "Store": "pathways.store",
    "Target": "tasks.spec",
    "Task": "tasks.spec",
    "TrainConfig": "pathways.config",
    "UserError": "tasks.errors",
    "Version": "pathways.store",
    "add_task": "pathways.adding",
    "copy_task": "pathways.life",
    "diff": "pathways.life",
    "evaluate": "pathways.evaluation",
    "lineage": "pathways.life",
    "load_config": "pathways.config",
    "lr_find": "pathways.training.lr_find",
    "predict": "pathways.inference",
    "predict_file": "pathways.inference_files",
    "predict_many": "pathways.inference",
    "remove_task": "pathways.adding",
    "rename_task": "pathways.life",
    "reuse_memory": "pathways.allocator",
    "train": "pathways.training.joint",
    "undo": "pathways.adding",
    "update_task": "pathways.life",
    "who_uses": "pathways.life",
}
"""Where each name comes from. No module of this package may be called like one of them: it would hide the name."""

_SIBLINGS = ("tasks", "routing", "experts", "sharding")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def open(path: str | os.PathLike[str], version: int | str | None = None) -> Model:
    """Opens a model for reading: its newest version, or an older one by number or name (`pathways log` lists them).

    Raises:
        UserError: there is no model, or no such version.
    """
    return import_module("pathways.model").Model.open(path, version)


def stats(model: Model | str | os.PathLike[str], phase: str | None = None) -> Statistics:
    """The routing statistics of a model, or of the folder of one, as tables: see docs/statistics.md.

    The derived tables are of the tasks and experts that the model has now; a removed task is in the stored ones only.

    Raises:
        UserError: none were recorded, or none of the phase.
    """
    return import_module("pathways.counting").open_statistics(model, phase)


def _check_siblings() -> None:
    """The four other packages have common names: another file of such a name, found first, must not be taken for one.

    Raises:
        ImportError: naming that file.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _SIBLINGS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"pathways needs its package {name!r} beside it, in {home}: install pathways-moe again")
        place = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
        if Path(place).resolve() != home / name / "__init__.py":
            raise ImportError(
                f"{place} hides the package {name!r} that belongs to pathways, in {home / name}: rename that file, or "
                "put its folder later on sys.path (a script's own folder comes first)"
            )


_check_siblings()
