"""Values of command lines, checked by argparse before anything is loaded."""

import argparse
from collections.abc import Callable


def number(kind: type, low: float, high: float = float("inf"), below: bool = False) -> Callable:
    """
    A ``type`` for argparse: a number from ``low`` to ``high``.

    Args:
        kind: int or float.
        below: the number must be less than ``high``.
    """

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high) or (below and value == high) or value == float("inf"):
            name = "a whole number" if kind is int else "a number"
            upper = "" if high == float("inf") else f" {'below' if below else 'to'} {high:g}"
            raise argparse.ArgumentTypeError(
                f"{text}: must be {name} "
                + (f"from {low:g}{upper}" if upper else f"of at least {low:g}")
            )
        return value

    return parse
