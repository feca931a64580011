"""What the API pages need of Griffe: our `Example:` sections are what it calls `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Lets `Example:` render as code; to Griffe it is a note of that name, in plain Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section in the docstring of one module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$",
                "Examples:",
                obj.docstring.value,
                flags=re.MULTILINE,
            )
