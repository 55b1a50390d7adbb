"""Who uses an expert: the tasks whose gate can choose it, and how often each does.

A gate's candidates say who can; the profile that was noted when a task came says by how much it did then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pathways.model import Model
from pathways.pathway import Experts
from pathways.submodel import TaskEntry
from tasks.check import nearest
from tasks.errors import UserError


@dataclass(frozen=True, order=True)
class Expert:
    """One expert of the model: the number of its layer, its kind, its row in that bank."""

    layer: int
    kind: str
    index: int

    def __str__(self) -> str:
        return f"layer{self.layer}/{self.kind}/{self.index}"


@dataclass(frozen=True)
class Use:
    """What an expert is to a task.

    Attributes:
        share: of the task's choices in that layer, from 0 to 1; None where none was noted.
        own: whether it was made for the task.
    """

    task: str
    share: float | None
    own: bool


class Users:
    """Which gates can choose which experts, and which tasks run on which gate; read once, in two rounds."""

    def __init__(self, model: Model, without: str | None = None) -> None:
        self.model = model
        self.tasks_of: dict[str, list[str]] = {}
        for line in model.catalogue.lines():
            if line.task != without:
                self.tasks_of.setdefault(line.gate, []).append(line.task)
        self.gates_of: dict[Expert, list[str]] = {}
        for gate, spec in model.gates(list(self.tasks_of)).items():
            for expert in experts_in(model, spec.candidates):
                self.gates_of.setdefault(expert, []).append(gate)

    def of(self, expert: Expert) -> list[str]:
        """The tasks that can choose it, in the order of their gates."""
        return [task for gate in self.gates_of.get(expert, ()) for task in self.tasks_of[gate]]


def experts_in(model: Model, layers: Sequence[Experts]) -> list[Expert]:
    """The experts that a list per routed layer names."""
    numbered = zip(model.routed_layers, layers, strict=False)
    return [Expert(layer, kind, i) for layer, kinds in numbered for kind, index in kinds.items() for i in index]


def share_of(entry: TaskEntry, model: Model, expert: Expert) -> float | None:
    """The expert's share of the task's choices in its layer, as noted when the task came; None if nothing was."""
    usage = (entry.notes.get("profile") or {}).get("usage")
    if not usage:
        return None
    return float(usage[model.routed_layers.index(expert.layer)].get(expert.kind, {}).get(str(expert.index), 0.0))


def who_uses(model: Model, expert: Expert | str) -> list[Use]:
    """The tasks whose gate can choose an expert, those that choose it most first.

    Args:
        expert: or its name, `layer1/mlp/5`.

    Raises:
        UserError: the model has no such expert.
    """
    found = check_expert(model, read_expert(expert) if isinstance(expert, str) else expert)
    uses = []
    for entry in model.entries(Users(model).of(found)):
        own = found in experts_in(model, entry.pathway.owned)
        uses.append(Use(entry.name, share_of(entry, model, found), own))
    return sorted(uses, key=lambda use: (-(use.share or 0.0), use.task))


def read_expert(text: str) -> Expert:
    """`layer1/mlp/5` or `1 mlp 5`, as an expert.

    Raises:
        UserError: it is neither.
    """
    parts = text.replace("/", " ").split()
    if len(parts) == 3:
        layer, kind, index = parts[0].removeprefix("layer"), parts[1], parts[2]
        if layer.isdecimal() and index.isdecimal():
            return Expert(int(layer), kind, int(index))
    raise UserError("This names no expert.", got=text, expected="a layer, a kind and a number, as layer1/mlp/5")


def check_expert(model: Model, expert: Expert) -> Expert:
    """Returns the expert if the model has it.

    Raises:
        UserError: it has no such layer, kind or index; what it has is said.
    """
    where = model.path
    banks = dict(zip(model.routed_layers, model.bank_sizes, strict=True))
    if expert.layer not in banks:
        known = ", ".join(map(str, banks))
        raise UserError("No experts are in this layer.", where=where, got=str(expert), expected=f"a layer of {known}")
    kinds = banks[expert.layer]
    if expert.kind not in kinds:
        guess = nearest(expert.kind, list(kinds))
        fix = f"did you mean {guess}?" if guess else None
        raise UserError("No such kind of expert.", where=where, got=expert.kind, expected=", ".join(kinds), fix=fix)
    if expert.index >= kinds[expert.kind]:
        last = kinds[expert.kind] - 1
        raise UserError("No such expert.", where=where, got=str(expert), expected=f"a number from 0 to {last}")
    return expert
