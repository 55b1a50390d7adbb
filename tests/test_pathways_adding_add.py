"""Adding a task: what is written, what old tasks are promised, what is refused, what others may commit meanwhile."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

import pathways as pw
from pathways.adding import add as adding
from pathways.adding import add_task, commit, fit, plan_task, protect, search, start
from pathways.data import encode_tasks, fit_tasks, streams_of
from pathways.evaluation import evaluate
from pathways.inference import predict_many
from pathways.model import Model, open_for_writing, row_chunked
from pathways.report import Card
from pathways.search import find
from pathways.store import Changes
from tasks.errors import UserError
from tasks.spec import Input, Target, Task

QUICK: dict[str, Any] = {"steps": 60, "learning_rate": 0.01, "search": "none", "quiet": True}
INPUTS = (Input("east", "number"), Input("north", "number"))
PROMISED = ("majority or mean", "linear probe on the frozen model", "same network from scratch")


def clouds(folder: Path, name: str = "clouds", rows: int = 120) -> Task:
    """Which of two Gaussian clouds a pair of numbers is from; splits are made."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("east", "north", "cloud"))
        for i in range(rows):
            centre = (1.5, -1.0) if i % 2 else (-1.5, 1.0)
            writer.writerow((*np.round(np.array(centre) + rng.normal(size=2), 3), ("upper", "lower")[i % 2]))
    return Task(name, str(folder / f"{name}.csv"), Target(("cloud",)), inputs=INPUTS)


@pytest.fixture(scope="module", autouse=True)
def always_tuned() -> Iterator[None]:
    """Training counts as better than the head start, so that there are own experts to be written."""
    patch = pytest.MonkeyPatch()
    patch.setattr(find.Search, "better", staticmethod(lambda before, after: True))
    yield
    patch.undo()


def copy_of(model: Model, folder: Path) -> Path:
    return Path(shutil.copytree(model.path, folder / "model"))


@pytest.fixture(scope="module")
def added(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card, Task]:
    """A copy of the tiny model with one task more; not to be changed."""
    folder = tmp_path_factory.mktemp("added")
    task, path = clouds(folder), copy_of(tiny_model, folder)
    return path, add_task(path, task, new_experts=2, candidates=3, **QUICK), task


def test_the_card_says_what_it_came_to_and_is_stored(added: tuple[Path, Card, Task]) -> None:
    path, card, _ = added
    model = Model.open(path)
    assert model.tasks[-1] == "clouds"
    assert Card.from_json(json.dumps(model.view.document("cards/clouds"))) == card
    assert tuple(card.baselines) == PROMISED
    assert card.baselines["majority or mean"] <= 0.75
    assert card.value > 0.8
    assert card.metric == "accuracy"
    assert [one.layer for one in card.reused] == [0] * 3 + [1] * 3
    assert all(set(one.from_tasks) <= {"wine", "mood", "words", "price"} for one in card.reused)


def test_new_parameters_are_counted_by_hand(added: tuple[Path, Card, Task]) -> None:
    # D = 32, F = 32, 2 layers: norms 5 x 32; per layer a gate of 32 x (3 + 2) and 2 experts of 2 x 32 x 32 + 32 + 32;
    # a head of 2 x 32 + 2, with taps of 2 x 64. Of the table encoder: column and gain of 2 columns, 1 row of
    # categories (to which numbers point), and what is not a table: missing, frequency, 33 x 32 + 32, 32 x 32.
    expected = 5 * 32 + 2 * (32 * 5 + 2 * (2 * 32 * 32 + 64)) + 2 * 32 + 2 + 2 * 64
    expected += (2 + 2 + 1) * 32 + 32 + 16 + 33 * 32 + 32 + 32 * 32
    assert added[1].new_parameters == added[1].trainable_parameters == expected


