"""What it costs to add a task to a model that holds 10, 100, 1,000 and 10,000 tasks.

    python benchmarks/library_cost.py --quick         # up to 1,000 tasks, two minutes on two cores
    python benchmarks/library_cost.py --plot docs/pictures/library-cost.svg

A small model is trained, a task added, and that pathway multiplied through the store in bulk commits: each copy has
its own norms, gate, head, rows of encoders, card, probe and two experts in each routed layer, all of other values,
so that at 10,000 tasks a layer has 20,000 experts. Each size is measured in a process of its own, after one
addition to warm up. Seconds are of CPU time, so that a busy machine does not show: the whole of `add_task` less its
retrieval; of it what meets the model (reading what is borrowed, laying out, committing); of that the commit (open,
check the old tasks, write). Bytes read are of the model, bytes written all, as asked of the system. `--experts`
instead varies the experts that a layer is trained with, from 16 to 4,096.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pathways.adding import add_task, undo
from pathways.config import Config, GateOptions, ModelConfig, TrainConfig
from pathways.model import RETRIEVAL, Model, manifest_with, open_for_writing, row_chunked, task_document
from pathways.pathway import Experts, GateSpec, encoder_names, gate_names, head_names, private
from pathways.store import Changes
from tasks.encoded import EncoderSettings
from tasks.spec import Target, Task

MB = 1e6
BULK = 500
"""Tasks of one bulk commit."""
STEPS = 20
COLUMNS = ("whole s", "model s", "commit s", "retrieval s", "memory MB", "read MB", "written MB")
READERS = ("reference_submodel", "touched", "prepare", "fingerprint", "commit")
"""What of an addition reads the model, beside the retrieval; the rest reads data and compiled programs."""


def clouds(folder: Path, name: str, seed: int, rows: int = 240) -> Task:
    """Three Gaussian clouds in four columns."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 4)) * 2
    path = folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("a", "b", "c", "d", "cloud"))
        for i in range(rows):
            writer.writerow((*np.round(centres[i % 3] + rng.normal(size=4), 3), "xyz"[i % 3]))
    return Task(name, str(path), Target(("cloud",)))


def first_model(folder: Path, experts: int) -> Path:
    """Three tasks trained jointly for a few steps, and the pathway that is multiplied."""
    from pathways.training.joint import train

    config = Config(
        model=ModelConfig(width=64, layers=2, heads=2, hidden=128, experts={"mlp": experts}, gate=GateOptions(top_k=2)),
        encoders=EncoderSettings(vocab_size=512, max_length=32, column_buckets=64, category_buckets=128),
        train=TrainConfig(steps=20, rows=4, eval_every=10, log_every=10, checkpoint_every=20),
        tasks=tuple(clouds(folder / "data", f"joint{i}", i) for i in range(3)),
    )
    train(config, folder / "model", quiet=True)
    add_task(folder / "model", clouds(folder / "data", "pattern", 7), steps=10, quiet=True)
    return folder / "model"


def grow(path: Path, tasks: int, seed: int = 0) -> None:
    """Multiplies the task `pattern` until the model has so many tasks."""
    rng = np.random.default_rng(seed)
    while (left := tasks - Model.open(path).catalogue.count) > 0:
        store, model = open_for_writing(path)
        first = model.catalogue.next
        names = [f"copy{i:06d}" for i in range(first, first + min(BULK, left))]
        store.commit(copies(model, names, rng), f"{len(names)} tasks", row_chunked=row_chunked)


