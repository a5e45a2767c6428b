"""Fixtures for every test; the tiny models themselves are made in models.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model as a Hugging Face folder under the test's own directory."""

    def save(model: Any, name: str = "src", **how: Any) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, **how)
        return folder

    return save
