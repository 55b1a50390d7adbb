"""A folder of images by class, `FOLDER/CLASS/*.png`: columns `image` (absolute path) and `label` (the class folder)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from tasks.check import listing
from tasks.errors import UserError
from tasks.readers.files import Request, reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


def columns(request: Request) -> tuple[str, ...]:
    if not any(_classes(request.path)):
        raise _no_images(request.path)
    return ("image", "label")


def batches(request: Request, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Classes in turn, one image of each, so that the first rows hold every class."""
    request.skipped = 0
    images: list[str] = []
    labels: list[str] = []

    def batch() -> pa.RecordBatch:
        arrays = {"image": pa.array(images, pa.string()), "label": pa.array(labels, pa.string())}
        return pa.RecordBatch.from_arrays([arrays[name] for name in wanted], names=list(wanted))

    for path, label in _in_turn(request.path):
        images.append(path)
        labels.append(label)
        if len(images) == request.rows_per_batch:
            yield batch()
            images, labels = [], []
    if images:
        yield batch()


def _classes(folder: str) -> Iterator[tuple[str, list[str]]]:
    """(class, sorted names of its images) for every class that has any."""
    with reading(folder):
        for place in sorted(Path(folder).iterdir()):
            if place.is_dir():
                found = sorted(file.name for file in place.iterdir() if file.name.lower().endswith(SUFFIXES))
                if found:
                    yield place.name, found


def _in_turn(folder: str) -> Iterator[tuple[str, str]]:
    root = str(Path(folder).absolute())
    turn = 0
    left = list(_classes(folder))
    while left:
        for name, found in left:
            yield f"{root}{os.sep}{name}{os.sep}{found[turn]}", name
        turn += 1
        left = [(name, found) for name, found in left if turn < len(found)]


def _no_images(folder: str) -> UserError:
    deeper = [place for place in sorted(Path(folder).iterdir()) if place.is_dir() and any(_classes(str(place)))]
    return UserError(
        "the folder has no images by class",
        where=folder,
        expected=f"FOLDER/CLASS/image with image ending in {listing(SUFFIXES)}",
        got=f"subfolders that have them: {listing(d.name for d in deeper)}" if deeper else "none one folder down",
        fix=f"give {str(deeper[0])!r}" if deeper else None,
    )
