"""Versions of a store: the log, digests, going back, compaction."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from pathways.store import Changes, Store
from pathways.store.compact import WORK_FOLDER
from pathways.store.locate import Database
from pathways.store.records import array_digest
from pathways.store.verify import damaged
from pathways.store.view import View
from tasks.errors import UserError


def in_rows(name: str) -> bool:
    return name.startswith("banks/")


def commit(store: Store, message: str = "test", **changes):
    return store.commit(Changes(**changes), message, row_chunked=in_rows)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Version 2: bank and head; 3: rows 1 and 3 changed; 4: two rows appended, a head removed, a document."""
    store = Store.create(tmp_path / "model")
    commit(store, "two", put={"banks/a": noise(8, 64, 64), "heads/x/kernel": noise(64, 3)}, blobs={"z": b"1"})
    commit(store, "three", put_rows={"banks/a": (np.array([1, 3]), noise(2, 64, 64, seed=1))})
    commit(store, "four", append={"banks/a": noise(2, 64, 64, seed=2)}, remove=["heads/"], documents={"tasks/y": 1})
    return store


def test_the_log_says_what_each_commit_did(store) -> None:
    log = Store.open(store.path, 2).log()
    assert [(version.number, version.message, version.parent) for version in log] == [
        (1, "created", None),
        (2, "two", 1),
        (3, "three", 2),
        (4, "four", 3),
    ]
    assert log[1].changes["written"] == ["banks/a", "heads/x/kernel", "z"]
    assert [version.changes["bytes"] for version in log] == [0, (8 * 64 * 64 + 64 * 3) * 4 + 1, 32768, 32768 + 1]
    assert log[3].changes["counts"] == {"written": 1, "appended": 1, "removed": 1}
    assert (log[3].changes["appended"], log[3].changes["removed"]) == (["banks/a"], ["heads/x/kernel"])
    assert all(abs((datetime.now(UTC) - version.time).total_seconds()) < 60 for version in log)


def test_a_hundred_versions_all_open(tmp_path) -> None:
    """More than one node of OCDBT's version tree (16 versions each)."""
    store = Store.create(tmp_path / "model")
    for number in range(2, 101):
        commit(store, documents={"d": number})
    assert [version.number for version in store.log()] == list(range(1, 101))
    assert [Store.open(store.path, number).document("d") for number in (2, 17, 18, 50, 100)] == [2, 17, 18, 50, 100]


def test_digests_say_what_changed_between_versions(store) -> None:
    two, three, four = (Store.open(store.path, number) for number in (2, 3, 4))
    assert two.digest("heads/x/kernel") == three.digest("heads/x/kernel")
    assert len({opened.digest("banks/a") for opened in (two, three, four)}) == 3
    rows = [opened.row_digests("banks/a") for opened in (two, three, four)]
    assert [i for i in range(8) if rows[0][i] != rows[1][i]] == [1, 3]
    assert rows[2][:8] == rows[1]
    assert two.digests("heads/") == {"heads/x/kernel": two.digest("heads/x/kernel")}
    assert set(four.digests()) == {"banks/a", "tasks/y", "z"}


def test_a_digest_depends_on_content_type_and_shape_alone(tmp_path) -> None:
    one, other = Store.create(tmp_path / "one"), Store.create(tmp_path / "other")
    array = noise(4, 6)
    commit(one, put={"banks/a": array, "x": array})
    commit(other, put={"banks/a": array[:2], "x": array})
    commit(other, append={"banks/a": array[2:]})
    assert one.digests() == other.digests()
    commit(one, put={"x": array.reshape(6, 4)})
    commit(other, put={"x": array.view(np.int32)})
    assert len({one.digest("x"), other.digest("x"), one.at(2).digest("x")}) == 3


def test_revert_gives_the_content_back_and_loses_nothing(store) -> None:
    before = size_of(Path(store.path))
    version = store.revert(2, "as it was")
    assert (version.number, version.parent, store.version) == (5, 4, 5)
    np.testing.assert_array_equal(store.read("banks/a"), noise(8, 64, 64))
    assert store.digests() == Store.open(store.path, 2).digests()
    assert version.changes["bytes"] == 2 * 64 * 64 * 4 + 64 * 3 * 4  # the two rows, and the head that was removed
    assert size_of(Path(store.path)) - before < version.changes["bytes"] + 8192
    assert Store.open(store.path, 4).read("banks/a").shape == (10, 64, 64)
    store.undo()
    assert store.digests() == Store.open(store.path, 4).digests()
    assert all(store.verify(number) == [] for number in range(1, 7))


