"""How large the objects of a data set are: as a table and as a picture."""

from collections.abc import Sequence

import numpy as np
from cbbl_d2.messages import plot_text

__all__ = ["format_sizes", "plot_sizes"]

# Pixels. 16: APvs of this project; 32 and 96: COCO's small, medium and large.
EDGES = (0, 4, 8, 16, 32, 64, 96, 128, 256, 512, np.inf)


def format_sizes(columns: dict[str, np.ndarray]) -> str:
    """
    A table with a line for each range of sizes, from an edge of ``EDGES`` up to, and without, the
    next, that has an object.

    Args:
        columns: title -> sizes of the objects in pixels.
    """
    counts = [np.histogram(sizes, EDGES)[0] for sizes in columns.values()]
    width = max(20, *map(len, columns)) + 2
    lines = ["size [px]".ljust(12) + "".join(title.rjust(width) for title in columns)]
    for i, (low, high) in enumerate(zip(EDGES, EDGES[1:])):
        if not any(numbers[i] for numbers in counts):
            continue
        label = f"{low} to {high}" if high < np.inf else f"{low} and more"
        cells = [f"{numbers[i]} ({numbers[i] / max(sum(numbers), 1):6.1%})" for numbers in counts]
        lines.append(label.ljust(12) + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)


def plot_sizes(
    path,
    title: str,
    columns: dict[str, np.ndarray],
    classes: np.ndarray,
    class_names: Sequence[str],
    anchor_sizes: Sequence[float] = (),
) -> None:
    """
    A histogram for each column, stacked by class, on one logarithmic scale, as PNG.

    Args:
        path: file name, or a binary file to write to.
        columns: title -> sizes of the N objects in pixels; anchors are drawn into the last one.
        classes: shape ``(N,)``, index of the class. Of more than eight classes the rarest are one.
        anchor_sizes: of the config, in pixels of the input.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    frequent = np.argsort(-np.bincount(classes, minlength=len(class_names)), kind="stable")
    groups = [(class_names[i], classes == i) for i in frequent[:8]]
    if len(frequent) > 8:
        groups[7:] = [(f"{len(frequent) - 7} other classes", np.isin(classes, frequent[7:]))]
    everything = np.concatenate([*columns.values(), np.asarray(anchor_sizes, dtype=float)])
    low, high = np.log2(everything.min()) - 0.25, np.log2(everything.max()) + 0.25
    bins = 2 ** np.linspace(low, high, 41)

    figure = Figure(figsize=(6 * len(columns), 4.4), layout="constrained")
    axes = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    colors, labels = colormaps["tab10"](range(len(groups))), [plot_text(x) for x, _ in groups]
    for axis, (name, sizes) in zip(axes, columns.items()):
        values = [sizes[mask] for _, mask in groups]
        axis.hist(values, bins=bins, stacked=True, color=colors, label=labels)
        for limit in (16, 32, 96):
            if bins[0] < limit < bins[-1]:
                axis.axvline(limit, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("square root of the box's area [pixels]")
        axis.set_title(name)
    axes[0].set_ylabel("objects")
    axes[0].tick_params(labelleft=True)
    if len(anchor_sizes):
        style = {"markersize": 9, "clip_on": False, "label": "anchors of the config"}
        axes[-1].plot(anchor_sizes, np.zeros(len(anchor_sizes)), "k^", **style)
    axes[-1].legend(fontsize=9)
    figure.suptitle(plot_text(f"{title}   (dotted: 16, 32, 96 px)"))
    figure.savefig(path, dpi=120, format="png")
