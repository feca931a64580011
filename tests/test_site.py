"""The site in a real browser: every page, every link, the search, and no error in the console.

It needs MkDocs, Playwright and a Chromium of the system (extra `dev`), and is skipped without them.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytest.importorskip("mkdocs")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore"),  # of MkDocs and its plugins
]
ROOT = Path(__file__).resolve().parents[1]
WIDE, NARROW = 1280, 390  # pixels: a laptop, a telephone

CUT = """found => found
    .filter(code => code.scrollWidth > code.clientWidth)
    .map(code => code.textContent)"""


@dataclass
class Seen:
    """What a browser has found on a page."""

    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    too_wide: list[int] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    remote: list[str] = field(default_factory=list)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    build(config)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def seen(site: Path, browser: Any) -> dict[str, Seen]:
    """Every page by its address, opened from the folder in a wide and a narrow window."""
    found: dict[str, Seen] = {}
    for width in (WIDE, NARROW):
        page = browser.new_page(viewport={"width": width, "height": 900})
        errors: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.on(
            "console",
            lambda message, errors=errors: (
                errors.append(message.text) if message.type == "error" else None
            ),
        )
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        for path in sorted(site.rglob("*.html")):
            if path.name == "404.html":  # its links are of a server
                continue
            errors.clear()
            requests.clear()
            address = path.as_uri()
            page.goto(address, wait_until="load")
            own = found.setdefault(address, Seen())
            own.ids |= set(page.eval_on_selector_all("[id]", "found => found.map(e => e.id)"))
            own.links |= set(
                page.eval_on_selector_all("a[href]", "found => found.map(e => e.href)")
            )
            own.modules += page.eval_on_selector_all(
                ".doc-heading .doc-symbol-module", "found => found.map(e => e.parentElement.id)"
            )
            own.errors += errors
            own.remote += [url for url in requests if not url.startswith(("file:", "data:"))]
            if page.evaluate("document.documentElement.scrollWidth") > width:
                own.too_wide.append(width)
            if width == WIDE:
                own.cut += page.eval_on_selector_all("pre > code", CUT)
        page.close()
    return found


def test_no_page_has_an_error_or_loads_from_the_network(seen: dict[str, Seen]) -> None:
    assert len(seen) > 40
    assert {address: page.errors for address, page in seen.items() if page.errors} == {}
    assert {address: page.remote for address, page in seen.items() if page.remote} == {}


def test_every_link_leads_somewhere(seen: dict[str, Seen]) -> None:
    broken = []
    for address, page in seen.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if urlsplit(target).scheme != "file":
                continue
            if target in seen:
                if fragment and unquote(fragment) not in seen[target].ids:
                    broken.append((address, link))
            elif not Path(unquote(urlsplit(target).path)).is_file():
                broken.append((address, link))
    assert broken == []


def test_names_are_those_of_functions_and_classes(seen: dict[str, Seen]) -> None:
    """A module that has the name of its function would be shown in its place."""
    assert {address: page.modules for address, page in seen.items() if page.modules} == {}


def test_pages_fit_wide_and_narrow_windows(seen: dict[str, Seen]) -> None:
    assert {address: page.too_wide for address, page in seen.items() if page.too_wide} == {}
    assert {address: page.cut for address, page in seen.items() if page.cut} == {}


@pytest.mark.parametrize("over", ["a folder", "HTTP"])
def test_the_search_finds_a_function(site: Path, browser: Any, over: str) -> None:
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = site.as_uri() if over == "a folder" else f"http://127.0.0.1:{server.server_port}"
    page = browser.new_page(viewport={"width": WIDE, "height": 900})
    try:
        page.goto(f"{base}/concepts/method.html")
        box = page.locator("input.md-search__input")
        box.click()
        ready = page.locator(".md-search-result__meta", has_text="Type to start searching")
        ready.wait_for(state="attached", timeout=60_000)
        box.press_sequentially("save_sparse")
        first = page.locator("a.md-search-result__link").first
        first.wait_for(state="attached", timeout=60_000)
        links = page.eval_on_selector_all(
            "a.md-search-result__link", "found => found.map(e => e.href)"
        )
        assert any("api/files.html" in link for link in links)
        assert all(link.startswith(base) for link in links)
    finally:
        page.close()
        server.shutdown()
        server.server_close()
