"""Non-interference: whatever comes, goes, changes or is renamed, every other task keeps its bytes and its logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import add_untrained, drawn

from pathways.adding import protect, remove_task, undo
from pathways.life import collect, rename_task
from pathways.life.cost import own_names
from pathways.life.update import Updated, commit_update, continued
from pathways.life.users import experts_in
from pathways.model import Model, open_for_writing
from pathways.report import Card
from pathways.store import Store

OLD = ("wine", "mood", "words", "price")
MOST = 14
"""Tasks at once: more are removed first."""

State = dict[str, tuple[dict[str, Any], bytes]]
"""Task -> digests of all that it runs on, and its logits on its probe rows."""


def hashes(model: Model, task: str) -> dict[str, Any]:
    """Digests of a task's parameters: its own, shared ones, and the rows of banks that its gate can choose."""
    entry = model.entry(task)
    pathway, view = entry.pathway, model.view
    documents = (f"tasks/{task}", f"cards/{task}", f"probes/{pathway.gate}")
    names = [name for name in own_names(model, entry) if name not in documents]
    shared = [f"norms/{pathway.norms}", *view.names("trunk/"), *view.names("encoders/table/")]
    found: dict[str, Any] = {name.replace(task, "*"): view.digest(name) for name in [*names, *shared]}
    for expert in experts_in(model, model.gate(pathway.gate).candidates):
        for bank in view.names(f"banks/layer{expert.layer}/{expert.kind}/"):
            found[f"{bank}[{expert.index}]"] = view.row_digests(bank, [expert.index])
    return found


def logits(model: Model, task: str) -> bytes:
    """The bits of a task's logits on its stored probe rows."""
    names, batch = protect.read_probe(model.view.blob(f"probes/{model.entry(task).pathway.gate}"))
    batch["task"] = np.where(batch["task"] == names.index(task), 0, -1).astype(np.int32)
    return b"".join(value.tobytes() for value in protect.probe_logits(model.submodel(task), batch))


def state_of(model: Model, tasks: Any) -> State:
    return {task: (hashes(model, task), logits(model, task)) for task in tasks}


def update_untrained(path: Path, task: str, seed: int) -> None:
    """Commits other values of a task's own parameters through the real commit of an update."""
    from pathways.adding.commit import take_apart

    store, model = open_for_writing(path)
    start = continued(model, model.entry(task))
    rng = np.random.default_rng(seed)
    whole, rows = ({k: drawn(v, rng) for k, v in part.items()} for part in take_apart(start, start.sub))
    card = Card(task, "accuracy", 0.5, {}, 1.0, 1, 0)
    commit_update(store, model, Updated(start.entry, start.fresh, whole, rows, card))


def live(path: Path, steps: int, seed: int, look: int) -> None:
    """So many random changes; every `look` of them, and at the end, all tasks are compared with what is known."""
    rng = np.random.default_rng(seed)
    model = Model.open(path)
    known: State = state_of(model, model.tasks)
    assert model.version is not None
    history: dict[int, State] = {model.version: known}
    for step in range(steps):
        others = [task for task in known if task not in OLD]
        wanted = rng.choice(
            ["add", "update", "remove", "rename", "undo", "collect"], p=[0.4, 0.15, 0.2, 0.1, 0.1, 0.05]
        )
        if not others or (wanted == "undo" and len(history) < 3):
            wanted = "add"
        if wanted == "add" and len(others) >= MOST:
            wanted = "remove"
        task, new = str(rng.choice(others)) if others else "", f"t{seed}.{step:04d}"
        known, fresh = dict(known), ""
        if wanted == "add":
            add_untrained(path, new, seed=step, new_experts=int(rng.integers(3)))
            fresh = new
        elif wanted == "update":
            update_untrained(path, task, step)
            fresh = task
        elif wanted == "remove":
            remove_task(path, task)
            del known[task]
        elif wanted == "rename":
            rename_task(path, task, new)
            known[new] = known.pop(task)
        elif wanted == "undo":
            done = undo(path)
            assert done.parent is not None
            parent = Store.open(f"{path}/store").at(done.parent)
            known = dict(history[next(v.parent for v in parent.log() if v.number == done.parent) or 0])
        else:
            collect(path)
        model = Model.open(path)
        if fresh:
            known |= state_of(model, [fresh])
        assert model.version is not None
        history[model.version] = known
        assert sorted(model.tasks) == sorted(known)
        assert {entry.name for entry in model.entries()} == set(known)
        if step % look == look - 1 or step == steps - 1:
            now = state_of(model, known)
            for name in known:
                assert now[name][0] == known[name][0], f"components of {name} after step {step}, {wanted}"
                assert now[name][1] == known[name][1], f"logits of {name} after step {step}, {wanted}"
    assert Model.open(path).view.digests("trunk/") == model.view.digests("trunk/")


def test_a_short_life_changes_no_other_task(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protect, "MOST_GROUPS", 2)
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    live(path, 12, seed=1, look=6)


@pytest.mark.slow
def test_a_thousand_changes_leave_every_task_as_it_was(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protect, "MOST_GROUPS", 1)  # all are compared below, by a path of their own
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    live(path, 1000, seed=0, look=100)
    assert Store.open(f"{path}/store").verify() == []
