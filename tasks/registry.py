"""The registry: names to things, with errors that help; and one task made into many by a column's values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Generic, TypeVar

from tasks.check import check_name, listing, slug, unknown
from tasks.errors import UserError
from tasks.spec import Task

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name, in the order they were registered.

    Args:
        what: the word for one of them in errors, for example "task".
    """

    def __init__(self, what: str, items: Iterable[tuple[str, T]] = ()) -> None:
        self._what = what
        self._items: dict[str, T] = {}
        for name, item in items:
            self.register(name, item)

    def register(self, name: str, item: T) -> T:
        """Adds `item` and returns it; a name that is taken or not valid is a UserError."""
        check_name(name)
        if name in self._items:
            raise UserError(
                f"there is already a {self._what} {name!r}",
                expected="a name that is not taken",
                got=repr(name),
                fix="choose another name, or remove the old one first",
            )
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """The thing of that name; an unknown name is a UserError that suggests the nearest."""
        try:
            return self._items[name]
        except KeyError:
            raise unknown(self._what, name, self._items) from None

    def names(self) -> tuple[str, ...]:
        return tuple(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def __len__(self) -> int:
        return len(self._items)


def expand(task: Task, values: Iterable[str]) -> list[Task]:
    """One task per value of the column `task.each`, named `<name>/<value>` and restricted to its rows.

    Characters that a name may not hold become `_`; a number is added where two values would share a name.
    """
    if task.each is None:
        raise UserError("the task has no column to be expanded by", where=f"task {task.name}", expected="each = COLUMN")
    tasks: dict[str, Task] = {}
    for value in values:
        base = name = f"{task.name}/{slug(value)}"
        number = 1
        while name in tasks:
            number += 1
            name = f"{base}-{number}"
        tasks[name] = replace(task, name=name, each=None, where=(task.each, value))
    return list(tasks.values())


def distinct_values(task: Task, column: str, *, limit: int = 100_000) -> list[str]:
    """The values of a column in the training file, missing ones left out, in natural order; one streaming pass."""
    # Imported here: the registry itself must stay light.
    from tasks.splits import open_split
    from tasks.values import label_column, natural_order

    reader = open_split(task, "train")
    seen: set[str] = set()
    for batch in reader.batches([column]):
        seen.update(value for value in label_column(batch.column(0)).unique().to_pylist() if value is not None)
        if len(seen) > limit:
            raise UserError(
                f"column {column!r} has more than {limit} values",
                where=task.train,
                expected="a column with few values",
                got=listing(sorted(seen), 5),
            )
    return natural_order(seen)
