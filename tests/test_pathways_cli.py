"""The command line end to end, in process; its help in a process of its own, which must stay light."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pathways.cli import commands, main
from pathways.cli.overrides import attribute_texts, parse_value, read_fields
from pathways.cli.parser import build, parse
from pathways.config import Config, fields_of
from pathways.model import Model
from tasks.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(commands.COMMANDS)


def _process(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **env}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def _table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture
def model_copy(tiny_model: Model, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model.path, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tiny_model: Model) -> Path:
    return Path(tiny_model.path).parent / "data"


def test_help_of_everything_imports_nothing_heavy() -> None:
    code = (
        "import sys, json\n"
        "from pathways.cli import main\n"
        f"for words in [[], *[[c] for c in {COMMANDS!r}]]:\n"
        "    assert main([*words, '--help']) == 0\n"
        "heavy = [m for m in ('jax', 'numpy', 'pyarrow', 'flax', 'rich', 'msgspec') if m in sys.modules]\n"
        "print(json.dumps(heavy))"
    )
    done = _process("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert all(name in done.stdout for name in COMMANDS)


def test_python_m_pathways_answers() -> None:
    done = _process("-m", "pathways", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("pathways ")


def test_every_command_has_a_parser_and_an_example() -> None:
    _, parsers = build()
    assert sorted(parsers) == COMMANDS
    for name, parser in parsers.items():
        assert f"example:\n  pathways {name} " in (parser.description or ""), name


def test_flags_are_the_fields_of_the_configuration() -> None:
    found = {field.name: field for field in read_fields()}
    assert list(found) == [name for name, _, _ in fields_of(Config) if name != "tasks"]
    assert found["train.learning_rate"].default == "0.002"
    assert found["model.experts"].default == "{mlp = 16}"
    assert found["model.gate.kind"].metavar == "{noisy_top_k,softmax_top_k,sigmoid_top_k,gumbel_matrix}"
    assert all(field.help for field in found.values() if field.section != "mesh")


def test_attribute_texts_join_continued_lines_and_shared_names() -> None:
    text = "Head.\n\nAttributes:\n    a, b: first\n        and more.\n    c: `code`.\n\nRaises:\n    d: no.\n"
    assert attribute_texts(text)["a"] == attribute_texts(text)["b"] == "first and more."
    assert attribute_texts(text)["c"] == "code."


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("1e-3", 1e-3), ("true", True), ("cosine", "cosine"), ("{mlp = 8}", {"mlp": 8}), ("-1", -1)],
)
def test_values_of_overrides(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[train]\nsteps = 7\nrows = 3\n")
    words = ["train", str(path), "--out", "x", "--train.steps", "9", "--model.experts", "{mlp = 5}", "--mesh.data=-1"]
    config = commands._config(parse(words))
    assert (config.train.steps, config.train.rows, config.model.experts) == (9, 3, {"mlp": 5})


def test_a_wrong_type_in_an_override_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text("")
    assert main(["train", str(path), "--out", str(tmp_path / "out"), "--train.steps", "many"]) == 2
    assert "steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "c.toml", "--out", "x", "--train.step", "5"], "did you mean --train.steps?"),
        (["eval", "m", "--wurst", "3"], "did you mean --worst?"),
        (["predict", "m"], "TASK, FILE"),
        (["log", "m", "n"], "no such argument"),
        (["eval", "m", "--split", "dev"], "invalid choice"),
        (["tasks", "no/such/folder"], "nothing at this path"),
    ],
)
def test_mistakes_are_told_plainly(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert "\033" not in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "no/such/folder", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device", "x"), 1), (BrokenPipeError(), 141)],
)
def test_exit_status(error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setitem(commands.COMMANDS, "log", fail)
    assert main(["log", "m"]) == status


def test_a_run_stopped_by_a_signal_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathways.training.loop import Interrupted

    def fail(args: object) -> None:
        raise Interrupted(40, 15)

    monkeypatch.setitem(commands.COMMANDS, "log", fail)
    assert main(["log", "m"]) == 128 + 15
    error = capsys.readouterr().err
    assert "SIGTERM" in error
    assert "step 40" in error
    assert "same command again" in error


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(commands.COMMANDS, "log", fail)
    with pytest.raises(ZeroDivisionError):
        main(["log", "m"])


def test_compilation_cache_respects_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    commands.set_up_jax()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("PATHWAYS_CACHE", str(tmp_path))
    try:
        commands.set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_tasks_as_csv_and_table(tiny_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", tiny_model.path, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["task"] for row in rows] == ["wine", "mood", "words", "price"]
    assert {row["origin"] for row in rows} == {"joint"}
    assert main(["tasks", tiny_model.path]) == 0
    assert "classification" in capsys.readouterr().out


def test_show_log_and_verify(tiny_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["show"], ["show", "wine"], ["log"], ["verify"]):
        assert main([words[0], tiny_model.path, *words[1:]]) == 0
    out = capsys.readouterr().out
    for text in ("active per row", "table encoder", "mlp 0-3", "jointly", "is whole"):
        assert text in out


def test_a_backend_that_is_not_there(monkeypatch, tiny_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATHWAYS_BACKEND", "fast")
    assert main(["show", tiny_model.path]) == 2
    said = capsys.readouterr().err
    assert "unknown backend" in said
    assert "expected auto or one of buckets, dense, native, ragged, triton" in said


def test_verify_names_what_is_damaged(model_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((model_copy / "store" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(files[-1].read_bytes())
    # A run of flipped bits in the middle of the largest data file lies within arrays.
    for i in range(len(content) // 2, len(content) // 2 + 64):
        content[i] ^= 255
    files[-1].write_bytes(bytes(content))
    assert main(["verify", str(model_copy)]) in (1, 2)
    done = capsys.readouterr()
    assert "damaged" in done.err or "/" in done.out


def test_predict_writes_every_row_in_order(
    tiny_model: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _table(data / "wine-test.csv")
    output = tmp_path / "out.csv"
    words = ["predict", tiny_model.path, "wine", str(data / "wine-test.csv"), "--keep", "alcohol", "-o", str(output)]
    assert main(words) == 0
    found = _table(output)
    assert [row["alcohol"] for row in found] == [row["alcohol"] for row in given]
    assert list(found[0]) == ["alcohol", "prediction", "confidence", "p_barbera", "p_barolo", "p_grignolino"]
    total = [sum(float(row[name]) for name in list(row)[3:]) for row in found]
    assert max(abs(value - 1) for value in total) < 1e-5
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_in_another_encoding_is_read_as_said(
    tiny_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = tmp_path / "old.csv", "alcohol,acid,hue,style,café\n1,2,3,dry,\n2,2,3,sweet,\n"
    path.write_bytes(rows.encode("latin-1"))
    for words in (
        ["predict", tiny_model.path, "wine", str(path)],
        ["suggest", tiny_model.path, "wine", "--pool", str(path)],
    ):
        assert main(words) == 2
        assert "--encoding latin-1" in capsys.readouterr().err
        assert main([*words, "--keep", "café", "--encoding", "latin-1", "--format", "csv"]) == 0
        assert "café" in capsys.readouterr().out.splitlines()[0]


def test_predict_formats_agree(tiny_model: Model, data: Path, tmp_path: Path) -> None:
    source = str(data / "price-test.csv")
    for ending in ("csv", "jsonl", "parquet"):
        words = ["predict", tiny_model.path, "price", source, "--keep", "price", "-o", str(tmp_path / f"o.{ending}")]
        assert main(words) == 0
    parquet = pq.read_table(tmp_path / "o.parquet")
    assert parquet.column_names == ["price", "predicted_price"]
    exact = parquet.column("predicted_price").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    rows = _table(tmp_path / "o.csv")
    assert len(exact) == len(lines) == len(rows) == 24
    assert [line["predicted_price"] for line in lines] == [float(row["predicted_price"]) for row in rows]
    assert [line["predicted_price"] for line in lines] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("form", ["csv", "jsonl", "tsv"])
def test_predict_reads_standard_input(
    tiny_model: Model, data: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _table(data / "wine-test.csv")[:3]
    if form == "jsonl":
        text = "".join(json.dumps({**row, "alcohol": float(row["alcohol"])}) + "\n" for row in rows)
    else:
        mark = "," if form == "csv" else "\t"
        text = "\n".join([mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]) + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["predict", tiny_model.path, "wine", "-", "-o", str(tmp_path / "o.jsonl")]) == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert found == _predictions(tiny_model, rows)


def test_predict_in_a_pipe_whose_reader_leaves(tiny_model: Model, data: Path) -> None:
    command = [sys.executable, "-m", "pathways", "predict", tiny_model.path, "wine", str(data / "wine-test.csv")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
        process.wait()
    assert process.returncode == 141
    assert error == ""


def _predictions(model: Model, rows: list[dict[str, str]]) -> list[str]:
    return model.predict("wine", rows).column("prediction").to_pylist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["wines", "wine-test.csv"], "did you mean 'wine'?"),
        (["wine", "price-test.csv"], "there is no column 'alcohol'"),
        (["wine", "wine-tst.csv"], "did you mean"),
        (["wine", "wine-test.csv", "--keep", "alcohl"], "did you mean 'alcohol'?"),
    ],
)
def test_predict_refuses(
    tiny_model: Model, data: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("old\n")
    assert main(["predict", tiny_model.path, words[0], str(data / words[1]), *words[2:], "-o", str(output)]) == 2
    assert said in capsys.readouterr().err
    assert output.read_text() == "old\n"
    assert not list(tmp_path.glob("*.partial"))


def test_eval_formats(model_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(model_copy)
    assert main(["eval", model, "wine", "price", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["task"], row["metric"]) for row in rows[:2]] == [("wine", "accuracy"), ("wine", "macro_f1")]
    assert main(["eval", model, "wine", "--format", "json", "--worst", "2"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["metrics"]["accuracy"] == float(rows[0]["value"])
    assert len(found["per_class"]) == 3
    assert main(["eval", model, "wine", "--worst", "2", "--plots", str(tmp_path / "p")]) == 0
    assert "per class" in capsys.readouterr().out
    assert (tmp_path / "p" / "wine.confusion.png").stat().st_size > 1000


def test_stats(model_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(model_copy)
    assert main(["stats", model]) == 0
    assert "max/mean" in capsys.readouterr().out
    assert main(["stats", model, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    totals: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["task"], row["layer"])
        totals[key] = totals.get(key, 0.0) + float(row["task_share"])
    assert len(totals) == 8  # 4 tasks in 2 layers
    assert all(abs(total - 1) < 1e-9 for total in totals.values())
    assert main(["stats", model, "--sql", "select count(distinct task) as n from routing", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 4}]
    assert main(["stats", model, "--plot"]) == 0
    names = sorted(path.name for path in (model_copy / "plots").iterdir())
    assert names == ["experts_layer0.png", "experts_layer1.png", "load.png", "similarity.png"]
    assert main(["stats", model, "--sql", "drop table routing"]) == 2


def test_undo_and_compact(model_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(model_copy)
    assert main(["remove", model, "mood"]) == 0
    assert Model.open(model).tasks == ("wine", "words", "price")
    assert main(["undo", model]) == 0
    assert Model.open(model).tasks == ("wine", "mood", "words", "price")
    assert main(["tasks", model, "--at", "3", "--format", "csv"]) == 0
    assert "mood" not in capsys.readouterr().out.splitlines()[1:]
    assert main(["compact", model]) == 2
    done = capsys.readouterr()
    assert [line.partition(":")[0] for line in done.out.splitlines()] == [f"version {i} would go" for i in (1, 2, 3)]
    assert "--yes" in done.err
    assert Model.open(model, 3).version == 3
    assert main(["compact", model, "--yes"]) == 0
    assert "kept version 4" in capsys.readouterr().out
    assert main(["compact", model]) == 0  # nothing is left to ask about
    assert main(["tasks", model, "--at", "3"]) == 2
    with pytest.raises(UserError):
        Model.open(model, 3)
