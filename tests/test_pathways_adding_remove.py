"""Taking tasks away and going back, on a model with tasks made by hand: no training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pathways import describe
from pathways.adding import commit, remove, remove_task, search, start, undo
from pathways.adding.commit import Trained
from pathways.counting import expert_names
from pathways.life.names import renamed_probe
from pathways.model import Model, row_chunked
from pathways.pathway import EncoderCopy
from pathways.report import Card
from pathways.statistics.counts import ExpertName
from pathways.store import Changes, Store
from pathways.submodel import SubModel
from tasks.errors import UserError

OLD = ("wine", "mood", "words", "price")


COPIED = {"table/column": (1, 5), "table/missing": None}


def put_in(
    path: Path,
    name: str,
    new_experts: int = 2,
    streams: tuple[str, ...] = ("table",),
    copied: EncoderCopy | None = None,
) -> SubModel:
    """Adds a task as `add_task` does, untrained: `wine` again under another name, or told to read other streams."""
    model = Model.open(path)
    fitted = model.entry("wine").fitted
    fitted = replace(fitted, task=replace(fitted.task, name=name))
    borrowed = start.reference_submodel(model, fitted, streams, search.reference(model), 0)
    ranked = tuple((("mlp", 1), ("mlp", 3)) for _ in range(2))
    choice = search.Choice(tuple({"mlp": (1, 3)} for _ in range(2)), ranked, ("wine",), (1.0,), (), (0.0,) * 32)
    made = start.prepare(model, borrowed, choice, new_experts, 0, copied)
    whole, rows = commit.take_apart(made, made.sub)
    card = Card(name, "accuracy", 0.5, {}, 1.0, 1, 1)
    probe = renamed_probe(model.view.blob("probes/base"), "wine", name, alone=True) if streams == ("table",) else None
    digests = commit.fingerprint(model.view, made.borrowed)
    ready = Trained(made.entry, made.gate, made.fresh, made.copied, whole, rows, digests, card, probe)
    commit.commit(path, ready, made.borrowed, 0)
    return made.sub


@pytest.fixture
def path(tiny_model: Model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.path, tmp_path / "model"))


def test_an_added_task_reads_back_as_it_was_put_in(path: Path) -> None:
    sub = put_in(path, "more")
    found = Model.open(path).submodel("more")
    for where, leaf in sub.flat().items():
        assert np.array_equal(np.asarray(leaf), np.asarray(found.flat()[where])), where
    assert found.layout.experts[0]["mlp"].tolist() == [1, 3, 4, 5]


def test_copied_parts_of_the_encoders_lie_over_the_shared_ones_and_go_with_the_task(path: Path) -> None:
    old = Model.open(path)
    sub = put_in(path, "more", copied=COPIED)
    model = Model.open(path)
    shared, own = (model.view.read(f"encoders/{name}table/column") for name in ("", "own/more/"))
    assert np.array_equal(own, shared[[1, 5]])
    store = Store.open(model.view.path, mode="w")  # pyright: ignore[reportAttributeAccessIssue]
    store.commit(Changes(put={"encoders/own/more/table/column": own + 1.0}), "moved", row_chunked=row_chunked)
    column = np.asarray(Model.open(path).submodel("more").flat()["encoders", "table", "column"])
    expected = shared.copy()
    expected[[1, 5]] += 1.0
    assert np.array_equal(column, expected)
    assert np.array_equal(np.asarray(sub.flat()["encoders", "table", "column"]), shared)
    assert np.array_equal(np.asarray(Model.open(path).submodel("wine").flat()["encoders", "table", "column"]), shared)
    sizes = describe.Sizes(Model.open(path))
    plain = put_in(path, "plain", new_experts=0)
    assert plain.layout.copied == {}
    assert sizes.private(Model.open(path).entry("more")) > 2 * 32 + 32
    remove_task(path, "more")
    assert not [name for name in Model.open(path).view.names("encoders/") if "own" in name]
    assert Model.open(path).view.digests("encoders/") == old.view.digests("encoders/")


def test_tasks_with_other_encoders_do_not_stand_in_one_network(path: Path) -> None:
    put_in(path, "more", copied=COPIED)
    model = Model.open(path)
    with pytest.raises(UserError, match=r"(?s)do not stand in one network.*wine, more"):
        model.submodel(("wine", "more"))
    assert model.networks(("wine", "more", "mood")) == [("wine", "mood"), ("more",)]


def test_a_copy_comes_and_goes_with_its_task_under_any_name(path: Path) -> None:
    for _ in range(2):
        put_in(path, "a", copied=COPIED)
        put_in(path, "a/table", copied={"table/gain": (2,)})
        remove_task(path, "a")
        assert Model.open(path).view.names("encoders/own/") == [
            "encoders/own/a/table/copied",
            "encoders/own/a/table/table/gain",
        ]
        assert Model.open(path).submodel("a/table").layout.copied == {"table/gain": (2,)}
        remove_task(path, "a/table")
    assert not Model.open(path).view.names("encoders/own/")


def test_the_shared_encoders_norms_are_borrowed_before_those_of_a_task_with_its_own(path: Path) -> None:
    put_in(path, "more", copied=COPIED)
    for name in OLD:
        remove_task(path, name)
    assert search.reference(Model.open(path)) == ("base", "base")


def test_a_model_of_before_the_first_release_is_told(path: Path) -> None:
    store = Store.open(Model.open(path).view.path, mode="w")  # pyright: ignore[reportAttributeAccessIssue]
    manifest = {**store.document("manifest"), "format": 1}
    store.commit(Changes(documents={"manifest": manifest}), "older", row_chunked=row_chunked)
    with pytest.raises(UserError, match=r"(?s)before the first release.*model format 1"):
        _ = Model.open(path).tasks


def test_no_new_experts_leave_the_banks_alone(path: Path) -> None:
    before = Model.open(path).view.digests("banks/")
    put_in(path, "more", new_experts=0)
    model = Model.open(path)
    assert model.view.digests("banks/") == before
    assert model.bank_sizes == [{"mlp": 4}, {"mlp": 4}]


def test_an_encoder_that_the_model_lacks_is_made_and_stays_when_its_task_goes(path: Path) -> None:
    put_in(path, "seen", new_experts=0, streams=("image",))
    model = Model.open(path)
    assert model.view.read("encoders/image/conv1").any()
    assert model.submodel("seen").layout.size.streams == ("image",)
    assert start.missing_encoders(model, ("image", "audio", "table")) == ("audio",)
    remove_task(path, "seen")
    assert Model.open(path).view.has("encoders/image/conv1")


def test_removing_takes_what_is_private_and_frees_the_experts(path: Path) -> None:
    put_in(path, "more")
    put_in(path, "more/yet", new_experts=1)
    # D = F = 32, of 5 norms: a head of 3 classes, its taps of 2 x 32, a gate of 2 + 2 columns and 2 experts in each of
    # 2 layers.
    sizes = describe.Sizes(Model.open(path))
    charged = 3 * 32 + 3 + 3 * 64 + 5 * 32 + 2 * (32 * 4 + 2 * (2 * 32 * 32 + 64))
    assert sizes.private(Model.open(path).entry("more")) == charged
    before = Model.open(path).view.digests()
    remove_task(path, "more")
    model = Model.open(path)
    after = model.view.digests()
    assert model.tasks == (*OLD, "more/yet")
    gone = set(before) - set(after)
    assert gone == {
        *("tasks/more", "cards/more", "heads/more/kernel", "heads/more/bias", "norms/own/more", "probes/own/more"),
        "heads/more/taps",
        *("gates/own/more/candidates", "gates/own/more/layer0/gate", "gates/own/more/layer1/gate"),
    }
    assert model.manifest["free"] == [{"mlp": [4, 5]}, {"mlp": [4, 5]}]
    assert model.bank_sizes == [{"mlp": 7}, {"mlp": 7}]
    assert expert_names(model)[0] == [ExpertName("mlp", i) for i in (0, 1, 2, 3, 6)]
    for bank in model.view.names("banks/"):
        assert not model.view.read(bank, [4, 5]).any()
    changed = {name for name in after if after[name] != before[name]}
    # The experts were never trained: all but `w_in` were zero before.
    assert changed == {"manifest", "catalogue/000000", "banks/layer0/mlp/w_in", "banks/layer1/mlp/w_in"}


def test_freed_places_are_filled_first(path: Path) -> None:
    put_in(path, "more")
    remove_task(path, "more")
    put_in(path, "other", new_experts=3)
    model = Model.open(path)
    assert model.entry("other").pathway.owned == ({"mlp": (4, 5, 6)}, {"mlp": (4, 5, 6)})
    assert model.bank_sizes == [{"mlp": 7}, {"mlp": 7}]
    assert model.manifest["free"] == [{}, {}]


def test_an_owned_expert_that_another_task_uses_stays(path: Path) -> None:
    put_in(path, "more")
    store = Model.open(path).view
    assert isinstance(store, remove.Store)
    writer = remove.Store.open(store.path, mode="w")
    gate = Model(path, writer).gate("base").to_json()
    gate["candidates"][0]["mlp"] = [*gate["candidates"][0]["mlp"], 4]
    wider = np.concatenate([writer.read("gates/base/layer0/gate"), np.zeros((32, 1), np.float32)], axis=1)
    changes = Changes(documents={"gates/base/candidates": gate}, put={"gates/base/layer0/gate": wider})
    writer.commit(changes, "wider", row_chunked=row_chunked)
    remove_task(path, "more")
    model = Model.open(path)
    assert model.manifest["free"] == [{"mlp": [5]}, {"mlp": [4, 5]}]
    assert model.view.read("banks/layer0/mlp/w_in", [4]).any()


def test_a_joint_task_and_then_all_of_them_can_go(path: Path) -> None:
    before = Model.open(path).view.digests()
    for name in OLD:
        remove_task(path, name)
    model = Model.open(path)
    assert model.tasks == ()
    shared = {n: d for n, d in before.items() if n.startswith(("banks/", "trunk/", "norms/", "gates/", "encoders/"))}
    after = model.view.digests()
    assert {name: after[name] for name in shared} == shared
    assert not model.view.names("tasks/")
    assert not model.view.names("heads/")
    assert search.reference(model) == ("base", "base")


def test_undo_brings_back_every_byte(path: Path) -> None:
    before = Model.open(path)
    remove_task(path, "price")
    version = undo(path)
    after = Model.open(path)
    assert after.version == version.number
    assert after.version == (before.version or 0) + 2
    assert after.view.digests() == before.view.digests()
    assert undo(path, to=before.version).number == version.number + 1


def test_there_is_no_way_back_to_before_the_model(path: Path) -> None:
    version = Model.open(path).version
    assert version == 2
    for to in (None, 1):
        with pytest.raises(UserError, match="no model to go back to"):
            undo(path, to=to)
    assert Model.open(path).version == version


def test_an_unknown_task_suggests_the_nearest(path: Path) -> None:
    version = Model.open(path).version
    with pytest.raises(UserError, match="did you mean 'price'"):
        remove_task(path, "prize")
    assert Model.open(path).version == version


def test_removing_that_would_touch_another_task_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remove, "freed_experts", lambda model, name: ({"mlp": (0,)}, {}))
    honest = remove.private_names
    monkeypatch.setattr(remove, "private_names", lambda model, name: [*honest(model, name), "encoders/table/missing"])
    version = Model.open(path).version
    with pytest.raises(UserError, match="logits of .* would be others|does not exist|no such name|would be"):
        remove_task(path, "price")
    assert Model.open(path).version == version
