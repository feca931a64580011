"""The package as a whole: what it imports, exports and documents."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import torch_adapmtl

ROOT = Path(__file__).parents[1]
# What users import from: the core, the kit, and the callback.
ADDRESSES = {
    "torch_adapmtl": None,
    "torch_adapmtl.models": None,
    "torch_adapmtl.datasets": None,
    "torch_adapmtl.tasks": "torchmetrics",
    "torch_adapmtl.lightning": "lightning",
    "torch_adapmtl.plots": "matplotlib",
}
WITHOUT_EXAMPLE = {
    # Results that users receive and never make.
    *(
        "ComponentRow",
        "Components",
        "Layer",
        "LayerChoice",
        "LayerRow",
        "LayerSize",
        "ModelSize",
        "PrunableTensor",
        "RelativePerformance",
        "RoomScenes",
        "StoredTensor",
    ),
    # Bases; the examples are those of their subclasses.
    *("Controller", "Task"),
}
COMMANDS = [
    'pip install -e ".[examples]" && python examples/quickstart.py',
    'pip install -e ".[test]" && pytest',
]
addresses = pytest.mark.parametrize("address", ADDRESSES)


def names_at(address: str) -> list[str]:
    if (needed := ADDRESSES[address]) is not None:
        pytest.importorskip(needed)
    names: list[str] = importlib.import_module(address).__all__
    return names


def test_importing_any_module_loads_torch_and_nothing_heavier() -> None:
    needing = tuple(address for address, needed in ADDRESSES.items() if needed)
    modules = [
        info.name
        for info in pkgutil.walk_packages(torch_adapmtl.__path__, "torch_adapmtl.", onerror=id)
        if not info.name.startswith(needing)
    ]
    assert len(modules) > 50
    code = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        + "\n".join(f"import {module}" for module in modules)
        + "\nprint(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split()) - sys.stdlib_module_names
    # Parts of torch that it does not load by itself are no weight to speak of.
    assert loaded <= {"torch_adapmtl", "torch"}, sorted(loaded)


@addresses
def test_every_public_name_is_documented_with_an_example(address: str) -> None:
    names = names_at(address)
    assert len(set(names)) == len(names)
    owner = importlib.import_module(address)
    assert (owner.__doc__ or "").strip(), f"{address} has no docstring"
    for name in names:
        found = getattr(owner, name)
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            continue  # type aliases and constants have no docstring of their own
        doc = inspect.getdoc(found) or ""
        assert doc.strip(), f"{address}.{name} has no docstring"
        assert ">>> " in doc or name in WITHOUT_EXAMPLE, f"{address}.{name} has no example"


@addresses
def test_every_public_name_is_on_exactly_one_api_page(address: str) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
    listed = Counter(re.findall(r"^::: ([\w.]+)\.(\w+)$", "\n".join(pages), re.M))
    here = {name: times for (place, name), times in listed.items() if place == address}
    assert here == dict.fromkeys(names_at(address), 1)


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(
        r"^## \[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d{2}-\d{2})$", changelog, re.M
    )
    assert newest, "the changelog's newest section has no version and date"
    assert newest[1] == torch_adapmtl.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {torch_adapmtl.__version__}\n" in citation


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(torch_adapmtl.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_gives_the_commands_that_are_the_whole_set_up(command: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{command}\n" in readme
