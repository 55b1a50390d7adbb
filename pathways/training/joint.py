"""Joint training: many tasks, one model, from task specs to the first committed version."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pathways.adding.protect import make_probe
from pathways.assemble import Layout, components, plan_network
from pathways.catalogue import new_catalogue
from pathways.config import Config, check
from pathways.convolution import pooled_width
from pathways.counting import to_counts
from pathways.data import (
    Data,
    cache_folder,
    encode_tasks,
    fit_tasks,
    fit_tokenizer,
    streams_of,
    subset,
    task_weights,
    train_shape,
)
from pathways.devices import Placement, mesh_of
from pathways.model import (
    RETRIEVAL,
    STATISTICS,
    STORE,
    TRAINED,
    Model,
    changes_for,
    create_store,
    manifest_document,
    row_chunked,
    task_document,
)
from pathways.monitor import CURVES, EVENTS, METRICS, Monitor
from pathways.pathway import BASE, GateSpec, Pathway, private
from pathways.predictions import predict_examples
from pathways.profile import PROFILE_ROWS, profiles
from pathways.quality import Chosen, figures, mean_quality, quality
from pathways.retrieval import table_of
from pathways.statistics.writer import StatisticsWriter
from pathways.store import Store
from pathways.submodel import SubModel, TaskEntry, initial_submodel
from pathways.training.checkpoint import Checkpoints, refuse_differences
from pathways.training.lazy import sleepers_for
from pathways.training.loop import Hooks, Progress
from pathways.training.loop import train as run_loop
from pathways.training.optimizer import make_optimizer, make_schedule
from pathways.training.profiler import FOLDER as PROFILE
from pathways.training.run import CONFIG, LOCK, VERSIONS, prepare_folder, resolved, sole_user
from pathways.training.step import initial_state, make_step
from tasks.batch import BatchShape
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.pipeline import TrainStream


@dataclass(frozen=True)
class Prepared:
    """All that stands before the first step."""

    config: Config
    fitted: tuple[FittedTask, ...]
    tokenizer: str
    data: Data
    weights: np.ndarray
    shape: BatchShape
    entries: tuple[TaskEntry, ...]
    gates: Mapping[str, GateSpec]
    layout: Layout


def train(
    config: Config,
    out: str | Path,
    *,
    restart: bool = False,
    quiet: bool = False,
    profile: bool = False,
    console: Any = None,
) -> Model:
    """Trains a model on the configuration's tasks and commits it to `out/store`.

    A run that was stopped goes on where it was; one that is complete is opened. `restart` begins again, which
    discards the run's checkpoints and, if there is one, the model. `profile` records a few steps in `out/profile`.

    Raises:
        UserError: a mistake in the configuration or the data, a folder with a run of another configuration or other
            data, or a run that diverges.
        Interrupted: a signal stopped it; it was saved.
    """
    check(config)
    if "://" in str(out):
        raise UserError(
            "Training needs a local folder.",
            where="out",
            got=str(out),
            fix="train locally, then copy the folder; a model there can be opened, asked and added to",
        )
    folder = Path(out)
    if restart:
        must_be_a_run(folder)
    elif _finished(folder):
        return _finished_model(config, folder)
    prepare_folder(folder)
    with sole_user(folder):
        if restart:
            # A mistake in the configuration or the data must show before anything is thrown away.
            prepare(config, lambda line: None)
            discard(folder)
        elif _finished(folder):  # by another process, meanwhile
            return _finished_model(config, folder)
        return _train(config, folder, quiet, profile, console)


def _finished(folder: Path) -> bool:
    return (folder / STORE).exists() and Store.open(folder / STORE).has("manifest")


def _finished_model(config: Config, folder: Path) -> Model:
    """The folder's model, which must be of this configuration and this data."""
    model = Model.open(folder)
    refuse_differences(trained_from(model), fingerprint(prepare(config, lambda line: None)), folder)
    return model


def _train(config: Config, folder: Path, quiet: bool, profile: bool, console: Any) -> Model:
    """Goes on from the folder's newest checkpoint, or begins, and commits."""
    checkpoints = Checkpoints(folder / "checkpoints", {})
    first = checkpoints.latest() or 0
    with Monitor(folder, config.train.steps, start_step=first, quiet=quiet, console=console) as monitor:
        prepared = prepare(config, monitor.event)
        checkpoints.fingerprint = fingerprint(prepared)
        checkpoints.check()
        prepare_folder(folder, config)
        sub = initial_submodel(config, prepared.entries, prepared.layout, prepared.tokenizer, config.train.seed)
        monitor.event(summary(prepared, sub))
        sub, progress = _run(prepared, sub, folder, checkpoints, first, monitor, profile)
        model = commit(prepared, sub, progress, folder)
        monitor.event(f"committed version {model.version} of {folder}")
    checkpoints.clear()
    return model


