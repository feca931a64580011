"""The package as a whole: what it imports, exports, documents, and says of itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torch_adapmtl

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    info.name for info in pkgutil.iter_modules(torch_adapmtl.__path__) if info.name[0] != "_"
)
# They stand on what the extra `examples` brings, or on the framework that they are for.
WITH_EXTRAS = {"benchmark", "lightning", "tasks"}
# Results that users receive and never make, and the working parts of the budget.
WITHOUT_EXAMPLE = {
    "groups": {"Components", "PrunableTensor"},
    "metrics": {"ModelSize", "RelativePerformance"},
    "report": {"ComponentRow", "DensePart", "LayerRow"},
    "datasets": {"RoomScenes"},
    "budget": {"Bounds", "Scores", "bisect", "from_bits", "pruned", "select", "solve", "to_bits"},
    "adaptive": {"AdaptiveBudget"},
    "sensitivity": {"Sensitivity"},
    "paper": {"PaperBudget"},
    "tasks": {"Task"},
    "lamp": {"LAMP", "lamp_thresholds"},
    "benchmark": {
        *("Problem", "Data", "Samples", "Streamed", "paper_problem"),
        *("evaluate", "run", "settings", "study"),
        *("Row", "Margin", "margin", "summarize", "provenance"),
        *(
            "delta_table",
            "margin_table",
            "paper_table",
            "metric_tables",
            "order_table",
            "overview_table",
        ),
        *("allocation_figure", "tradeoff_figure"),
    },
}
COMMANDS = [
    'pip install -e ".[examples]" && python examples/quickstart.py',
    'pip install -e ".[test]" && pytest',
]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"torch_adapmtl.{name}")


def listed_on_api_pages() -> dict[str, list[str]]:
    """The names that the pages in docs/api list, by module."""
    pages = [p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md")]
    return {
        block[1]: re.findall(r"^ +- (\w+)$", block[2], re.M)
        for block in re.finditer(r"^::: (\S+)\n(.*?)(?=^\S|\Z)", "\n".join(pages), re.M | re.S)
    }


def test_importing_loads_torch_and_nothing_heavier() -> None:
    imports = "\n".join(
        f"import torch_adapmtl.{name}" for name in MODULES if name not in WITH_EXTRAS
    )
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport torch_adapmtl\n"
        f"{imports}\nprint(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split()) - sys.stdlib_module_names
    # Parts of torch that it does not load by itself are no weight to speak of.
    assert loaded <= {"torch_adapmtl", "torch"}, sorted(loaded)


def test_everything_the_package_exports_exists() -> None:
    assert len(set(torch_adapmtl.__all__)) == len(torch_adapmtl.__all__)
    for name in torch_adapmtl.__all__:
        assert hasattr(torch_adapmtl, name), name


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented_with_an_example(name: str) -> None:
    owner = module(name)
    assert (owner.__doc__ or "").strip(), f"torch_adapmtl.{name} has no docstring"
    for public in owner.__all__:
        found = getattr(owner, public)
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            continue  # type aliases and constants have no docstring of their own
        doc = inspect.getdoc(found) or ""
        assert doc.strip(), f"torch_adapmtl.{name}.{public} has no docstring"
        if public not in WITHOUT_EXAMPLE.get(name, ()):
            assert ">>> " in doc, f"torch_adapmtl.{name}.{public} has no example"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_on_its_api_page(name: str) -> None:
    listed = listed_on_api_pages()
    assert f"torch_adapmtl.{name}" in listed, f"docs/api/{name}.md has no ::: torch_adapmtl.{name}"
    assert sorted(listed[f"torch_adapmtl.{name}"]) == sorted(module(name).__all__)


def test_every_name_of_the_package_is_on_an_api_page() -> None:
    pages = listed_on_api_pages()
    listed = {name for names in pages.values() for name in names}
    listed |= {path.removeprefix("torch_adapmtl.") for path in pages}
    assert set(torch_adapmtl.__all__) <= listed


def test_every_module_is_in_the_api_overview() -> None:
    overview = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    for name in MODULES:
        assert f"]({name}.md)" in overview, name


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


def test_the_readme_links_to_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", readme) + re.findall(r'src="([^"]+)"', readme)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_every_dependency_floor_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = [line for line in text.splitlines() if re.match(r'\s+"[^"]+>=', line)]
    assert floors
    assert [line for line in floors if "  # " not in line] == []
