"""Pages with blocks that are filled from data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

__all__ = ["fill"]


def fill(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    r"""Replace the blocks of a page; the rest of its text stays.

    A block is between `<!-- NAME -->` and `<!-- end -->`, each on its own line.

    Args:
        page: The text of the page.
        blocks: By the name of a block, a function that returns its text.

    Raises:
        KeyError: If the page has a block that is not in `blocks`.

    Example:
        >>> print(fill("<!-- a -->\nold\n<!-- end -->", {"a": lambda: "new"}))
        <!-- a -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- end -->
    """

    def replace(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            raise KeyError(
                f"the page has a block {match[2]!r}, which nothing makes: is there a file of lines "
                f"for it? There are {list(blocks)}"
            )
        return f"{match[1]}\n\n{blocks[match[2]]()}\n\n<!-- end -->"

    return re.sub(r"(?ms)^(<!-- ([^\n]+) -->)$.*?^<!-- end -->$", replace, page)
