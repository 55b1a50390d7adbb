"""Shared fixtures: eight virtual CPU devices, strict jax settings, the optional shared data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from pathways.model import Model

settings.register_profile("pathways", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("pathways")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data beside the project; tests that need it skip without it."""
    folder = Path(os.environ.get("PATHWAYS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`PATHWAYS_CACHE` for the session: nothing is left in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    old = os.environ.get("PATHWAYS_CACHE")
    os.environ["PATHWAYS_CACHE"] = str(folder)
    yield folder
    if old is None:
        del os.environ["PATHWAYS_CACHE"]
    else:
        os.environ["PATHWAYS_CACHE"] = old


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Model:
    """The four tasks of `tiny.py`, trained jointly for a few steps. Shared: write only to a copy of its `path`."""
    from tiny import make_config, make_tasks

    from pathways.training.joint import train

    folder = tmp_path_factory.mktemp("tiny")
    return train(make_config(make_tasks(folder / "data")), folder / "model", quiet=True)
