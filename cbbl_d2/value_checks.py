"""What the value of a config key can be, in a table from keys to checks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from cbbl_d2.errors import ConfigError
from cbbl_d2.messages import short

__all__ = ["Check", "check_values", "each", "integer", "is_number", "number", "one_of"]

# Whether a value is allowed, and which ones are: "KEY = VALUE: must be" stands before that.
Check = tuple[Callable[[Any], bool], str]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(low: float, high: float = math.inf, above: bool = False, note: str = "") -> Check:
    """From ``low`` on, or with ``above`` anything over it."""
    words = f"a number {'>' if above else '>='} {low:g}"
    if high < math.inf:
        words = f"a number from {low:g} to {high:g}"
    return lambda v: is_number(v) and (low < v if above else low <= v <= high), words + note


def integer(low: int, high: int = 2**31 - 1, note: str = "") -> Check:
    words = f"an integer from {low} to {high}{note}"
    return lambda v: type(v) is int and low <= v <= high, words


def each(one: Check, least: int = 0) -> Check:
    """A list of values."""
    ok, words = one
    return (
        lambda v: isinstance(v, (tuple, list)) and len(v) >= least and all(map(ok, v)),
        f"a list of {'one or more' if least else 'any number'}, each {words}",
    )


def one_of(*options: Any) -> Check:
    return lambda v: v in options, f"one of {', '.join(map(repr, options))}"


def check_values(cfg: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """
    Args:
        cfg: a config; keys that it lacks are not looked at.
        checks: by key, such as "SOLVER.BASE_LR".

    Raises:
        ConfigError: a value is none of the allowed ones; names key, value and what is allowed.
    """
    for key, (ok, allowed) in checks.items():
        *nodes, last = key.split(".")
        node = cfg
        for name in nodes:
            node = node.get(name, {})
        if last in node and not ok(node[last]):
            raise ConfigError(f"{key} = {short(node[last])}: must be {allowed}")
