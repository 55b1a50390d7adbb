"""What may go wrong with a store, and that nothing is lost: kills, full disks, two writers, damage, newer formats."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from pathways.store import Changes, Store
from pathways.store.locate import Database, locked
from pathways.store.pins import stamped_pins
from tasks.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def in_rows(name: str) -> bool:
    return name.startswith("banks/")


def commit(store: Store, message: str = "test", check=None, **changes):
    return store.commit(Changes(**changes), message, row_chunked=in_rows, check=check)


def filled(path: Path) -> Store:
    store = Store.create(path)
    commit(store, "first", put={"banks/a": np.zeros((8, 64, 64), np.float32)}, documents={"d": 0})
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return filled(tmp_path / "model")


def child(code: str, *arguments: object, **options) -> subprocess.Popen:
    """Another process that runs `code` with the store's names at hand."""
    head = (
        "import sys, os, numpy as np\nfrom pathways.store import Changes, Store\n"
        "from tasks.errors import UserError\nrows = lambda name: name.startswith('banks/')\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


BIG_COMMITS = """
store = Store.open(sys.argv[1], mode="w")
array = np.zeros((64, 256, 256), np.float32)
print("ready", flush=True)
while True:
    number = store.version + 1
    array[:] = number
    put = {"banks/big": array, "x": np.full(5000, number)}
    store.commit(Changes(put=put, documents={"d": number}), "big", row_chunked=rows)
"""


def test_a_kill_at_any_point_leaves_one_version_whole(tmp_path) -> None:
    """Each state says its number in a bank of 16 MiB, a small array and a document: all three must agree."""
    path = tmp_path / "model"
    store = Store.create(path)
    commit(store, put={"banks/big": np.full((64, 256, 256), 2, np.float32), "x": np.full(5000, 2)}, documents={"d": 2})
    rng = random.Random(0)
    reached = [2]
    for attempt in range(40):
        if attempt >= 8 and reached[-1] > 2:
            break
        process = child(BIG_COMMITS, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.1 * (attempt + 1)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        opened = Store.open(path)
        number = opened.version
        assert number >= reached[-1]
        assert opened.document("d") == number
        assert (opened.read("x") == number).all()
        assert (opened.read("banks/big") == number).all()
        reached.append(number)
    assert reached[-1] > 2, "no commit ever finished: the kills came too early to test anything"
    assert Store.open(path).verify() == []
    commit(Store.open(path, mode="w"), documents={"d": -1})
    assert Store.open(path).document("d") == -1


def test_of_two_writers_the_second_is_refused(store) -> None:
    other = Store.open(store.path, mode="w")
    commit(store, documents={"d": 1})
    with pytest.raises(UserError, match="moved from version 2 to 3"):
        commit(other, documents={"d": 2})
    assert Store.open(store.path).document("d") == 1
    commit(Store.open(store.path, mode="w"), documents={"d": 2})


def test_without_the_lock_the_conditional_write_refuses_the_second() -> None:
    """A remote store has no lock: the other commit lands between this one's look at the head and its own commit."""
    store = Store.create("memory://race")
    other = Store.open("memory://race", mode="w")
    with pytest.raises(UserError, match="moved from version 1 to 2"):
        commit(store, documents={"d": 1}, check=lambda view: commit(other, documents={"d": 2}))
    assert Store.open("memory://race").document("d") == 2
    assert [version.number for version in store.log()] == [1, 2]


@pytest.mark.parametrize("act", ["pin", "unpin", "compact"])
def test_a_pin_that_comes_just_before_the_lock_is_kept(store, monkeypatch, act) -> None:
    """Somebody else pins version 1 at the last moment: neither another pin nor a compaction may lose it."""
    store.pin("old")
    others = [Store.open(store.path, mode="w")]

    @contextmanager
    def overtaken(path):
        while others:
            others.pop().pin("first", 1)
        with locked(path):
            yield

    monkeypatch.setattr("pathways.store.store.locked", overtaken)
    {"pin": lambda: store.pin("new"), "unpin": lambda: store.unpin("old"), "compact": store.compact}[act]()
    kept = {"pin": {"first": 1, "new": 2, "old": 2}, "unpin": {"first": 1}, "compact": {"first": 1, "old": 2}}[act]
    assert store.pins() == kept
    assert Store.open(store.path, "first").version == 1


def test_a_commit_to_a_bucket_that_a_pin_overtakes_says_so() -> None:
    store = Store.create("memory://pinned")
    other = Store.open("memory://pinned", mode="w")
    with pytest.raises(UserError, match="gave a version a name"):
        commit(store, documents={"d": 1}, check=lambda view: other.pin("first"))
    assert store.pins() == {"first": 1}
    commit(store, documents={"d": 1})
    with pytest.raises(UserError, match="moved from version 1 to 2"):
        other.pin("second")
    assert store.pins() == {"first": 1}


def test_of_two_pins_to_a_bucket_at_once_the_second_is_refused(monkeypatch) -> None:
    store = Store.create("memory://pins")
    others = [Store.open("memory://pins", mode="w")]

    def overtaken(database):
        found = stamped_pins(database)
        while others:
            others.pop().pin("first")
        return found

    monkeypatch.setattr("pathways.store.store.stamped_pins", overtaken)
    with pytest.raises(UserError, match="gave a version a name"):
        store.pin("second")
    assert store.pins() == {"first": 1}


def test_two_processes_commit_in_turn_and_lose_nothing(store) -> None:
    """Each appends 10 rows, one per commit, opening again whenever the other was first."""
    code = """
done = refused = 0
while done < 10:
    store = Store.open(sys.argv[1], mode="w")
    try:
        new = np.full((1, 64, 64), float(sys.argv[2]), np.float32)
        store.commit(Changes(append={"banks/a": new}), "append", row_chunked=rows)
        done += 1
    except UserError as error:
        assert "moved from version" in str(error), error
        refused += 1
print(done, refused)
"""
    processes = [child(code, store.path, value) for value in (1, 2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    found = Store.open(store.path)
    assert found.version == 22
    assert np.unique(found.read("banks/a")[:, 0, 0], return_counts=True)[1].tolist() == [8, 10, 10]
    assert found.verify() == []


def test_a_failed_check_aborts_and_its_error_comes_through(store) -> None:
    def check(view) -> None:
        assert view.names() == ["b", "banks/a", "new"]  # it sees the state to be committed
        assert view.document("new") == 5
        assert (view.read("banks/a", [0, 1]) == np.array([1, 0])[:, None, None]).all()
        assert not view.has("d")
        raise ArithmeticError("old logits moved")

    with pytest.raises(ArithmeticError, match="old logits moved"):
        commit(
            store,
            check=check,
            remove=["d"],
            documents={"new": 5},
            blobs={"b": b""},
            put_rows={"banks/a": (np.array([0]), np.ones((1, 64, 64), np.float32))},
        )
    assert Store.open(store.path).version == 2
    assert store.document("d") == 0
    commit(store, documents={"d": 1})


def test_a_full_disk_is_told_and_the_old_version_stands(store) -> None:
    """A limit on the size of any file stands in for a full disk."""
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store.open(sys.argv[1], mode="w")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
big = np.random.default_rng(0).standard_normal((64, 64, 256))
try:
    store.commit(Changes(put={"banks/big": big}), "big", row_chunked=rows)
except UserError as error:
    print(error.problem)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.commit(Changes(documents={"d": 1}), "small", row_chunked=rows)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    process = child(code, store.path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "disk is full" in output
    assert "stands unchanged" in output
    found = Store.open(store.path)
    assert (found.version, found.document("d"), found.has("banks/big")) == (3, 1, False)
    assert found.verify() == []


def test_no_permission_and_paths_under_a_file(tmp_path, store, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "model", "/proc/none/model"):
        with pytest.raises(UserError, match="lock of the store"):
            Store.create(path)
    if os.geteuid() == 0:  # root writes everywhere: let the system say what it says to others

        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathways.store.locate.os.open", refuse)
    else:
        Path(store.path).chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        commit(store, documents={"d": 1})
    monkeypatch.undo()
    Path(store.path).chmod(0o700)
    assert Store.open(store.path).document("d") == 0


def test_reading_leaves_no_trace(store) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")}
    reader = Store.open(store.path)
    reader.read("banks/a")
    reader.verify()
    with pytest.raises(UserError, match="opened for reading"):
        commit(reader, documents={"d": 1})
    assert {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")} == before


def test_an_older_version_opens_and_refuses_writes(store) -> None:
    commit(store, documents={"d": 1})
    old = Store.open(store.path, 2)
    assert old.document("d") == 0
    with pytest.raises(UserError, match="opened for reading"):
        commit(old, documents={"d": 2})
    with pytest.raises(UserError, match=r"(?s)only the newest.*version 3.*revert\(2"):
        Store.open(store.path, 2, mode="w")
    for number in (0, -1, 4, 10**12):
        with pytest.raises(UserError, match="one of 1, 2, 3"):
            Store.open(store.path, number)


def test_missing_paths_foreign_folders_and_existing_stores(tmp_path, store) -> None:
    with pytest.raises(UserError, match=r"(?s)nothing at this path.*did you mean .*/model\?"):
        Store.open(tmp_path / "modle")
    assert not (tmp_path / "modle").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="not a pathways store"):
        Store.open(tmp_path / "notes")
    with pytest.raises(UserError, match="something at this path already"):
        Store.create(tmp_path / "notes")
    assert sorted(path.name for path in (tmp_path / "notes").iterdir() if path.name != ".lock") == ["a.txt"]
    with pytest.raises(UserError, match="something at this path already"):
        Store.create(store.path)
    ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/other/"}).result()["key"] = b"value"
    with pytest.raises(UserError, match="not a pathways store"):
        Store.open(tmp_path / "other")


def test_a_newer_format_is_refused_with_both_versions(store) -> None:
    Database.find(store.path).at()["format"] = json.dumps({"format": "pathways-store", "version": 3}).encode()
    with pytest.raises(UserError, match=r"(?s)format version 2.*format version 3.*pip install -U pathways-moe"):
        Store.open(store.path)


def test_verify_names_the_damaged_row_and_array(tmp_path) -> None:
    store = Store.create(tmp_path / "model")
    rng = np.random.default_rng(0)
    bank, whole = rng.integers(0, 256, (8, 4096), np.uint8), rng.integers(0, 256, 5000, np.uint8)
    text = "0123456789" * 500
    commit(store, put={"banks/a": bank, "whole": whole}, documents={"doc": text})
    assert store.verify() == []
    for content, name in [(bank[5].tobytes(), "banks/a[5]"), (whole.tobytes(), "whole"), (text.encode(), "doc")]:
        flip_first_byte(tmp_path / "model" / "d", content)
        assert name in Store.open(store.path).verify()
    assert Store.open(store.path).verify() == ["banks/a[5]", "doc", "whole"]
    assert store.verify(1) == []
    with pytest.raises(UserError, match="damaged"):
        Store.open(store.path).document("doc")


def flip_first_byte(folder: Path, content: bytes) -> None:
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        place = data.find(content)
        if place >= 0:
            data[place] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError("content not found on disk")


def test_a_lost_data_file_is_an_error_not_zeros_and_older_versions_open(store) -> None:
    commit(store, put={"banks/b": np.ones((4, 64, 64), np.float32)})
    last = max((Path(store.path) / "d").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    opened = Store.open(store.path)
    opened.names()
    last.unlink()
    with pytest.raises(UserError):
        opened.read("banks/b")
    with pytest.raises(UserError, match="data files are lost"):
        Store.open(store.path)
    assert Store.open(store.path, 2).verify() == []
    assert [version.number for version in Store.open(store.path, 2).log()] == [1, 2]
