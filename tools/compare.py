#!/usr/bin/env python
"""
Put trainings side by side: AP of the last and of the best evaluation, time per iteration, and the
config keys in which they differ, as a Markdown table; AP and losses over the iterations as a plot.

    python tools/compare.py output/small_shapes_smooth_l1 output/small_shapes_cbbl
    python tools/compare.py output/a output/b --labels before after --output output/comparison

It reads metrics.json and config.yaml in the output folders, also of trainings that are running.
For several seeds with mean and spread see tools/run_study.py.
"""

import argparse
import os

from cbbl_d2.analysis.comparison import as_markdown, plot, read_trainings
from cbbl_d2.engine import one_line_errors
from cbbl_d2.files import open_whole


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="OUTPUT_DIR of a training")
    parser.add_argument("--labels", nargs="+", help="a name for each (default: from the paths)")
    parser.add_argument(
        "--output",
        help="folder that gets comparison.md and comparison.png (default: the table is printed)",
    )
    args = parser.parse_args()
    trainings = read_trainings(args.folders, args.labels)
    text = as_markdown(trainings)
    print(text)
    if args.output is None:
        return
    cure = "choose another --output"
    with open_whole(os.path.join(args.output, "comparison.md"), cure=cure) as f:
        f.write(text)
    with open_whole(os.path.join(args.output, "comparison.png"), "wb", cure) as f:
        plot(trainings, f)
    print(f"Written to {args.output}: comparison.md, comparison.png")


if __name__ == "__main__":
    main()
