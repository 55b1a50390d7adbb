"""What taking a task away would free, and who leans on it: the answer before the deed."""

from __future__ import annotations

from dataclasses import dataclass

from pathways.adding.remove import freed_experts, private_names
from pathways.life.cost import held
from pathways.life.users import Expert, Users, experts_in
from pathways.model import Model


@dataclass(frozen=True)
class Removal:
    """What a removal would do. Nothing breaks by it: what others lean on stays.

    Attributes:
        components: names that would go.
        freed: experts that would be set to zero, their places free for later tasks.
        parameters, bytes: of both; the space is given back when the versions that hold them are compacted away.
        kept: experts made for the task that stay, and the tasks that can choose them.
        children: tasks whose search started from this one.
    """

    task: str
    components: tuple[str, ...]
    freed: tuple[Expert, ...]
    parameters: int
    bytes: int
    kept: dict[Expert, tuple[str, ...]]
    children: tuple[str, ...]


def plan_removal(model: Model, task: str) -> Removal:
    """What `remove_task` would do, from documents and the index alone.

    Raises:
        UserError: no such task.
    """
    entry = model.entry(task)
    names = private_names(model, task)
    freed = experts_in(model, freed_experts(model, task))
    others = Users(model, without=task)
    owned = experts_in(model, entry.pathway.owned)
    parameters, size = held(model, names, freed)
    kept = {expert: tuple(others.of(expert)) for expert in owned if expert not in freed}
    children = tuple(other.name for other in model.entries() if task in other.pathway.parents)
    return Removal(task, tuple(names), tuple(freed), parameters, size, kept, children)
