"""How fast and how small the store is: full saves, small commits, reads of a task, cold reads, listing.

    python -m benchmarks.store --quick        # about half a minute on two cores
    python -m benchmarks.store --folder /somewhere/on/the/disk/to/measure

Saves take turns with `np.save` followed by fsync of the same arrays and, where it can be imported, with a synchronous
save of orbax-checkpoint (flax brings it), so that all meet the same weather. What a save took is compared with the
`np.save` of the same round; medians are shown, with the least and the greatest. Reads are cold where the system lets a
file leave its page cache. `hash alone` is the part of a save that no disk shortens.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import MB, Row, bytes_read, in_turn, median_ratio, peak_memory, seconds, spread, write_json
from pathways.allocator import reuse_memory
from pathways.store import Changes, Store
from pathways.store.stage import hash_all, split

Arrays = dict[str, np.ndarray]
RAW, OWN, ORBAX = "np.save, fsync", "store", "orbax"


def in_rows(name: str) -> bool:
    return name.startswith("banks/")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def leave_page_cache(folder: Path) -> None:
    """Asks the system to forget the pages of all files under `folder`."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def np_save(folder: Path, arrays: Arrays) -> None:
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            np.save(handle, array)
            handle.flush()
            os.fsync(handle.fileno())


def store_save(folder: Path, arrays: Arrays) -> None:
    Store.create(folder).commit(Changes(put=arrays), "save", row_chunked=in_rows)


def savers() -> dict[str, Callable[[Path, Arrays], None]]:
    """What saves arrays into a new folder and returns when they are on the disk."""
    found = {RAW: np_save, OWN: store_save}
    if importlib.util.find_spec("orbax") is not None:
        import orbax.checkpoint as ocp

        def orbax_save(folder: Path, arrays: Arrays) -> None:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(folder, args=ocp.args.StandardSave(arrays))

        found[ORBAX] = orbax_save
    return found


