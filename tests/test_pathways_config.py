"""Configuration: read strictly, refused with both numbers, written back so that it reads the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tomli_w
from tiny import make_config, make_family, make_tasks

from pathways.config import Config, GateOptions, ModelConfig, check, fields_of, load_config
from pathways.training.run import resolved
from tasks.errors import UserError
from tasks.spec import Input, Split


def load(tmp_path, text, overrides=None):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(tmp_path, "") == Config()


@pytest.mark.parametrize(
    ("text", "got", "fix"),
    [
        ("[train]\nlearning_rat = 1.0", "train.learning_rat", "train.learning_rate"),
        ("[model.gate]\ntopk = 2", "model.gate.topk", "model.gate.top_k"),
        ("[trian]\nsteps = 2", "trian", "train"),
        ("zzz = 1", "zzz", "known keys: model"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path, text, got, fix):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert caught.value.got == got
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[train]\nsteps = "many"', "train.steps"),
        ("[model]\nwidth = 1.5", "model.width"),
        ('[model.gate]\nkind = "soft"', "model.gate.kind"),
        ('[model]\nexperts = {mlp = "four"}', "model.experts"),
        ("train = 3", "train"),
        ("[encoders]\nchannels = 2", "channels must be 1, 3 or 4, got 2"),
        ("[tasks]\nname = 'x'", "[tasks]"),
    ],
)
def test_a_wrong_value_names_its_key(tmp_path, text, key):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert key in caught.value.got
    assert str(tmp_path) in caught.value.where


@pytest.mark.parametrize(
    ("section", "fields", "numbers"),
    [
        ("model", {"width": 30, "heads": 4}, ("4", "30")),
        ("model", {"heads": 0}, (">= 1", "0")),
        ("model", {"gate": GateOptions(top_k=5)}, ("<= 4", "5")),
        ("model", {"layers": 3, "routed_every": 2, "scan_layers": True}, ("routed_every = 2", "layers = 3")),
        ("model", {"experts": {}}, ("<= 0", "top_k = 2")),
        ("model", {"experts": {"mlpp": 4}}, ("mlp", "mlpp")),
        ("model", {"experts": {"mlp": 4, "swiglu": -1}}, ("model.experts.swiglu >= 0", "-1")),
        ("model", {"experts": {"identity": 2, "mlp": 2}, "shared_experts": 1}, ("first", "identity")),
        ("model", {"dropout": 1.0}, ("< 1", "1.0")),
        ("encoders", {"vocab_size": 100}, (">= 256", "100")),
        ("train", {"steps": 0}, (">= 1", "0")),
        ("train", {"patience": -1}, (">= 0", "-1")),
        ("train", {"temperature": 0.5}, (">= 1", "0.5")),
        ("train", {"learning_rate": float("nan")}, ("> 0", "nan")),
        ("train", {"warmup": 1.5}, ("<= 1", "1.5")),
        ("train", {"beta2": 1.0}, ("< 1", "1.0")),
        ("balance", {"z": -0.1}, (">= 0", "-0.1")),
    ],
)
def test_impossible_sizes_name_both_numbers(section, fields, numbers):
    with pytest.raises(UserError) as caught:
        check(make_config(**{section: fields}))
    assert numbers[0] in caught.value.expected
    assert numbers[1] in caught.value.got


def test_overrides_win_and_make_their_tables(tmp_path):
    config = load(tmp_path, "[train]\nsteps = 5", {"train.steps": 7, "model.gate.top_k": 1})
    assert (config.train.steps, config.model.gate.top_k) == (7, 1)
    with pytest.raises(UserError, match="inside a plain value"):
        load(tmp_path, "train = 5", {"train.steps": 7})


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "shared.toml").write_text("")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "shard.toml")
    assert "shared.toml" in caught.value.fix


def test_what_is_not_toml_names_the_place(tmp_path):
    with pytest.raises(UserError, match="line 1"):
        load(tmp_path, "steps = = 1")


def test_the_resolved_configuration_reads_back_the_same(tmp_path):
    wine, *_, price = make_tasks(tmp_path / "data")
    rich = replace(
        price,
        inputs=(Input("area", "number"), Input("city")),
        split=Split(0.2, 0.1, 3),
        test=None,
        ignore=("age",),
        where=("city", "north"),
        metrics=("mae",),
        loss="huber",
        weight=2.5,
        group="city",
        on_bad="skip",
        max_rows=40,
        encoding="latin-1",
    )
    family = make_family(tmp_path / "data", 2)
    config = make_config((wine, rich, family), model={"experts": {"swiglu": 3, "identity": 1}, "scan_layers": True})
    path = tmp_path / "run" / "config.toml"
    path.parent.mkdir()
    path.write_text(tomli_w.dumps(resolved(config)), encoding="utf-8")
    assert load_config(path) == config


def test_relative_paths_survive_the_move_into_the_run_folder(tmp_path, monkeypatch):
    make_tasks(tmp_path, ["wine"])
    (tmp_path / "c.toml").write_text('[[tasks]]\nname = "wine"\ntrain = "wine-train.csv"\ntarget = "cultivar"\n')
    monkeypatch.chdir(tmp_path)
    config = load_config("c.toml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(resolved(config)))
    assert load_config("run/config.toml").tasks[0].train == str(tmp_path / "wine-train.csv")


def test_every_field_is_listed_for_the_command_line():
    found = {name: default for name, _, default in fields_of(Config)}
    assert found["train.steps"] == 1000
    assert found["model.gate.top_k"] == 2
    assert "model.experts" in found
    assert "model.gate" not in found
    assert hash(ModelConfig()) == hash(ModelConfig())
