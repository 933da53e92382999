"""Wording that errors and log lines of the checks share. Each result is a part of one line."""

import json
from collections.abc import Iterable
from typing import Any

_MAX_LENGTH = 60


def count(number: int, singular: str, plural: str) -> str:
    """``count(1, "box", "boxes")`` is "1 box"."""
    return f"{number} {singular if number == 1 else plural}"


def listed(values: Iterable, limit: int = 5) -> str:
    """The first few ids or names, and how many more there are."""
    values = [str(value) for value in values]
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(values[:limit]) + more


def short(value: Any) -> str:
    """A value as Python writes it, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 3] + "..."


def plot_text(text: str) -> str:
    """A name as matplotlib shows it unchanged: "$" would start a formula, and in a legend a name
    that begins with "_" is left out."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def explain_json_error(error: json.JSONDecodeError) -> str:
    """What is wrong with a text that should be JSON, and where."""
    return f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
