"""Makes the quickstart's data from what is already on the machine: nothing is downloaded.

    python examples/quickstart_data.py [FOLDER]

Six small tasks, each with train, valid and test files:

| task            | kind                       | from                                                              |
|-----------------|----------------------------|-------------------------------------------------------------------|
| digits          | images, 10 classes         | scikit-learn: 1,797 handwritten digits, 8 x 8, as a folder of PNG  |
| wine            | table, 3 classes           | scikit-learn: 178 chemical analyses of wines of three cultivars    |
| breast_cancer   | table, 2 classes           | scikit-learn: 569 tumours, 30 measurements each                    |
| diabetes        | table, regression          | scikit-learn: 442 patients, the disease's progression after a year |
| library_area    | text, 6 classes            | this Python's own library: which area is a function from?          |
| library_returns | text, 2 classes            | the same: does a function so named and described return a value?   |

The two text tasks are read with `ast` from the installed sources, so their exact rows follow the Python version. A text
is a function's name, its arguments and the first paragraph of its docstring. They are split by file: no source file
has rows in two splits.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARES = {"train": 0.7, "valid": 0.15, "test": 0.15}

AREAS = {
    "concurrency": "asyncio concurrent contextvars multiprocessing queue sched signal subprocess threading",
    "data types": "_collections_abc _pydatetime _pydecimal abc bisect calendar collections copy dataclasses datetime"
    " enum fractions functools graphlib heapq numbers pprint random reprlib statistics types typing weakref zoneinfo",
    "files": "_pyio bz2 dbm filecmp fileinput fnmatch glob gzip io lzma ntpath os pathlib pickle posixpath shelve"
    " shutil sqlite3 stat tarfile tempfile zipapp zipfile",
    "interface": "curses tkinter turtle",
    "network": "email ftplib http imaplib ipaddress mailbox mimetypes poplib selectors smtplib socket socketserver ssl"
    " urllib uuid webbrowser wsgiref xmlrpc",
    "testing": "bdb cProfile doctest logging pdb profile pstats pydoc timeit trace traceback tracemalloc unittest"
    " warnings",
}
"""Areas as the library's own reference manual groups its modules, by the first part of a module's name."""

TESTS = {"test", "tests", "idle_test"}

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def make_data(folder: Path, seed: int = 0) -> dict[str, dict]:
    """Writes the six tasks under `folder`; the same seed and Python give the same bytes.

    Returns:
        task name -> `train`, `valid`, `test` (paths), `target` (the column predicted) and `about` (one line).
    """
    tasks = {"digits": _digits(folder / "digits", seed)}
    for name, target, about in (
        ("wine", "cultivar", "which of three cultivars a wine is from, by its chemistry"),
        ("breast_cancer", "diagnosis", "malignant or benign, by measurements of cell nuclei"),
        ("diabetes", "progression", "how far the disease has gone after a year (25 to 346)"),
    ):
        tasks[name] = _table(folder / name, name, target, about, seed)
    return tasks | _library(folder, seed)


def _digits(folder: Path, seed: int) -> dict:
    """SPLIT/CLASS/NUMBER.png, 8 x 8, the set's 17 grey levels spread over 0..255."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for split, chosen in _splits(len(labels), seed).items():
        for i in chosen:
            path = folder / split / str(labels[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey[i]).save(path)
    return {split: folder / split for split in SHARES} | {"target": "label", "about": "which digit was written"}


def _table(folder: Path, name: str, target: str, about: str, seed: int) -> dict:
    """One of scikit-learn's tables as CSV, columns named as they are there, the target last and in words."""
    from sklearn import datasets

    # Diabetes comes standardised; its raw numbers have their units.
    bunch: Any = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    names = getattr(bunch, "target_names", None)
    values = bunch.target if names is None else [names[i] for i in bunch.target]
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in _splits(len(values), seed).items():
        files[split] = folder / f"{split}.csv"
        with files[split].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([column.replace(" ", "_") for column in bunch.feature_names] + [target])
            writer.writerows([f"{x:g}" for x in bunch.data[i]] + [values[i]] for i in chosen)
    return files | {"target": target, "about": about}


def _splits(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of each split, from one seeded shuffle."""
    order = np.random.default_rng(seed).permutation(rows)
    cuts = np.round(np.cumsum(list(SHARES.values()))[:-1] * rows).astype(int)
    return dict(zip(SHARES, np.split(order, cuts), strict=True))


def _library(folder: Path, seed: int) -> dict[str, dict]:
    """The two text tasks: the same texts with two targets. A row goes where its file goes; no text is taken twice."""
    rows: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SHARES}
    seen = set()
    for source, split in _deal(list(_sources()), seed):
        for function in source.functions:
            if (text := _described(function)) and text not in seen:
                seen.add(text)
                rows[split].append((text, source.area, "returns" if _returns_value(function) else "nothing"))
    generator = np.random.default_rng(seed)
    for split in SHARES:
        generator.shuffle(rows[split])
    about = "which area of the library a function is from, by its name, arguments and docstring"
    area = _texts(folder / "library_area", {s: [row[:2] for row in rows[s]] for s in SHARES}, "area", about)
    about = "whether a function returns a value, by its name, arguments and docstring"
    result = _texts(folder / "library_returns", {s: [row[::2] for row in rows[s]] for s in SHARES}, "result", about)
    return {"library_area": area, "library_returns": result}


@dataclass(frozen=True)
class _Source:
    path: str
    area: str
    functions: list[_Function]


def _sources() -> Iterator[_Source]:
    """The library's modules of `AREAS`, in the order of their paths; what this Python cannot parse is left out."""
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        area = area_of.get(relative.parts[0].removesuffix(".py"))
        if area and not TESTS.intersection(relative.parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue
            yield _Source(relative.as_posix(), area, [node for node in ast.walk(tree) if isinstance(node, _Function)])


def _deal(sources: list[_Source], seed: int) -> Iterator[tuple[_Source, str]]:
    """Deals the files of each area so that each split comes near its share of the area's functions.

    Files go in the order of a seeded hash of their path, each to the split that is furthest behind; a file with more
    than a tenth of its area's functions is always for training, or it would be a split's whole area.
    """
    total = Counter[str]()
    for source in sources:
        total[source.area] += len(source.functions)
    dealt = Counter[tuple[str, str]]()
    big = {source.path for source in sources if len(source.functions) > total[source.area] / 10}
    hashed = {source.path: hashlib.sha256(f"{seed}:{source.path}".encode()).digest() for source in sources}
    for source in sorted(sources, key=lambda s: (s.path not in big, hashed[s.path])):
        behind = min(SHARES, key=lambda split: dealt[source.area, split] / SHARES[split])
        split = "train" if source.path in big else behind
        dealt[source.area, split] += len(source.functions)
        yield source, split


def _described(function: _Function) -> str:
    """`name(arguments): first paragraph of the docstring`, at most 200 characters; empty if it says next to nothing."""
    words = (ast.get_docstring(function) or "").partition("\n\n")[0].split()
    arguments = ", ".join(a.arg for a in function.args.args if a.arg not in ("self", "cls"))
    return f"{function.name}({arguments}): {' '.join(words)}"[:200] if len(words) > 2 else ""


def _returns_value(function: _Function) -> bool:
    """Whether the function's own body (not that of a function inside it) returns something or yields."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if isinstance(node, ast.Return) and not _is_none(node.value):
            return True
        if not isinstance(node, _Function | ast.ClassDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return False


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _texts(folder: Path, rows: dict[str, list[tuple[str, ...]]], target: str, about: str) -> dict:
    """SPLIT.jsonl with the columns `text` and the target."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SHARES:
        lines = (json.dumps(dict(zip(("text", target), row, strict=True)), ensure_ascii=False) for row in rows[split])
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {split: folder / f"{split}.jsonl" for split in SHARES} | {"target": target, "about": about}


if __name__ == "__main__":
    for task, files in make_data(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart/data")).items():
        print(f"{task:<16} {files['target']:<12} {files['about']}: {files['train']}")
