"""Griffe extension for the API reference: the ``Example:`` of a docstring is code, as ``Examples:`` is for Griffe."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Lets every ``Example:`` be read as an ``Examples:`` section."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
