"""Labels of nodes, and selectors of them, as Ray reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bld_core.errors import UserError

Selector = Mapping[str, str]
"""Labels that a node is to have: of each a value, or "!a", "in(a,b)", "!in(a,b)", as Ray reads them."""
NODE_ID = "ray.io/node-id"
"""A label that Ray gives each node."""
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:[a-zA-Z0-9.-]+/)?{_LABEL}")
_VALUE = re.compile(rf"(!?)(?:({_LABEL})|in\(({_LABEL}(?:,{_LABEL})*)\))")


def check_selector(name: str, selector: Selector) -> None:
    """Refuse what Ray would refuse deep within, or take and never find: it keeps blanks in a list as part of a value.

    Args:
        name: of the setting.
        selector: its value.

    Raises:
        UserError: a name that no label has, or a value of none of the four forms.
    """
    for key, value in selector.items():
        if not (_KEY.fullmatch(key) and _VALUE.fullmatch(value)):
            raise UserError(
                f"{name} has {key!r}: {value!r}; a label is named as pool or ray.io/accelerator-type, its value is a, "
                "!a, in(a,b) or !in(a,b), without blanks and quoted in YAML, each of at most 63 letters, digits, '-', "
                "'_' and '.', a letter or digit first and last"
            )


def matches(labels: Mapping[str, str], selector: Selector) -> bool:
    """Whether a selector means a node of these labels. As Ray has it, one without the label matches `!` forms alone."""
    for key, value in selector.items():
        found = _VALUE.fullmatch(value)
        assert found is not None, "checked with the settings"
        wrong, one, several = found.groups()
        if (labels.get(key) in (several or one).split(",")) == bool(wrong):
            return False
    return True


def shown(selector: Selector) -> str:
    """A selector as one writes it."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in selector.items())}}}"