def test_every_old_component_keeps_its_bytes(tiny_model: Model, added: tuple[Path, Card, Task]) -> None:
    old, new = tiny_model.view, Model.open(added[0]).view
    before, after = old.digests(), new.digests()
    banks = {name for name in before if name.startswith("banks/")}
    assert {name for name in before if after[name] != before[name]} == banks | {
        "manifest",
        "catalogue/000000",
        "retrieval/embedding",
    }
    for bank in banks:
        assert new.row_digests(bank)[:4] == old.row_digests(bank)
        assert len(new.row_digests(bank)) == 6
    private = ("own/clouds", "heads/clouds/", "tasks/clouds", "cards/clouds")
    assert all(any(part in name for part in private) for name in set(after) - set(before))


def test_old_tasks_compute_the_same_bits(tiny_model: Model, added: tuple[Path, Card, Task]) -> None:
    new = Model.open(added[0])
    names, batch = protect.read_probe(tiny_model.view.blob("probes/base"))
    assert set(names) == {"wine", "mood", "words", "price"}
    was, now = (model.submodel(names).run(batch) for model in (tiny_model, new))
    assert np.any(np.asarray(was.logits) != 0)
    assert np.array_equal(np.asarray(was.logits), np.asarray(now.logits))
    assert np.array_equal(np.asarray(was.token_logits), np.asarray(now.token_logits))


def test_old_tasks_are_evaluated_and_predicted_to_the_same_bits(
    tiny_model: Model, added: tuple[Path, Card, Task]
) -> None:
    new, old = Model.open(added[0]), tiny_model.tasks
    was = {one.task: json.dumps(one.to_json()) for one in evaluate(tiny_model, statistics=False)}
    now = evaluate(new, ["clouds", *old], statistics=False)
    assert [one.task for one in now] == ["clouds", *old]
    for one in now[1:]:
        # As text: a NaN equals no NaN.
        assert json.dumps(one.to_json()) == was[one.task]
    rows = {name: _inputs(tiny_model, name) for name in old}
    before = predict_many(tiny_model, rows)
    after = predict_many(new, {"clouds": [{"east": 1.0, "north": -1.0}], **rows})
    assert list(after) == ["clouds", *old]
    assert all(after[name].equals(before[name]) for name in old)


def _inputs(model: Model, task: str) -> Any:
    path = Path(model.entry(task).fitted.task.test or "")
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(line) for line in lines]


def test_an_evaluation_of_old_and_new_tasks_is_one_record(added: tuple[Path, Card, Task], tmp_path: Path) -> None:
    path = Path(shutil.copytree(added[0], tmp_path / "model"))
    for _ in range(2):
        Model.open(path).evaluate()
        found = pw.stats(path, "test")
        assert found.task_names == ["clouds", "mood", "price", "wine", "words"]
        assert len(set(found.entropy.filter(pc.equal(found.entropy["phase"], "test"))["step"].to_pylist())) == 1
        for layer in found.usage.values():
            # Each row chose two experts.
            assert (layer.rows.sum(axis=1) == 2 * layer.routed).all()


