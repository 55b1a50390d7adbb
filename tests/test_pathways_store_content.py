"""The store's content: arrays, rows, documents, blobs; what is written, shared, removed, and brought back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from pathways.store import Changes, Store, kvstore_spec
from pathways.store.records import DTYPES
from pathways.store.stage import REFERENCED
from tasks.errors import UserError


def in_rows(name: str) -> bool:
    return name.startswith("banks/")


def commit(store: Store, message: str = "test", **changes):
    return store.commit(Changes(**changes), message, row_chunked=in_rows)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bank(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 64, 128), dtype=np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "model")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["whole/x", "banks/x"])
def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path, dtype, name) -> None:
    store = Store.create(f"memory://{tmp_path.name}")
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(5,), (4, 3), (2, 1, 3), (3, 0), (0, 3)]):
        array = rng.integers(0, 2, shape).astype(DTYPES[dtype])
        commit(store, put={f"{name}{i}": array})
        found = Store.open(store.path).read(f"{name}{i}")
        assert found.dtype == array.dtype
        assert found.shape == shape
        assert found.tobytes() == array.tobytes()


def test_scalars_strided_and_big_endian_arrays(store) -> None:
    strided = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-3]
    commit(store, put={"scalar": np.float32(3.5), "strided": strided, "big": np.arange(3, dtype=">i4")})
    assert store.read("scalar").shape == ()
    assert store.read("scalar") == 3.5
    np.testing.assert_array_equal(store.read("strided"), [[5, 2], [17, 14]])
    np.testing.assert_array_equal(store.read("big"), [0, 1, 2])


@pytest.mark.parametrize("name", ["whole/x", "banks/x"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.complex64])
def test_chunks_written_from_where_they_lie_come_back_bit_for_bit(store, dtype, name) -> None:
    for i, shape in enumerate([(3, REFERENCED), (2, 3, REFERENCED // 2), (REFERENCED,)]):
        array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        array[1:2] = 0  # a Zarr array does not store a chunk of zeros unless told to
        seen: list[np.ndarray] = []

        def look(view, i=i, seen=seen) -> None:
            seen.append(view.read(f"{name}{i}"))

        store.commit(Changes(put={f"{name}{i}": array}), "large", row_chunked=in_rows, check=look)
        expected = array.copy()
        array[:] = 1  # the caller's again
        for found in (seen[0], store.read(f"{name}{i}"), Store.open(store.path).read(f"{name}{i}")):
            assert found.tobytes() == expected.tobytes()
        if name.startswith("banks/") and array.ndim > 1:
            commit(store, append={f"{name}{i}": array[:1]}, put_rows={f"{name}{i}": (np.array([0]), array[:1])})
            expected = np.concatenate([array[:1], expected[1:], array[:1]])
            assert Store.open(store.path).read(f"{name}{i}").tobytes() == expected.tobytes()
    assert store.verify() == []


def test_any_zarr_reader_over_ocdbt_opens_the_arrays(store) -> None:
    rows, whole = bank(5), bank(1)[0].astype(ml_dtypes.bfloat16)
    commit(store, put={"banks/a": rows, "trunk/x": whole, "flags": np.array([True, False]), "one": np.complex64(1j)})
    commit(store, append={"banks/a": rows[:2]})
    for name, expected in [("banks/a", np.concatenate([rows, rows[:2]])), ("trunk/x", whole)]:
        spec = {"driver": "ocdbt", "base": kvstore_spec(store.path), "path": f"arrays/{name}/"}
        plain = ts.open({"driver": "zarr3", "kvstore": spec}).result()
        np.testing.assert_array_equal(plain.read().result(), expected)
    for name in ("flags", "one"):
        spec = {"driver": "ocdbt", "base": kvstore_spec(store.path), "path": f"arrays/{name}/"}
        np.testing.assert_array_equal(
            ts.open({"driver": "zarr3", "kvstore": spec}).result().read().result(), store.read(name)
        )


def test_reading_rows(store) -> None:
    array = bank(8)
    commit(store, put={"banks/a": array, "whole": array[:, 0]})
    np.testing.assert_array_equal(store.read("banks/a", [5, 1, 5]), array[[5, 1, 5]])
    np.testing.assert_array_equal(store.read("banks/a", slice(-3, None)), array[-3:])
    np.testing.assert_array_equal(store.read("whole", [2]), array[[2], 0])
    many = store.read_many({"banks/a": [0], "whole": None})
    np.testing.assert_array_equal(many["banks/a"], array[:1])
    np.testing.assert_array_equal(many["whole"], array[:, 0])
    assert store.read("banks/a", []).shape == (0, 64, 128)
    many["banks/a"][:] = 0  # what was read is the caller's own
    for rows in ([8], [-1]):
        with pytest.raises(UserError, match="row out of range"):
            store.read("banks/a", rows)


def test_a_commit_of_two_experts_writes_their_bytes_and_no_more(tmp_path) -> None:
    store = Store.create(tmp_path / "model")
    array = np.random.default_rng(0).standard_normal((64, 256, 256), dtype=np.float32)
    commit(store, put={"banks/a": array})
    before = size_of(tmp_path)
    changed = array.copy()
    changed[[3, 9]] += 1
    version = commit(store, put={"banks/a": changed})  # put whole: the store finds the two rows itself
    delta = 2 * 256 * 256 * 4
    assert version.changes["bytes"] == delta
    assert size_of(tmp_path) - before < 1.02 * delta
    before = size_of(tmp_path)
    commit(store, put_rows={"banks/a": (np.array([9, 3]), array[[9, 3]] + 2)}, append={"banks/a": array[:2]})
    assert size_of(tmp_path) - before < 1.02 * 2 * delta
    changed[[3, 9]] = array[[3, 9]] + 2
    np.testing.assert_array_equal(store.read("banks/a"), np.concatenate([changed, array[:2]]))


def test_equal_content_is_not_written_again(tmp_path, store) -> None:
    put = {"banks/a": bank(4), "x": bank(1)}
    commit(store, put=put, documents={"d": {"b": 1}}, blobs={"z": b"123"})
    again = commit(store, put=put, documents={"d": {"b": 1}}, blobs={"z": b"123"})
    assert again.changes["bytes"] == 0
    assert again.changes["counts"] == {"written": 0, "appended": 0, "removed": 0}


def test_an_array_may_change_shape_type_and_shrink(store) -> None:
    commit(store, put={"banks/a": bank(6), "x": bank(1)})
    commit(store, put={"banks/a": bank(2, seed=1), "x": np.arange(3)})
    np.testing.assert_array_equal(store.read("banks/a"), bank(2, seed=1))
    np.testing.assert_array_equal(store.read("x"), [0, 1, 2])
    keys = store._kv.list().result()
    assert sum(key.startswith(b"arrays/banks/a/c/") for key in keys) == 2
    assert store.verify() == []


def test_names_documents_and_blobs(store) -> None:
    tasks = ["a.b-c_d/e", "a", "a/c/0", "schöne/Größe"]
    commit(
        store,
        documents={f"tasks/{task}": {"name": task} for task in tasks},
        put={f"heads/{task}/kernel": np.full(3, i) for i, task in enumerate(tasks)},
        blobs={"empty": b"", "z": b"\0\1"},
    )
    assert store.names("tasks/") == sorted(f"tasks/{task}" for task in tasks)
    assert store.document("tasks/a.b-c_d/e") == {"name": "a.b-c_d/e"}
    assert [store.read(f"heads/{task}/kernel")[0] for task in tasks] == [0, 1, 2, 3]
    assert store.blob("empty") == b""
    assert store.blob("z") == b"\0\1"
    assert store.has("z")
    assert not store.has("y")
    assert len(store.names()) == 10
    assert store.array_info("heads/a/kernel") == ((3,), np.dtype(np.int64), False)


def test_removing_names_and_prefixes(store) -> None:
    commit(store, put={"heads/a/kernel": np.ones(3), "heads/ab/kernel": np.ones(3), "banks/a": bank(3)})
    version = commit(store, remove=["heads/a/", "banks/a", "nothing/"])
    assert store.names() == ["heads/ab/kernel"]
    assert version.changes["removed"] == ["banks/a", "heads/a/kernel"]
    assert not [key for key in store._kv.list().result() if b"banks/a" in key]
    commit(store, remove=["heads/"], put={"heads/ab/kernel": np.zeros(2)})  # removed and written anew in one commit
    np.testing.assert_array_equal(store.read("heads/ab/kernel"), [0, 0])
    assert store.verify() == []
    assert store.verify(2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"put": {"a//b": np.ones(1)}}, "name cannot stand"),
        ({"put": {"a/../b": np.ones(1)}}, "name cannot stand"),
        ({"documents": {"/a": 1}}, "name cannot stand"),
        ({"put": {"x": np.array(["text"])}}, "does not hold this type"),
        ({"put": {"x": np.array([object()])}}, "does not hold this type"),
        ({"put": {"banks/scalar": np.float32(1)}}, "no rows to chunk"),
        ({"put": {"doc": np.ones(1)}}, "taken by another kind"),
        ({"documents": {"x": float("nan")}}, "JSON"),
        ({"documents": {"x": {1, 2}}}, "JSON"),
        ({"remove": ["nothing"]}, "no such name"),
        ({"put_rows": {"nothing": (np.array([0]), np.ones((1, 2)))}}, "no such name"),
        ({"put_rows": {"banks/a": (np.array([3]), np.ones((1, 2)))}}, "row out of range"),
        ({"put_rows": {"banks/a": (np.array([1, 1]), np.ones((2, 2)))}}, "distinct"),
        ({"put_rows": {"banks/a": (np.array([0]), np.ones((1, 3)))}}, "do not fit"),
        ({"append": {"banks/a": np.ones((1, 2), np.float32)}}, "do not fit"),
        ({"append": {"whole": np.ones((1, 2))}}, "not stored row by row"),
    ],
)
def test_unfit_changes_write_nothing(store, changes, message) -> None:
    commit(store, put={"banks/a": np.ones((3, 2)), "whole": np.ones((3, 2))}, documents={"doc": 1})
    with pytest.raises(UserError, match=message):
        store.commit(Changes(**{"blobs": {"with": b"it"}, **changes}), "unfit", row_chunked=in_rows)
    assert store.version == 2
    assert Store.open(store.path).version == 2
    assert not store.has("with")
    commit(store, documents={"doc": 2})  # the store is still good to write to


def test_unknown_names_suggest_the_nearest(store) -> None:
    commit(store, put={"heads/sentiment/kernel": np.ones(1)}, documents={"tasks/sentiment": 1})
    with pytest.raises(UserError, match="did you mean 'heads/sentiment/kernel'"):
        store.read("heads/sentimant/kernel")
    with pytest.raises(UserError, match=r"(?s)expected: a blob.*got: +document"):
        store.blob("tasks/sentiment")


operations = st.lists(
    st.tuples(st.sampled_from(["put", "rows", "append", "remove", "document", "revert"]), st.integers(0, 5)),
    min_size=1,
    max_size=8,
)


@given(operations)
def test_any_history_equals_a_dictionary(steps) -> None:
    """Oracle: a list of dictionaries, one per version, changed with plain numpy."""
    store = Store.create(f"memory://{np.random.default_rng().bytes(8).hex()}")
    states: list[dict] = [{}]
    for kind, value in steps:
        now = dict(states[-1])
        rows = np.full((value, 2), value, np.int32)
        if kind == "put":
            now["banks/a"] = rows
            commit(store, put={"banks/a": rows})
        elif kind == "document":
            now["d"] = value
            commit(store, documents={"d": value})
        elif kind == "revert":
            to = value % len(states)
            now = dict(states[to])
            store.revert(to + 1, "back")
        elif "banks/a" not in now:
            continue
        elif kind == "rows":
            idx = np.arange(len(now["banks/a"]))[:: value + 1]
            now["banks/a"] = now["banks/a"].copy()
            now["banks/a"][idx] += value
            commit(store, put_rows={"banks/a": (idx, now["banks/a"][idx])})
        elif kind == "append":
            now["banks/a"] = np.concatenate([now["banks/a"], rows])
            commit(store, append={"banks/a": rows})
        else:
            del now["banks/a"]
            commit(store, remove=["banks/a"])
        states.append(now)
    for number, state in enumerate(states, 1):
        old = Store.open(store.path, number)
        assert old.names() == sorted(state)
        assert old.verify() == []
        for name, expected in state.items():
            found = old.read(name) if name == "banks/a" else old.document(name)
            np.testing.assert_array_equal(found, expected)


def test_opening_a_store_imports_no_jax(tmp_path) -> None:
    Store.create(tmp_path / "model")
    code = (
        "import sys, pathways.store; assert 'tensorstore' not in sys.modules; "
        "from pathways.store import Store; Store.open(sys.argv[1]); assert 'jax' not in sys.modules"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True, cwd=root)


def test_urls() -> None:
    assert kvstore_spec("gs://bucket/a/b/") == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    assert kvstore_spec("s3://bucket") == {"driver": "s3", "bucket": "bucket", "path": ""}
    assert kvstore_spec("file:///a/b") == kvstore_spec("/a/b/") == {"driver": "file", "path": "/a/b/"}
    assert kvstore_spec("memory://x/y") == {"driver": "memory", "path": "x/y/"}
    with pytest.raises(UserError, match="no bucket"):
        kvstore_spec("gs://")
    with pytest.raises(UserError, match="http://"):
        kvstore_spec("http://a/b")