def copies(model: Model, names: Sequence[str], rng: np.random.Generator) -> Changes:
    """The pathway of `pattern` once for each name, with other values."""
    entry, changes = model.entry("pattern"), Changes()
    gate, copied = model.gate(entry.pathway.gate), model.copied(entry.pathway.encoders)
    old = private("pattern")
    parts = [*head_names("pattern"), f"norms/{old}", *gate_names(old, model.routed_layers), *encoder_names(old, copied)]
    arrays = model.view.read_many({n: None for n in parts if model.view.has(n) and not n.endswith("/copied")})
    card, probe = model.view.document("cards/pattern"), model.view.blob(f"probes/{old}")
    sizes = [dict(layer) for layer in model.bank_sizes]
    pathways, embedded = [], []
    for name in names:
        owned = tuple(
            {k: tuple(size[k] + i for i in range(len(v))) for k, v in layer.items()}
            for layer, size in zip(entry.pathway.owned, sizes, strict=True)
        )
        for layer, size in zip(owned, sizes, strict=True):
            for kind, index in layer.items():
                size[kind] += len(index)
        own = private(name)
        pathways.append(replace(entry.pathway, task=name, norms=own, gate=own, encoders=own, owned=owned))
        fitted = replace(entry.fitted, task=replace(entry.fitted.task, name=name))
        notes = {**entry.notes, "profile": profile(entry.notes["profile"], rng)}
        embedded.append(np.asarray(notes["profile"]["embedding"]))
        changes.documents |= {
            f"tasks/{name}": task_document(replace(entry, fitted=fitted, pathway=pathways[-1], notes=notes)),
            f"gates/{own}/candidates": exchanged(gate, entry.pathway.owned, owned).to_json(),
            f"cards/{name}": {**card, "task": name},
            f"encoders/{own}/copied": copied,
        }
        changes.blobs[f"probes/{own}"] = probe
        for part, value in arrays.items():
            changes.put[part.replace(old, own).replace("heads/pattern/", f"heads/{name}/")] = noisy(value, rng)
    for bank in model.view.names("banks/"):
        shape, dtype, _ = model.view.array_info(bank)
        number, kind = bank.split("/")[1:3]
        layer = model.routed_layers.index(int(number.removeprefix("layer")))
        rows = sizes[layer][kind] - shape[0]
        changes.append[bank] = rng.standard_normal((rows, *shape[1:]), np.float32).astype(dtype) / 8
    changes.append[RETRIEVAL] = np.stack(embedded).astype(np.float32)
    pages, head = model.catalogue.changed(add=pathways)
    changes.documents |= {**pages, "manifest": manifest_with(model, catalogue=head, banks=sizes)}
    return changes


def exchanged(gate: GateSpec, old: Sequence[Experts], new: Sequence[Experts]) -> GateSpec:
    """The gate with its own experts replaced by others."""
    layers = []
    for layer, was, now in zip(gate.candidates, old, new, strict=True):
        other = {kind: dict(zip(was[kind], now[kind], strict=True)) for kind in was}
        layers.append({kind: tuple(other.get(kind, {}).get(i, i) for i in index) for kind, index in layer.items()})
    return GateSpec(tuple(layers))