def test_what_goes_wrong_after_the_commit_is_a_warning(
    tiny_model: Model, added: tuple[Path, Card, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("a file is damaged")

    monkeypatch.setattr(adding, "record", fail)
    with pytest.warns(UserWarning, match="a file is damaged"):
        adding._record_routing(added[0], "clouds", [])


def test_the_same_seed_gives_the_same_bytes(tiny_model: Model, added: tuple[Path, Card, Task], tmp_path: Path) -> None:
    path, card, task = added
    again = copy_of(tiny_model, tmp_path)
    assert replace(add_task(again, task, candidates=3, **QUICK), seconds=0.0) == replace(card, seconds=0.0)
    timed = ("cards/clouds", "tasks/clouds")
    first, second = (Model.open(p).view.digests() for p in (path, again))
    assert {n: d for n, d in first.items() if n not in timed} == {n: d for n, d in second.items() if n not in timed}


def test_only_what_is_the_tasks_own_moves_in_training(tiny_model: Model, tmp_path: Path, cache_folder: Path) -> None:
    task = clouds(tmp_path)
    fitted = fit_tasks([task])[0]
    splits = [
        encode_tasks([fitted], split, tiny_model.tokenizer, tiny_model.config.encoders, cache_folder)[0]
        for split in ("train", "valid")
    ]
    borrowed = start.reference_submodel(tiny_model, fitted, streams_of(fitted), ("base", "base"), 0)
    choice = search.choose(tiny_model, borrowed, splits[0], per_layer=2, seed=0)
    copied = start.touched(tiny_model, splits[0])
    made = start.prepare(tiny_model, borrowed, choice, 2, 0, copied)
    before = {path: np.array(leaf) for path, leaf in made.sub.flat().items()}
    recipe = fit.make_recipe(tiny_model.config, splits[0], 8, 0.01, 0)
    monitor = adding.Monitor(tmp_path / "log", 8, quiet=True)
    with monitor:
        sub, _ = fit.fit(made.sub, splits[0], splits[1], recipe, monitor, trainable=fit.own_part(made))
    for path, leaf in sub.flat().items():
        moved, leaf = not np.array_equal(before[path], leaf), np.asarray(leaf)
        if "banks" in path:
            # The four of each compact bank: two borrowed first, as fresh ones are at the end of the model's bank.
            assert np.array_equal(before[path][:2].view(np.int32), leaf[:2].view(np.int32)), path
            assert not np.array_equal(before[path][2:], leaf[2:]), path
        elif path[0] == "encoders" and path[2] in ("column", "gain", "category"):
            rows = copied["/".join(path[1:])]
            assert rows is not None
            assert 0 < len(rows) < len(leaf) / 2
            others = np.delete(np.arange(len(leaf)), rows)
            assert np.array_equal(before[path][others], leaf[others]), path
            assert not np.array_equal(before[path][list(rows)], leaf[list(rows)]) or path[2] == "category", path
        elif path[0] == "encoders":
            assert moved or path[2] == "missing", path  # no cell of these rows is missing
        else:
            assert moved == (path[-1] in ("scale", "gate") or path[0] in ("heads", "taps")), path


def test_fresh_experts_are_silent_and_no_two_gate_columns_are_equal(tiny_model: Model, tmp_path: Path) -> None:
    rows = start.fresh_rows(tiny_model, ({"mlp": (4, 5)}, {"mlp": (4, 5)}), seed=0)
    assert not rows["banks/layer0/mlp/w_out"][1].any()
    assert not rows["banks/layer0/mlp/b_out"][1].any()
    assert rows["banks/layer0/mlp/w_in"][1].any()
    assert not np.array_equal(*rows["banks/layer0/mlp/w_in"][1])
    assert not np.array_equal(rows["banks/layer0/mlp/w_in"][1], rows["banks/layer1/mlp/w_in"][1])


@pytest.mark.slow
def test_an_encoder_that_the_model_lacks_is_made_and_kept(tiny_model: Model, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "pictures" / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (8, 8, 3)) + 120 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    path = copy_of(tiny_model, tmp_path)
    card = add_task(path, Task("shade", str(tmp_path / "pictures"), Target(("label",))), **QUICK)
    assert any("no image encoder" in note for note in card.notes)
    model = Model.open(path)
    assert "encoders/image/conv1" in model.view.names("encoders/image/")
    assert model.submodel("shade").names == ("shade",)
    assert card.value > 0.8


@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        ({"name": "wine"}, {}, "of this name already"),
        ({"name": "no good"}, {}, "not a valid name"),
        ({"each": "cloud"}, {}, "family"),
        ({}, {"new_experts": -1}, "at least 0"),
        ({}, {"candidates": 0}, "at least 1"),
        ({}, {"steps": 0}, "at least 1"),
        ({}, {"learning_rate": 0.0}, "must be positive"),
        ({}, {"search": "luck"}, "unknown choice"),
        ({}, {"effort": "heroic"}, "low or medium or high"),
        ({}, {"max_parameters": 0}, "at least 1"),
        ({"train": "nowhere.csv"}, {}, "nowhere.csv"),
    ],
)
def test_mistakes_are_told_and_change_nothing(
    tiny_model: Model, tmp_path: Path, task: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    good = clouds(tmp_path)
    with pytest.raises(UserError, match=told):
        add_task(tiny_model.path, replace(good, **task), quiet=True, **options)
    assert Model.open(tiny_model.path).version == tiny_model.version


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(tiny_model: Model, tmp_path: Path) -> None:
    path, before = copy_of(tiny_model, tmp_path), set((tmp_path / "model").rglob("*"))
    lines = plan_task(path, clouds(tmp_path), steps=60, candidates=3)
    assert "3 folds of 112 rows" in lines[0]
    assert "60 steps" in lines[0]
    assert "at most 300 steps in all" in lines[0]
    # The most that a first candidate has: all that is counted by hand above.
    numbers = [line for line in lines if line.startswith("candidate")]
    assert "fresh/3 fresh/3 + encoder: 11.4K parameters" in numbers[0]
    assert len(numbers) == 5
    assert "at most" in lines[-1]
    assert set((tmp_path / "model").rglob("*")) | {tmp_path / "model"} >= before
    assert Model.open(path).version == tiny_model.version
    few = plan_task(path, clouds(tmp_path, "tiny", rows=8))
    assert "too few to train on" in few[0]


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing at this path"):
        add_task(tmp_path / "none", clouds(tmp_path), quiet=True)


@pytest.fixture(scope="module")
def ready(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What `add_task` hands to the commit, and the copy of the model that it did not reach."""
    folder, caught = tmp_path_factory.mktemp("ready"), []
    path = copy_of(tiny_model, folder)
    patch = pytest.MonkeyPatch()

    def catch(path: Any, trained: Any, parts: Any, seed: int) -> None:
        caught.extend((trained, parts))
        raise UserError("caught")

    patch.setattr(adding, "commit", catch)
    with pytest.raises(UserError, match="caught"):
        add_task(path, clouds(folder), candidates=3, **QUICK)
    patch.undo()
    assert Model.open(path).version == tiny_model.version
    return path, *caught


def copy_ready(ready: tuple[Any, ...], folder: Path) -> tuple[Path, Any, Any]:
    return Path(shutil.copytree(ready[0], folder / "model")), ready[1], ready[2]


def test_a_change_of_an_old_component_aborts_the_commit(
    ready: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trained, parts = copy_ready(ready, tmp_path)
    honest, before = commit.changes, Model.open(path)

    def sabotaged(model: Model, trained: Any) -> Changes:
        made = honest(model, trained)
        made.put["heads/wine/bias"] = model.view.read("heads/wine/bias") + 1e-7
        return made

    monkeypatch.setattr(commit, "changes", sabotaged)
    with pytest.raises(UserError, match="heads/wine/bias would be changed"):
        commit.commit(path, trained, parts, 0)
    after = Model.open(path)
    assert (after.version, after.view.digests()) == (before.version, before.view.digests())


def test_a_change_of_one_row_of_a_bank_aborts_the_commit(
    ready: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trained, parts = copy_ready(ready, tmp_path)
    honest, bank = commit.changes, "banks/layer1/mlp/b_out"

    def sabotaged(model: Model, trained: Any) -> Changes:
        made = honest(model, trained)
        made.put_rows[bank] = (np.array([2]), model.view.read(bank, [2]) + 1e-7)
        return made

    monkeypatch.setattr(commit, "changes", sabotaged)
    with pytest.raises(UserError, match=f"expert 2 of {bank} would be changed"):
        commit.commit(path, trained, parts, 0)


def test_logits_alone_abort_the_commit_too(
    ready: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trained, parts = copy_ready(ready, tmp_path)
    honest, version = commit.changes, Model.open(path).version

    def sabotaged(model: Model, trained: Any) -> Changes:
        made = honest(model, trained)
        made.put["norms/base"] = model.view.read("norms/base") * 1.001
        return made

    monkeypatch.setattr(commit, "changes", sabotaged)
    monkeypatch.setattr(protect, "check_digests", lambda old, new, allowed: None)
    with pytest.raises(UserError, match="logits of .* would be others"):
        commit.commit(path, trained, parts, 0)
    assert Model.open(path).version == version


def grow_banks(path: Path) -> None:
    """What another process may commit meanwhile: one more expert in every bank, that of layer 0 free again."""
    store, model = open_for_writing(path)
    banks = [{kind: size + 1 for kind, size in layer.items()} for layer in model.bank_sizes]
    grown = {name: model.view.read(name, [0]) for name in model.view.names("banks/")}
    manifest = {**model.manifest, "banks": banks, "free": [{"mlp": [4]}, {}]}
    store.commit(Changes(append=grown, documents={"manifest": manifest}), "grown", row_chunked=row_chunked)


@pytest.mark.parametrize("late", [False, True])
def test_a_commit_of_somebody_else_moves_the_fresh_experts_on(
    ready: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    path, trained, parts = copy_ready(ready, tmp_path)
    honest, calls = commit.changes, []

    def changes_after_another_commit(model: Model, trained: Any) -> Changes:
        calls.append(model)
        if len(calls) == 1:
            grow_banks(path)
        return honest(model, trained)

    if late:
        monkeypatch.setattr(commit, "changes", changes_after_another_commit)
    else:
        grow_banks(path)
    commit.commit(path, trained, parts, 0)
    model = Model.open(path)
    names, batch = protect.read_probe(trained.probe)
    assert trained.entry.pathway.owned == ({"mlp": (4, 5)}, {"mlp": (4, 5)})
    assert model.entry("clouds").pathway.owned == ({"mlp": (4, 5)}, {"mlp": (5, 6)})
    assert model.manifest["free"] == [{}, {}]
    was, now = (entry.notes["profile"]["usage"][1]["mlp"] for entry in (trained.entry, model.entry("clouds")))
    moved = {"4": "5", "5": "6"}
    assert set(was) & set(moved)
    assert now == {moved.get(expert, expert): share for expert, share in was.items()}
    for bank, values in trained.rows.items():
        layer = int(bank[len("banks/layer")])
        places = list(model.entry("clouds").pathway.owned[layer]["mlp"])
        assert np.array_equal(model.view.read(bank, places), values)
    assert np.isfinite(np.asarray(model.submodel(names).run(batch).logits)).all()
    assert late == (len(calls) == 2)


def test_a_change_of_what_the_task_builds_on_is_told(ready: tuple[Any, ...], tmp_path: Path) -> None:
    path, trained, parts = copy_ready(ready, tmp_path)
    store, model = open_for_writing(path)
    name = "trunk/layer0/attention/qkv"
    store.commit(Changes(put={name: model.view.read(name) * 2}), "meanwhile", row_chunked=row_chunked)
    with pytest.raises(UserError, match=f"in parts that the task builds on(.|\n)*{name}"):
        commit.commit(path, trained, parts, 0)
    assert Model.open(path).version == store.version


def test_a_name_taken_meanwhile_is_told(ready: tuple[Any, ...], tmp_path: Path) -> None:
    path, trained, parts = copy_ready(ready, tmp_path)
    commit.commit(path, trained, parts, 0)
    with pytest.raises(UserError, match="of this name meanwhile"):
        commit.commit(path, trained, parts, 0)


def test_a_probe_reads_back(tiny_model: Model) -> None:
    names, batch = protect.read_probe(tiny_model.view.blob("probes/base"))
    sub = tiny_model.submodel(names)
    assert protect.make_probe(sub, {name: [] for name in names}) is None
    present = batch["task"][batch["task"] >= 0]
    assert sorted(set(present.tolist())) == [0, 1, 2, 3]


def test_a_probe_names_the_tasks_that_found_room_and_no_others(tiny_model: Model, tmp_path: Path) -> None:
    """Of very many tasks the last find none; one without an example stands among the first."""
    wine, settings = tiny_model.entry("wine").fitted, tiny_model.config.encoders
    example = encode_tasks([wine], "train", tiny_model.tokenizer, settings, tmp_path)[0].example(0)
    many = {f"task{number}": [example] if number != 1 else [] for number in range(2000)}
    blob = protect.make_probe(tiny_model.submodel(("wine",)), many)
    assert blob is not None
    names, batch = protect.read_probe(blob)
    shown = batch["task"][batch["task"] >= 0].tolist()
    assert 1 < len(names) < 2000
    assert names == ("task0", *(f"task{number}" for number in range(2, len(names) + 1)))
    assert shown == list(range(len(names)))
