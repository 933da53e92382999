#!/usr/bin/env python
"""
Convert a public data set of small objects, in the format in which it is published, or labels of
your own in YOLO's or Pascal VOC's format, to COCO format.

    python tools/convert_dataset.py visdrone
    python tools/convert_dataset.py visdrone --split train --erase-ignored
    python tools/convert_dataset.py tinyperson
    python tools/convert_dataset.py aitod --version 2 --split trainval test
    python tools/convert_dataset.py hituav --half
    python tools/convert_dataset.py yolo --root my
    python tools/convert_dataset.py voc --root VOCdevkit/VOC2007 --split trainval test

A public data set is registered under the names that docs/public_data.md lists; for your own, the
last lines say what to write into a config (docs/own_data.md). What is there stays as it is.
"""

import argparse
import os
import sys

from cbbl_d2.data.datasets.ai_tod import AI_TOD_SPLITS, ai_tod_annotation_files, convert_ai_tod
from cbbl_d2.data.datasets.hit_uav import HIT_UAV_SPLITS, convert_hit_uav
from cbbl_d2.data.datasets.public_data import dataset_folder
from cbbl_d2.data.datasets.tiny_person import TINY_PERSON_FILES, convert_tiny_person
from cbbl_d2.data.datasets.visdrone import VISDRONE_FOLDERS, convert_visdrone
from cbbl_d2.data.label_formats import convert_voc, convert_yolo
from cbbl_d2.engine import one_line_errors
from cbbl_d2.errors import UserError


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = parser.add_subparsers(
        dest="data_set", required=True, metavar="visdrone|tinyperson|aitod|hituav|yolo|voc"
    )
    for name, folder, splits in (
        ("visdrone", "VisDrone", VISDRONE_FOLDERS),
        ("tinyperson", "tiny_set", TINY_PERSON_FILES),
        ("aitod", "AI-TOD", AI_TOD_SPLITS),
        ("hituav", "HIT-UAV", HIT_UAV_SPLITS),
    ):
        p = sets.add_parser(name, help=f"python tools/convert_dataset.py {name} --help")
        p.add_argument(
            "--root",
            default=dataset_folder(folder),
            help="folder of the data set (default: %(default)s, where the registered names look "
            "for it; it follows $DETECTRON2_DATASETS)",
        )
        if name == "hituav":  # its own split needs all published ones
            p.add_argument(
                "--half",
                action="store_true",
                help="also the images at half size, 320x256, and their annotations",
            )
            continue
        p.add_argument(
            "--split",
            nargs="+",
            choices=tuple(splits),
            default=None,
            help="what to convert (default: all whose annotations are there)",
        )
        if name == "visdrone":
            p.add_argument(
                "--erase-ignored",
                action="store_true",
                help="paint over the ignored regions on copies of the images, so that training "
                "does not take unlabeled objects for background (train alone)",
            )
        else:
            p.add_argument("--annotations", help="another annotation file, relative to --root")
            p.add_argument("--images", help="another image folder, relative to --root")
        if name == "aitod":
            p.add_argument(
                "--version", type=int, choices=(1, 2), default=1, help="2: AI-TOD-v2 (default: 1)"
            )
    add_label_formats(sets)
    args = parser.parse_args(argv)
    args.split = getattr(args, "split", None)
    one_split = args.split is not None and len(args.split) == 1
    for option in ("annotations", "images") if args.data_set != "voc" else ():
        if getattr(args, option, None) and not one_split:
            parser.error(f"--{option} needs the one --split that it holds")
    if getattr(args, "data", None) and args.classes:
        parser.error("--data and --classes both name the classes: give one")
    if getattr(args, "erase_ignored", False) and args.split != ["train"]:
        parser.error("--erase-ignored is for --split train alone")
    return args


def add_label_formats(sets) -> None:
    """The parsers of YOLO's and Pascal VOC's labels."""
    for name, classes in (
        ("yolo", "in place of the YAML (default: classes.txt in --root, where there is no YAML)"),
        ("voc", "(default: those that occur, sorted)"),
    ):
        p = sets.add_parser(name, help=f"python tools/convert_dataset.py {name} --help")
        p.add_argument("--root", required=True, help="folder of the data set")
        p.add_argument("--split", nargs="+", help="what to convert (default: all)")
        p.add_argument("--classes", help=f"file with their names, one a line {classes}")
        if name == "yolo":
            p.add_argument("--data", help="the YAML (default: data.yaml in --root)")
            continue
        p.add_argument("--images", help="relative to --root (default: JPEGImages or images)")
        p.add_argument("--annotations", help="relative to --root (default: Annotations)")
        p.add_argument(
            "--coordinates",
            choices=("pixels", "corners"),
            help="pixels: xmin and so on are numbers of pixels, from 1, both ends within the box, "
            "as in VOC's own files; corners: 0 to the width, as LabelImg, CVAT and Roboflow write "
            "(default: pixels in files whose <database> is VOC, unless one has a number under 1)",
        )


def splits_there(args: argparse.Namespace) -> list[str]:
    """The splits whose annotations have been downloaded."""
    if args.data_set == "visdrone":
        files = {s: [os.path.join(f, "annotations")] for s, f in VISDRONE_FOLDERS.items()}
    elif args.data_set == "tinyperson":
        files = {split: files for split, (files, _) in TINY_PERSON_FILES.items()}
    else:
        files = {split: ai_tod_annotation_files(split, args.version) for split in AI_TOD_SPLITS}
    there = [
        split
        for split, candidates in files.items()
        if any(os.path.exists(os.path.join(args.root, path)) for path in candidates)
    ]
    if not there:
        looked = ", ".join(candidates[0] for candidates in files.values())
        raise UserError(
            f"{args.root}: nothing to convert; looked for {looked}: download the data set (see "
            "docs/public_data.md), or give its folder as --root"
        )
    return there


@one_line_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    is_own = args.data_set in ("yolo", "voc")
    if not os.path.isdir(args.root):
        download = "" if is_own else "download the data set (see docs/public_data.md), or "
        raise UserError(f"{args.root}: no such folder: {download}give its folder as --root")
    if args.data_set == "hituav":
        print(*convert_hit_uav(args.root, args.half), sep="\n")
        return 0
    if args.data_set == "yolo":
        print(*convert_yolo(args.root, args.data, args.classes, args.split), sep="\n")
        return 0
    if args.data_set == "voc":
        folders = args.images, args.annotations
        print(
            *convert_voc(args.root, *folders, args.classes, args.split, args.coordinates), sep="\n"
        )
        return 0
    for split in args.split or splits_there(args):
        if args.data_set == "visdrone":
            line = convert_visdrone(args.root, split, args.erase_ignored)
        elif args.data_set == "tinyperson":
            line = convert_tiny_person(args.root, split, args.annotations, args.images)
        else:
            line = convert_ai_tod(args.root, split, args.version, args.annotations, args.images)
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
