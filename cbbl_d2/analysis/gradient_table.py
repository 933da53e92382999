"""The localization gradients of the runs of a study, by object size, early and late in training."""

import itertools
import math
from typing import Dict, Iterable, List, Tuple

import numpy as np
from cbbl_d2.engine.gradient_stats import SIZES
from cbbl_d2.errors import UserError

from .markdown import markdown_table
from .study import Run, Study, read_metrics

# The first and the last quarter of a training: a single iteration has few regions of each size.
PART = 0.25
_STATISTICS = ("mean", "total_variance", "relative_total_variance")


def summarize_gradients(study: Study, head: str = "box") -> List[Dict]:
    """
    Means over iterations and seeds of what ``SOLVER.GRADIENT_STATS_PERIOD`` has logged.

    Args:
        head: see :class:`GradientStats`.

    Returns:
        list[dict]: for each run and each range of object sizes that has values, ``name``, ``size``,
        ``seeds`` (how many), and for ``early`` and ``late`` (first and last quarter of the
        iterations) ``{part} mean``, ``{part} total_variance`` and
        ``{part} relative_total_variance``; ``ratio``: by how much the late total variance is below
        that of the run's baseline, over the seeds that both have, or NaN.

    Raises:
        UserError: no run has logged gradients of this head.
    """
    by_seed: Dict[Tuple[str, str], Dict[int, Dict[str, float]]] = {}
    for run in study.runs:
        record = study.records.find(run)
        gradients = record.metrics if record else gradients_of(run)
        for size in SIZES:
            prefix = f"gradients/{head}/{size}/"
            mine = {k.removeprefix(prefix): v for k, v in gradients.items() if k.startswith(prefix)}
            if mine:
                by_seed.setdefault((run.name, size), {})[run.seed] = mine
    rows = []
    for name, size in itertools.product(study.names, SIZES):
        mine = by_seed.get((name, size))
        if mine is None:
            continue
        row = {"name": name, "size": size, "seeds": len(mine), **_mean(mine.values())}
        row["ratio"] = math.nan
        other = by_seed.get((study.baselines.get(name), size), {})
        both = mine.keys() & other.keys()
        if both:
            late, late_other = (
                _mean([x[seed] for seed in both])["late total_variance"] for x in (mine, other)
            )
            row["ratio"] = late_other / late if late > 0 else math.nan
        rows.append(row)
    if not rows:
        raise UserError(
            f"{study.output}: no run has logged gradients of the head {head}: train with "
            "SOLVER.GRADIENT_STATS_PERIOD 20 among the overrides of the study"
        )
    return rows


def gradients_of(run: Run) -> Dict[str, float]:
    """
    What is kept on record of a run: ``gradients/{head}/{size}/{part} {statistic}``, for all heads
    and sizes whose gradients it has logged.
    """
    lines = read_metrics(run.folder)
    logged = {key.rpartition("/")[0] for key in set().union(*lines) if key.startswith("gradients/")}
    parts = {
        "early": (0, PART * run.max_iter),
        "late": ((1 - PART) * run.max_iter, run.max_iter),
    }
    found = {}
    for prefix in sorted(logged):
        means = {}
        for (part, (begin, end)), statistic in itertools.product(parts.items(), _STATISTICS):
            key = f"{prefix}/{statistic}"
            values = [x[key] for x in lines if begin <= x["iteration"] < end and key in x]
            if values:
                means[f"{prefix}/{part} {statistic}"] = float(np.mean(values))
        if len(means) == len(parts) * len(_STATISTICS):  # none of the numbers is missing
            found.update(means)
    return found


def _mean(values: Iterable[Dict[str, float]]) -> Dict[str, float]:
    values = list(values)
    return {key: float(np.mean([v[key] for v in values])) for key in values[0]}


def gradients_as_markdown(rows: List[Dict]) -> str:
    """The rows of :func:`summarize_gradients` as a table."""
    header = ["objects", "run", "length, early", "late", "variance, early", "late"]
    header += ["late / early", "baseline / run, late", "relative variance, late", "seeds"]
    table = []
    for row in sorted(rows, key=lambda row: SIZES.index(row["size"])):
        early, late = row["early total_variance"], row["late total_variance"]
        lengths = [f"{row['early mean']:.2g}", f"{row['late mean']:.2g}"]
        settles = f"{late / early:.2f}" if early > 0 else ""
        ratio = "" if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}"
        relative = f"{row['late relative_total_variance']:.2f}"
        cells = [row["size"], row["name"], *lengths, f"{early:.2g}", f"{late:.2g}"]
        table.append([*cells, settles, ratio, relative, str(row["seeds"])])
    return markdown_table(header, table)
