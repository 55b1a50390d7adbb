"""Readers: every format, streaming, and what each kind of broken file says."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import UserError
from tasks.readers import open_reader, resolve
from tasks.readers.csv_file import BLOCK

ROOT = Path(__file__).resolve().parent.parent


def table(path, **keys) -> dict[str, list]:
    batches = list(open_reader(str(path), **keys).batches())
    return {name: [v for batch in batches for v in batch.column(name).to_pylist()] for name in batches[0].schema.names}


def refused(path, *words: str, **keys) -> UserError:
    """Opening or reading `path` fails with a UserError whose text has all the words."""
    with pytest.raises(UserError) as caught:
        list(open_reader(str(path), **keys).batches())
    for word in words:
        assert word in str(caught.value), f"{word!r} not in:\n{caught.value}"
    return caught.value


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Formats


def test_csv_values_stay_text_and_quotes_hold_newlines(tmp_path):
    path = write(tmp_path / "a.csv", 'n,t\n007,"x, ""y""\nz"\n1.50,\n')
    assert table(path) == {"n": ["007", "1.50"], "t": ['x, "y"\nz', ""]}


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.tab", "\t"), ("a.csv", ";"), ("a.csv", ",")])
def test_delimiter_by_ending_and_header(tmp_path, name, mark):
    path = write(tmp_path / name, f"a{mark}b\n1{mark}2\n")
    assert table(path) == {"a": ["1"], "b": ["2"]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl"])
def test_byte_order_marks_tell_the_encoding(tmp_path, encoding, name):
    text = '{"à": "é日"}\n' if "jsonl" in name else "à\né日\n"
    data = text.encode(encoding)
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert table(path) == {"à": ["é日"]}


def test_encoding_as_said(tmp_path):
    path = write(tmp_path / "a.csv", "a\né\n".encode("latin-1"))
    assert table(path, encoding="latin-1") == {"a": ["é"]}
    refused(path, "no encoding 'latin-99'", encoding="latin-99")


def test_csv_cell_far_larger_than_a_block_keeps_every_row(tmp_path):
    long = "x" * (3 * BLOCK)
    rows = [f"{i},{long if i == 30_000 else 'short text ' * 5}" for i in range(40_000)]
    path = write(tmp_path / "a.csv", "n,t\n" + "\n".join(rows) + "\n")
    assert path.stat().st_size > 2 * BLOCK
    read = table(path)
    assert read["n"] == [str(i) for i in range(40_000)]
    assert read["t"][30_000] == long


def test_jsonl_keeps_types_and_widens_when_a_later_value_needs_it(tmp_path):
    rows = [{"n": 1, "l": ["a"], "s": "x"}, {"n": 2, "l": []}, {"n": 2.5, "l": None, "s": 7}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert table(path, rows_per_batch=1) == {"n": [1, 2, 2.5], "l": [["a"], [], None], "s": ["x", None, "7"]}
    assert table(path, rows_per_batch=9) == {"n": [1, 2, 2.5], "l": [["a"], [], None], "s": ["x", None, "7"]}


def test_parquet_with_image_structs_and_dictionaries(tmp_path):
    images = pa.array([{"bytes": b"abc", "path": None}, {"bytes": b"d", "path": "p"}])
    words = pa.array(["x", "y"]).dictionary_encode()
    pq.write_table(pa.table({"image": images, "word": words, "n": [1, 2]}), tmp_path / "a.parquet")
    assert table(tmp_path / "a.parquet") == {"image": [b"abc", b"d"], "word": ["x", "y"], "n": [1, 2]}


def test_image_folder_takes_classes_in_turn(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a/1.png", "a/notes.txt", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"x")
    expected = [str(tmp_path / name) for name in ("a/1.png", "b/1.JPG", "b/2.png")]
    assert table(tmp_path) == {"image": expected, "label": ["a", "b", "b"]}


def idx_pair(folder: Path, pixels: np.ndarray, labels: np.ndarray, kind: str = "train") -> Path:
    head = struct.pack(f">HBB{pixels.ndim}I", 0, 8, pixels.ndim, *pixels.shape)
    write(folder / f"{kind}-images-idx3-ubyte.gz", gzip.compress(head + pixels.tobytes()))
    write(
        folder / f"{kind}-labels-idx1-ubyte.gz",
        gzip.compress(struct.pack(">HBBI", 0, 8, 1, len(labels)) + labels.tobytes()),
    )
    return folder / f"{kind}-images-idx3-ubyte.gz"


def test_idx_pair_by_file_and_by_folder(tmp_path):
    pixels = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)
    path = idx_pair(tmp_path, pixels, np.array([3, 1, 4, 1, 5], np.uint8))
    for place in (path, tmp_path):
        reader = open_reader(str(place), rows_per_batch=2)
        batches = list(reader.batches())
        assert [b.num_rows for b in batches] == [2, 2, 1]
        shape = batches[0].schema.field("image").metadata[b"shape"].decode()
        assert shape == "2,3"
        images = [np.frombuffer(v, np.uint8) for b in batches for v in b.column("image").to_pylist()]
        np.testing.assert_array_equal(np.stack(images).reshape(5, 2, 3), pixels)
        assert table(place)["label"] == [3, 1, 4, 1, 5]


def test_idx_with_labels_missing_or_too_few(tmp_path):
    path = idx_pair(tmp_path, np.zeros((3, 2, 2), np.uint8), np.zeros(2, np.uint8))
    refused(path, "differ in number", "3 and 2")
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    refused(path, "labels", "train-labels-idx1-ubyte.gz")


CONLLU = """# text = del mar
1-2\tdel\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\tIN\t_\t3\tcase\t_\t_
2\tel\tel\tDET\tDT\t_\t3\tdet\t_\t_
2.1\tghost\t_\t_\t_\t_\t_\t_\t_\t_
3\tmar\tmar\tNOUN\tNN\t_\t0\troot\t_\t_

