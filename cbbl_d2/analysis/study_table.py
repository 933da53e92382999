"""Tables and plots of a study: mean, spread, and paired differences to a baseline."""

import csv
import difflib
import io
import itertools
import math
from typing import Dict, List, Sequence, Tuple

import numpy as np
from cbbl_d2.errors import UserError
from cbbl_d2.messages import listed, plot_text

from .markdown import markdown_table
from .study import Study
from .study_record import Record

# Enough for the second digit of a percentile.
_NUM_RESAMPLES = 10000


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95) -> Tuple[float, float]:
    """
    Percentile bootstrap interval of the mean. All resamples where there are few values, random
    ones (always the same) otherwise. With n values the interval never reaches beyond the smallest
    and the largest: for three seeds it is a coarse guide.

    Args:
        values: at least one.
        confidence: in (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n**n <= _NUM_RESAMPLES:
        means = [np.mean(resample) for resample in itertools.product(values, repeat=n)]
    else:
        indices = np.random.default_rng(0).integers(n, size=(_NUM_RESAMPLES, n))
        means = values[indices].mean(axis=1)
    tail = (1 - confidence) / 2
    # Means that occur, not values between them: with few seeds these lie far apart.
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def resampled_interval(
    mine: Dict[int, np.ndarray], baseline: Dict[int, np.ndarray], confidence: float = 0.95
) -> Tuple[float, float]:
    """
    Percentile interval of the mean difference between two methods, over the images that happen to
    be in the data set and over seeds: each draw takes one resample of the images, the same for both
    methods, and as many seeds as there are, with replacement.

    Args:
        mine, baseline: seed -> AP on each resample of the images, as of
            :func:`cbbl_d2.evaluation.bootstrap.bootstrap_ap`; compared seed by seed.
    """
    seeds = sorted(mine.keys() & baseline.keys())
    differences = np.array([mine[seed] - baseline[seed] for seed in seeds])
    if len(seeds) > 1:
        drawn = np.random.default_rng(0).integers(len(seeds), size=(50, len(seeds)))
        differences = differences[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(differences, [tail, 1 - tail])
    return float(low), float(high)


def summarize(study: Study) -> List[Dict]:
    """
    One row for each name of a run that has finished seeds:

    * ``name``, ``baseline`` (or ""), ``seeds`` (list of the finished ones);
    * for each metric M: ``M`` (mean), ``M std`` (sample standard deviation; NaN for one seed);
    * for each metric and where there is a baseline: ``M diff`` (mean of the differences, seed by
      seed, over the seeds that both have finished), ``M low`` and ``M high``: the interval of
      :func:`resampled_interval` where AP on resampled images is on record, otherwise, for two
      seeds or more, of :func:`bootstrap_interval`; ``over``: metric -> what it is over;
    * ``time``: median over the seeds of the median seconds of an iteration.

    Raises:
        UserError: a metric that no run has.
    """
    measured: Dict[str, Dict[int, Record]] = {name: {} for name in study.names}
    for run in study.runs:
        record = study.measured(run)
        if record:
            measured[run.name][run.seed] = record
    known = {k for mine in measured.values() for r in mine.values() for k in r.metrics if "/" in k}
    for metric in study.metrics:
        if known and metric not in known:
            near = difflib.get_close_matches(metric, sorted(known), n=3, cutoff=0.3)
            raise UserError(
                f"{study.output}: no run has the metric {metric}; there are {listed(near or known)}"
            )
    rows = []
    for name, mine in measured.items():
        if not mine:
            continue
        baseline = study.baselines.get(name, "")
        others = measured.get(baseline, {})
        both = [seed for seed in mine if seed in others]
        row = {"name": name, "baseline": baseline, "seeds": sorted(mine), "over": {}}
        for metric in study.metrics:
            values = [r.metrics.get(metric, math.nan) for r in mine.values()]
            row[metric] = float(np.mean(values))
            row[f"{metric} std"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            if not both:
                continue
            differences = [
                mine[s].metrics.get(metric, math.nan) - others[s].metrics.get(metric, math.nan)
                for s in both
            ]
            row[f"{metric} diff"] = float(np.mean(differences))
            if all(metric in r.bootstrap for s in both for r in (mine[s], others[s])):
                low_high = resampled_interval(
                    *({s: records[s].bootstrap[metric] for s in both} for records in (mine, others))
                )
                row["over"][metric] = "images and seeds" if len(both) > 1 else "images"
            elif len(both) > 1:
                low_high = bootstrap_interval(differences)
                row["over"][metric] = "seeds"
            else:
                continue
            row[f"{metric} low"], row[f"{metric} high"] = low_high
        row["time"] = float(np.median([r.metrics.get("time", math.nan) for r in mine.values()]))
        rows.append(row)
    return rows


def as_markdown(study: Study, rows: List[Dict]) -> str:
    """A table with ``mean ± std`` and, below it in the cell, the difference to the baseline."""
    paired = any(row["baseline"] for row in rows)
    header = ["run", *(_short(metric) for metric in study.metrics)]
    if paired:
        header += [f"{_short(metric)} minus baseline [95 %]" for metric in study.metrics]
    header += ["s/iteration", "seeds"]
    table = []
    for row in rows:
        cells = [row["name"]]
        for metric in study.metrics:
            std = row[f"{metric} std"]
            mean = "no detections" if math.isnan(row[metric]) else f"{row[metric]:.1f}"
            cells.append(mean + ("" if math.isnan(std) else f" ± {std:.1f}"))
        if paired:
            cells += [_difference(row, metric) for metric in study.metrics]
        time = "" if math.isnan(row["time"]) else f"{row['time']:.2f}"
        table.append([*cells, time, ", ".join(map(str, row["seeds"]))])
    text = markdown_table(header, table)
    for over in ("images and seeds", "images", "seeds"):
        names = []
        for row in rows:
            metrics = [_short(m) for m, what in row["over"].items() if what == over]
            partly = f" ({', '.join(metrics)})" if len(metrics) < len(row["over"]) else ""
            names += [f"{row['name']}{partly}"] if metrics else []
        if names:
            text += f"\nIntervals of {', '.join(names)}: bootstrap over {over}.\n"
    return text


def as_csv(study: Study, rows: List[Dict]) -> str:
    """The same numbers with all digits."""
    columns = ["name", "baseline", "seeds"]
    for metric in study.metrics:
        columns += [metric, *(f"{metric} {part}" for part in ("std", "diff", "low", "high"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "over", "time"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        over = ", ".join(dict.fromkeys(row["over"].values()))
        writer.writerow({**row, "seeds": " ".join(map(str, row["seeds"])), "over": over})
    return text.getvalue()


def plot(study: Study, rows: List[Dict], path) -> None:
    """
    For each metric, each run's seeds as dots and their mean as a bar mark, as PNG.

    Args:
        path: file name, or a binary file to write to.
    """
    results = {(run.name, run.seed): study.results(run) for run in study.runs}
    figure, axes = _panels(study, 1.5, 0.4 * len(rows) + 1.3, sharey=True)
    for axis, metric in zip(axes, study.metrics):
        for y, row in enumerate(rows):
            values = [results[row["name"], seed].get(metric, math.nan) for seed in row["seeds"]]
            axis.plot(values, [y] * len(values), "o", alpha=0.45, color="tab:blue", markersize=5)
            axis.plot([row[metric]], [y], "|", markersize=16, markeredgewidth=2.5, color="black")
        axis.grid(axis="x", alpha=0.3)
        axis.set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png")


def budgets(study: Study) -> Dict[str, Dict[int, List[Dict[str, float]]]]:
    """
    The runs that differ in the length of their training alone: those whose names end in it, such as
    ``cbbl_600`` and ``cbbl_1200``.

    Returns:
        name without the length -> number of iterations -> results of the finished seeds; only for
        names with two lengths or more.
    """
    found: Dict[str, Dict[int, List[Dict[str, float]]]] = {}
    for run in study.runs:
        results = study.results(run)
        if run.name.endswith(f"_{run.max_iter}") and results is not None:
            name = run.name.removesuffix(f"_{run.max_iter}")
            found.setdefault(name, {}).setdefault(run.max_iter, []).append(results)
    return {name: by_length for name, by_length in found.items() if len(by_length) > 1}


def plot_budgets(study: Study, path) -> None:
    """
    For each metric, how it grows with the length of the training: each seed a dot, a line through
    the means. As PNG.

    Args:
        path: file name, or a binary file to write to.
    """
    curves = budgets(study)
    ticks = sorted(set().union(*curves.values()))
    figure, axes = _panels(study, 0.5, 3.2)
    for axis, metric in zip(axes, study.metrics):
        for name, by_length in curves.items():
            lengths = sorted(by_length)
            values = [[r.get(metric, math.nan) for r in by_length[n]] for n in lengths]
            (line,) = axis.plot(lengths, [np.mean(v) for v in values], label=plot_text(name))
            for length, of_seeds in zip(lengths, values):
                axis.plot([length] * len(of_seeds), of_seeds, "o", color=line.get_color())
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_xlabel("iterations")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png")


def _panels(study: Study, margin: float, height: float, **options):
    """A figure with a panel for each metric, and these panels; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(study.metrics) + margin, height))
    axes = figure.subplots(1, len(study.metrics), squeeze=False, **options)[0]
    for axis, metric in zip(axes, study.metrics):
        axis.set_title(_short(metric), fontsize=10)
    return figure, axes


def _difference(row: Dict, metric: str) -> str:
    if math.isnan(row.get(f"{metric} diff", math.nan)):
        return ""
    text = f"{row[f'{metric} diff']:+.1f}"
    if f"{metric} low" in row:
        text += f" [{row[f'{metric} low']:+.1f}, {row[f'{metric} high']:+.1f}]"
    return text


def _short(metric: str) -> str:
    return metric.removeprefix("bbox/")
