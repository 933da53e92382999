"""The localization gradients of the runs of a study, by object size, early and late in training."""

import math
from typing import Dict, List, Optional

import numpy as np
from cbbl_d2.engine.gradient_stats import SIZES
from cbbl_d2.errors import UserError

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
    values = {}
    for run in study.runs:
        record = study.records.find(run)
        values[run] = record.metrics if record else gradients_of(run)
    rows = []
    for name in study.names:
        for size in SIZES:
            by_seed = _by_seed(values, name, f"gradients/{head}/{size}")
            if by_seed:
                row = {"name": name, "size": size, "seeds": len(by_seed), **_mean(by_seed)}
                others = _by_seed(values, study.baselines.get(name), f"gradients/{head}/{size}")
                both = by_seed.keys() & others.keys()
                row["ratio"] = math.nan
                if both:
                    mine, other = (
                        _mean({seed: x[seed] for seed in both})["late total_variance"]
                        for x in (by_seed, others)
                    )
                    row["ratio"] = other / mine if mine > 0 else math.nan
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
    prefixes = {key.rpartition("/")[0] for line in lines for key in line if _is_gradient(key)}
    return {
        f"{prefix}/{key}": value
        for prefix in sorted(prefixes)
        for key, value in _of_run(lines, run.max_iter, prefix).items()
    }


def _is_gradient(key: str) -> bool:
    return key.startswith("gradients/")


def _by_seed(
    values: Dict[Run, Dict[str, float]], name: Optional[str], prefix: str
) -> Dict[int, Dict[str, float]]:
    """
    Of the runs of this name that have logged gradients.

    Args:
        values: of :func:`gradients_of`, for each run.
    """
    found = {}
    for run, mine in values.items():
        start = f"{prefix}/"
        mine = {k[len(start) :]: v for k, v in mine.items() if k.startswith(start)}
        if run.name == name and mine:
            found[run.seed] = mine
    return found


def _mean(by_seed: Dict[int, Dict[str, float]]) -> Dict[str, float]:
    values = list(by_seed.values())
    return {key: float(np.mean([v[key] for v in values])) for key in values[0]}


def _of_run(lines: List[Dict], max_iter: int, prefix: str) -> Dict[str, float]:
    """Empty if one of the numbers is missing."""
    parts = {"early": (0, PART * max_iter), "late": ((1 - PART) * max_iter, max_iter)}
    found = {}
    for part, (begin, end) in parts.items():
        for statistic in _STATISTICS:
            key = f"{prefix}/{statistic}"
            values = [x[key] for x in lines if begin <= x["iteration"] < end and key in x]
            if not values:
                return {}
            found[f"{part} {statistic}"] = float(np.mean(values))
    return found


def gradients_as_markdown(rows: List[Dict]) -> str:
    """The rows of :func:`summarize_gradients` as a table."""
    lines = [
        "| objects | run | length, early | late | variance, early | late | late / early "
        "| baseline / run, late | relative variance, late | seeds |",
        "|" + "---|" * 10,
    ]
    for row in sorted(rows, key=lambda row: SIZES.index(row["size"])):
        early, late = row["early total_variance"], row["late total_variance"]
        ratio = "" if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}"
        settles = f"{late / early:.2f}" if early > 0 else ""
        lines.append(
            f"| {row['size']} | {row['name']} | {row['early mean']:.2g} | {row['late mean']:.2g} "
            f"| {early:.2g} | {late:.2g} | {settles} | {ratio} "
            f"| {row['late relative_total_variance']:.2f} | {row['seeds']} |"
        )
    return "\n".join(lines) + "\n"
