"""
Options that the command lines share, and their values, which argparse checks before anything is
loaded.
"""

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


def enlargement_factor(text: str) -> float | None:
    """A ``type`` for argparse: a number from 0.01 to 100, or "auto", which is None."""
    return None if text == "auto" else number(float, 0.01, 100)(text)


def add_source(parser: argparse.ArgumentParser, files: str) -> None:
    """
    ``--input`` or ``--dataset``, one of which is required.

    Args:
        files: what ``--input`` takes.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help=files)
    source.add_argument("--dataset", metavar="NAME", help="registered data set, with ground truth")


def add_threshold(parser: argparse.ArgumentParser, help: str, default: float | None = None) -> None:
    """``--confidence-threshold``, which is also called ``--score-threshold``."""
    parser.add_argument(
        "--confidence-threshold",
        "--score-threshold",
        dest="confidence_threshold",
        type=number(float, 0, 1),
        default=default,
        metavar="SCORE",
        help=help,
    )


def add_pictures(parser: argparse.ArgumentParser, num_images: str) -> None:
    """
    What is drawn, and how large: ``--num-images``, ``--scale`` and ``--no-ground-truth``.

    Args:
        num_images: what ``--num-images`` does.
    """
    parser.add_argument("--num-images", type=number(int, 1), metavar="N", help=num_images)
    parser.add_argument(
        "--scale",
        type=enlargement_factor,
        metavar="auto|FACTOR",
        help="enlargement of the pictures; auto (the default): the smallest whole factor that "
        "makes the short side 600 pixels or more",
    )
    parser.add_argument("--no-ground-truth", action="store_true", help="draw the predictions alone")


def add_opts(parser: argparse.ArgumentParser) -> None:
    """``--opts``, the last on the line."""
    parser.add_argument(
        "--opts",
        help="Modify config options using the command-line 'KEY VALUE' pairs",
        default=[],
        nargs=argparse.REMAINDER,
    )
