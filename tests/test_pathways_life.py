"""What is known of a task after it came: lineage, users, costs, differences; copies, names, pins, more data."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pathways_life_interference import hashes, logits
from tiny import add_untrained

from pathways.adding import remove_task, undo
from pathways.adding.fit import own_part
from pathways.adding.protect import read_probe
from pathways.cli import main
from pathways.life import (
    copy_task,
    diff,
    lineage,
    marginal,
    plan_removal,
    rename_task,
    update,
    update_task,
    who_uses,
)
from pathways.life.ancestry import as_text
from pathways.life.cost import operations
from pathways.life.drawing import save_drawing
from pathways.life.garbage import collect, garbage
from pathways.life.names import same_bits
from pathways.life.update import continued
from pathways.life.users import Expert
from pathways.model import Model, open_for_writing, row_chunked
from pathways.pathway import GateSpec
from pathways.store import Changes, Store
from tasks.errors import UserError


@pytest.fixture(scope="module")
def grown(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions: 2 trained; 3 `first`, with an expert a layer (4); 4 `second`, with two (5, 6), started from `first`."""
    path = Path(shutil.copytree(tiny_model.path, tmp_path_factory.mktemp("life") / "model"))
    add_untrained(path, "first", seed=1)
    add_untrained(path, "second", seed=2, new_experts=2, like="first")
    return path


@pytest.fixture
def path(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "model"))


def widen(path: Path, task: str, expert: int) -> None:
    """Lets the gate of a task choose one expert more in layer 0."""
    store, model = open_for_writing(path)
    gate = model.entry(task).pathway.gate
    first, *rest = model.gate(gate).candidates
    spec = GateSpec(({"mlp": (*first["mlp"], expert)}, *rest))
    name = f"gates/{gate}/layer0/gate"
    wider = np.concatenate([model.view.read(name), np.ones((32, 1), np.float32)], axis=1)
    documents = {f"gates/{gate}/candidates": spec.to_json()}
    store.commit(Changes(put={name: wider}, documents=documents), "wider", row_chunked=row_chunked)


def test_lineage_names_parents_experts_and_versions(grown: Path) -> None:
    found = lineage(Model.open(grown), "second")
    assert [parent.task for parent in found.parents] == ["first"]
    assert [parent.task for parent in found.parents[0].parents] == ["wine"]
    assert found.parents[0].parents[0].origin == "joint"
    parts = {str(part.expert): part for part in found.parts}
    assert set(parts) == {f"layer{i}/mlp/{e}" for i in (0, 1) for e in (1, 3, 5, 6)}
    assert parts["layer0/mlp/5"].own
    assert parts["layer0/mlp/5"].others == ()
    assert parts["layer0/mlp/1"].others == ("wine", "mood", "words", "price", "first")
    assert [(moment.version, moment.what) for moment in found.moments] == [(4, "came")]
    text = as_text(found)
    assert "└─ first (added)" in text
    assert "layer1/mlp/6: its own" in text
    assert "with wine, mood, words and 2 more" in text
    assert json.loads(json.dumps(found.to_json()))["parents"][0]["task"] == "first"


def test_lineage_sees_changes_removals_and_a_parent_that_is_gone(path: Path) -> None:
    remove_task(path, "first")
    undo(path)
    assert [(m.version, m.what) for m in lineage(Model.open(path), "first").moments] == [
        (3, "came"),
        (5, "gone"),
        (6, "came"),
    ]
    remove_task(path, "first")
    assert lineage(Model.open(path), "second").parents[0].origin == "removed"


def test_a_lineage_is_drawn(grown: Path, tmp_path: Path) -> None:
    found = lineage(Model.open(grown), "second")
    drawn = save_drawing(found, tmp_path / "second.svg").read_text()
    assert drawn.startswith("<?xml")
    assert save_drawing(found, tmp_path / "second.png").stat().st_size > 1000
    with pytest.raises(UserError, match=r"\.svg, \.png or \.pdf"):
        save_drawing(found, tmp_path / "second.doc")


