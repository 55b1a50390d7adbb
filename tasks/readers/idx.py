"""IDX pairs (MNIST and its kin), plain or gz: columns `image` (raw uint8 bytes) and `label` (integer).

The image field's metadata holds its shape: `{"shape": "28,28"}`. A path is the images file, or a folder, which means
its `train-images-*` pair (else its only pair).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from tasks.errors import UserError
from tasks.readers.files import Request, open_bytes, reading

UINT8 = 0x08
MAX_BYTES = 1 << 24


def is_idx(path: str) -> bool:
    """Whether the path is an IDX file by its name, or a folder that holds one."""
    if Path(path).is_dir():
        return bool(_images_in(Path(path)))
    return path.endswith(("-ubyte", "-ubyte.gz", ".idx", ".idx.gz"))


def columns(request: Request) -> tuple[str, ...]:
    pair(request.path)
    return ("image", "label")


def pair(path: str) -> tuple[str, str]:
    """The images file and the labels file that `path` means."""
    if Path(path).is_dir():
        found = _images_in(Path(path))
        path = str(next((file for file in found if file.name.startswith("train")), found[0]))
    labels = str(Path(path).with_name(Path(path).name.replace("images", "labels").replace("idx3", "idx1")))
    if labels == path or not Path(labels).exists():
        raise UserError("the labels of these images are missing", where=path, expected=f"a file {labels}")
    return path, labels


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if "images" in file.name and file.is_file() and is_idx(str(file)))


def batches(request: Request, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    request.skipped = 0
    images, labels = pair(request.path)
    with reading(images), open_bytes(images) as image_file, open_bytes(labels) as label_file:
        count, *shape = _header(image_file, images)
        (label_count,) = _header(label_file, labels)
        if count != label_count:
            raise UserError("images and labels differ in number", where=images, got=f"{count} and {label_count}")
        size = math.prod(shape)
        rows = max(1, min(request.rows_per_batch, MAX_BYTES // max(1, size)))
        field = pa.field("image", pa.binary(), metadata={"shape": ",".join(map(str, shape))})
        fields = {"image": field, "label": pa.field("label", pa.int64())}
        schema = pa.schema([fields[name] for name in wanted])
        for first in range(0, count, rows):
            n = min(rows, count - first)
            pixels, classes = _exactly(image_file, n * size, images), _exactly(label_file, n, labels)
            offsets = pa.py_buffer(np.arange(0, (n + 1) * size, size, dtype=np.int32))
            arrays = {
                "image": pa.Array.from_buffers(pa.binary(), n, [None, offsets, pa.py_buffer(pixels)]),
                "label": pa.array(np.frombuffer(classes, np.uint8).astype(np.int64)),
            }
            yield pa.RecordBatch.from_arrays([arrays[name] for name in wanted], schema=schema)


def _header(file: BinaryIO, path: str) -> list[int]:
    zero, kind, dims = struct.unpack(">HBB", _exactly(file, 4, path))
    if zero != 0 or kind != UINT8 or dims < 1:
        raise UserError("the file is not IDX of unsigned bytes", where=path, expected="a head of 00 00 08 and a rank")
    return list(struct.unpack(f">{dims}I", _exactly(file, 4 * dims, path)))


def _exactly(file: BinaryIO, size: int, path: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UserError("the file ends too early", where=path, expected=f"{size} more bytes", got=f"{len(data)} bytes")
    return data
