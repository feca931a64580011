"""What holds for every test, those in docstrings included."""

from __future__ import annotations

import pytest
import torch

# Pytest loads these by itself; they are not to be searched for examples, as modules of one name.
collect_ignore_glob = ["*/conftest.py"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Runs one file, or one test of it, in this process: others would have to start first."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Starts each test and each example in a docstring from the same random state."""
    torch.manual_seed(0)