def test_who_uses_an_expert(path: Path) -> None:
    model = Model.open(path)
    assert [(use.task, use.own) for use in who_uses(model, "layer0/mlp/4")] == [("first", True)]
    used = who_uses(model, Expert(1, "mlp", 1))
    assert {use.task for use in used} == {"wine", "mood", "words", "price", "first", "second"}
    noted = model.entry("wine").notes["profile"]["usage"][1]["mlp"].get("1", 0.0)
    assert next(use.share for use in used if use.task == "wine") == noted
    assert [use.share or 0.0 for use in used] == sorted((use.share or 0.0 for use in used), reverse=True)
    for wrong, told in (("layer7/mlp/0", "layer of 0, 1"), ("layer0/mpl/0", "did you mean mlp"), ("0 mlp 9", "0 to 6")):
        with pytest.raises(UserError, match=told):
            who_uses(model, wrong)
    with pytest.raises(UserError, match="names no expert"):
        who_uses(model, "five")


def test_the_cost_of_a_task_is_counted_by_hand(grown: Path) -> None:
    model = Model.open(grown)
    cost = marginal(model, "second")
    # D = F = 32. Head 3 * 32 + 3, its taps on two layers, norms 5 * 32, per layer a gate of 32 * 4 and two experts of
    # 2 * 32 * 32 + 64, and two rows of the table of columns.
    assert cost.parameters == 99 + 2 * 3 * 32 + 160 + 2 * (128 + 2 * (2 * 32 * 32 + 64)) + 2 * 32
    assert cost.bytes > 4 * cost.parameters
    more = marginal(model, "second").operations - marginal(model, "first").operations
    assert more == 2 * 2 * 32  # one column more in each of two gates; as many experts are active
    assert marginal(model, "wine").parameters == 99
    entry = model.entry("second")
    bare = replace(entry, pathway=replace(entry.pathway, taps=False))
    branched = replace(entry, pathway=replace(entry.pathway, adapters=(8, 0)))
    plain = operations(model, entry)
    assert plain - operations(model, bare) == 2 * 2 * 32 * 3  # taps: two layers more for each of 3 outputs
    assert operations(model, branched) - plain == 4 * 32 * 8  # a branch of rank 8 in one layer


def test_a_copy_of_a_joint_task_can_be_trained_on(path: Path) -> None:
    copy_task(path, "wine", "other")
    model = Model.open(path)
    start = continued(model, model.entry("other"))
    assert start.fresh == ({}, {})  # the experts are others'
    assert own_part(start).count(start.sub.params) == 99 + 160 + 2 * 32 * 4  # head, norms, two gates


def test_the_plan_of_a_removal_is_what_removing_does(path: Path) -> None:
    widen(path, "second", 4)  # it leans on the first's expert of layer 0
    model = Model.open(path)
    plan = plan_removal(model, "first")
    assert plan.freed == (Expert(1, "mlp", 4),)
    assert plan.kept == {Expert(0, "mlp", 4): ("second",)}
    assert plan.children == ("second",)
    before = set(model.view.names())
    remove_task(path, "first")
    after = Model.open(path)
    assert before - set(after.view.names()) == set(plan.components)
    assert after.manifest["free"] == [{}, {"mlp": [4]}]
    # The last user takes it along, though it was made for another.
    remove_task(path, "second")
    assert Model.open(path).manifest["free"] == [{"mlp": [4, 5, 6]}, {"mlp": [4, 5, 6]}]
    assert not garbage(Model.open(path)).experts


def test_a_copy_computes_the_same_bits_and_lives_on_without_the_first(path: Path) -> None:
    known = logits(Model.open(path), "first")
    for task, kind in (("first", "added"), ("wine", "joint")):
        copy_task(path, task, f"{task}_again")
        model = Model.open(path)
        assert logits(model, f"{task}_again") == logits(model, task), kind
        assert model.entry(f"{task}_again").pathway.parents == (task,)
    remove_task(path, "first")
    model = Model.open(path)
    assert logits(model, "first_again") == known
    assert model.tasks == ("wine", "mood", "words", "price", "second", "first_again", "wine_again")
    with pytest.raises(UserError, match="of this name already"):
        copy_task(path, "wine", "mood")
    assert lineage(model, "first_again").parents[0].origin == "removed"


def test_a_renamed_task_computes_the_same_bits_in_its_old_place(path: Path) -> None:
    model = Model.open(path)
    known = {task: (hashes(model, task), logits(model, task)) for task in ("first", "mood")}
    for task, new in (("first", "a/b"), ("mood", "temper")):
        rename_task(path, task, new)
        model = Model.open(path)
        assert logits(model, new) == known[task][1]
        assert hashes(model, new) == known[task][0]
        assert not model.has(task)
        assert not [name for name in model.view.names() if f"/{task}/" in f"/{name}/"]
    assert model.tasks == ("wine", "temper", "words", "price", "a/b", "second")
    assert lineage(model, "second").parents[0].task == "a/b"
    with pytest.raises(UserError, match="did you mean"):
        rename_task(path, "moods", "x")