def test_reverting_past_additions_writes_no_content(store) -> None:
    commit(store, "add a task", put={"heads/new/kernel": noise(64, 3)}, append={"banks/a": noise(1, 64, 64)})
    assert store.undo().changes["bytes"] == 0
    assert store.digests() == store.at(4).digests()


def test_there_is_nothing_before_the_first_version(tmp_path) -> None:
    store = Store.create(tmp_path / "model")
    with pytest.raises(UserError, match="nothing before"):
        store.undo()
    with pytest.raises(UserError, match="one of 1"):
        store.revert(7, "no such")


def test_compaction_to_a_new_store_keeps_the_asked_versions(store, tmp_path) -> None:
    done = store.compact(tmp_path / "small", keep=[2, 4])
    small = Store.open(tmp_path / "small")
    assert [version.number for version in small.log()] == [2, 4]
    assert (done.before, done.after) == (size_of(Path(store.path)), size_of(tmp_path / "small"))
    for number in (2, 4):
        assert Store.open(small.path, number).digests() == store.at(number).digests()
        assert Store.open(small.path, number).verify() == []
    content = 10 * 64 * 64 * 4 + 2 * 64 * 64 * 4  # version 4, and the two rows that differ in version 2
    assert content < done.after < content + 16384
    with pytest.raises(UserError, match="one of 2, 4"):
        Store.open(small.path, 3)
    with pytest.raises(UserError, match="at the destination already"):
        store.compact(small.path)
    assert commit(Store.open(small.path, mode="w"), documents={"d": 1}).number == 5
    assert Store.open(small.path).digests("banks/") == store.digests("banks/")


def test_compaction_in_place(store) -> None:
    commit(store, put={"banks/a": noise(10, 64, 64, seed=7)})
    wanted, older = store.digests(), store.at(2).digests()
    orphan = Path(store.path) / "d" / ("0" * 32)
    orphan.write_bytes(b"left by a commit that was killed")
    done = store.compact(keep=[2, 5])
    assert done.after < done.before
    assert done.after == size_of(Path(store.path))
    assert not orphan.exists()
    assert not (Path(store.path) / WORK_FOLDER).exists()
    for opened, digests in [(store, wanted), (store.at(2), older), (Store.open(store.path), wanted)]:
        assert opened.digests() == digests
        assert opened.verify() == []
    assert commit(store, documents={"d": 1}).number == 6
    assert [version.number for version in Store.open(store.path).log()] == [2, 5, 6]


def test_what_was_opened_before_a_compaction_fails_rather_than_reads_something_else(store) -> None:
    """After it, OCDBT generation numbers mean other versions."""
    fresh, used, writer = Store.open(store.path, 3), Store.open(store.path, 3), Store.open(store.path, mode="w")
    used.names()
    store.compact()
    for reader in (fresh, used):
        with pytest.raises(UserError, match="compacted"):
            reader.read("banks/a")
    with pytest.raises(UserError, match="compacted"):
        commit(writer, documents={"d": 1})
    assert Store.open(store.path).version == 4


@pytest.mark.parametrize("step", ["shutil.rmtree", "sync_folder", "copy_versions", "Path.unlink"])
def test_compaction_in_place_cut_short_leaves_the_store_whole(store, monkeypatch, step) -> None:
    wanted = store.digests()

    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"pathways.store.compact.{step}", die)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    opened = Store.open(store.path, mode="w")
    assert opened.digests() == wanted
    assert opened.verify() == []
    opened.compact()
    assert opened.digests() == wanted
    assert not (Path(store.path) / WORK_FOLDER).exists()


def test_compaction_in_place_needs_the_newest_version_and_a_folder(store) -> None:
    with pytest.raises(UserError, match="must keep the newest"):
        store.compact(keep=[2])
    with pytest.raises(UserError, match="opened for reading"):
        Store.open(store.path).compact()
    with pytest.raises(UserError, match="only a local store"):
        Store.create("memory://compact").compact()
    memory = store.compact("memory://copy")
    assert memory.after > 0
    assert Store.open("memory://copy").digests() == store.digests()


def test_the_code_in_the_documentation_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / "docs" / "store.md").read_text(encoding="utf-8")
    ours, plain = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict = {}
    exec(ours[: ours.index("store.compact")], found)
    exec(plain.replace("/path/to/model", f"{tmp_path}/model"), found)
    assert found["array"].shape == (64, 256, 1024)
    old = ts.KvStore.open(found["older"]).result()
    assert json.loads(old["head"]) == {"number": 2}
    assert Store.open("model").digests() == Store.open("model", 2).digests()  # version 3 was undone


