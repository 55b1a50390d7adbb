"""Routing statistics: tables, files, flags, similarity, SQL. Every expectation is worked by hand beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from pathways.statistics import usage
from pathways.statistics.counts import SCHEMAS, ExpertName, LayerCounts, RoutingCounts, record
from pathways.statistics.files import LocalFiles, RemoteFiles
from pathways.statistics.flags import coefficient_of_variation, cosine, flag, max_over_mean
from pathways.statistics.parts import list_parts
from pathways.statistics.reader import Statistics
from pathways.statistics.writer import StatisticsWriter, read_experts
from tasks.errors import UserError

MLP = [ExpertName("mlp", i) for i in range(3)] + [ExpertName("identity", 0)]
ROWS = np.array([[100, 0, 0, 0], [0, 30, 10, 0]])
"""Task a sends 100 rows to mlp 0; task b sends 30 to mlp 1 and 10 to mlp 2; identity 0 gets none."""


def layer_counts(rows, layer=0, experts=None, pairs=None, entropy=0.5) -> LayerCounts:
    rows = np.asarray(rows)
    n, e = rows.shape
    routed = rows.sum(axis=1)
    names = experts or [ExpertName("mlp", i) for i in range(e)]
    pairs = np.zeros((e, e), int) if pairs is None else np.asarray(pairs)
    return LayerCounts(layer, names, rows, rows * 0.5, np.arange(n), pairs, entropy * routed, routed)


def counts(step=10, phase: Any = "train", rows: Any = ROWS, tasks=("a", "b"), experts=None, **options) -> RoutingCounts:
    experts = experts or (MLP if np.asarray(rows).shape[1] == 4 else None)
    return RoutingCounts(step, phase, list(tasks), [layer_counts(rows, experts=experts, **options)])


def written(folder: Path, *records: RoutingCounts, **options) -> Statistics:
    writer = StatisticsWriter(folder)
    for one in records:
        writer.append(one)
    return Statistics.open(folder, **options)


def test_record_keeps_only_what_is_not_zero():
    pairs = np.zeros((4, 4), int)
    pairs[1, 2] = pairs[2, 1] = 7  # symmetric, as a counter of pairs is; the diagonal is not a pair
    pairs[1, 1] = 30
    tables = record(counts(pairs=pairs))
    assert tables["routing"].to_pylist() == [
        {"step": 10, "phase": "train", "task": t, "layer": 0, "kind": "mlp", "expert": e, "rows": r, "weight": r / 2}
        for t, e, r in (("a", 0, 100), ("b", 1, 30), ("b", 2, 10))
    ]
    assert tables["pairs"].to_pylist() == [
        {
            "step": 10,
            "phase": "train",
            "layer": 0,
            "kind_a": "mlp",
            "expert_a": 1,
            "kind_b": "mlp",
            "expert_b": 2,
            "rows": 7,
        }
    ]
    entropy = tables["entropy"].to_pylist()
    assert [(row["task"], row["rows"], row["entropy"], row["drops"]) for row in entropy] == [
        ("a", 100, 0.5, 0),
        ("b", 40, 0.5, 1),
    ]


def test_counters_of_a_wrong_shape_are_named():
    layer = layer_counts(ROWS, experts=MLP)
    bad = LayerCounts(0, MLP, layer.rows, layer.weight[:, :3], layer.drops, layer.pairs, layer.drops, layer.drops)
    with pytest.raises(ValueError, match=r"weight of layer 0: expected shape \(2, 4\), got \(2, 3\)"):
        RoutingCounts(1, "train", ["a", "b"], [bad])
    with pytest.raises(ValueError, match="unknown phase"):
        counts(phase="training")


def test_flags_by_hand():
    # Loads 100, 30, 10, 0: mean 35, so only 100 > 70 is overloaded; the first three have one task each.
    flags = flag(ROWS)
    assert flags.dead.tolist() == [False, False, False, True]
    assert flags.overloaded.tolist() == [True, False, False, False]
    assert flags.exclusive.tolist() == [True, True, True, False]
    assert flags.words() == ["overloaded,exclusive", "exclusive", "exclusive", "dead"]


def test_flags_at_their_bounds():
    # 99 of 100 rows is exclusive, 98 of 100 is not; a load of exactly twice the mean (2 of 2, 0) is not overloaded.
    assert flag(np.array([[99, 98], [1, 2]])).exclusive.tolist() == [True, False]
    assert flag(np.array([[2, 0]])).overloaded.tolist() == [False, False]
    nothing = flag(np.zeros((2, 3)))
    assert nothing.dead.all()
    assert not nothing.overloaded.any()
    assert not nothing.exclusive.any()


def test_balance_by_hand():
    # Loads 1, 3: mean 2, standard deviation 1, so 0.5; largest over mean 1.5.
    assert coefficient_of_variation(np.array([1.0, 3.0])) == 0.5
    assert max_over_mean(np.array([1.0, 3.0])) == 1.5
    assert coefficient_of_variation(np.zeros(3)) == max_over_mean(np.zeros(3)) == 0


def test_derived_tables(tmp_path):
    statistics = written(tmp_path, counts())
    experts = statistics.experts.to_pylist()
    assert [(row["kind"], row["expert"], row["rows"], row["flags"]) for row in experts] == [
        ("mlp", 0, 100, "overloaded,exclusive"),
        ("mlp", 1, 30, "exclusive"),
        ("mlp", 2, 10, "exclusive"),
        ("identity", 0, 0, "dead"),
    ]
    assert [row["top_task"] for row in experts] == ["a", "b", "b", None]
    assert [row["tasks"] for row in experts] == [1, 1, 1, 0]
    assert_close([row["share"] for row in experts], [100 / 140, 30 / 140, 10 / 140, 0], "float64")
    (layer,) = statistics.layers.to_pylist()
    # Mean load 35, variance (65^2 + 5^2 + 25^2 + 35^2) / 4 = 1525; gate weights are half of it all.
    assert_close(layer["cv_load"], np.sqrt(1525) / 35, "float64")
    assert_close(layer["cv_importance"], np.sqrt(1525) / 35, "float64")
    assert_close(layer["max_over_mean_load"], 100 / 35, "float64")
    assert (layer["dead"], layer["overloaded"], layer["exclusive"], layer["drops"]) == (1, 1, 3, 1)
    assert_close(layer["entropy"], 0.5)
    tasks = statistics.tasks.to_pylist()
    assert [(row["task"], row["experts"], row["exclusive"], row["similarity"]) for row in tasks] == [
        ("a", 1, 1, 0.0),
        ("b", 2, 2, 0.0),
    ]


def test_tasks_below_one_percent_are_not_counted(tmp_path):
    # Expert 0: 1000 + 10 rows, the second task has 10/1010 < 1%. Expert 1: 50 + 50.
    statistics = written(tmp_path, counts(rows=[[1000, 50], [10, 50]]))
    assert statistics.experts["tasks"].to_pylist() == [1, 2]


def test_similarity_of_identical_and_disjoint_tasks(tmp_path):
    # b does what a does, ten times as often; c shares nothing with them; d stands halfway: cos 45 degrees.
    rows = [[3, 1, 0, 0], [30, 10, 0, 0], [0, 0, 5, 0], [0, 0, 5, 5]]
    names, matrix = written(tmp_path, counts(rows=rows, tasks="abcd")).similarity()
    assert names == ["a", "b", "c", "d"]
    expected = np.eye(4)
    expected[0, 1] = expected[1, 0] = 1
    expected[2, 3] = expected[3, 2] = np.sqrt(0.5)
    assert_close(matrix, expected, "float64")


def test_similarity_puts_layers_side_by_side(tmp_path):
    # Same expert in layer 0, disjoint in layer 1: (1,0,1,0).(1,0,0,1) / 2 = 0.5.
    layers = [layer_counts([[5, 0], [7, 0]], 0), layer_counts([[5, 0], [0, 7]], 1)]
    statistics = written(tmp_path, RoutingCounts(1, "train", ["a", "b"], layers))
    assert_close(statistics.similarity()[1][0, 1], 0.5, "float64")
    assert_close(statistics.similarity(0)[1][0, 1], 1.0, "float64")
    assert_close(statistics.similarity(1)[1][0, 1], 0.0, "float64")
    with pytest.raises(UserError, match="0, 1"):
        statistics.similarity(2)


@given(st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=1, max_size=6))
def test_cosine_is_symmetric_and_bounded(vectors):
    matrix = cosine(np.array(vectors, np.float64))
    assert_close(matrix, matrix.T, "float64")
    assert (np.diag(matrix) == 1).all()
    assert ((matrix >= 0) & (matrix <= 1)).all()


def test_a_task_trained_alone_later_does_not_kill_the_experts_of_others(tmp_path):
    joint = counts(step=10, rows=[[100, 0, 0, 0], [0, 30, 10, 0]])
    added = counts(step=20, rows=[[0, 50]], tasks=["c"], experts=[ExpertName("mlp", 0), ExpertName("mlp", 3)])
    statistics = written(tmp_path, joint, added)
    rows = {(row["kind"], row["expert"]): row for row in statistics.experts.to_pylist()}
    assert {key: row["rows"] for key, row in rows.items()} == {
        ("mlp", 0): 100,
        ("mlp", 1): 30,
        ("mlp", 2): 10,
        ("identity", 0): 0,
        ("mlp", 3): 50,
    }
    assert rows["mlp", 3]["top_task"] == "c"
    assert [key for key, row in rows.items() if row["dead"]] == [("identity", 0)]


def test_only_the_latest_window_of_each_task_counts(tmp_path):
    early, late = counts(step=10, rows=[[9, 0], [0, 9]]), counts(step=20, rows=[[0, 4], [0, 5]])
    statistics = written(tmp_path, early, late)
    assert statistics.experts["rows"].to_pylist() == [0, 9]
    assert statistics.experts["dead"].to_pylist() == [True, False]
    both = Statistics.open(tmp_path, window=2)
    assert both.experts["rows"].to_pylist() == [9, 18]
    assert Statistics.open(tmp_path, tasks=["a"]).experts["rows"].to_pylist() == [0, 4]
    assert Statistics.open(tmp_path, since=11).routing["step"].to_pylist() == [20, 20]


def test_phases(tmp_path):
    train, valid = counts(step=10, rows=[[9, 0], [0, 9]]), counts(step=10, phase="valid", rows=[[1, 1], [1, 1]])
    statistics = written(tmp_path, valid, train, counts(step=20, rows=[[3, 3]], tasks="a"))
    assert statistics.phases == ["train", "valid"]
    assert statistics.phase == "train"
    assert statistics.of("valid").experts["rows"].to_pylist() == [2, 2]
    latest = statistics.latest("train")
    assert latest.task_names == ["a"]
    assert latest.experts["rows"].to_pylist() == [3, 3]
    with pytest.raises(UserError, match="train, valid"):
        statistics.of("test")


def test_nothing_recorded_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="train or evaluate"):
        Statistics.open(tmp_path)


def test_load_over_time(tmp_path):
    statistics = written(tmp_path, counts(step=10, rows=[[1, 0], [2, 5]]), counts(step=20, rows=[[0, 0], [0, 4]]))
    steps, load = statistics.balance_over_time()[0]
    assert steps.tolist() == [10, 20]
    assert load.tolist() == [[3, 5], [0, 4]]


def test_a_record_of_one_task_of_three_is_not_the_load(tmp_path):
    all_three = counts(step=10, rows=[[1, 0], [2, 5], [1, 1]], tasks="abc")
    steps, load = written(tmp_path, all_three, counts(step=11, rows=[[9, 0]], tasks="a")).balance_over_time()[0]
    assert steps.tolist() == [10]
    assert load.tolist() == [[4, 6]]


@pytest.mark.parametrize("number", [3, 4, 5, 23, 70])
def test_merged_files_hold_every_record_once(tmp_path, number):
    writer = StatisticsWriter(tmp_path, merge_every=4)
    for step in range(number):
        writer.append(counts(step=step, rows=[[step + 1, 0], [0, 1]]))
    files = list((tmp_path / "routing").iterdir())
    # Fewer than 4 files of each level, and at most 1 + log4(70) levels.
    assert len(files) <= 3 * 4
    if number == 70:  # 70 = 1 * 64 + 1 * 4 + 2
        assert len(files) == 4
    table = Statistics.open(tmp_path).sql("select step, rows from routing where task = 'a' order by step")
    assert table["step"].to_pylist() == list(range(number))
    assert table["rows"].to_pylist() == list(range(1, number + 1))


def test_a_record_written_again_replaces_itself(tmp_path):
    writer = StatisticsWriter(tmp_path, merge_every=4)
    for step in [*range(5), 4, 1]:  # 4 is a file of its own, 1 is merged with others
        writer.append(counts(step=step, rows=[[step, 0], [0, 100 + step]]))
    writer.append(counts(step=1, rows=[[77, 0], [0, 0]]))
    rows = Statistics.open(tmp_path).sql("select task, step, rows from routing order by all").to_pylist()
    got = [(row["task"], row["step"], row["rows"]) for row in rows]
    assert got == [("a", 1, 77), *(("a", s, s) for s in (2, 3, 4)), *(("b", s, 100 + s) for s in (0, 2, 3, 4))]


@pytest.mark.parametrize("start_step", [0, 3, 5, 9, 10, 50])
def test_resuming_drops_what_will_come_again(tmp_path, start_step):
    writer = StatisticsWriter(tmp_path, merge_every=4)
    for step in range(1, 11):
        writer.append(counts(step=step, rows=[[step, 1], [1, 1]]))
    again = StatisticsWriter(tmp_path, start_step=start_step, merge_every=4)
    for step in range(start_step + 1, 13):
        again.append(counts(step=step, rows=[[step, 1], [1, 1]]))
    steps = Statistics.open(tmp_path).sql("select step from routing where task = 'a' and expert = 0 order by 1")
    assert steps["step"].to_pylist() == list(range(1, 11 if start_step == 50 else 13))


def test_leftovers_of_a_merge_cut_short_are_not_read_twice(tmp_path):
    writer = StatisticsWriter(tmp_path, merge_every=4)
    copies = {}
    for step in range(3):
        writer.append(counts(step=step))
    for path in tmp_path.rglob("*.parquet"):
        copies[path] = path.read_bytes()
    writer.append(counts(step=3))
    for path, data in copies.items():  # as if the process had died before deleting them
        path.write_bytes(data)
    (tmp_path / "routing" / "notes.txt").write_text("foreign")
    assert Statistics.open(tmp_path).entropy.num_rows == 4 * 2
    StatisticsWriter(tmp_path)
    assert not any(path.exists() for path in copies)
    assert [part.level for part in list_parts(LocalFiles(tmp_path), "routing")[0]] == [1]


def test_a_url_works_like_a_folder(tmp_path):
    url = f"file://{tmp_path}/model/statistics"
    writer = StatisticsWriter(url, merge_every=3)
    for step in range(7):
        writer.append(counts(step=step))
    remote, local = Statistics.open(url), Statistics.open(tmp_path / "model" / "statistics")
    assert remote.experts.equals(local.experts)
    assert remote.routing.num_rows == 7 * 3
    assert len(RemoteFiles(url).list("routing/")) == 3  # two merged ones and one more
    with pytest.raises(FileNotFoundError):
        RemoteFiles(url).read("nothing")


def test_experts_are_listed_in_a_small_file(tmp_path):
    written(tmp_path, counts(), counts(step=20))
    content = json.loads((tmp_path / "layers.json").read_text())
    assert content["layers"] == [{"layer": 0, "runs": [["mlp", 0, 2], ["identity", 0, 0]]}]
    found = read_experts(LocalFiles(tmp_path))
    assert found == {0: [ExpertName("mlp", 0), ExpertName("mlp", 1), ExpertName("mlp", 2), ExpertName("identity", 0)]}
    older = {"format": 1, "layers": [{"layer": 0, "experts": [["mlp", 0], ["mlp", 1], ["mlp", 2], ["identity", 0]]}]}
    (tmp_path / "layers.json").write_text(json.dumps(older))
    assert read_experts(LocalFiles(tmp_path)) == found


def test_a_damaged_file_is_named(tmp_path):
    written(tmp_path, counts(), counts(step=20))
    (tmp_path / "routing" / "0000000020-train.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match="0000000020-train") as raised:
        Statistics.open(tmp_path)
    assert "delete this file" in str(raised.value)


def test_a_write_that_fails_leaves_the_old_bytes(tmp_path, monkeypatch):
    files = LocalFiles(tmp_path)
    files.write("a/b", b"old")

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write("a/b", b"new")
    assert files.read("a/b") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_sql_sees_all_six_tables(tmp_path):
    statistics = written(tmp_path, counts(pairs=np.triu(np.ones((4, 4), int), 1)))
    for name, rows in {"routing": 3, "pairs": 6, "entropy": 2, "experts": 4, "tasks": 2, "layers": 1}.items():
        assert statistics.sql(f"select count(*) as n from {name}")["n"].to_pylist() == [rows]
    total = statistics.sql("select sum(rows) as rows from routing")
    assert total.schema.field("rows").type == pa.int64()
    assert total["rows"].to_pylist() == [140]
    alone = statistics.sql("select kind, expert from experts where exclusive and top_task = 'b' order by all")
    assert alone["expert"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("selec 1", "syntax error"),
        ("select foo from routing", "foo"),
        ("select * from nothing", "nothing"),
        ("", "got:      nothing"),
        ("select 1; select 2", "one SELECT"),
        ("drop view routing", "DROP"),
        ("copy routing to '{path}/stolen.csv'", "COPY"),
        ("attach '{path}/stolen.db'", "ATTACH"),
        ("set enable_external_access = true", "SET"),
        ("select * from read_text('{path}/secret.csv')", "file system operations are disabled"),
        ("select * from '{path}/secret.csv'", "secret.csv"),
        ("select * from read_csv('https://example.org/a.csv')", "disabled"),
        ("select * from local_frame", "local_frame"),
    ],
)
def test_sql_that_is_wrong_or_reaches_out_is_a_users_error(tmp_path, query, message):
    local_frame = pa.table({"a": [1]})  # DuckDB would otherwise read Python variables by name
    (tmp_path / "secret.csv").write_text("a\n1\n")
    statistics = written(tmp_path / "statistics", counts())
    with pytest.raises(UserError) as raised:
        statistics.sql(query.format(path=tmp_path))
    text = str(raised.value)
    assert message in text
    assert "entropy(step, phase, task, layer, rows, entropy, drops)" in text
    assert not list(tmp_path.glob("stolen*"))
    assert local_frame.num_rows == 1


def test_a_large_record_is_written_fast(tmp_path):
    """160 tasks, 64 experts, 4 layers, every entry non-zero: under 50 ms of processor time a record.

    Waiting for the disk is left out: it is the machine's, and the test must hold on a busy one.
    """
    n, e = 160, 64
    rows = np.random.default_rng(0).integers(1, 1000, (n, e))
    layers = [layer_counts(rows, i, pairs=np.ones((e, e), int)) for i in range(4)]
    writer = StatisticsWriter(tmp_path)
    taken = []
    for step in range(5):
        start = time.process_time()
        writer.append(RoutingCounts(step, "train", [f"task {i}" for i in range(n)], layers))
        taken.append(time.process_time() - start)
    assert min(taken) < 0.05
    assert Statistics.open(tmp_path).routing.num_rows == 5 * 4 * n * e


def test_every_query_of_the_documentation_runs(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "statistics.md").read_text(encoding="utf-8")
    queries = [block.partition("```")[0] for block in text.split("```sql\n")[1:]]
    pairs = np.zeros((4, 4), int)
    pairs[1, 2] = 7
    statistics = written(tmp_path, counts(rows=[[40, 60, 0, 0], [0, 30, 10, 0]], pairs=pairs))
    answers = [statistics.sql(query).to_pylist() for query in queries]
    assert len(answers) == 7
    assert answers[2] == [{"one": "a", "other": "b", "experts": 1}]
    assert [row["expert"] for row in answers[1]] == [0, 2]
    # Loads 40, 90, 10, 0: mean 35, so 90 / 35. Lift: 7 * 140 / (90 * 10).
    assert_close(answers[4][0]["max_over_mean"], 90 / 35, "float64")
    assert_close(answers[5][0]["lift"], 7 * 140 / 900, "float64")


def test_every_column_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "statistics.md").read_text(encoding="utf-8")
    sections = {part.partition("`")[0]: part for part in text.split("### `")[1:]}
    tables = {**SCHEMAS, "experts": usage._EXPERTS, "tasks": usage._TASKS, "layers": usage._LAYERS}
    for name, schema in tables.items():
        cells = [line.split("|")[1] for line in sections[name].splitlines() if line.startswith("| ")]
        documented = {word.strip() for cell in cells for word in cell.split(",")}
        assert set(schema.names) <= documented, name
