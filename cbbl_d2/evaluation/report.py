"""
What an evaluation leaves beside its numbers: a table of the classes and curves of precision over
recall. Both are read from what COCO's metric has computed already.
"""

import csv
from collections.abc import Mapping

import numpy as np
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import plot_text
from pycocotools.coco import COCO

__all__ = ["average_precision", "count_objects", "write_per_class", "write_pr_curves"]

# Recall levels of COCO's metric.
_RECALL = np.linspace(0.0, 1.0, 101)
_MAX_CLASS_CURVES = 8


def average_precision(precision: np.ndarray) -> float:
    """
    Mean in percent, NaN where there is nothing to take it of.

    Args:
        precision: any part of what ``COCOeval.accumulate`` makes; -1 where a class has no object.
    """
    precision = precision[precision > -1]
    return float(precision.mean() * 100) if precision.size else float("nan")


def count_objects(truth: COCO, image_ids: list[int], max_area: float = np.inf) -> dict[int, int]:
    """
    Category id -> number of objects that the metric asks for: without crowds, of at most
    ``max_area`` square pixels, in these images.
    """
    counts = dict.fromkeys(truth.getCatIds(), 0)
    for annotation in truth.loadAnns(truth.getAnnIds(imgIds=image_ids, iscrowd=False)):
        if annotation["area"] <= max_area:
            counts[annotation["category_id"]] += 1
    return counts


def write_per_class(
    path: str,
    names: list[str],
    counts: Mapping[str, list[int]],
    precisions: Mapping[str, np.ndarray] | None,
) -> None:
    """
    A CSV file: for each class, and for their mean, the AP of each kind in percent and the numbers
    of objects. Empty cells: the class has no object of this kind, or nothing was predicted.

    Args:
        path: file to write or replace.
        names: of the K classes.
        counts: column -> number of objects in each class.
        precisions: column -> ``(T, 101, K)``, IoU thresholds by recall levels by classes, see
            :func:`average_precision`. None: no predictions.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["class", *(precisions or {}), *counts])
        for k, name in enumerate(names):
            aps = [_cell(average_precision(p[:, :, k])) for p in (precisions or {}).values()]
            writer.writerow([name, *aps, *(numbers[k] for numbers in counts.values())])
        # Over the classes together, as the evaluation's own numbers.
        aps = [_cell(average_precision(p)) for p in (precisions or {}).values()]
        writer.writerow(["all classes", *aps, *(sum(numbers) for numbers in counts.values())])


def write_pr_curves(
    path: str,
    title: str,
    names: list[str],
    by_iou: Mapping[str, np.ndarray],
    by_size: Mapping[str, np.ndarray],
) -> None:
    """
    Precision over recall as PNG: by IoU, by size of the objects, and of single classes (those
    with the lowest AP50, where there are many). A legend gives the area under each curve.

    Args:
        path: file to write or replace.
        names: of the K classes.
        by_iou, by_size: legend -> precision ``(101, K)`` at one IoU, -1 where a class has no
            object. The first of ``by_iou`` is that of the single classes.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    first_iou, first = next(iter(by_iou.items()))
    classes = {name: first[:, k : k + 1] for k, name in enumerate(names)}
    classes = {name: p for name, p in classes.items() if (p > -1).any()}
    heading = f"classes, {first_iou}"
    if len(classes) > _MAX_CLASS_CURVES:
        lowest = sorted(classes, key=lambda name: average_precision(classes[name]))
        heading += f": the lowest {_MAX_CLASS_CURVES} of {len(classes)}"
        classes = {name: classes[name] for name in lowest[:_MAX_CLASS_CURVES]}

    figure = Figure(figsize=(13.5, 5.2))
    panels = {"all objects": by_iou, f"by size, {first_iou}": by_size, heading: classes}
    for axis, (panel, curves) in zip(figure.subplots(1, 3), panels.items()):
        for legend, precision in curves.items():
            # A class without objects is in no curve.
            precision = precision[:, (precision > -1).any(axis=0)]
            if precision.size:
                label = plot_text(f"{legend}: {average_precision(precision):.1f}")
                axis.plot(_RECALL, precision.mean(axis=1), label=label)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("recall")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        if axis.lines:
            # Below the panel: inside, it would hide the curves of one detector or another.
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.axes[0].set_ylabel("precision")
    figure.suptitle(plot_text(title), fontsize=11)
    figure.tight_layout()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=100, format="png")


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"
