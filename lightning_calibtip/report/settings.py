"""Settings of a run as a flat list, with the defaults told apart."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Args:
        group: What it belongs to: the name of a stage, or ``""`` for the run itself.
        name: Its name within the group; that of a nested one has dots.
        value: Its value as JSON.
        is_default: Whether it is what it would have been without being set.

    Example:
        >>> Setting("AdaQuant", "iterations", "500", True).name
        'iterations'
    """

    group: str
    name: str
    value: str
    is_default: bool = False


def flat_settings(group: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Setting]:
    """Settings of a group, nested ones one by one.

    Args:
        group: Name of the group.
        values: Values by name, plain or nested.
        defaults: Those that have a default.

    Example:
        >>> list(flat_settings("", {"overrides": {"head": 8}, "bits": 4}, {"overrides": {}, "bits": 4}))
        [Setting(group='', name='overrides.head', value='8', is_default=False),
         Setting(group='', name='bits', value='4', is_default=True)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            inner = defaults.get(name)
            inner = inner if isinstance(inner, Mapping) else {}
            for setting in flat_settings(group, value, inner):
                yield Setting(group, f"{name}.{setting.name}", setting.value, setting.is_default)
        else:
            is_default = name in defaults and _text(defaults[name]) == _text(value)
            yield Setting(group, name, _text(value), is_default)


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
