"""The sub-model a new task is trained in: what it borrows, what is made for it, and where that will stand.

Nothing is written here. Borrowed arrays come from the store, new ones lie over it: norms, gate columns and the parts
of the encoders that the task's rows touch as copies, fresh experts with zero output, a zero head.

Axis letters: D width, M candidates of the gate, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from flax import nnx

from experts.kinds import get_kind
from pathways.adding.search import Choice, free_experts
from pathways.assemble import Part
from pathways.model import Model
from pathways.network.encoders import LOOKUPS, make_encoder
from pathways.pathway import BASE, GATE_LEAVES, EncoderCopy, Experts, GateSpec, Pathway, private
from pathways.submodel import SubModel, TaskEntry, read_submodel
from tasks.cache import EncodedSplit
from tasks.fitted import FittedTask

JITTER = 1e-3
"""What is added to a fresh expert's gate column so that no two are equal: its deviation, as a part of the column's."""
TOKENS_AT_ONCE = 1 << 20

Read = Callable[[list[Part]], list[np.ndarray]]


@dataclass(frozen=True)
class Start:
    """A new task before training.

    Attributes:
        sub: the network it is trained in, holding it alone.
        gate: its candidates.
        fresh: per routed layer, the experts made for it.
        made_encoders: streams whose encoder is made for it.
        copied: what it has of the other encoders as a copy of its own.
        borrowed: the parts of the store that `sub` was read from.
    """

    sub: SubModel
    gate: GateSpec
    fresh: tuple[Experts, ...]
    made_encoders: tuple[str, ...]
    copied: EncoderCopy
    borrowed: tuple[Part, ...]

    @property
    def entry(self) -> TaskEntry:
        return self.sub.entries[0]


def reference_submodel(
    model: Model, fitted: FittedTask, streams: tuple[str, ...], group: tuple[str, str], seed: int
) -> SubModel:
    """The new task on borrowed norms and gate, frozen: a zero head, and a fresh encoder where the model has none.

    A head for whole examples has taps.
    """
    entry = TaskEntry(fitted, Pathway(fitted.task.name, streams, *group, taps=not fitted.is_token_level), {})
    read = overlay(model.read, new_components(model, entry, seed), {}, [])
    return read_submodel(model.config, [entry], model.layout([entry]), model.tokenizer, read)


def prepare(
    model: Model,
    reference: SubModel,
    choice: Choice,
    new_experts: int,
    seed: int,
    copied: EncoderCopy | None = None,
    rank: int = 0,
) -> Start:
    """Lays out the task's own sub-model and fills it.

    Args:
        copied: what it gets of the encoders as a copy of its own (`touched`); nothing by default.
        rank: of the adapter in every routed layer; 0 for none.
    """
    copied = copied or {}
    borrowed_from = reference.entries[0]
    name = borrowed_from.name
    fresh = fresh_places(model, new_experts)
    gate = GateSpec(tuple(joined(old, new) for old, new in zip(choice.experts, fresh, strict=True)))
    pathway = replace(
        borrowed_from.pathway,
        norms=private(name),
        gate=private(name),
        encoders=private(name) if copied else BASE,
        origin="added",
        parents=choice.nearest,
        owned=fresh,
        adapters=(rank,) * len(fresh) if rank else (),
    )
    entry = TaskEntry(borrowed_from.fitted, pathway, {})
    layout = model.layout([entry], {pathway.gate: gate}, copied)
    whole = new_components(model, entry, seed)
    whole[f"norms/{pathway.norms}"] = model.view.read(f"norms/{borrowed_from.pathway.norms}")
    whole |= encoder_components(model, pathway.encoders, copied)
    whole |= gate_components(
        model, pathway, gate, choice, gate_sources(model, choice, borrowed_from.pathway.gate), seed
    )
    whole |= adapter_components(model, pathway, seed)
    if choice.nearest and model.config.model.gate.scope == "task_embedding":
        whole[f"heads/{name}/embedding"] = model.view.read(f"heads/{choice.nearest[0]}/embedding")
    used: list[Part] = []
    read = overlay(model.read, whole, fresh_rows(model, fresh, seed), used)
    sub = read_submodel(model.config, [entry], layout, model.tokenizer, read)
    return Start(sub, gate, fresh, missing_encoders(model, pathway.streams), copied, tuple(used))


def touched(model: Model, train: EncodedSplit) -> EncoderCopy:
    """Of the encoders that the model has for these rows: every weight, and of tables the rows that they look up."""
    found: EncoderCopy = {}
    for stream in train.streams:
        for name in sorted(model.view.names(f"encoders/{stream}/")):
            leaf = name.rpartition("/")[2]
            field = LOOKUPS[stream].get(leaf)
            size = model.view.array_info(name)[0][0] if field else 0
            found[f"{stream}/{leaf}"] = tuple(_seen(train.fields[stream][field], size)) if field else None
    return found


def _seen(values: np.ndarray, size: int) -> list[int]:
    """The rows of a table of `size` that some of `values [t]` look up; read in slices, as the values may be mapped."""
    seen = np.zeros(size, bool)
    for begin in range(0, len(values), TOKENS_AT_ONCE):
        seen[np.minimum(values[begin : begin + TOKENS_AT_ONCE], size - 1)] = True
    return np.flatnonzero(seen).tolist()


def encoder_components(model: Model, encoders: str, copied: EncoderCopy) -> dict[str, np.ndarray]:
    """The copies, as the shared encoders have them."""
    shared = model.view.read_many(dict.fromkeys(f"encoders/{leaf}" for leaf in copied))
    return {
        f"encoders/{encoders}/{leaf}": value if rows is None else value[np.asarray(rows, np.int64)]
        for (leaf, rows), value in zip(copied.items(), shared.values(), strict=True)
    }


def joined(chosen: Experts, fresh: Experts) -> Experts:
    """Chosen, then fresh ones of each kind. Their order is that of the gate's columns and survives renumbering."""
    kinds = dict.fromkeys([*chosen, *fresh])
    return {kind: (*chosen.get(kind, ()), *fresh.get(kind, ())) for kind in kinds}


