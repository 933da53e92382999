"""Options that tools/predict.py and tools/visualize.py share."""

import argparse

from cbbl_d2.engine.cli import number


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
    What is drawn, and how large: ``--num-images``, ``--scale``, ``--no-ground-truth`` and
    ``--uncertainty``.

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
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help="draw a band around each side of a box, one standard deviation to both sides of it",
    )