def noisy(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (value + 0.01 * rng.standard_normal(value.shape)).astype(value.dtype)


def profile(found: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    embedding = np.asarray(found["embedding"])
    return {**found, "embedding": (embedding + 0.3 * rng.standard_normal(embedding.shape)).tolist()}


class Meter:
    """Seconds of CPU time, of all threads, and bytes of what runs under it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.read = self.written = 0

    def __enter__(self) -> Meter:
        self._start, self._io = time.process_time(), asked()
        return self

    def __exit__(self, *_: object) -> None:
        read, written = asked()
        self.seconds += time.process_time() - self._start
        self.read += read - self._io[0]
        self.written += written - self._io[1]


def asked() -> tuple[int, int]:
    """Bytes that this process has asked the system to read and to write."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["rchar"]), int(found["wchar"])


def peak() -> float:
    """The most memory that the process held since `forget_peak`, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / MB


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def metered(module: Any, name: str, meter: Meter) -> Callable[[], None]:
    """Has a function of a module run under the meter; gives what undoes it."""
    work = getattr(module, name)

    def run(*args: Any, **options: Any) -> Any:
        with meter:
            return work(*args, **options)

    setattr(module, name, run)
    return lambda: setattr(module, name, work)


def measure(path: Path, repeats: int) -> list[dict[str, float]]:
    """Adds a task, notes what it cost, and takes it back; so many times."""
    from pathways.adding import add

    task = clouds(path.parent / "data", "arrival", 99)
    found = []
    for turn in range(repeats + 1):
        retrieval, commit, reading, whole = Meter(), Meter(), Meter(), Meter()
        back = [metered(add, "choose", retrieval), metered(add, "commit", commit)]
        back += [metered(add, name, reading) for name in READERS]
        forget_peak()
        with whole:
            add_task(path, task, steps=STEPS, quiet=True)
        memory = peak()
        for one in reversed(back):
            one()
        undo(path)
        if turn:
            found.append(
                {
                    "whole s": whole.seconds - retrieval.seconds,
                    "model s": reading.seconds,
                    "commit s": commit.seconds,
                    "retrieval s": retrieval.seconds,
                    "memory MB": memory,
                    "read MB": reading.read / MB,
                    "written MB": (whole.written - retrieval.written) / MB,
                }
            )
    return found


def measured(path: Path, repeats: int) -> dict[str, list[float]]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), "--repeats", str(repeats)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(out.splitlines()[-1])
    return {name: [row[name] for row in rows] for name in COLUMNS}


def draw(path: Path, label: str, table: dict[int, dict[str, list[float]]]) -> None:
    """Each cost against the size, as a multiple of that at the smallest."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    sizes = list(table)
    for name in (name for name in table[sizes[0]] if name != "retrieval s"):
        values = [statistics.median(table[size][name]) for size in sizes]
        axes.plot(sizes, [value / values[0] for value in values], marker="o", label=name.rpartition(" ")[0])
    axes.axhline(1.1, color="0.6", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel=label, ylabel=f"times the cost at {sizes[0]}", ylim=(0, None))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pathways"}):
        figure.savefig(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    head = re.search(r'<svg [^>]*?width="([^"]+)" height="([^"]+)"[^>]*>', text)
    assert head is not None
    title = f"<title>What it costs to add a task, against the number of {label}</title>"
    ground = f'<rect width="{head[1]}" height="{head[2]}" fill="#ffffff"/>'
    path.write_text(text[: head.end()] + title + ground + text[head.end() :], encoding="utf-8")


def show(label: str, table: dict[int, dict[str, list[float]]]) -> None:
    print(f"{label:>10}  " + "  ".join(f"{name:>24}" for name in COLUMNS))
    for size, found in table.items():
        cells = (f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in found.values())
        print(f"{size:>10,}  " + "  ".join(f"{cell:>24}" for cell in cells), flush=True)
    ends = [table[size] for size in (min(table), max(table))]
    ratios = (statistics.median(ends[1][n]) / max(statistics.median(ends[0][n]), 1e-9) for n in COLUMNS)
    print(f"{'ratio':>10}  " + "  ".join(f"{ratio:>24.3f}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 1,000 tasks")
    parser.add_argument("--experts", action="store_true", help="vary the experts of a layer instead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are made; a temporary one by default")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.repeats)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = {}
        if options.experts:
            label, sizes = "experts", (16, 256, 4096)[: 2 if options.quick else 3]
            for size in sizes:
                table[size] = measured(first_model(Path(folder) / str(size), size), options.repeats)
                shutil.rmtree(Path(folder) / str(size))
        else:
            label, sizes = "tasks", (10, 100, 1000, 10_000)[: 3 if options.quick else 4]
            path = first_model(Path(folder), 8)
            for size in sizes:
                grow(path, size)
                table[size] = measured(path, options.repeats)
        show(label, table)
        if options.plot:
            draw(options.plot, label, table)
        print(f"greatest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


if __name__ == "__main__":
    main()
