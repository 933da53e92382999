#!/usr/bin/env python
"""
Make a SmallShapes data set of your own size, as an ordinary folder of PNG images and COCO JSON with
boxes, masks and keypoints.

The default data sets small_shapes_{train,val,test} need no call of this script: they are drawn on
first use.
"""

import argparse
import dataclasses
import os

from cbbl_d2.data import SmallShapesSpec, generate_small_shapes
from cbbl_d2.engine import one_line_errors
from cbbl_d2.errors import UserError

HELP = {
    "num_train": "images for training",
    "num_val": "images for validation",
    "num_test": "images for the final test",
    "image_size": "side of the square images, pixels",
    "min_side": "smallest object: square root of its box's area, pixels",
    "max_side": "largest object, pixels",
    "min_objects": "fewest objects on an image",
    "max_objects": "most objects on an image",
    "seed": "another seed gives other images",
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--output", required=True, default=argparse.SUPPRESS, help="folder to create"
    )
    for field in dataclasses.fields(SmallShapesSpec):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.type,
            default=field.default,
            metavar="N",
            help=HELP[field.name],
        )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None) -> None:
    args = vars(parse_args(argv))
    folder = args.pop("output")
    spec = SmallShapesSpec(**args)
    if os.path.exists(folder):
        raise UserError(f"{folder} exists already: delete it or choose another --output")
    generate_small_shapes(folder, spec)
    print(f"images:      {folder}/{{train,val,test}}/*.png")
    print(f"annotations: {folder}/annotations/instances_{{train,val,test}}.json")


if __name__ == "__main__":
    main()