def fresh_kind(model: Model) -> str | None:
    """The kind of new experts: the first of the model's that can start silent."""
    return next((kind for kind in model.config.model.experts if get_kind(kind).output_names), None)


def fresh_places(model: Model, numbers: int | Sequence[int]) -> tuple[Experts, ...]:
    """Per routed layer, places for new experts: freed ones first, then past the end of the bank; ascending.

    Args:
        numbers: of new experts, in every layer or in each.
    """
    kind = fresh_kind(model)
    numbers = [numbers] * len(model.bank_sizes) if isinstance(numbers, int) else numbers
    places: list[Experts] = []
    for number, sizes, free in zip(numbers, model.bank_sizes, free_experts(model), strict=True):
        freed = sorted(free.get(kind or "", ()))[:number]
        size = sizes.get(kind or "", 0)
        places.append({kind: (*freed, *range(size, size + number - len(freed)))} if kind and number else {})
    return tuple(places)


def missing_encoders(model: Model, streams: Sequence[str]) -> tuple[str, ...]:
    """Streams for which the model has no encoder yet."""
    return tuple(stream for stream in streams if not model.view.names(f"encoders/{stream}/"))


def new_components(model: Model, entry: TaskEntry, seed: int) -> dict[str, np.ndarray]:
    """A zero head (and task embedding), and the encoders that the model lacks, freshly made."""
    config, outputs, head = model.config.model, entry.fitted.num_outputs, f"heads/{entry.name}"
    taps = (outputs, config.layers * config.width)
    shapes = {"kernel": (outputs, config.width), "bias": (outputs,), "embedding": (config.width,), "taps": taps}
    found = {f"{head}/{leaf}": np.zeros(shape, np.float32) for leaf, shape in shapes.items()}
    for stream in missing_encoders(model, entry.pathway.streams):
        options, rngs = model.config.encoders, nnx.Rngs(params=seed)
        state = nnx.state(make_encoder(stream, options, options.vocab_size, config.width, rngs), nnx.Param)
        found |= {f"encoders/{stream}/{leaf}": np.asarray(v) for leaf, v in nnx.to_pure_dict(state).items()}
    return found


def gate_sources(model: Model, choice: Choice, borrowed: str) -> list[str]:
    """Gates to take columns from: one shared by tasks is asked first; where every task has a gate of its own, those of
    the nearest tasks are."""
    theirs = [model.entry(task).pathway.gate for task in choice.nearest]
    own_gates = model.config.model.gate.scope == "task"
    return list(dict.fromkeys([*theirs, borrowed] if own_gates else [borrowed, *theirs]))