def trained_from(model: Model) -> dict[str, Any]:
    """The fingerprint that a trained model was committed with."""
    return model.manifest["trained"] if "trained" in model.manifest else model.view.document(TRAINED)


def prepare(config: Config, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Fits and encodes the tasks, and lays out the network."""
    fitted = tuple(fit_tasks(config.tasks, say))
    tokenizer = fit_tokenizer(fitted, config.encoders)
    folder = cache_folder() / "encoded"
    data = Data(
        encode_tasks(fitted, "train", tokenizer, config.encoders, folder),
        encode_tasks(fitted, "valid", tokenizer, config.encoders, folder),
    )
    for line in data.warnings([item.task.name for item in fitted]):
        say(line)
    weights = task_weights(fitted, data.train, config.train.temperature)
    own_gates = config.model.gate.scope == "task"
    entries = tuple(
        TaskEntry(item, Pathway(name, streams_of(item), gate=private(name) if own_gates else BASE), {})
        for item, name in ((item, item.task.name) for item in fitted)
    )
    routed = len(config.model.routed_layers)
    everything = GateSpec(tuple({k: tuple(range(n)) for k, n in config.model.experts.items()} for _ in range(routed)))
    gates = {entry.pathway.gate: everything for entry in entries}
    layout = plan_network(config.model, config.encoders.vocab_size, [e.pathway for e in entries], gates, fitted)
    shape = train_shape(config, data.train, weights, layout.size.outputs)
    return Prepared(config, fitted, tokenizer, data, weights, shape, entries, gates, layout)


def summary(prepared: Prepared, sub: SubModel) -> str:
    """A line that says what is about to be trained."""
    rows = sum(len(split) for split in prepared.data.train)
    experts = sum(sum(n for _, n in layer) for layer in prepared.layout.size.experts)
    return (
        f"{len(prepared.fitted)} tasks, {rows:,} training rows; {sub.num_parameters / 1e6:.1f}M parameters, "
        f"{experts} experts in {len(prepared.layout.experts)} layers"
    )


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint must agree with: the configuration, the tasks and, by their encoded folders, the data."""
    tables = _sections(prepared.config)
    tables["tasks"] = {}
    for item, train, valid in zip(prepared.fitted, prepared.data.train, prepared.data.valid, strict=True):
        task = item.task
        data = {"train": train.folder.name, "valid": valid.folder.name}
        # What the encoded data does not depend on.
        options = {"weight": task.weight, "loss": task.loss, "metrics": list(task.metrics)}
        tables["tasks"][task.name] = {"data": data, **options}
    return tables


def _sections(config: Config) -> dict[str, Any]:
    """The configuration but for its tasks and the devices, which may change from start to start."""
    tables = resolved(config)
    tables.pop("tasks")
    tables.pop("mesh")
    return tables


def make_hooks(prepared: Prepared, writer: StatisticsWriter | None, sub: SubModel) -> Hooks:
    """Validation on a fixed sample, statistics into tables, names for a batch's tasks."""
    rows = prepared.config.train.eval_rows
    names = sub.names
    sample = examples_of(names, prepared.data.valid, rows)

    def evaluate(sub: SubModel) -> dict[str, float]:
        found = predict_examples(sub, {task: items for task, items in sample.items() if items})
        each = {task: quality(sub.entries[sub.number(task)].fitted, out, sample[task]) for task, out in found.items()}
        seen = {task: len(sample[task]) for task in each}
        return {"quality": mean_quality(each, seen), **{f"quality/{task}": value for task, value in each.items()}}

    def record(step: int, counts: Any) -> None:
        if writer is not None and counts and counts[0].rows.sum() > 0:
            writer.append(to_counts(sub, counts, step, "train"))

    def describe(batch: dict[str, Any]) -> str:
        present = np.unique(batch["task"][batch["task"] >= 0])
        shown = ", ".join(names[i] for i in present[:8])
        return shown + (f" and {len(present) - 8} more" if len(present) > 8 else "")

    return Hooks(evaluate, record, describe)


def examples_of(names: Sequence[str], splits: Sequence[Any], most: int) -> dict[str, Chosen]:
    """At most `most` examples of each task's split, read when asked for."""
    return {name: Chosen(split, subset(split, most)) for name, split in zip(names, splits, strict=True)}


def _run(
    prepared: Prepared,
    sub: SubModel,
    folder: Path,
    checkpoints: Checkpoints,
    first: int,
    monitor: Monitor,
    profile: bool,
) -> tuple[SubModel, Progress]:
    config = prepared.config.train
    schedule = make_schedule(config)
    optimizer = make_optimizer(config, schedule)
    rows = prepared.shape.rows * prepared.shape.length
    sleepers = sleepers_for(config, sub.config.model, sub.params, rows)
    counted = config.statistics
    step = make_step(sub, optimizer, prepared.config.balance, seed=config.seed, statistics=counted, sleepers=sleepers)
    state = initial_state(sub, optimizer, statistics=counted, sleepers=sleepers)
    writer = StatisticsWriter(folder / STATISTICS, start_step=first) if config.statistics else None

    def stream(position: dict[str, Any] | None) -> TrainStream:
        return TrainStream(prepared.data.train, prepared.weights, prepared.shape, config.seed, start_state=position)

    hooks = make_hooks(prepared, writer, sub)
    mesh = mesh_of(prepared.config)
    with jax.set_mesh(mesh):
        return run_loop(
            sub,
            step,
            state,
            config,
            hooks,
            monitor,
            stream,
            checkpoints,
            jax.jit(schedule),
            placement=Placement(mesh),
            profile=folder / PROFILE if profile else None,
            settle=None if sleepers is None else jax.jit(lambda state: sleepers.settle(state.params, state.asleep)),
        )


def commit(prepared: Prepared, sub: SubModel, progress: Progress, folder: Path) -> Model:
    """Writes the trained model, whole, as one version."""
    config = prepared.config
    entries = annotate(prepared, sub, progress)
    found = components(sub.flat(), prepared.layout, config.model)
    changes = changes_for(found, lambda name: 0)
    banks = [dict(layer) for layer in prepared.layout.size.experts]
    pages, head = new_catalogue([entry.pathway for entry in entries])
    manifest = manifest_document(config, head, banks)
    whole = {"manifest": manifest, TRAINED: fingerprint(prepared), "tokenizer": {"json": prepared.tokenizer}}
    changes.documents.update(pages | whole)
    changes.put[RETRIEVAL] = table_of(entries, pooled_width(config))
    for name, spec in prepared.gates.items():
        changes.documents[f"gates/{name}/candidates"] = spec.to_json()
    for entry in entries:
        changes.documents[f"tasks/{entry.name}"] = task_document(entry)
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(entry.pathway.gate, []).append(entry.name)
    for gate, names in groups.items():
        examples = examples_of(names, [prepared.data.train[sub.number(name)] for name in names], 2)
        if (probe := make_probe(sub, examples)) is not None:
            changes.blobs[f"probes/{gate}"] = probe
    store = Store.open(folder / STORE, mode="w") if (folder / STORE).exists() else create_store(folder)
    store.commit(changes, f"trained {len(entries)} tasks jointly", row_chunked=row_chunked)
    return Model(folder, store)


def annotate(prepared: Prepared, sub: SubModel, progress: Progress) -> list[TaskEntry]:
    """Entries with notes: validation figures on all rows, profile, when and after how many steps."""
    splits = prepared.data.valid
    full = examples_of(sub.names, splits, 0)
    found = predict_examples(sub, {task: items for task, items in full.items() if items})
    known = profiles(sub, examples_of(sub.names, prepared.data.train, PROFILE_ROWS))
    made = datetime.now(UTC).isoformat(timespec="seconds")
    entries = []
    for entry in prepared.entries:
        name = entry.name
        metrics = figures(entry.fitted, found[name], examples=full[name]) if name in found else {}
        notes = {
            "valid": {name: value for name, value in metrics.items() if np.isfinite(value)},
            "profile": known[entry.name],
            "steps": progress.best_step,
            "made": made,
        }
        entries.append(replace(entry, notes=notes))
    return entries


def must_be_a_run(folder: Path) -> None:
    """Refuses to clear a folder that training did not make."""
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()) and not (folder / VERSIONS).exists():
        raise UserError(
            "This folder is not a training run's; nothing was removed.",
            where=str(folder),
            expected=f"an empty folder, or one with a {VERSIONS}",
            fix="choose another --out",
        )


def discard(folder: Path) -> None:
    """Removes what a run left in a folder that is a run's; anything else there stays."""
    for name in ("checkpoints", STORE, STATISTICS, "tensorboard", PROFILE):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS, EVENTS, CURVES, CONFIG, VERSIONS):
        (folder / name).unlink(missing_ok=True)
    if (folder / STORE).exists():
        raise UserError("The old model could not be removed.", where=str(folder))
