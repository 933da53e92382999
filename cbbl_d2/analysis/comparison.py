"""
Several trainings side by side, finished or not, from what they leave in their folders: results,
losses, and in which config keys they differ.
"""

import dataclasses
import math
import os
import statistics
from collections.abc import Sequence

import numpy as np
import yaml
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import AP_COLUMNS
from cbbl_d2.messages import short
from cbbl_d2.yaml_checks import check_yaml

from .markdown import markdown_table
from .study import read_metrics, stopped_early_after
from .study_record import flatten

__all__ = ["Training", "as_markdown", "differing_keys", "plot", "read_training", "read_trainings"]

_METRICS = AP_COLUMNS[:5]  # there are no large objects in many a data set of small ones
# Where a training writes is no setting of it.
_NOT_COMPARED = {"OUTPUT_DIR", "VERSION", "train.output_dir"}
_UNSET = "-"
_ABSENT = object()
_MAX_PLOTTED_LOSSES = 7


@dataclasses.dataclass(frozen=True)
class Training:
    """What the folder of one training tells."""

    label: str
    folder: str
    rows: dict[int, dict[str, float]]
    """Iteration, counted from 0 -> what was logged for it, ascending. An evaluation after the last
    iteration bears the number of iterations."""
    settings: dict[str, object]
    """Dotted config key -> value; empty without a ``config.yaml``."""

    @property
    def is_finished(self) -> bool:
        """
        Whether its last checkpoint is there, and is none of an earlier training in the folder. (Of
        a config that Detectron2 scales, the file has the number of iterations before scaling.)
        """
        is_scaled = self.settings.get("SOLVER.REFERENCE_WORLD_SIZE", 0) != 0
        rows = [{**row, "iteration": i} for i, row in self.rows.items()]
        last = stopped_early_after(rows) or self.max_iter or 0
        is_long_enough = is_scaled or self.last_iteration >= last
        return is_long_enough and os.path.isfile(os.path.join(self.folder, "model_final.pth"))

    @property
    def last_iteration(self) -> int:
        """Number of iterations that are logged."""
        return max((i + 1 for i, row in self.rows.items() if "total_loss" in row), default=0)

    @property
    def max_iter(self) -> int | None:
        """Number of iterations that the config asks for."""
        return self.settings.get("SOLVER.MAX_ITER", self.settings.get("train.max_iter"))

    @property
    def time(self) -> float:
        """Median over the logged iterations of the seconds of one; NaN before the first line."""
        _, times = self.curve("time")
        return statistics.median_high(times) if times else math.nan

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of ``key``, where it was logged."""
        points = [(i, row[key]) for i, row in self.rows.items() if key in row]
        return [i for i, _ in points], [value for _, value in points]

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Number of iterations before -> "AP", "AP50" ... of boxes, on the first test set."""
        logged = [key for row in self.rows.values() for key in row if key.endswith("bbox/AP")]
        # With several test sets Detectron2 writes their names before "bbox/AP".
        names = self.settings.get("DATASETS.TEST") or []
        candidates = ["bbox/AP", *(f"{name}/bbox/AP" for name in names), *logged]
        ap = next((key for key in candidates if key in logged), "bbox/AP")
        prefix = ap.removesuffix("AP")
        found = {}
        for iteration, row in self.rows.items():
            if ap in row:
                # The last evaluation bears the number of iterations, others count from 0.
                done = iteration if iteration >= self.last_iteration else iteration + 1
                boxes = [key for key in row if key.startswith(prefix)]
                found[done] = {key.removeprefix(prefix): row[key] for key in boxes}
        return found


def read_trainings(folders: Sequence[str], labels: Sequence[str] | None = None) -> list[Training]:
    """
    Args:
        folders: ``OUTPUT_DIR`` of each training.
        labels: a name for each; by default the parts of its path that tell it from the others.

    Raises:
        UserError: another number of labels, or two alike; see :func:`read_training`.
    """
    if labels is not None and len(labels) != len(folders):
        raise UserError(
            f"--labels: {len(labels)} labels for {len(folders)} folders: give one for each"
        )
    labels = list(labels or _labels(folders))
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(f"{twice[0]}: stands for two trainings: give each a label of its own")
    return [read_training(folder, label) for folder, label in zip(folders, labels)]


