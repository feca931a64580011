"""Seeds, devices and dtypes of the tests, in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

# Shapes are small: more threads than one only cost.
torch.set_num_threads(1)

settings.register_profile(
    "tests",
    deadline=None,  # nothing measures time
    derandomize=True,  # the same examples in every run
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],  # a machine under load is no failure
)
settings.load_profile("tests")


class _TorchRandom:
    """Torch's generator in the form Hypothesis resets before each example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM: Any = _TorchRandom()  # Hypothesis keeps only a weak reference
register_random(_TORCH_RANDOM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", type=Path, help="folder for what the zoo and the matrix found, as JSON lines"
    )
    parser.addoption(
        "--zoo", choices=("sample", "whole"), default="sample", help="how many of its models"
    )


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Writes a line into a file of the folder that `--record` names, if it does."""
    folder: Path | None = request.config.getoption("--record")

    def write(table: str, **line: Any) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{table}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device a model may live on."""
    return torch.device(request.param)


@pytest.fixture(
    params=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=["float64", "float32", "bfloat16", "float16"],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype a weight may have."""
    return request.param
