"""The catalogue and the index of embeddings: which tasks there are, and which are near, without reading all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tiny import add_untrained

from pathways import retrieval
from pathways.adding import remove_task, undo
from pathways.catalogue import PAGE, Catalogue, new_catalogue, page_name, read_page
from pathways.life import copy_task, rename_task
from pathways.model import RETRIEVAL, Model
from pathways.pathway import Pathway, private


class Documents:
    """A view of documents in memory that notes which were read."""

    def __init__(self, documents: dict[str, Any]) -> None:
        self.known, self.read = documents, list[str]()

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.known if name.startswith(prefix))

    def has(self, name: str) -> bool:
        return name in self.known

    def documents(self, names: Any) -> list[Any]:
        wanted = list(names)
        self.read += wanted
        return [self.known[name] for name in wanted]


def own(task: str) -> Pathway:
    return Pathway(task, ("table",), norms=private(task), gate=private(task), encoders=private(task))


def catalogue_of(pathways: list[Pathway]) -> tuple[Catalogue, Documents]:
    pages, head = new_catalogue(pathways)
    view: Any = Documents(pages)
    return Catalogue(view, {"catalogue": head}), view


def test_an_addition_reads_and_writes_the_last_page_alone() -> None:
    """300 tasks stand on pages of 128, 128 and 44."""
    known, view = catalogue_of([Pathway("joint", ("text",)), *(own(f"t{i}") for i in range(299))])
    pages, head = known.changed(add=[own("new")])
    assert list(pages) == view.read == [page_name(2 * PAGE)]
    assert [line.task for line in read_page(pages[page_name(2 * PAGE)])][-2:] == ["t298", "new"]
    assert head == {"count": 301, "next": 301, "groups": [["base", "base", "base", 1]]}


def test_removals_and_names_change_their_page_and_the_counts() -> None:
    known, _ = catalogue_of([Pathway("a", ()), Pathway("b", ()), *(own(f"t{i}") for i in range(PAGE))])
    pages, head = known.changed(remove=["a", f"t{PAGE - 1}"])
    assert list(pages) == [page_name(0), page_name(PAGE)]
    assert head == {"count": PAGE, "next": PAGE + 2, "groups": [["base", "base", "base", 1]]}
    pages, head = known.changed(replace={"b": Pathway("other", ())})
    assert [line.task for line in read_page(pages[page_name(0)])][:3] == ["a", "other", "t0"]
    assert head == {"count": PAGE + 2, "next": PAGE + 2, "groups": [["base", "base", "base", 2]]}


def test_a_sample_reads_as_many_pages_as_it_is_told() -> None:
    known, view = catalogue_of([own(f"t{i}") for i in range(10 * PAGE)])
    drawn = known.sample(np.random.default_rng(0), 3)
    assert len(view.read) == 3
    assert len({line.task for line in drawn}) == 3 * PAGE
    few, _ = catalogue_of([own("a"), own("b")])
    assert [line.task for line in few.sample(np.random.default_rng(0), 3)] == ["a", "b"]


def test_the_index_follows_its_tasks(tiny_model: Model, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    profiles = {entry.name: entry.notes["profile"]["embedding"] for entry in tiny_model.entries()}
    found = retrieval.embeddings(tiny_model)
    assert list(found) == list(tiny_model.tasks)
    for name, embedding in profiles.items():
        np.testing.assert_array_equal(found[name], np.asarray(embedding, np.float32))
    add_untrained(path, "plain")  # it has no profile: a row of zeros
    copy_task(path, "mood", "again")
    rename_task(path, "price", "cost")
    remove_task(path, "words")
    model = Model.open(path)
    now = retrieval.embeddings(model)
    assert list(now) == ["wine", "mood", "cost", "again"]
    np.testing.assert_array_equal(now["again"], found["mood"])
    np.testing.assert_array_equal(now["cost"], found["price"])
    assert model.view.array_info(RETRIEVAL)[0] == (6, 32)
    undo(path)
    assert "words" in retrieval.embeddings(Model.open(path))
