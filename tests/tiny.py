"""Four tiny tasks, one of each shape, and a configuration small enough to train in seconds; all from fixed seeds.

| task  | kind                          | what is to be learned                                    |
|-------|-------------------------------|----------------------------------------------------------|
| wine  | table, 3 classes              | which of three Gaussian clouds a row of numbers is from  |
| mood  | text, 2 classes               | whether a sentence has a pleasant or an unpleasant word  |
| words | text, a tag per word          | the word class of each word of a made-up grammar         |
| price | table, regression             | a linear function of two numbers and a category          |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pathways.config import BalanceOptions, Config, GateOptions, ModelConfig, TrainConfig
from tasks.encoded import EncoderSettings
from tasks.spec import Target, Task

SIZES = {"train": 60, "valid": 24, "test": 24}
NAMES = ("wine", "mood", "words", "price")

_PLEASANT = ("good", "fine", "lovely", "bright")
_UNPLEASANT = ("bad", "grim", "awful", "dull")
_THINGS = ("day", "book", "meal", "walk", "room")
_GRAMMAR = {"DET": ("the", "a"), "ADJ": ("small", "red", "old"), "NOUN": _THINGS, "VERB": ("ran", "sang", "slept")}


def make_tasks(folder: Path, names: Sequence[str] = NAMES) -> tuple[Task, ...]:
    """Writes the tasks' files under `folder` and returns their specs, all splits given."""
    makers = {"wine": _wine, "mood": _mood, "words": _words, "price": _price}
    targets = {"wine": "cultivar", "mood": "mood", "words": "tags", "price": "price"}
    tasks = []
    for name in names:
        files = {}
        for seed, (split, size) in enumerate(SIZES.items()):
            files[split] = str(makers[name](folder / f"{name}-{split}", size, np.random.default_rng(seed)))
        tasks.append(Task(name, files["train"], Target((targets[name],)), valid=files["valid"], test=files["test"]))
    return tuple(tasks)


def make_family(folder: Path, members: int, rows: int = 6) -> Task:
    """One file of `members` small schools; `each` makes a task of every school."""
    rng = np.random.default_rng(0)
    lines = []
    for school in range(members):
        for _ in range(rows):
            hours = rng.normal()
            lines.append((f"s{school:03d}", round(hours, 3), round(hours * (1 + school % 3) + rng.normal() / 5, 3)))
    path = _csv(folder / "schools", ("school", "hours", "score"), lines)
    return Task("schools", str(path), Target(("score",), "regression"), each="school")


def make_config(tasks: Sequence[Task] = (), **sections: Any) -> Config:
    """The tiny configuration; `train={"steps": 5}` and the like replace single fields of a section."""
    config = Config(
        model=ModelConfig(
            width=32,
            layers=2,
            heads=2,
            hidden=32,
            experts={"mlp": 4},
            gate=GateOptions(kind="softmax_top_k", scope="shared", top_k=2),
        ),
        encoders=EncoderSettings(
            vocab_size=320,
            max_length=32,
            image_tokens=16,
            mels=16,
            column_buckets=64,
            category_buckets=128,
        ),
        balance=BalanceOptions(),
        train=TrainConfig(
            steps=20,
            rows=4,
            learning_rate=5e-3,
            eval_every=10,
            log_every=5,
            checkpoint_every=10,
            statistics_every=10,
        ),
        tasks=tuple(tasks),
    )
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


def _wine(path: Path, rows: int, rng: np.random.Generator) -> Path:
    centres = {"barolo": (2.0, 0.0, 1.0), "grignolino": (-2.0, 1.0, 0.0), "barbera": (0.0, -2.0, -1.0)}
    names = list(centres)
    lines = []
    for i in range(rows):
        name = names[i % 3]
        values = np.round(np.asarray(centres[name]) + 0.5 * rng.normal(size=3), 3)
        lines.append((*values.tolist(), ("dry", "sweet")[i % 2], name))
    return _csv(path, ("alcohol", "acid", "hue", "style", "cultivar"), lines)


def _price(path: Path, rows: int, rng: np.random.Generator) -> Path:
    lines = []
    for i in range(rows):
        area, age = rng.uniform(20, 120), rng.uniform(0, 50)
        city = ("north", "south")[i % 2]
        price = 2.0 * area - 1.5 * age + (60 if city == "north" else 0) + rng.normal()
        lines.append((round(area, 2), round(age, 2), city, round(price, 2)))
    return _csv(path, ("area", "age", "city", "price"), lines)


def _mood(path: Path, rows: int, rng: np.random.Generator) -> Path:
    lines = []
    for i in range(rows):
        words = (_PLEASANT, _UNPLEASANT)[i % 2]
        text = f"a {words[rng.integers(4)]} {_THINGS[rng.integers(5)]}" + " it was" * int(rng.integers(3))
        lines.append({"text": text, "mood": ("pleasant", "unpleasant")[i % 2]})
    return _jsonl(path, lines)


