"""Pathways as data: which parts of the model a task uses. Frozen, JSON, no code.

A pathway names a gate; the gate's document lists, per routed layer and kind, the experts its logits mean. Tasks that
share a gate share that list, so a thousand tasks trained jointly store it once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

GATE_LEAVES, ADAPTER_LEAVES = ("gate", "noise", "bias"), ("adapter_in", "adapter_out")
"""Arrays of a gate in one layer: `[D, M]` over its candidates (`bias [M]`), and the two factors of its adapter."""

BASE = "base"
"""Name of the norms, of the shared gate and of the encoders that joint training makes."""


def private(task: str) -> str:
    """Name of the norms, the gate and the encoders that belong to one task alone; no task can be named so."""
    return f"own/{task}"


def head_names(task: str) -> list[str]:
    """Components of a task's head, by their whole names: those of `a/b` start with `heads/a/` too."""
    return [f"heads/{task}/{leaf}" for leaf in ("kernel", "bias", "embedding", "taps")]


def gate_names(gate: str, layers: Sequence[int]) -> list[str]:
    """Components of a gate that are arrays, by their whole names.

    Args:
        layers: the numbers of the routed layers.
    """
    return [f"gates/{gate}/layer{i}/{leaf}" for i in layers for leaf in (*GATE_LEAVES, *ADAPTER_LEAVES)]


EncoderCopy = dict[str, tuple[int, ...] | None]
"""What a task has of the encoders as a copy of its own: `stream/leaf` -> the rows of a lookup table, None for all."""


def encoder_names(encoders: str, copied: EncoderCopy) -> list[str]:
    """Components of a task's own copy of the encoders, with the document that says what was copied."""
    return [f"encoders/{encoders}/copied", *(f"encoders/{encoders}/{leaf}" for leaf in copied)]


Experts = dict[str, tuple[int, ...]]
"""Experts of one routed layer: kind -> indices in that layer's bank."""


@dataclass(frozen=True)
class GateSpec:
    """The candidates of a gate, per routed layer; its logits stand in the order kinds, then indices."""

    candidates: tuple[Experts, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Pathway:
    """The part of the model one task uses.

    Attributes:
        task: its name; the head is the task's own.
        streams: encoders its inputs need, of `tasks.batch.STREAMS`.
        norms: name of the stack of norm scales.
        gate: name of the gate.
        encoders: name of the encoders; those of one task are the shared ones with some parts copied.
        origin: `joint` for tasks trained together, `added` for a task added later.
        parents: tasks whose experts the search started from.
        owned: per routed layer, the experts that were made for this task.
        taps: whether its head looks at the rows before every layer too, not at the last ones only.
        adapters: per routed layer, the rank of the low-rank branch beside the experts; empty for none.
    """

    task: str
    streams: tuple[str, ...]
    norms: str = BASE
    gate: str = BASE
    encoders: str = BASE
    origin: str = "joint"
    parents: tuple[str, ...] = ()
    owned: tuple[Experts, ...] = field(default_factory=tuple)
    taps: bool = False
    adapters: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def pathway_from_json(document: dict[str, Any]) -> Pathway:
    """The inverse of `Pathway.to_json`."""
    return msgspec.convert(document, Pathway)


def gate_from_json(document: dict[str, Any]) -> GateSpec:
    """The inverse of `GateSpec.to_json`."""
    return msgspec.convert(document, GateSpec)


def encoder_copy_from_json(document: dict[str, Any]) -> EncoderCopy:
    """A document `encoders/<name>/copied`, which is an `EncoderCopy` as it is."""
    return msgspec.convert(document, EncoderCopy)
