"""What is in a model: parameter counts against the arrays themselves, the drawing, the versions; the public face."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pathways as pw
from experts.compute import choose_backend
from pathways import allocator, describe
from pathways.model import RETRIEVAL, Model

ROOT = Path(__file__).resolve().parent.parent


def test_total_parameters_are_those_of_the_arrays(tiny_model: Model) -> None:
    stored = [name for name in tiny_model.view.names() if tiny_model.view.entry(name).kind == "array"]
    names = [name for name in stored if name != RETRIEVAL]
    arrays = tiny_model.view.read_many(dict.fromkeys(names))
    assert describe.Sizes(tiny_model).total == sum(array.size for array in arrays.values())


def test_private_and_active_parameters(tiny_model: Model) -> None:
    sizes, entry = describe.Sizes(tiny_model), tiny_model.entry("wine")
    # A head of 3 classes on rows of width 32, with biases: 3 * 32 + 3 = 99.
    assert sizes.private(entry) == 99
    # Of 4 experts in each of 2 layers, 2 are active: the others and what belongs to other tasks are not.
    expert = sizes.expert[0, "mlp"]
    others = sum(sizes.private(tiny_model.entry(name)) for name in ("mood", "words", "price"))
    idle = sizes.under("encoders/") - sizes.under("encoders/table/")
    assert sizes.active(entry) == sizes.total - 2 * 2 * expert - others - idle
    # Two-layer MLP, D = F = 32: 32 * 32 + 32 and 32 * 32 + 32.
    assert expert in (2 * 32 * 32, 2 * 32 * 32 + 64)


def test_a_task_named_like_the_start_of_another_is_not_charged_for_it(tiny_model: Model) -> None:
    sizes = describe.Sizes(tiny_model)
    assert sizes.under("heads/w/") == 0
    assert sizes.under("heads/") == sum(sizes.under(f"heads/{name}/") for name in tiny_model.tasks)


def test_task_rows(tiny_model: Model) -> None:
    columns, rows = describe.task_rows(tiny_model)
    by_name = {row[0]: dict(zip([c.name for c in columns], row, strict=True)) for row in rows}
    assert by_name["price"]["metric"] == "rmse"
    assert by_name["price"]["value"] == tiny_model.entry("price").notes["valid"]["rmse"]
    assert by_name["wine"]["rows"] == 60
    assert 4 <= by_name["wine"]["experts"] <= 8
    narrow, shown = describe.compact(rows)
    assert len(shown[0]) == len(narrow)
    assert shown[0][4].startswith("accuracy ")


def test_shares_are_drawn(tiny_model: Model) -> None:
    noted = describe.shares(tiny_model.entry("wine"))
    assert all(abs(sum(layer["mlp"].values()) - 1) < 1e-3 for layer in noted)
    text = describe.drawing(tiny_model, "wine")
    assert text.startswith("table encoder")
    assert "layer 1   mlp 0-3" in text
    assert text.endswith("head      3 outputs")


@pytest.mark.parametrize(
    ("share", "most", "mark"), [(0.0, 1.0, "·"), (1.0, 1.0, "█"), (0.5, 1.0, "▄"), (1e-6, 1.0, "▁"), (0.0, 0.0, "·")]
)
def test_bars(share: float, most: float, mark: str) -> None:
    assert describe._shade(share, most) == mark


def test_ranges() -> None:
    assert describe._ranges([1, 2, 3, 7]) == "1-3, 7"
    assert describe._ranges([]) == ""


def test_log_and_facts(tiny_model: Model) -> None:
    columns, rows = describe.log_rows(tiny_model)
    assert rows[-1][0] == tiny_model.version
    assert len(columns) == len(rows[0])
    facts = dict(describe.model_facts(tiny_model))
    assert facts["tasks"] == "4"
    assert facts["layer 0"] == "4 mlp"
    assert facts["experts by"] == f"{choose_backend(jnp.float32)} on cpu in float32"
    assert dict(describe.task_facts(tiny_model, "mood"))["classes"] == "2: pleasant, unpleasant"


def test_freed_memory_is_kept_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(allocator.SWITCH, "0")
    assert pw.reuse_memory() is False
    program = """
import ctypes, sys
import pathways as pw
print(pw.reuse_memory(), sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"))
"""
    monkeypatch.delenv(allocator.SWITCH)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == out[1]


def test_every_public_name_resolves() -> None:
    assert len(set(pw.__all__)) == len(pw.__all__)
    for name in pw.__all__:
        value = getattr(pw, name)
        assert callable(value), name
        assert not isinstance(value, type(sys)), f"{name} is hidden by a module of its name"
    assert set(pw.__all__) <= set(dir(pw))
    with pytest.raises(AttributeError):
        _ = pw.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_no_module_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(pw.__path__)}
    assert modules
    assert not modules & set(pw.__all__)


def test_open_finds_versions(tiny_model: Model) -> None:
    assert pw.open(tiny_model.path).tasks == tiny_model.tasks
    assert pw.open(Path(tiny_model.path), tiny_model.version).version == tiny_model.version
    with pytest.raises(pw.UserError):
        pw.open(tiny_model.path, 99)


def test_statistics_by_path_and_by_model(tiny_model: Model) -> None:
    assert pw.stats(tiny_model).task_names == pw.stats(tiny_model.path).task_names == sorted(tiny_model.tasks)
    assert np.isfinite(pw.stats(tiny_model).similarity()[1]).all()


@pytest.mark.parametrize("shadow", ["tasks.py", "routing/__init__.py", "experts/other.py"])
def test_a_file_that_hides_a_sibling_is_named(shadow: str, tmp_path: Path) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import pathways"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if shadow == "experts/other.py":
        # A folder without an __init__ gives way to a package anywhere on the path.
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert str(tmp_path / shadow) in done.stderr
    assert "hides the package" in done.stderr
