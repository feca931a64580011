"""Folders with small data sets."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest


@pytest.fixture
def indexed_nyuv2(tmp_path: Path) -> Path:
    folders.write_indexed_nyuv2(tmp_path)
    return tmp_path


@pytest.fixture
def arrays_nyuv2(tmp_path: Path) -> Path:
    folders.write_arrays_nyuv2(tmp_path)
    return tmp_path


@pytest.fixture
def taskonomy(tmp_path: Path) -> Path:
    folders.write_taskonomy(tmp_path)
    return tmp_path