1\tsí\tsí\tINTJ\tUH\t_\t0\troot\t_\t_
"""


def test_conllu_leaves_out_comments_ranges_and_empty_nodes(tmp_path):
    read = table(write(tmp_path / "a.conllu", CONLLU))
    assert read["tokens"] == [["de", "el", "mar"], ["sí"]]
    assert read["upos"] == [["ADP", "DET", "NOUN"], ["INTJ"]]


def test_conllu_with_a_short_line(tmp_path):
    path = write(tmp_path / "a.conllu", CONLLU.replace("2\tel\tel\tDET", "2\tel"))
    refused(path, "line 4", "expected: 10", "got:      8")
    reader = open_reader(str(path), on_bad="skip")
    assert [b.column("tokens").to_pylist() for b in reader.batches()] == [[["sí"]]]
    assert reader.skipped == 1


def test_glob_joins_files_and_puts_columns_in_one_order(tmp_path):
    write(tmp_path / "p2.csv", "b,a\n4,3\n")
    write(tmp_path / "p1.csv", "a,b\n1,2\n")
    assert table(tmp_path / "p*.csv") == {"a": ["1", "3"], "b": ["2", "4"]}
    write(tmp_path / "p3.csv", "a,c\n1,2\n")
    refused(tmp_path / "p*.csv", "differ in their columns", "p3.csv")
    refused(tmp_path / "q*.csv", "no file matches")


def test_paths_in_cells_are_relative_to_the_table(tmp_path):
    reader = open_reader(str(write(tmp_path / "a.csv", "audio\nwav/1.wav\n")))
    (batch,) = reader.batches()
    assert resolve(reader, "wav/1.wav") == resolve(batch, "wav/1.wav") == str(tmp_path / "wav" / "1.wav")
    assert resolve(reader, "/abs/1.wav") == "/abs/1.wav"


def test_only_the_columns_asked_for_in_their_order(tmp_path):
    reader = open_reader(str(write(tmp_path / "a.csv", "a,b,c\n1,2,3\n")))
    assert [b.to_pydict() for b in reader.batches(["c", "a"])] == [{"c": ["3"], "a": ["1"]}]
    with pytest.raises(UserError, match="did you mean 'a'"):
        list(reader.batches(["A"]))


def test_an_index_column_without_a_name_gets_one(tmp_path):
    assert table(write(tmp_path / "a.csv", ",b\n0,x\n")) == {"index": ["0"], "b": ["x"]}


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])), min_size=2, max_size=2),
        min_size=1,
        max_size=8,
    )
)
def test_csv_gives_back_what_the_csv_module_wrote(tmp_path_factory, cells):
    import csv

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["p", "q"], *cells])
    assert table(path) == {"p": [row[0] for row in cells], "q": [row[1] for row in cells]}


# Broken files


def test_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path / "train.csv", "a\n1\n")
    refused(tmp_path / "trian.csv", "does not exist", "did you mean", "train.csv")
    refused(tmp_path / "no" / "train.csv", "folder", "does not exist")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.conllu", "a.csv.gz"])
def test_empty_file(tmp_path, name):
    refused(write(tmp_path / name, b""), "empty" if "parquet" not in name else "Parquet", name)


def test_gz_of_nothing(tmp_path):
    refused(write(tmp_path / "a.csv.gz", gzip.compress(b"")), "empty")


def test_header_only(tmp_path):
    refused(write(tmp_path / "a.csv", "a,b\n"), "no rows", "after the header")


def test_header_names_a_column_twice(tmp_path):
    refused(write(tmp_path / "a.csv", "a,b,a\n1,2,3\n"), "'a'", "more than once")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_wrong_encoding_names_line_and_byte(tmp_path, name):
    good = b'{"a": "x"}\n' if "jsonl" in name else b"a\nx\n"
    bad = b'{"a": "\xe9"}\n' if "jsonl" in name else b"\xe9\n"
    line = 2 if "jsonl" in name else 3
    error = refused(write(tmp_path / name, good + bad), "not UTF-8", f"line {line}", "0xe9", "--encoding latin-1")
    assert f"byte {(good + bad).index(0xE9)}" in str(error)


def test_zero_bytes_and_bare_carriage_returns(tmp_path):
    refused(write(tmp_path / "a.csv", "a,b\n1,2\n".encode("utf-16-le")), "UTF-16 without", "utf-16-le")
    refused(write(tmp_path / "a.csv", b"a,b\r1,2\r"), "cannot be read as CSV", "carriage return")


def test_ragged_csv_names_the_line_even_after_quoted_newlines(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n"x\ny",1\n1,2,3\n4,5\n')
    refused(path, "line 4", "expected: 2 columns", "got:      3 columns")
    reader = open_reader(str(path), on_bad="skip")
    assert [b.to_pydict() for b in reader.batches()] == [{"a": ["x\ny", "4"], "b": ["1", "5"]}]
    assert reader.skipped == 1
    list(reader.batches())
    assert reader.skipped == 1, "each pass counts anew"


def test_all_rows_skipped_is_said(tmp_path):
    refused(write(tmp_path / "a.csv", "a,b\n1\n2\n"), "no rows", "2 rows, all of them skipped", on_bad="skip")


def test_quote_that_never_closes(tmp_path):
    rows = "".join(f"{i},text\n" for i in range(500))
    refused(write(tmp_path / "a.csv", "a,b\n" + rows + '7,"oops\n' + rows), "line 502", "quote")


def test_bad_json_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n[1]\n{"a": 4}\n')
    refused(path, "not a JSON object", "line 2")
    reader = open_reader(str(path), on_bad="skip")
    assert [b.to_pydict() for b in reader.batches()] == [{"a": [1, 4]}]
    assert reader.skipped == 2


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_truncated_gzip(tmp_path, name):
    row = '{"a": "%d"}\n' if "jsonl" in name else "%d\n"
    data = gzip.compress(("" if "jsonl" in name else "a\n").encode() + "".join(row % i for i in range(50_000)).encode())
    refused(write(tmp_path / name, data[: len(data) // 2]), "ends too early", name)


def test_not_gzip_and_not_parquet(tmp_path):
    refused(write(tmp_path / "a.csv.gz", "a\n1\n"), "not valid gzip")
    refused(write(tmp_path / "a.parquet", b"hello, not parquet"), "not Parquet")


def test_truncated_idx(tmp_path):
    path = idx_pair(tmp_path, np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.uint8))
    write(path, gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    refused(path, "ends too early", "12 more bytes", "11 bytes")


def test_folder_without_images_points_one_deeper(tmp_path):
    refused(tmp_path, "no images by class")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    write(tmp_path / "train" / "cat" / "1.png", b"x")
    refused(tmp_path, "no images by class", str(tmp_path / "train"))


def test_unknown_ending_and_format(tmp_path):
    refused(write(tmp_path / "a.XLSX", b"x"), ".xlsx", "format", "save the sheet as CSV")
    refused(write(tmp_path / "a.dat", b"x"), ".dat", "give it such an ending")
    refused(write(tmp_path / "a.txt", "a\n1\n"), "did you mean 'csv'", format="csvv")
    assert table(tmp_path / "a.txt", format="csv") == {"a": ["1"]}


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.csv", "a\n1\n")
    reader = open_reader(str(path))
    reader.check_unchanged()
    stat = path.stat()
    write(path, "a\n2\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="changed while it was in use"):
        reader.check_unchanged()


# Memory

BIG = """
import sys, resource
from tasks.readers import open_reader
from tasks.config import task_from_flags
from tasks.fitted import fit
import pyarrow.parquet, pyarrow.csv
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fitted = fit(task_from_flags("big", sys.argv[1], "y", inputs=["x0:number", "words:text"], kind="classification"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(fitted.train_rows + fitted.valid_rows + fitted.test_rows, (peak - before) / 1024)
"""


def test_a_large_file_streams_in_bounded_memory(tmp_path):
    """160 MB through reader and fit, in a fresh process, with less than 100 MB more than the imports take."""
    block = "".join(
        f"{i * 0.37:.6f},some words of row {i} {'lorem ipsum ' * 8},{'yes' if i % 3 else 'no'}\n" for i in range(10_000)
    )
    copies = 160_000_000 // len(block) + 1
    path = tmp_path / "big.csv"
    with path.open("w") as file:
        file.write("x0,words,y\n")
        for _ in range(copies):
            file.write(block)
    out = subprocess.run(
        [sys.executable, "-c", BIG, str(path)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert out.returncode == 0, out.stderr
    rows, growth = out.stdout.split()
    assert int(rows) == copies * 10_000
    assert float(growth) < 100, f"grew by {growth} MB"


# Real files


@pytest.mark.parametrize(
    ("path", "rows", "some"),
    [
        ("adult/train.csv", 29_561, "income"),
        ("school/train.csv", 10_754, "score"),
        ("goemotions/valid.jsonl", 5_426, "labels"),
        ("snips/valid.jsonl", 700, "tags"),
        ("ud_english_ewt/valid.conllu", 2_001, "upos"),
        ("fashion_mnist/t10k-images-idx3-ubyte.gz", 10_000, "label"),
        ("omniglot20/Keble/train", 260, "label"),
        ("fsdd/valid.csv", 180, "audio"),
    ],
)
def test_real_files(shared_data, path, rows, some):
    reader = open_reader(str(shared_data / path))
    batches = list(reader.batches([some]))
    assert sum(batch.num_rows for batch in batches) == rows
    if some == "audio":
        assert Path(resolve(batches[0], batches[0].column(0)[0].as_py())).is_file()