def _words(path: Path, rows: int, rng: np.random.Generator) -> Path:
    lines = []
    for i in range(rows):
        tags = ["DET", *["ADJ"] * int(rng.integers(3)), "NOUN", "VERB"] if i else ["DET", "ADJ", "NOUN", "VERB"]
        lines.append({"tokens": [str(rng.choice(_GRAMMAR[tag])) for tag in tags], "tags": tags})
    return _jsonl(path, lines)


def _csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> Path:
    path = path.with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    return path


def _jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path = path.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def prepared_model(folder: Path, seed: int = 7, names: Sequence[str] = NAMES, **sections: Any) -> tuple[Any, Any, Any]:
    """`(Prepared, SubModel, one training batch)` of the tiny tasks, every parameter random, nothing compiled.

    Fresh heads are zero, and with them most gradients; here each array is drawn by the seed and its name, so that all
    matter and that networks which differ in their layout alone hold the same numbers.
    """
    from pathways.training.joint import prepare

    prepared = prepare(make_config(make_tasks(folder, names), **sections))
    return prepared, random_submodel(prepared, seed), first_batch(prepared)


def random_submodel(prepared: Any, seed: int = 7) -> Any:
    """See `prepared_model`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pathways.assemble import by_layer, from_layers
    from pathways.submodel import SubModel, abstract_network

    graph, state = nnx.split(abstract_network(prepared.config, prepared.layout))
    flat = {}
    for path, leaf in by_layer(nnx.to_pure_dict(state), prepared.config.model).items():
        rng = np.random.default_rng([seed, *"/".join(map(str, path)).encode()])
        matrix = len(leaf.shape) > 1 and path[-1] not in ("b_in", "b_out", "scale", "bias")
        scale = leaf.shape[-2] ** -0.5 if matrix else 0.1
        flat[path] = ((path[-1] in ("scale", "gain")) + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, from_layers(flat, prepared.config.model)))
    made = (prepared.config, prepared.entries, prepared.layout, prepared.tokenizer)
    return SubModel(*made, nnx.merge(graph, state))


def read_from(found: dict[str, Any]) -> Any:
    """What `read_submodel` reads with, from the dict that `assemble.components` gives."""

    def read(parts: Sequence[Any]) -> list[np.ndarray]:
        values = []
        for part in parts:
            rows, value = found[part.name]
            if isinstance(part.rows, int):
                value = value[part.rows]
            elif part.rows is not None:
                value = value[np.searchsorted(rows, part.rows)]
            values.append(value)
        return values

    return read


def first_batch(prepared: Any, seed: int = 0) -> dict[str, Any]:
    """The first training batch."""
    from contextlib import closing

    from tasks.pipeline import TrainStream

    with closing(TrainStream(prepared.data.train, prepared.weights, prepared.shape, seed)) as stream:
        return next(stream)


def add_untrained(path: Any, name: str, seed: int = 0, new_experts: int = 1, like: str = "wine") -> None:
    """Adds a task through the real commit without training it: another name for `like`, every parameter drawn anew.

    Its gate chooses among experts 1 and 3 of each layer and its own. Two examples of `like` are its probe.
    """
    from pathways.adding import commit, protect, search, start
    from pathways.data import cache_folder, encode_tasks
    from pathways.model import Model
    from pathways.report import Card

    model = Model.open(path)
    old = model.entry(like).fitted
    fitted = replace(old, task=replace(old.task, name=name))
    borrowed = start.reference_submodel(model, fitted, ("table",), search.reference(model), seed)
    layers = len(model.bank_sizes)
    ranked = tuple((("mlp", 1), ("mlp", 3)) for _ in range(layers))
    chosen = tuple({"mlp": (1, 3)} for _ in range(layers))
    choice = search.Choice(chosen, ranked, (like,) if model.has(like) else (), (1.0,), (), (0.0,) * 32)
    made = start.prepare(model, borrowed, choice, new_experts, seed, {"table/column": (1, 5)})
    whole, rows = commit.take_apart(made, made.sub)
    rng = np.random.default_rng([seed, *name.encode()])
    whole, rows = ({key: drawn(value, rng) for key, value in part.items()} for part in (whole, rows))
    split = encode_tasks([old], "train", model.tokenizer, model.config.encoders, cache_folder() / "encoded")[0]
    probe = protect.make_probe(made.sub, {name: [split.example(i) for i in range(2)]})
    card = Card(name, "accuracy", 0.5, {}, 1.0, 1, 1)
    digests = commit.fingerprint(model.view, made.borrowed)
    ready = commit.Trained(made.entry, made.gate, made.fresh, made.copied, whole, rows, digests, card, probe)
    commit.commit(path, ready, made.borrowed, seed)


def drawn(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other values of the same shape and type."""
    return (value + 0.3 * rng.standard_normal(value.shape)).astype(value.dtype)
