"""How fast and how small the store is: full saves, small commits, cold reads, listing.

    python benchmarks/store.py --quick        # about half a minute on two cores
    python benchmarks/store.py --folder /somewhere/on/the/disk/to/measure

Saves are timed alternately with `np.save` followed by fsync of the same arrays, so that both meet the same weather;
medians are shown, with the least and the greatest. Reads are cold where the system lets a file leave its page cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pathways.store import Changes, Store

MB = 1e6


def in_rows(name: str) -> bool:
    return name.startswith("banks/")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


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


def bytes_read() -> int:
    """Bytes this process has asked the system to read so far."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def np_save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            np.save(handle, array)
            handle.flush()
            os.fsync(handle.fileno())


def store_save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    Store.create(folder).commit(Changes(put=arrays), "save", row_chunked=in_rows)


def full_save(folder: Path, megabytes: int, repeats: int) -> None:
    arrays = {f"banks/layer{i}/w": noise(megabytes // 4, 1 << 18, seed=i) for i in range(4)}
    total = sum(array.nbytes for array in arrays.values())
    rates: dict[str, list[float]] = {"store": [], "np.save + fsync": []}
    for _ in range(repeats):
        for label, save in (("store", store_save), ("np.save + fsync", np_save)):
            place = folder / "full"
            rates[label].append(total / MB / timed(lambda save=save, place=place: save(place, arrays)))
            shutil.rmtree(place)
    for label, values in rates.items():
        print(f"full save, {total / MB:,.0f} MB, {label:<16} {spread(values)} MB/s")
    print(f"greatest memory so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB:,.0f} MB")


def small_commit(folder: Path, repeats: int) -> None:
    store = Store.create(folder / "small")
    array = noise(64, 256, 1024)
    store.commit(Changes(put={"banks/w": array}), "all", row_chunked=in_rows)
    ratios, times = [], []
    for i in range(repeats):
        before = size_of(folder / "small")
        changes = Changes(put_rows={"banks/w": (np.array([3, 9]), array[[3, 9]] + i + 1)})
        times.append(1e3 * timed(lambda c=changes: store.commit(c, "two", row_chunked=in_rows)))
        ratios.append((size_of(folder / "small") - before) / (2 * array[0].nbytes))
    print(f"commit of 2 of 64 experts of 1 MB: {spread(ratios, 4)} times their bytes, {spread(times, 1)} ms")


def cold_read(folder: Path, repeats: int) -> None:
    place = folder / "cold"
    array = noise(1024, 256, 256)
    Store.create(place).commit(Changes(put={"banks/w": array}), "all", row_chunked=in_rows)
    rng = np.random.default_rng(0)
    times, ratios = [], []
    for _ in range(repeats):
        leave_page_cache(place)
        rows = rng.choice(1024, 16, replace=False)
        before = bytes_read()
        times.append(1e3 * timed(lambda rows=rows: Store.open(place).read("banks/w", rows)))
        ratios.append((bytes_read() - before) / (16 * array[0].nbytes))
    print(
        f"cold, open and 16 of 1,024 experts of 256 KiB: {spread(times, 1)} ms, {spread(ratios, 3)} times their bytes"
    )
    whole = [array.nbytes / MB / timed(lambda: Store.open(place).read("banks/w")) for _ in range(repeats)]
    print(f"read all 1,024, warm: {spread(whole)} MB/s")


def listing(folder: Path, tasks: int, repeats: int) -> None:
    place = folder / f"tasks{tasks}"
    names = [f"task{i:05d}" for i in range(tasks)]
    put = {f"heads/{name}/kernel": noise(64, 10, seed=i) for i, name in enumerate(names)}
    documents = {f"tasks/{name}": {"name": name, "kind": "classification"} for name in names}
    store = Store.create(place)
    whole = timed(lambda: store.commit(Changes(put=put, documents=documents), "all", row_chunked=in_rows))
    before = size_of(place)
    one = Changes(put={"heads/new/kernel": noise(64, 10)}, documents={"tasks/new": {}})
    added = 1e3 * timed(lambda: store.commit(one, "one", row_chunked=in_rows))
    growth = size_of(place) - before
    opens, lists, digests = [], [], []
    for _ in range(repeats):
        opens.append(1e3 * timed(lambda: Store.open(place)))
        opened = Store.open(place)
        lists.append(1e3 * timed(lambda opened=opened: opened.names("tasks/")))
        digests.append(1e3 * timed(opened.digests))
    print(
        f"{tasks:>6,} tasks: commit {whole:.2f} s; one more {added:.0f} ms, {growth / 1e3:,.0f} kB; "
        f"open {spread(opens, 1)} ms; list {spread(lists, 1)} ms; all digests {spread(digests, 1)} ms"
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast and how small the store is.")
    parser.add_argument("--quick", action="store_true", help="64 MB instead of 512, three repeats instead of seven")
    parser.add_argument("--folder", type=Path, help="measure on the disk of this folder")
    options = parser.parse_args()
    repeats = 3 if options.quick else 7
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        full_save(folder, 64 if options.quick else 512, repeats)
        small_commit(folder, repeats)
        cold_read(folder, repeats)
        for tasks in (10, 1_000, 10_000):
            listing(folder, tasks, repeats)


if __name__ == "__main__":
    main()
