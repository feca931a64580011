"""Every Python block of README.md and docs/ runs, page by page, and prints what the page says."""

from __future__ import annotations

import doctest
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+) *(?P<info>[^\n`]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence) *$",
    re.DOTALL | re.MULTILINE,
)
INCLUDED = re.compile(r'--8<-- "(.+)"')
# Characters of a line that a page shows without scrolling; output is in smaller letters.
WIDTH, OUTPUT_WIDTH = 76, 84
SHOWN_ONLY = {"bash", "bibtex", "measured"}  # languages that are not code to run


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """The page's fenced blocks: language, line of the first line of code, code.

    Text with a title is what one machine printed, so it is not compared.
    """
    text = page.read_text(encoding="utf-8")
    return [
        (
            "measured"
            if re.match(r"text +title=", match["info"])
            else match["info"].partition(" ")[0],
            text.count("\n", 0, match.start("code")),
            textwrap.dedent(match["code"]),
        )
        for match in FENCE.finditer(text)
    ]


def shown(code: str) -> str:
    """The code with the files that it includes."""
    return INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), code)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes, it writes there
    # As a module that can be found by its name, so that a page's classes can be pickled.
    module = ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, "docs_page", module)
    printed: str | None = None
    for language, line, code in blocks(page):
        if language == "python":
            # The blank lines make a traceback point at the page's own line.
            exec(compile("\n" * line + shown(code), str(page), "exec"), module.__dict__)
            printed = capsys.readouterr().out
        elif language == "text":  # what the block before prints
            if printed is None:
                continue
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(code, printed, options)
            assert same, f"{name(page)}:{line} shows\n{code}\nbut the code prints\n{printed}"
        else:  # code that says no language would not run
            printed = None  # text that follows is what a command prints
            assert language in SHOWN_ONLY, f"{name(page)}:{line} is marked {language!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_and_output_fit_the_page(page: Path) -> None:
    for language, line, code in blocks(page):
        width = OUTPUT_WIDTH if language in ("text", "measured") else WIDTH
        for below, text in enumerate(shown(code).splitlines(), 1):
            assert len(text) <= width, f"{name(page)}:{line + below} has {len(text)} characters"


def test_the_runner_finds_what_it_should(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n```python\nx = 1\n```\n\n!!! note\n    ```python hl_lines='1'\n    if x:\n"
        "        y = 2\n    ```\n\n```\nplain\n```\n",
        encoding="utf-8",
    )
    assert blocks(page) == [
        ("python", 3, "x = 1\n"),
        ("python", 8, "if x:\n    y = 2\n"),
        ("", 13, "plain\n"),
    ]