def test_a_task_without_a_row_in_its_probe_is_copied_and_renamed_all_the_same(path: Path) -> None:
    """As the last of very many tasks are; an older program named them in the probe nonetheless."""
    store, model = open_for_writing(path)
    names, batch = read_probe(model.view.blob("probes/base"))
    assert names[:2] == ("wine", "mood")
    with np.load(io.BytesIO(model.view.blob("probes/base"))) as found:
        arrays = dict(found)
    arrays["batch/task"][batch["task"] == 0] = -1
    out = io.BytesIO()
    np.savez(out, **arrays)
    store.commit(Changes(blobs={"probes/base": out.getvalue()}), "as it was", row_chunked=row_chunked)
    copy_task(path, "wine", "wine_again")
    rename_task(path, "wine", "vine")
    rename_task(path, "wine_again", "vine_again")
    rename_task(path, "mood", "temper")
    model = Model.open(path)
    assert not model.view.has("probes/own/vine_again")
    assert read_probe(model.view.blob("probes/base"))[0] == ("temper", "words", "price")
    with pytest.raises(UserError, match="other values under its new name"):
        same_bits(model, emptied(model, "first"), "first", "first")


def emptied(model: Model, task: str) -> Any:
    """The state in which the probe of a task names it and shows no row of it."""
    name = f"probes/own/{task}"
    names, batch = read_probe(model.view.blob(name))
    flat = {f"batch/{k}": v for k, v in batch.items() if not isinstance(v, dict)}
    flat |= {f"batch/{k}/{a}": b for k, v in batch.items() if isinstance(v, dict) for a, b in v.items()}
    out = io.BytesIO()
    np.savez(out, names=np.array(names), **flat | {"batch/task": np.full_like(batch["task"], -1)})
    store, _ = open_for_writing(model.path)
    store.commit(Changes(blobs={name: out.getvalue()}), "emptied", row_chunked=row_chunked)
    return Model(model.path, store).view


def test_pins_name_versions_and_compaction_keeps_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(path)
    assert main(["pin", model, "paper", "--at", "3"]) == 0
    assert "Version 3 is called paper" in capsys.readouterr().out
    assert Model.open(path, "paper").version == 3
    assert main(["log", model, "--format", "csv"]) == 0
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines() if ",paper," in line] == ["3"]
    assert main(["compact", model, "--yes"]) == 0
    assert [version.number for version in Store.open(f"{model}/store").log()] == [3, 4]
    assert main(["tasks", model, "--at", "paper", "--format", "csv"]) == 0
    assert "second" not in capsys.readouterr().out
    undo(path, "paper")  # a revert keeps the names
    assert Store.open(f"{model}/store").pins() == {"paper": 3}
    assert main(["tasks", model, "--at", "papers"]) == 2
    assert "did you mean 'paper'" in capsys.readouterr().err
    for words in (["12"], ["a b"], ["x", "--at", "99"], ["paper", "--at", "4"]):
        assert main(["pin", model, *words]) == 2
    assert main(["pin", model, "paper", "--remove"]) == 0
    assert main(["tasks", model, "--at", "paper"]) == 2


def test_a_difference_names_what_came_changed_and_went(path: Path) -> None:
    found = diff(Model.open(path, 3), Model.open(path, 4))
    assert found.tasks == {"second": "added"}
    assert found.experts == {Expert(i, "mlp", e): "added" for i in (0, 1) for e in (5, 6)}
    sizes = {one.name: (one.what, one.bytes) for one in found.components}
    assert sizes["heads/second/kernel"] == ("added", 4 * 3 * 32)
    assert sizes["banks/layer0/mlp/w_in"] == ("changed", 2 * 4 * 32 * 32)
    assert found.metrics == {"second": ("accuracy", None, 0.5)}
    back = diff(Model.open(path, 4), Model.open(path, 3))
    assert back.tasks == {"second": "removed"}
    assert set(back.experts.values()) == {"removed"}
    assert not diff(Model.open(path, 3), Model.open(path, 4), "first").components
    assert diff(Model.open(path, 3), Model.open(path, 4), "second").experts == found.experts
    with pytest.raises(UserError, match="did you mean 'first'"):
        diff(Model.open(path, 3), Model.open(path, 4), "frist")