def test_many_small_arrays_commit_and_list(tmp_path) -> None:
    """A thousand heads in one commit; one of them changed later costs a few nodes, not the list."""
    store = Store.create(tmp_path / "model")
    heads = {f"heads/task{i:04d}/kernel": np.full((32, 4), i, np.float32) for i in range(1000)}
    commit(store, put=heads, documents={f"tasks/task{i:04d}": {"number": i} for i in range(1000)})
    assert store.names("tasks/") == [f"tasks/task{i:04d}" for i in range(1000)]
    found = store.read_many(dict.fromkeys(heads))
    assert all((found[name] == array).all() for name, array in heads.items())
    before = size_of(tmp_path)
    commit(store, put={"heads/task0500/kernel": np.zeros((32, 4), np.float32)})
    assert size_of(tmp_path) - before < 64 * 1024


def many(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 3), dtype=np.float32)


def test_a_change_of_one_row_rewrites_one_page_of_hashes(tmp_path) -> None:
    """600 rows stand in pages of 256, 256 and 88."""
    store = Store.create(tmp_path / "model")
    array = many(600)
    commit(store, put={"banks/a": array})
    entry = store.entry("banks/a")
    before = store.hash_pages("banks/a", entry, range(3))
    assert [len(page) // 16 for page in before.values()] == [256, 256, 88]
    commit(store, put_rows={"banks/a": (np.array([300]), many(1, 1))}, append={"banks/a": many(200, 2)})
    after = store.hash_pages("banks/a", store.entry("banks/a"), range(4))
    assert [page for page in range(4) if before.get(page) != after[page]] == [1, 2, 3]
    assert after[2].startswith(before[2])
    array = np.concatenate([array, many(200, 2)])
    array[300] = many(1, 1)
    fresh = Store.create(tmp_path / "fresh")
    commit(fresh, put={"banks/a": array})
    assert fresh.digests() == store.digests()
    assert fresh.row_digests("banks/a") == store.row_digests("banks/a")
    assert store.row_digests("banks/a", [799, 0, 300]) == [fresh.row_digests("banks/a")[i] for i in (799, 0, 300)]
    assert store.verify() == []
    commit(store, put={"banks/a": array[:10]})
    assert store.verify() == []
    assert not [key for key in store._kv.list().result() if key.startswith(b"pages/banks/a/000001")]


def test_an_array_of_the_first_format_is_read_and_paged_when_it_is_written(tmp_path) -> None:
    store = Store.create(tmp_path / "model")
    array = many(300)
    commit(store, put={"banks/a": array})
    database, hashes = Database.find(store.path).at(), store.row_hashes("banks/a", store.entry("banks/a"))
    digest = array_digest("float32", (300, 3), True, hashes)
    old = {"kind": "array", "digest": digest, "shape": [300, 3], "dtype": "float32", "row_chunked": True}
    transaction = ts.Transaction(atomic=True)
    bound = database.with_transaction(transaction)
    for key, value in (("index/banks/a", json.dumps(old).encode()), ("hashes/banks/a", b"".join(hashes))):
        bound.write(key, value)
    for page in (0, 1):
        bound.write(f"pages/banks/a/{page:06d}", None)
    version = json.loads(database["log/0000000002"])
    bound.write("log/0000000002", json.dumps(version | {"generation": version["generation"] + 1}).encode())
    transaction.commit_async().result()
    older = Store.open(store.path, mode="w")
    assert not older.entry("banks/a").paged
    assert older.digest("banks/a") == digest
    assert older.row_digests("banks/a", [299]) == [hashes[299].hex()]
    assert older.verify() == []
    commit(older, put_rows={"banks/a": (np.array([7]), many(1, 1))})
    array[7] = many(1, 1)
    np.testing.assert_array_equal(older.read("banks/a"), array)
    assert older.entry("banks/a").paged
    assert older.verify() == []
    older.undo()
    assert older.verify() == []
    assert [part.hex() for part in hashes] == older.row_digests("banks/a")
    assert older.entry("banks/a") == store.entry("banks/a")  # as the new format has the same content


def test_a_damaged_hash_of_a_page_is_named(tmp_path) -> None:
    store = Store.create(tmp_path / "model")
    commit(store, put={"banks/a": many(300)})
    for key in ("hashes/banks/a", "pages/banks/a/000001"):
        kept = store._kv[key]
        database = Database.find(store.path).at()
        database[key] = bytes(len(kept))
        assert damaged(View(store.path, database)) == ["banks/a"]
        database[key] = kept
        assert damaged(View(store.path, database)) == []