def adapter_components(model: Model, pathway: Pathway, seed: int) -> dict[str, np.ndarray]:
    """The factors of the adapters: the first random, the second zero, so that an adapter is silent until trained."""
    width, rng, found = model.config.model.width, np.random.default_rng([seed, 2]), {}
    for number, rank in zip(model.routed_layers, pathway.adapters, strict=False):
        down = rng.standard_normal((width, rank)) * width**-0.5
        if rank:
            found[f"gates/{pathway.gate}/layer{number}/adapter_in"] = down.astype(np.float32)
            found[f"gates/{pathway.gate}/layer{number}/adapter_out"] = np.zeros((rank, width), np.float32)
    return found


def gate_components(
    model: Model, pathway: Pathway, gate: GateSpec, choice: Choice, sources: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """The gate's columns: a chosen expert's as the first of `sources` has it that knows it; a fresh expert's like that
    of an expert the task prefers, so that rows come to it from the first step on."""
    rng = np.random.default_rng([seed, 1])
    found = {}
    for layer, number in enumerate(model.routed_layers):
        columns = [columns_of(model.gate(source).candidates[layer]) for source in sources]
        wanted = columns_of(gate.candidates[layer])
        for leaf in GATE_LEAVES:
            names = [f"gates/{source}/layer{number}/{leaf}" for source in sources]
            if not model.view.has(names[0]):
                continue
            arrays = list(model.view.read_many(dict.fromkeys(names)).values())
            value = np.zeros((*arrays[0].shape[:-1], len(wanted)), np.float32)
            for slot, column in wanted.items():
                source = next((i for i, known in enumerate(columns) if slot in known), None)
                if source is not None:
                    value[..., column] = arrays[source][..., columns[source][slot]]
            fresh = [wanted[kind, i] for kind, indices in pathway.owned[layer].items() for i in indices]
            _fill_fresh(value, fresh, [wanted[slot] for slot in choice.ranked[layer]], leaf, rng)
            found[f"gates/{pathway.gate}/layer{number}/{leaf}"] = value
    return found


def _fill_fresh(value: np.ndarray, fresh: list[int], ranked: list[int], leaf: str, rng: np.random.Generator) -> None:
    for turn, column in enumerate(fresh):
        like = value[..., ranked[turn % len(ranked)]]
        noise = rng.standard_normal(like.shape) * np.std(like) * JITTER
        value[..., column] = like + (0.0 if leaf == "bias" else noise)


def columns_of(candidates: Experts) -> dict[tuple[str, int], int]:
    """(kind, index) of each candidate -> its column in the gate's arrays."""
    slots = [(kind, index) for kind, indices in candidates.items() for index in indices]
    return {slot: column for column, slot in enumerate(slots)}


def fresh_rows(model: Model, fresh: Sequence[Experts], seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bank -> (places, values) of the fresh experts."""
    config, found = model.config.model, {}
    for layer, (number, places) in enumerate(zip(model.routed_layers, fresh, strict=True)):
        for kind, index in places.items():
            key = jax.random.fold_in(jax.random.key(seed), layer)
            for leaf, value in get_kind(kind).fresh(key, len(index), config.width, config.hidden).items():
                found[f"banks/layer{number}/{kind}/{leaf}"] = (np.array(index), np.asarray(value))
    return found


def overlay(
    read: Read, whole: dict[str, np.ndarray], rows: dict[str, tuple[np.ndarray, np.ndarray]], used: list[Part]
) -> Read:
    """A reader that gives `whole` arrays and `rows` of banks by name, and everything else from `read`.

    Appends to `used` what `read` was asked.
    """

    def overlaid(parts: list[Part]) -> list[np.ndarray]:
        asked = []
        for part in parts:
            if part.name in whole:
                continue
            if part.name in rows:
                index = np.asarray(part.rows)
                part = replace(part, rows=index[~np.isin(index, rows[part.name][0])])
            asked.append(part)
        used.extend(asked)
        stored = iter(read(asked))
        return [_merged(part, whole, rows, stored) for part in parts]

    return overlaid


def _merged(
    part: Part, whole: dict[str, np.ndarray], rows: dict[str, tuple[np.ndarray, np.ndarray]], stored
) -> np.ndarray:
    if part.name in whole:
        value = whole[part.name]
        return value if part.rows is None else value[part.rows]
    value = next(stored)
    if part.name not in rows:
        return value
    index, (places, made) = np.asarray(part.rows), rows[part.name]
    new = np.isin(index, places)
    out = np.zeros((len(index), *made.shape[1:]), made.dtype)
    out[~new] = value
    out[new] = made[np.searchsorted(places, index[new])]
    return out