def read_training(folder: str, label: str | None = None) -> Training:
    """
    Where a folder was trained in more than once, the last training counts, and of a resumed one
    what was done after its checkpoint counts from the resumed part.

    Raises:
        UserError: no such folder, one without ``metrics.json`` or without a line in it, a
            ``config.yaml`` that is none.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder: give the OUTPUT_DIR of a training")
    if not os.path.isfile(os.path.join(folder, "metrics.json")):
        raise UserError(
            f"{folder}: has no metrics.json: give the OUTPUT_DIR of a training (Detectron2 writes "
            "the file after 20 iterations)"
        )
    rows: dict[int, dict[str, float]] = {}
    for line in read_metrics(folder):
        iteration = line["iteration"]
        if "total_loss" in line:  # and not an evaluation alone, which may be of an old checkpoint
            rows = {i: row for i, row in rows.items() if i < iteration}
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
        rows.setdefault(iteration, {}).update(numbers)
    if not rows:
        raise UserError(f"{folder}/metrics.json: has no line with an iteration: not of a training")
    return Training(
        label=label or os.path.basename(os.path.abspath(folder)),
        folder=folder,
        rows=dict(sorted(rows.items())),
        settings=_read_settings(os.path.join(folder, "config.yaml")),
    )


def differing_keys(trainings: Sequence[Training]) -> dict[str, list[str]]:
    """
    Dotted config key -> the value in each training as text ("-" where it has none), for the keys in
    which those that have a ``config.yaml`` differ.
    """
    known = [t.settings for t in trainings if t.settings]
    differing = {}
    for key in sorted(set().union(*known) - _NOT_COMPARED):
        values = [settings.get(key, _ABSENT) for settings in known]
        if any(value != values[0] for value in values):
            differing[key] = [_text(t.settings.get(key, _ABSENT)) for t in trainings]
    return differing


def as_markdown(trainings: Sequence[Training]) -> str:
    """
    Two tables: the last and the best evaluation (that of the highest AP) of each training with its
    time and its iterations; and the config keys in which they differ.
    """
    table = []
    for training in trainings:
        # Detectron2 may have scaled the number of the config (SOLVER.REFERENCE_WORLD_SIZE).
        is_known = training.max_iter is not None and training.last_iteration <= training.max_iter
        total = f" of {training.max_iter}" if is_known else ""
        state = "" if training.is_finished else ", not finished"
        cost = [_number(training.time, 2), f"{training.last_iteration}{total}{state}"]
        evaluations = training.evaluations()
        if not evaluations:
            table.append([training.label, "not yet", *([_UNSET] * len(_METRICS)), *cost])
            continue
        last = max(evaluations)
        # NaN is what an evaluation without any detection gives.
        best = max(evaluations, key=lambda i: (np.nan_to_num(evaluations[i]["AP"], nan=-1.0), i))
        rows = [("last", last), ("best", best)] if best != last else [("last, best", last)]
        for name, done in rows:
            numbers = [_number(evaluations[done].get(m, math.nan)) for m in _METRICS]
            table.append([training.label, f"{done} ({name})", *numbers, *cost])
    header = ["run", "evaluated after", *_METRICS, "s/iteration", "iterations"]
    text = markdown_table(header, table)
    without = [t.label for t in trainings if not t.settings]
    if without:
        text += f"\nNo config.yaml: {', '.join(without)}.\n"
    differing = differing_keys(trainings)
    if differing:
        rows = [[f"`{key}`", *values] for key, values in differing.items()]
        text += "\n" + markdown_table(["config key", *(t.label for t in trainings)], rows)
    elif len(trainings) - len(without) > 1:
        text += "\nThe configs are alike.\n"
    return text


def plot(trainings: Sequence[Training], path) -> None:
    """
    AP and APvs, the total loss and the losses over the iterations, a line for each training, as
    PNG; losses on validation data (``TEST.LOSS``) as dashed lines.

    Args:
        path: file name, or a binary file to write to.
    """
    from matplotlib.figure import Figure

    logged = set().union(*(row for training in trainings for row in training.rows.values()))
    losses = [key for key in sorted(logged) if key.startswith("loss_")]
    losses = [*logged & {"total_loss"}, *losses][:_MAX_PLOTTED_LOSSES]
    panels = ["AP", "APvs", *losses]
    columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    legend_height = 0.25 * math.ceil(len(trainings) / columns) + 0.1
    size = 4.2 * columns, 3.0 * num_rows + legend_height
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels):
        for number, training in enumerate(trainings):
            if panel in losses:
                (iterations, values), style = training.curve(panel), "-"
            else:
                evaluations, style = training.evaluations(), "o-"
                iterations = list(evaluations)
                values = [row.get(panel, math.nan) for row in evaluations.values()]
            # Also without points, so that the legend names every training.
            label = training.label
            color = f"C{number % 10}"
            axis.plot(iterations, values, style, markersize=4, color=color, label=label)
            if f"val/{panel}" in logged:
                axis.plot(*training.curve(f"val/{panel}"), "--", color=color)
        dashed = " (dashed: on validation data)" if f"val/{panel}" in logged else ""
        axis.set_title(panel + dashed, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlim(0, 1.03 * max(training.last_iteration for training in trainings) or 1)
        top = max((y for x in axis.lines for y in x.get_ydata() if math.isfinite(y)), default=0)
        if panel in losses or top == 0:
            axis.set_ylim(0, 1.05 * top or 1)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("iterations", fontsize=9)
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _labels(folders: Sequence[str]) -> list[str]:
    """What tells the paths apart: without the folders at both ends that all of them share."""
    paths = [os.path.abspath(folder).split(os.sep) for folder in folders]
    for end in (0, -1):
        while min(map(len, paths)) > 1 and len({path[end] for path in paths}) == 1:
            for path in paths:
                path.pop(end)
    return ["/".join(path) for path in paths]


def _read_settings(path: str) -> dict[str, object]:
    if not os.path.isfile(path):
        return {}
    check_yaml(path, plain_keys=False)
    try:
        with open(path, encoding="utf-8") as f:
            content = yaml.load(f, _ConfigLoader)
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the config of a training: must be a mapping")
    return flatten(content)


class _ConfigLoader(yaml.SafeLoader):
    """
    Reads what a Lazy config writes as well: Python objects in it, such as a ``ShapeSpec``, become
    text, and none is made.
    """

    def text(self, suffix: str, node: yaml.Node) -> str:
        return f"{suffix} {node.value if isinstance(node, yaml.ScalarNode) else ''}".strip()


_ConfigLoader.add_multi_constructor("tag:yaml.org,2002:python/", _ConfigLoader.text)


def _text(value) -> str:
    return _UNSET if value is _ABSENT else short(value).replace("|", "\\|")


def _number(value: float, digits: int = 1) -> str:
    return _UNSET if math.isnan(value) else f"{value:.{digits}f}"