def full_save(folder: Path, megabytes: int, repeats: int) -> Row:
    """Every array of a model of four banks, new; and all of it read back."""
    arrays = {f"banks/layer{i}/w": noise(megabytes // 4, 1 << 18, seed=i) for i in range(4)}
    total = sum(array.nbytes for array in arrays.values())
    times: dict[str, list[float]] = {}
    for turn in range(1 + repeats):  # the first finds its memory, and does not count
        for name, save in savers().items():
            place = folder / "full"
            taken = seconds(lambda save=save, place=place: save(place, arrays))
            shutil.rmtree(place)
            if turn:
                times.setdefault(name, []).append(taken)
    hashing = [seconds(lambda: [hash_all(split(array, True)) for array in arrays.values()]) for _ in range(repeats)]
    print(f"full save of {total / MB:,.0f} MB, with sync; times np.save of the same round")
    for name, values in times.items():
        print(f"  {name:<16}{rates(total, values):<28} MB/s {median_ratio(values, times[RAW]):8.2f}")
    print(f"  {'hash alone':<16}{rates(total, hashing):<28} MB/s {median_ratio(hashing, times[RAW]):8.2f}")
    print(f"  most memory so far: {peak_memory() / MB:,.0f} MB, {total / MB:,.0f} of them the arrays")
    store_save(folder / "full", arrays)
    np_save(folder / "raw", arrays)
    paths = sorted((folder / "raw").rglob("*.npy"))
    reads = in_turn(
        {
            RAW: lambda: [np.load(path) for path in paths],
            OWN: lambda: Store.open(folder / "full").read_many(dict.fromkeys(arrays)),
        },
        repeats,
    )
    for name, values in reads.items():
        print(f"  read back, {name.split(',')[0]:<14} {rates(total, values):<28} MB/s")
    for name in ("full", "raw"):
        shutil.rmtree(folder / name)
    return {"save": times, "hash": hashing, "read": reads, "bytes": total}


def rates(size: int, values: Sequence[float]) -> str:
    """Bytes a second, in MB."""
    return spread([size / MB / value for value in values])


def one_task(folder: Path, tasks: int, repeats: int) -> Row:
    """What one of many tasks reads: a document, a gate, a head, norms and 16 of the experts of two layers."""
    place = folder / "tasks"
    put = {f"banks/layer{i}/w": noise(1024, 64, 256, seed=i) for i in range(2)}
    documents = {}
    for i in range(tasks):
        put |= {
            f"heads/t{i}/kernel": noise(10, 256),
            f"gates/t{i}/layer0/gate": noise(256, 16),
            f"norms/t{i}": noise(9, 256),
        }
        documents[f"tasks/t{i}"] = {"name": f"t{i}", "kind": "classification"}
    Store.create(place).commit(Changes(put=put, documents=documents), "all", row_chunked=in_rows)
    rng, times, ratios = np.random.default_rng(0), [], []
    for _ in range(repeats):
        leave_page_cache(place)
        rows, name = np.sort(rng.choice(1024, 16, replace=False)), f"t{rng.integers(tasks)}"
        wanted = {f"banks/layer{i}/w": rows for i in range(2)}
        wanted |= dict.fromkeys([f"heads/{name}/kernel", f"gates/{name}/layer0/gate", f"norms/{name}"])
        before, taken = bytes_read(), []

        def read(wanted=wanted, name=name, taken=taken) -> None:
            store = Store.open(place)
            store.document(f"tasks/{name}")
            taken.append(sum(array.nbytes for array in store.read_many(wanted).values()))

        times.append(1e3 * seconds(read))
        ratios.append((bytes_read() - before) / taken[0])
    shutil.rmtree(place)
    what = f"one of {tasks:,} tasks with 32 of 2,048 experts of 64 KiB, cold"
    print(f"{what}: {spread(times, 1)} ms, {spread(ratios, 3)} times its bytes")
    return {"ms": times, "ratio": ratios}


def small_commit(folder: Path, repeats: int) -> Row:
    """Two experts of 64 change."""
    store = Store.create(folder / "small")
    array = noise(64, 256, 1024)
    store.commit(Changes(put={"banks/w": array}), "all", row_chunked=in_rows)
    ratios, times = [], []
    for i in range(repeats):
        before = size_of(folder / "small")
        changes = Changes(put_rows={"banks/w": (np.array([3, 9]), array[[3, 9]] + i + 1)})
        times.append(1e3 * seconds(lambda c=changes: store.commit(c, "two", row_chunked=in_rows)))
        ratios.append((size_of(folder / "small") - before) / (2 * array[0].nbytes))
    print(f"commit of 2 of 64 experts of 1 MB: {spread(ratios, 4)} times their bytes, {spread(times, 1)} ms")
    return {"ms": times, "ratio": ratios}


def cold_read(folder: Path, repeats: int) -> Row:
    """Sixteen experts of 1,024."""
    place = folder / "cold"
    array = noise(1024, 256, 256)
    Store.create(place).commit(Changes(put={"banks/w": array}), "all", row_chunked=in_rows)
    rng = np.random.default_rng(0)
    times, ratios = [], []
    for _ in range(repeats):
        leave_page_cache(place)
        rows = rng.choice(1024, 16, replace=False)
        before = bytes_read()
        times.append(1e3 * seconds(lambda rows=rows: Store.open(place).read("banks/w", rows)))
        ratios.append((bytes_read() - before) / (16 * array[0].nbytes))
    print(
        f"cold, open and 16 of 1,024 experts of 256 KiB: {spread(times, 1)} ms, {spread(ratios, 3)} times their bytes"
    )
    return {"ms": times, "ratio": ratios}


def listing(folder: Path, tasks: int, repeats: int) -> Row:
    """Opening, listing and adding to a store of many tasks."""
    place = folder / f"tasks{tasks}"
    names = [f"task{i:05d}" for i in range(tasks)]
    put = {f"heads/{name}/kernel": noise(64, 10, seed=i) for i, name in enumerate(names)}
    documents = {f"tasks/{name}": {"name": name, "kind": "classification"} for name in names}
    store = Store.create(place)
    whole = seconds(lambda: store.commit(Changes(put=put, documents=documents), "all", row_chunked=in_rows))
    before = size_of(place)
    one = Changes(put={"heads/new/kernel": noise(64, 10)}, documents={"tasks/new": {}})
    added = 1e3 * seconds(lambda: store.commit(one, "one", row_chunked=in_rows))
    growth = size_of(place) - before
    opens, lists, digests = [], [], []
    for _ in range(repeats):
        opens.append(1e3 * seconds(lambda: Store.open(place)))
        opened = Store.open(place)
        lists.append(1e3 * seconds(lambda opened=opened: opened.names("tasks/")))
        digests.append(1e3 * seconds(opened.digests))
    print(
        f"{tasks:>6,} tasks: commit {whole:.2f} s; one more {added:.0f} ms, {growth / 1e3:,.0f} kB; "
        f"open {spread(opens, 1)} ms; list {spread(lists, 1)} ms; all digests {spread(digests, 1)} ms"
    )
    return {"tasks": tasks, "commit": whole, "one more ms": added, "open ms": opens, "list ms": lists}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast and how small the store is.")
    parser.add_argument("--quick", action="store_true", help="64 MB instead of 512, three repeats instead of seven")
    parser.add_argument("--folder", type=Path, help="measure on the disk of this folder")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    reuse_memory()
    repeats = 3 if options.quick else 7
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        found: Row = {"full": full_save(folder, 64 if options.quick else 512, repeats)}
        found["delta"] = small_commit(folder, repeats)
        found["cold"] = cold_read(folder, repeats)
        found["task"] = one_task(folder, 1_000, repeats)
        found["listing"] = [listing(folder, tasks, repeats) for tasks in (10, 1_000, 10_000)]
    write_json(options.json, found)


if __name__ == "__main__":
    main()
