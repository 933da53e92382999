import json
import os
import shutil

import pytest
import yaml
from cbbl_d2.analysis.gradient_table import (
    gradients_as_markdown,
    gradients_of,
    summarize_gradients,
)
from cbbl_d2.analysis.study import load_study
from cbbl_d2.errors import UserError


@pytest.fixture
def study(tmp_path, repository):
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    path = tmp_path / "study.yaml"
    content = {
        "output": str(tmp_path / "study"),
        "seeds": [1, 2],
        "overrides": ["SOLVER.MAX_ITER", 80],
        "baseline": "stock",
        "runs": {"stock": config, "cbbl": config},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(str(path))


def log(run, variance):
    """
    As a training leaves it that is written every 20 iterations.

    Args:
        variance: from the iteration to that of the gradients of objects under 16 px.
    """
    os.makedirs(run.folder)
    with open(os.path.join(run.folder, "metrics.json"), "w") as f:
        for iteration in (0, 19, 39, 59, 79):
            prefix = "gradients/box/0-16px"
            line = {
                "iteration": iteration,
                f"{prefix}/mean": 0.5,
                f"{prefix}/total_variance": variance(iteration),
                f"{prefix}/relative_total_variance": 0.75,
            }
            f.write(json.dumps(line) + "\n")


def test_first_and_last_quarter_are_averaged_over_iterations_and_seeds(study):
    for run in study.runs:
        stock = run.name == "stock"
        log(run, lambda i, k=run.seed * (8 if stock else 2): k * (3 if i == 0 else 1 + (i == 19)))
    stock, cbbl = summarize_gradients(study)
    assert (stock["name"], stock["size"], stock["seeds"]) == ("stock", "0-16px", 2)
    # Iterations 0 and 19 of both seeds: the means of 24, 16 and of 48, 32. Iteration 79: 8, 16.
    assert stock["early total_variance"] == 30 and stock["late total_variance"] == 12
    assert cbbl["early total_variance"] == 7.5 and cbbl["late total_variance"] == 3
    assert stock["ratio"] != stock["ratio"] and cbbl["ratio"] == 4
    text = gradients_as_markdown([stock, cbbl])
    assert "| 0-16px | cbbl | 0.5 | 0.5 | 7.5 | 3 | 0.40 | 4.00 | 0.75 | 2 |" in text
    assert "| 0-16px | stock | 0.5 | 0.5 | 30 | 12 | 0.40 |  | 0.75 | 2 |" in text


def test_runs_are_compared_over_the_seeds_that_both_have(study):
    stock_1, _, cbbl_1, cbbl_2 = study.runs
    log(stock_1, lambda i: 8.0)
    log(cbbl_1, lambda i: 2.0)
    log(cbbl_2, lambda i: 100.0)
    _, cbbl = summarize_gradients(study)
    assert cbbl["late total_variance"] == 51 and cbbl["ratio"] == 4


def test_a_run_without_gradients_has_no_row(study):
    with pytest.raises(UserError, match="SOLVER.GRADIENT_STATS_PERIOD 20"):
        summarize_gradients(study)
    log(study.runs[-1], lambda i: 1.0)
    (row,) = summarize_gradients(study)
    assert row["name"] == "cbbl" and row["seeds"] == 1
    assert row["ratio"] != row["ratio"]  # there is no baseline


def test_the_same_table_from_the_records_alone(study):
    for run in study.runs:
        log(run, lambda i, k=run.seed * (8 if run.name == "stock" else 2): float(k))
    before = gradients_as_markdown(summarize_gradients(study))
    for run in study.runs:
        study.records.add(run, gradients_of(run), run.folder, 1)
        shutil.rmtree(run.folder)
    assert gradients_as_markdown(summarize_gradients(study)) == before