def test_a_bank_that_only_an_upgrade_of_the_format_wrote_is_no_difference(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format 1 made the digest of a bank in another way from the same rows."""
    old, new = Model.open(path), Model.open(path)
    find = old.view.find

    def as_before(names: Any) -> Any:
        return [replace(e, digest="0" * 32, paged=False) if e is not None and e.row_chunked else e for e in find(names)]

    monkeypatch.setattr(old.view, "find", as_before)
    monkeypatch.setattr(old.view, "row_digests", new.view.row_digests)
    assert not diff(old, new).components
    assert not diff(old, new, "first").components
    other = [*new.view.row_digests("banks/layer0/mlp/w_in")[:-1], "1" * 32]
    monkeypatch.setattr(
        old.view, "row_digests", lambda name: other if name.endswith("layer0/mlp/w_in") else new.view.row_digests(name)
    )
    assert diff(old, new).experts == {Expert(0, "mlp", 6): "changed"}


def test_collecting_takes_what_nobody_needs_and_nothing_else(path: Path) -> None:
    assert collect(path)[1] is None
    store, model = open_for_writing(path)
    # What a program that was not this one left: a head without a task, an expert in no gate.
    banks = model.view.names("banks/layer0/")
    put = {"heads/ghost/kernel": np.ones((2, 2), np.float32)}
    grown = {name: np.ones((1, *model.view.array_info(name)[0][1:]), np.float32) for name in banks}
    sizes = [{"mlp": 8}, {"mlp": 7}]
    manifest = {"manifest": {**model.manifest, "banks": sizes}}
    store.commit(Changes(put=put, append=grown, documents=manifest), "left over", row_chunked=row_chunked)
    known = {task: logits(Model.open(path), task) for task in ("wine", "first", "second")}
    found, version = collect(path)
    assert found.experts == (Expert(0, "mlp", 7),)
    assert found.components == ("heads/ghost/kernel",)
    assert version is not None
    model = Model.open(path)
    assert model.manifest["free"][0] == {"mlp": [7]}
    assert {task: logits(model, task) for task in known} == known
    assert Model.open(path, version.parent).view.has("heads/ghost/kernel")  # older versions keep theirs


def test_rows_of_many_tasks_in_one_batch_are_those_of_each_alone(tiny_model: Model) -> None:
    """At the same batch shape, a task's row does not hang on whose rows stand beside it."""
    from pathways.adding.protect import probe_logits, read_probe

    names, batch = read_probe(tiny_model.view.blob("probes/base"))
    sub = tiny_model.submodel(names)
    together = probe_logits(sub, batch)[0]
    at = np.flatnonzero(batch["task"] >= 0)
    for number, _ in enumerate(names):
        alone = {**batch, "task": np.where(batch["task"] == number, number, -1).astype(np.int32)}
        rows = np.flatnonzero(batch["task"][at] == number)
        assert len(rows)
        assert probe_logits(sub, alone)[0].tobytes() == together[rows].tobytes()


def test_a_wrong_head_or_path_is_never_taken_silently(path: Path) -> None:
    model = Model.open(path)
    with pytest.raises(UserError, match="did you mean 'wine'"):
        model.submodel("wines")
    # Another task's integer is another head and another pathway: its logits are others.
    from pathways.adding.protect import probe_logits, read_probe

    names, batch = read_probe(model.view.blob("probes/own/first"))
    assert names == ("first",)
    right, wrong = (probe_logits(model.submodel(task), batch)[0] for task in ("first", "second"))
    assert right.tobytes() != wrong.tobytes()


def test_more_data_trains_what_is_the_tasks_own_and_refuses_what_is_worse(
    tiny_model: Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.open(path)
    task: Any = model.entry("first").fitted.task
    others = {name: (hashes(model, name), logits(model, name)) for name in ("wine", "second")}
    card = update_task(path, "first", task.train, steps=60, learning_rate=1e-2, quiet=True)
    now = Model.open(path)
    assert card.value >= card.baselines["before the update"]
    assert card.trainable_parameters == marginal(now, "first").parameters
    assert hashes(now, "first") != hashes(model, "first")
    assert {name: (hashes(now, name), logits(now, name)) for name in others} == others
    assert [m.what for m in lineage(now, "first").moments] == ["came", "changed"]
    assert "accepted by" in card.notes[-1]
    assert diff(model, now).metrics["first"][2] == card.value
    with pytest.raises(UserError, match="pathways copy"):
        update_task(path, "wine", task.train, quiet=True)
    monkeypatch.setattr("pathways.life.update.no_worse", lambda *scores: False)
    with pytest.raises(UserError, match="worse than before"):
        update_task(path, "first", task.train, steps=1, quiet=True)
    assert Model.open(path).version == now.version
    update_task(path, "first", task.train, steps=1, force=True, quiet=True)


def test_an_update_is_decided_by_validation_rows_and_scored_on_test_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test rows say worse, validation rows say better: it is committed, and the card says what test rows said."""
    task: Any = Model.open(path).entry("first").fitted.task
    splits, version = [], Model.open(path).version
    honest = update._splits

    def caught(*given: Any) -> Any:
        splits.append(honest(*given))
        return splits[-1]

    def scores(valid: list[float], test: list[float]) -> Any:
        told = iter(valid), iter(test)
        return lambda sub, split: next(told[split is not splits[-1][1]])

    monkeypatch.setattr(update, "_splits", caught)
    monkeypatch.setattr(update, "fit", lambda sub, *rest, **named: (sub, None))
    monkeypatch.setattr(update, "metric_of", scores([0.5, 0.4], [0.1, 0.9]))
    with pytest.raises(UserError, match="validation rows"):
        update_task(path, "first", task.train, steps=1, quiet=True)
    assert Model.open(path).version == version
    assert splits[-1][1] is not splits[-1][2]
    monkeypatch.setattr(update, "metric_of", scores([0.5, 0.6], [0.9, 0.1]))
    card = update_task(path, "first", task.train, steps=1, quiet=True)
    assert (card.baselines["before the update"], card.value) == (0.9, 0.1)
    assert "0.5 before, 0.6 after" in card.notes[-1]


@pytest.mark.parametrize("steps", ["-5", "0"])
def test_an_update_of_no_steps_is_told(grown: Path, steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["update", str(grown), "first", "--data", "any.csv", "--steps", steps]) == 2
    told = capsys.readouterr().err
    assert "steps" in told
    assert "at least 1" in told


def test_the_commands_say_what_they_find(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(path)
    for words, told in (
        (["lineage", model, "second"], "└─ wine (joint)"),
        (["lineage", model, "second", "--format", "json"], '"task": "second"'),
        (["lineage", model, "second", "--plot", str(tmp_path / "a.svg")], "a.svg"),
        (["who-uses", model, "layer0/mlp/4"], "first"),
        (["who-uses", model, "0", "mlp", "4", "--format", "json"], '"its own"'),
        (["diff", model, "3", "4"], "1 tasks\n  added    second"),
        (["diff", model, "3", "4", "--format", "json"], '"second": "added"'),
        (["remove", model, "first", "--dry-run"], "tasks that started from it"),
        (["collect", model, "--dry-run"], "Everything is needed."),
        (["copy", model, "first", "third"], "copied task first to third"),
        (["rename", model, "third", "fourth"], "renamed task third to fourth"),
        (["show", model, "first"], "operations per row"),
    ):
        assert main(words) == 0, words
        assert told in capsys.readouterr().out, words
    assert Model.open(path).tasks[-1] == "fourth"


def test_a_model_without_a_catalogue_is_read_and_gets_one(tiny_model: Model, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    store, model = open_for_writing(path)
    manifest = {key: value for key, value in model.manifest.items() if key != "catalogue"}
    older = Changes(documents={"manifest": {**manifest, "tasks": list(model.tasks)}}, remove=["catalogue/"])
    store.commit(older, "as it was", row_chunked=row_chunked)
    old = Model.open(path)
    assert old.tasks == tiny_model.tasks
    assert old.groups() == tiny_model.groups()
    add_untrained(path, "more")
    new = Model.open(path)
    assert "tasks" not in new.manifest
    assert new.tasks == (*tiny_model.tasks, "more")
    assert new.catalogue.shared == {("base", "base", "base"): 4}
    assert replace(new.catalogue.find("more"), number=0).group == ("own/more", "own/more")  # pyright: ignore
