"""What the site needs of MkDocs beyond its plugins: formulae without a script, and no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex writes, with `generic: true`.
_INLINE = re.compile(
    r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL
)
_BLOCK = re.compile(
    r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL
)
_REMOTE = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\brel="(?:stylesheet|preconnect|icon)"[^>]*\bhref="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*\brel="(?:stylesheet|preconnect|icon)"'
)


def on_page_content(content: str, **_: Any) -> str:
    """Turns each formula into MathML, which browsers render by themselves."""

    def inline(match: re.Match[str]) -> str:
        return str(convert(html.unescape(match[1])))

    def block(match: re.Match[str]) -> str:
        formula = convert(html.unescape(match[1]), display="block")
        return f'<div class="formula">{formula}</div>'

    return _INLINE.sub(inline, _BLOCK.sub(block, content))


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuses a page that a reader without a network could not see whole."""
    if remote := _REMOTE.search(output):
        raise PluginError(
            f"{page.file.src_uri} loads from the network: {remote[0]}"
        )
    if "arithmatex" in output:
        raise PluginError(
            f"{page.file.src_uri} has a formula that was not rendered"
        )
    return output
