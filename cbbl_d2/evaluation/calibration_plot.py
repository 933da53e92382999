"""The picture of a calibration."""

import math

import numpy as np
from cbbl_d2.messages import plot_text

from .calibration import (
    ONE_SIGMA,
    SIDES,
    MatchedSides,
    coverage,
    coverage_curve,
    size_classes,
)

_COLORS = ("#777777", "#0072b2", "#d55e00")
_NUM_BINS = 10


def plot_calibration(path, title: str, versions: dict[str, MatchedSides]) -> None:
    """
    Three panels, as PNG: the reliability curve; the error by predicted deviation, in ten bins of
    equally many sides; the coverage of one standard deviation by size of the object.

    Args:
        path: file name, or a binary file to write to.
        versions: what the deviations are called -> the same detections with them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(14, 4.4), dpi=110, layout="constrained")
    figure.suptitle(plot_text(title), fontsize=11)
    curve, by_std, by_size = figure.subplots(1, 3)

    curve.plot([0, 1], [0, 1], "--", color="#bbbbbb", zorder=0)
    for (name, matched), color in zip(versions.items(), _COLORS):
        curve.plot(*coverage_curve(matched), color=color, label=name)
        for i in range(len(SIDES)):
            curve.plot(*coverage_curve(matched.side(i)), color=color, linewidth=0.6, alpha=0.6)
    curve.set(xlabel="share that the interval ought to cover", ylabel="share of the errors in it")
    curve.set_title("Reliability: above the diagonal, too modest (thin: each side)", fontsize=10)
    for axis in (curve.xaxis, curve.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    curve.set_aspect("equal")

    low, high = math.inf, 0.0
    for (name, matched), color in zip(versions.items(), _COLORS):
        predicted, observed = _bins(matched)
        by_std.plot(predicted, observed, "o-", color=color, markersize=4, label=name)
        low = min(low, *predicted, *observed)
        high = max(high, *predicted, *observed)
    by_std.plot([low, high], [low, high], "--", color="#bbbbbb", zorder=0)
    by_std.set(xscale="log", yscale="log", xlabel="predicted deviation, median of the bin [px]")
    by_std.set_ylabel("error, 68.3 % quantile [px]")
    by_std.set_title("Error by deviation", fontsize=10)
    for axis in (by_std.xaxis, by_std.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    by_std.tick_params(which="minor", labelsize=7)

    by_size.axhline(ONE_SIGMA, linestyle="--", color="#bbbbbb", zorder=0)
    labels: list[str] = []
    for (name, matched), color in zip(versions.items(), _COLORS):
        classes = size_classes(matched)
        labels = [f"{label}\n({len(part)})" for label, part in classes]
        shares = [coverage(part, 1.0) for _, part in classes]
        by_size.plot(range(len(classes)), shares, "o-", color=color, label=name)
    by_size.set_xticks(range(len(labels)), labels, fontsize=8)
    by_size.set(ylim=(0, 1), xlabel="size of the object [px] (detections)")
    by_size.set_ylabel("share of the errors within one deviation")
    by_size.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    by_size.set_title("By size: 68.3 % would be right", fontsize=10)
    for axes in (curve, by_std, by_size):
        axes.grid(color="#eeeeee", which="both")
        axes.set_axisbelow(True)
        axes.legend(fontsize=9, loc="lower right")
    figure.savefig(path, format="png")


def _bins(matched: MatchedSides) -> tuple[list[float], list[float]]:
    """Median deviation and the quantile of the errors that it ought to be, for each bin."""
    used = np.isfinite(matched.errors)
    std, errors = matched.std[used], np.abs(matched.errors[used])
    parts = np.array_split(np.argsort(std, kind="stable"), _NUM_BINS)
    return (
        [float(np.median(std[part])) for part in parts],
        [float(np.quantile(errors[part], ONE_SIGMA)) for part in parts],
    )
