"""What one task costs: parameters and bytes that are there for it alone, operations per row.

Axis letters: D width, M candidates of a gate, Y outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experts.image_kinds import get_image_kind
from experts.kinds import get_kind
from pathways.convolution import places, pooled_width
from pathways.life.users import Expert, experts_in
from pathways.model import Model
from pathways.pathway import encoder_names, gate_names, head_names, private
from pathways.store.records import DTYPES, Entry
from pathways.submodel import TaskEntry


@dataclass(frozen=True)
class Marginal:
    """The cost of one task.

    Attributes:
        parameters: numbers that are the task's alone: head, own norms, gate, rows of encoders, experts made for it.
        bytes: of all its components on disk, documents and probe too; without the nodes of the store's tree.
        operations: floating-point operations of the matrix products for one row (a token) on its way from the encoder
            to the head, two for a multiply-add; products between the tokens of an example are not counted.
    """

    parameters: int
    bytes: int
    operations: int


def own_names(model: Model, entry: TaskEntry) -> list[str]:
    """Every component under the task's own name, those that exist; experts stand in banks and are not among them."""
    task, own, pathway = entry.name, private(entry.name), entry.pathway
    names = [f"tasks/{task}", f"cards/{task}", *head_names(task), f"norms/{own}", f"probes/{own}"]
    names += [f"gates/{own}/candidates", *gate_names(own, model.routed_layers)]
    if pathway.encoders == own:
        names += encoder_names(own, model.copied(own))
    return [name for name, found in zip(names, model.view.find(names), strict=True) if found is not None]


def held(model: Model, names: Sequence[str], experts: Iterable[Expert]) -> tuple[int, int]:
    """Numbers and bytes of components that exist, and of experts, in the store."""
    parameters = size = 0
    for name, found in zip(names, model.view.find(names), strict=True):
        assert found is not None
        if found.kind == "array":
            parameters, size = parameters + math.prod(found.shape), size + array_bytes(found)
        else:
            size += len(model.view.encoded(name, found))
    for (layer, kind), count in Counter((expert.layer, expert.kind) for expert in experts).items():
        for found in model.view.find(model.view.names(f"banks/layer{layer}/{kind}/")):
            assert found is not None
            parameters += count * math.prod(found.shape[1:])
            size += count * found.chunk_bytes
    return parameters, size


def marginal(model: Model, task: str) -> Marginal:
    """The cost of a task.

    Raises:
        UserError: no such task.
    """
    entry = model.entry(task)
    parameters, size = held(model, own_names(model, entry), experts_in(model, entry.pathway.owned))
    return Marginal(parameters, size, operations(model, entry))


def array_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def operations(model: Model, entry: TaskEntry) -> int:
    """Operations of one row: the trunk, per routed layer the gate and the `top_k` largest candidates, the task's own
    low-rank branches, the head. A row of a convolutional trunk is an image."""
    config, pathway = model.config.model, entry.pathway
    trunk = model.view.names("trunk/")
    matrices = [found for found in model.view.find(trunk) if found is not None and len(found.shape) > 1]
    total = sum(2 * math.prod(found.shape) for found in matrices)
    for layer, candidates in enumerate(model.gate(pathway.gate).candidates):
        each = [_of_expert(model, kind, layer) for kind, index in candidates.items() for _ in index]
        total += sum(sorted(each, reverse=True)[: config.gate.top_k])
        total += 0 if config.gate.kind == "gumbel_matrix" else 2 * config.width * len(each)
    levels = 1 + (config.layers if pathway.taps else 0)
    total += sum(4 * config.width * rank for rank in pathway.adapters)
    return total + 2 * pooled_width(model.config) * levels * entry.fitted.num_outputs


def _of_expert(model: Model, kind: str, layer: int) -> int:
    config = model.config.model
    if config.trunk == "conv":
        return get_image_kind(kind).operations(config.width, places(config, model.config.encoders)[layer])
    return get_kind(kind).operations(config.width, config.hidden)
