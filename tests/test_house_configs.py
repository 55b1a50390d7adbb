"""Every configuration that ships can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def test_every_shipped_config_loads() -> None:
    files = sorted(CONFIGS.glob("**/*.toml"))
    if not files:
        pytest.skip("no configuration ships yet")
    from pathways.config import load_config

    for file in files:
        assert load_config(file) is not None, file
