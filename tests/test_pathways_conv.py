"""The convolutional trunk from configuration to prediction: what is trained, stored, counted and refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import first_batch, make_config, make_tasks, random_submodel
from tolerance import assert_close

from pathways.config import Config, GateOptions, MeshOptions, check
from pathways.convolution import feature_width
from pathways.model import Model
from pathways.training.joint import prepare, train
from tasks.errors import UserError
from tasks.spec import Target, Task

SIDE = 9
EXPERTS = {"conv3x3": 2, "conv1x7_7x1": 1, "average_pool": 1, "identity": 1}


def image_tasks(folder: Path) -> tuple[Task, ...]:
    """`way`: whether stripes stand or lie. `side`: whether the bright half is left, right, above or below."""
    tasks = []
    for name, classes in (("way", ("across", "up")), ("side", ("left", "right", "above", "below"))):
        for seed, (split, count) in enumerate({"train": 16, "valid": 6, "test": 6}.items()):
            rng = np.random.default_rng(seed)
            for i in range(count * len(classes)):
                label = classes[i % len(classes)]
                pixels = drawing(label, rng)
                if label in ("up", "right", "below"):
                    pixels = pixels.T if label == "up" else np.flip(pixels)
                path = folder / name / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        splits = {split: str(folder / name / split) for split in ("train", "valid", "test")}
        tasks.append(Task(name, splits["train"], Target(("label",)), valid=splits["valid"], test=splits["test"]))
    return tuple(tasks)


def drawing(label: str, rng: np.random.Generator) -> np.ndarray:
    """Lying stripes, or a half that is brighter, with noise; others are turned from these."""
    rows = np.arange(SIDE)[:, None] + np.zeros((1, SIDE), int)
    shape = (
        (rows + rng.integers(2)) % 2
        if label in ("across", "up")
        else (rows if label in ("above", "below") else rows.T) < 4
    )
    return np.clip(160 * shape + rng.integers(0, 90, (SIDE, SIDE)), 0, 255).astype(np.uint8)


def conv_config(tasks: tuple[Task, ...] = (), **gate: object) -> Config:
    options = {"kind": "gumbel_matrix", "scope": "task", "unit": "example", "top_k": 2, **gate}
    return make_config(
        tasks,
        model={"trunk": "conv", "width": 8, "strides": (2, 1), "experts": EXPERTS, "gate": GateOptions(**options)},  # type: ignore[arg-type]
        encoders={"patch": SIDE, "stride": SIDE, "image_tokens": 1, "max_length": 1, "channels": 1},
        balance={"load_balancing": 0.0, "z": 0.0},
        train={"steps": 60, "rows": 16, "learning_rate": 2e-2, "eval_every": 30, "checkpoint_every": 30},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> tuple[Task, ...]:
    return image_tasks(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: tuple[Task, ...]) -> Model:
    return train(conv_config(data), tmp_path_factory.mktemp("conv") / "model", quiet=True)


def test_it_learns_and_what_is_stored_predicts_the_same(model: Model) -> None:
    found = {one.task: one.metrics["accuracy"] for one in model.evaluate(split="test")}
    assert found["way"] >= 0.9
    assert found["side"] >= 0.8
    path = Path(model.entry("side").fitted.task.test or "")
    images = sorted(path.glob("*/*.png"))
    rows = Model.open(model.path).predict("side", {"image": [str(image) for image in images]})
    right = np.mean([p == image.parent.name for p, image in zip(rows["prediction"].to_pylist(), images, strict=True)])
    assert right == pytest.approx(found["side"])


def test_each_expert_is_a_chunk_and_the_heads_read_all_places(model: Model) -> None:
    # 9 pixels, strides 2 and 1: 5 x 5 places of 8 channels.
    assert feature_width(model.config.model, model.config.encoders) == 200
    names = model.view.names()
    entries = dict(zip(names, model.view.find(names), strict=True))
    kernel = entries["banks/layer0/conv3x3/kernel"]
    assert kernel is not None
    assert tuple(kernel.shape) == (2, 3, 3, 8, 8)
    assert tuple(entries["heads/way/kernel"].shape) == (2, 200)  # type: ignore[union-attr]
    assert tuple(entries["gates/own/way/layer1/gate"].shape) == (5,)  # type: ignore[union-attr]
    assert not any(name.startswith(("norms/", "trunk/")) for name in names)


def test_the_statistics_count_examples_of_a_task_that_all_go_one_way(model: Model) -> None:
    from pathways.counting import open_statistics

    model.evaluate(split="test")
    table = open_statistics(model, phase="test").tables["routing"].to_pylist()
    ways = [row for row in table if row["phase"] == "test" and row["task"] == "way" and row["layer"] == 0]
    assert {row["rows"] for row in ways} == {12}  # 6 examples of 2 classes
    assert len(ways) <= 2


def test_a_task_alone_says_what_it_says_among_others(model: Model) -> None:
    alone = model.submodel("side")
    both = model.submodel(("way", "side"))
    # Both hold the experts that their gates name, which are all: one batch of the one is one of the other.
    prepared = prepare(replace(conv_config((model.entry("side").fitted.task,))))
    batch = first_batch(prepared)
    batch = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim and leaf.shape[0] == 1 else leaf, batch)
    other = batch | {"task": np.where(batch["task"] >= 0, 1, -1)}
    assert np.array_equal(alone.run(batch).logits[:, :4], both.run(other).logits[:, :4])


@pytest.mark.parametrize("kind", ["softmax_top_k", "noisy_top_k", "sigmoid_top_k"])
def test_an_example_may_choose_for_itself(data: tuple[Task, ...], kind: str) -> None:
    prepared = prepare(conv_config(data, kind=kind, scope="shared"))
    sub = random_submodel(prepared)
    batch = first_batch(prepared)
    out = sub.run(batch, statistics=True)
    layer = sub.count(out)[0]
    assert layer is not None
    present = int((np.asarray(batch["task"]) >= 0).sum())
    assert float(layer.routed_rows.sum()) == present
    assert float(layer.rows.sum()) == 2 * present
    # Nothing of another example enters: the others' images may change.
    first = np.asarray(batch["segment"]).reshape(-1) == 1
    keep = np.asarray(batch["source"]).reshape(-1)[first][0]
    patch = np.asarray(batch["image"]["patch"])
    changed = np.where((np.arange(len(patch)) == keep)[:, None, None, None], patch, 1 - patch)
    again = sub.run(batch | {"image": batch["image"] | {"patch": changed}})
    assert np.allclose(out.logits[0], again.logits[0], atol=1e-5)


MISTAKES = {
    "model.strides of 2 numbers": {"model": {"strides": (2,)}},
    "model.width a multiple of 4": {"model": {"width": 10, "heads": 2}},
    "the side of an image": {"encoders": {"max_length": 2}},
    "model.gate.unit = example": {"model": {"gate": GateOptions("gumbel_matrix", "task", 2)}},
    "model.shared_experts = 0": {"model": {"shared_experts": 1}},
    "of the kinds conv3x3": {"model": {"experts": {"mlp": 4}}},
    "scope task or shared": {"model": {"gate": GateOptions("gumbel_matrix", "task_embedding", 2, unit="example")}},
    "temperature > 0": {"model": {"gate": GateOptions("gumbel_matrix", "task", 2, temperature=0.0, unit="example")}},
}


@pytest.mark.parametrize("expected", MISTAKES)
def test_a_configuration_that_cannot_be_is_refused_with_the_reason(expected: str) -> None:
    config = conv_config()
    changed = {name: replace(getattr(config, name), **fields) for name, fields in MISTAKES[expected].items()}
    with pytest.raises(UserError, match=expected):
        check(replace(config, **changed))


def test_tasks_without_images_are_refused(tmp_path: Path, cache_folder: Path) -> None:
    with pytest.raises(UserError, match="reads images only"):
        train(conv_config(make_tasks(tmp_path, ["wine"])), tmp_path / "model", quiet=True)


def test_adding_is_refused_and_changes_nothing(model: Model, data: tuple[Task, ...]) -> None:
    from pathways.adding import add_task

    before = model.version
    with pytest.raises(UserError, match="One task of such a model cannot be trained alone yet"):
        add_task(model.path, replace(data[0], name="other"), quiet=True)
    assert Model.open(model.path).version == before


def test_show_says_what_it_is(model: Model) -> None:
    from pathways.describe import drawing, model_facts

    facts = dict(model_facts(model))
    assert facts["layers"] == "2 of 8 channels, with strides 2, 1"
    assert facts["experts by"].startswith("blocks of images on")
    assert facts["layer 0"] == "2 conv3x3, 1 conv1x7_7x1, 1 average_pool, 1 identity"
    assert "conv1x7_7x1" in drawing(model, "side")


def test_devices_share_the_examples_and_change_nothing(data: tuple[Task, ...]) -> None:
    from pathways.devices import Placement, mesh_of

    config = conv_config(data, kind="softmax_top_k", scope="shared")
    prepared = prepare(replace(config, mesh=MeshOptions(data=2)))
    sub, batch = random_submodel(prepared), first_batch(prepared)
    alone = sub.run(batch, statistics=True)
    mesh = mesh_of(prepared.config)
    with jax.set_mesh(mesh):
        placed = Placement(mesh).batch(jax.tree.map(lambda leaf: leaf[None], batch))
        shared = sub.run(jax.tree.map(lambda leaf: leaf[0], placed), statistics=True)
    assert_close(shared.logits, alone.logits, scale=10.0)
    for one, other in zip(alone.layers, shared.layers, strict=True):
        assert np.array_equal(one.load, other.load)


def test_every_command_works_on_it_or_says_that_it_does_not_yet(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathways.cli import main

    path = str(shutil.copytree(model.path, tmp_path / "model"))
    images, pool = model.entry("way").fitted.task.test or "", tmp_path / "pool" / "new"
    pool.mkdir(parents=True)
    for i in range(6):
        Image.fromarray(drawing("across", np.random.default_rng(100 + i))).save(pool / f"{i}.png")
    commands = {
        "tasks": 0,
        "show": 0,
        "show way": 0,
        "eval --limit 4": 0,
        "stats": 0,
        "lineage way": 0,
        "who-uses layer0/conv3x3/0": 0,
        f"predict way {images} -o {tmp_path / 'out.csv'}": 0,
        f"suggest way --pool {pool.parent} -n 3": 0,
        f"add --name more --data {images} --target label": 2,
        "copy way third": 0,
        f"update third --data {images}": 2,
        "rename third fourth": 0,
        "remove fourth --dry-run": 0,
        "remove fourth": 0,
        "remove way": 0,
        "collect": 0,
        "undo": 0,
        "diff 1 2": 0,
        "pin good": 0,
        "log": 0,
        "compact --yes": 0,
        "verify": 0,
    }
    found = {}
    for words in commands:
        name, *rest = words.split()
        found[words] = main([name, path, *rest])
        said = capsys.readouterr().err
        assert "cannot be trained alone yet" in said or found[words] == 0, said
    assert found == commands
    assert main(["predict", path, "fourth", images]) == 2  # the undo did not bring it back


def test_a_removal_that_would_change_another_task_is_refused(model: Model, tmp_path: Path) -> None:
    """There are no norms here to find a group by: its logits are compared all the same."""
    from pathways.adding.protect import chosen_groups

    again = Model.open(shutil.copytree(model.path, tmp_path / "model"))
    assert len(chosen_groups(again, again, [], 0)) == 2
