import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from cbbl_d2.analysis.study import load_study
from cbbl_d2.analysis.study_table import (
    as_csv,
    as_markdown,
    bootstrap_interval,
    plot,
    summarize,
)
from cbbl_d2.errors import UserError


@pytest.fixture
def write_study(tmp_path, repository):
    def write(**changes):
        config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
        content = {
            "output": str(tmp_path / "study"),
            "seeds": [1, 2],
            "overrides": ["SOLVER.MAX_ITER", 20],
            "baseline": "stock",
            "runs": {"stock": config, "cbbl": {"config": config, "overrides": ["SEED", 7]}},
        }
        content.update(changes)
        content = {k: v for k, v in content.items() if v is not None}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


def finish(run, ap, iteration=19, **more):
    """As train_net.py leaves a finished run."""
    os.makedirs(run.folder, exist_ok=True)
    with open(os.path.join(run.folder, "metrics.json"), "w") as f:
        f.write(json.dumps({"iteration": 9, "bbox/AP": 1.0, "time": 0.5}) + "\n")
        f.write(json.dumps({"iteration": 14, "total_loss": 1.0, "time": 0.1}) + "\n")
        f.write(json.dumps({"iteration": iteration, "bbox/AP": ap, "time": 0.2, **more}) + "\n")
        f.write('{"iteration": 19, "bbox')  # cut off
    open(os.path.join(run.folder, "model_final.pth"), "w").close()


def test_table_of_canned_metrics(write_study):
    study = load_study(write_study(metrics=["bbox/AP", "bbox/APvs"]))
    assert study.names == ["stock", "cbbl"] and len(study.runs) == 4
    assert all(run.results() is None and run.last_iteration() == 0 for run in study.runs)
    assert summarize(study) == []
    for run, ap in zip(study.runs, (50.0, 52.0, 53.0, 56.0)):
        finish(run, ap, **{"bbox/APvs": ap - 10})
    stock, cbbl = summarize(study)
    assert stock["bbox/AP"] == 51 and stock["bbox/AP std"] == pytest.approx(np.sqrt(2))
    assert "bbox/AP diff" not in stock and stock["seeds"] == [1, 2]
    # Differences seed by seed: 3 and 4.
    assert cbbl["bbox/AP"] == 54.5 and cbbl["bbox/AP diff"] == 3.5
    assert (cbbl["bbox/APvs low"], cbbl["bbox/APvs high"]) == (3.0, 4.0)
    assert cbbl["time"] == 0.2
    text = as_markdown(study, [stock, cbbl])
    assert "| cbbl | 54.5 ± 2.1 | 44.5 ± 2.1 | +3.5 [+3.0, +4.0] |" in text
    rows = list(csv.DictReader(io.StringIO(as_csv(study, [stock, cbbl]))))
    assert float(rows[1]["bbox/AP diff"]) == 3.5 and rows[0]["bbox/AP diff"] == ""
    picture = io.BytesIO()
    plot(study, [stock, cbbl], picture)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_only_seeds_that_both_have_are_compared(write_study):
    study = load_study(write_study(metrics=["bbox/AP"]))
    stock_1, stock_2, cbbl_1, cbbl_2 = study.runs
    finish(stock_1, 50.0)
    finish(cbbl_1, 51.0)
    finish(cbbl_2, 90.0)
    _, cbbl = summarize(study)
    assert cbbl["bbox/AP"] == 70.5 and cbbl["bbox/AP diff"] == 1.0
    assert "± " not in as_markdown(study, [summarize(study)[0]])  # one seed has no spread


def test_a_metric_that_is_nowhere_is_named(write_study):
    """A run that has found nothing has it, as NaN."""
    study = load_study(write_study(metrics=["bbox/AP", "bbox/APvz"]))
    assert summarize(study) == []
    finish(study.runs[0], float("nan"), **{"bbox/APvs": float("nan")})
    with pytest.raises(UserError, match="no run has the metric bbox/APvz; there are bbox/APvs"):
        summarize(study)
    study = load_study(write_study(metrics=["bbox/AP", "bbox/APvs"]))
    assert "no detections" in as_markdown(study, summarize(study))


def test_unfinished_runs_have_no_results(write_study):
    run = load_study(write_study()).runs[0]
    finish(run, 50.0, iteration=12)  # an evaluation in between
    assert run.results() is None and run.last_iteration() == 15
    finish(run, 50.0)
    assert run.results()["bbox/AP"] == 50.0
    os.remove(os.path.join(run.folder, "model_final.pth"))
    assert run.results() is None


def test_a_run_that_has_stopped_early_is_finished(write_study):
    study = load_study(write_study(evaluations={"voting": ["MODEL.CBBL.VOTING_SIGMA", 0.05]}))
    run = study.runs[0]
    finish(run, 50.0, iteration=11)
    path = os.path.join(run.folder, "metrics.json")

    def write(line):
        with open(path, "a") as f:
            f.write("\n" + json.dumps(line) + "\n")

    os.remove(path)
    write({"iteration": 11, "bbox/AP": 50.0, "bbox/APvs": 5.0})
    assert run.results() is None and run.iterations == 20
    # With test-time augmentation there is one more evaluation at the end.
    write({"iteration": 12, "stopped_early_after": 12.0, "bbox_TTA/AP": 51.0})
    assert run.iterations == 12
    assert run.results()["bbox/AP"] == 50.0 and run.results()["bbox_TTA/AP"] == 51.0
    # Its further evaluation bears the iteration of the checkpoint.
    (voting,) = run.evaluations
    os.makedirs(os.path.join(voting.folder, "inference"))
    with open(os.path.join(voting.folder, "inference", "metrics.json"), "w") as f:
        f.write(json.dumps({"iteration": 11, "bbox/AP": 52.0}) + "\n")
    assert run.all_results()["voting/bbox/AP"] == 52.0
    study.records.add(run, run.all_results(), run.folder, 1)
    with open(os.path.join(study.records.folder, "runs.csv")) as f:
        (row,) = csv.DictReader(f)
    assert row["iterations"] == "12" and study.results(run)["bbox/AP"] == 50.0
    # Trained on, with more patience.
    write({"iteration": 15, "total_loss": 1.0})
    assert run.results() is None and run.iterations == 20


def test_bootstrap_interval():
    assert bootstrap_interval([2.0]) == (2.0, 2.0)
    low, high = bootstrap_interval([1.0, 2.0, 3.0])
    assert 1 <= low < 2 < high <= 3
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)  # of the normal approximation
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval(values) == (low, high)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"runs": None}, "lacks runs"),
        ({"runs": {}}, "runs must map"),
        ({"seeds": [1, 1]}, "once"),
        ({"seeds": 3}, "seeds = 3"),
        ({"sedes": [1]}, "unknown sedes"),
        ({"baseline": "giou"}, "baseline giou of stock is none of the runs"),
        ({"runs": {"a": "nowhere.yaml"}, "baseline": None}, "nowhere.yaml: no such config file"),
        ({"overrides": ["SOLVER.MAX_ITR", 3]}, "did you mean SOLVER.MAX_ITER"),
        ({"overrides": "SOLVER.MAX_ITER 3"}, "overrides = 'SOLVER.MAX_ITER 3': must be a list"),
        ({"metrics": "bbox/AP"}, "metrics = 'bbox/AP': must be a list"),
        ({"runs": {"a": "lazy.py"}, "baseline": None}, "lazy.py: no such config file"),
    ],
)
def test_malformed_studies(write_study, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_study(write_study(**changes))
    assert "\n" not in str(error.value)


@pytest.fixture
def run_tool(load_script, monkeypatch, capsys):
    """Call the script in this process; returns its exit status and what it said."""
    tool = load_script("tools/run_study.py")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["run_study.py", *args])
        try:
            tool.main()
            status = 0
        except SystemExit as e:
            status = e.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.mark.slow
def test_a_killed_study_continues(write_study, run_tool, repository, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = write_study(
        seeds=[1],
        overrides=["SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 2],
        runs={"a": os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")},
        baseline=None,
    )
    (run,) = load_study(path).runs
    tool = os.path.join(repository, "tools", "run_study.py")
    with open("killed.txt", "wb") as said:
        first = subprocess.Popen(
            [sys.executable, tool, path], stdout=said, stderr=said, start_new_session=True
        )
    deadline = time.time() + 200
    while not os.path.exists(os.path.join(run.folder, "last_checkpoint")):
        assert first.poll() is None and time.time() < deadline, open("killed.txt").read()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)  # with the training itself
    first.wait()
    assert run.results() is None
    records = os.path.join(study_folder(path), "results", "runs.csv")
    assert not os.path.exists(records)
    assert run_tool(path, "--table-only") == (0, f"{study_folder(path)}: no run is finished yet\n")

    status, said = run_tool(path)
    assert status == 0, said
    assert run.results() is not None
    with open(os.path.join(run.folder, "console.txt")) as f:
        starts = re.findall(r"Starting training from iteration (\d+)", f.read())
    assert starts[0] == "0" and int(starts[1]) > 0
    with open(os.path.join(study_folder(path), "table.md")) as f:
        assert "| a |" in f.read()
    with open(records) as f:
        assert [row["run"] for row in csv.DictReader(f)] == ["a"]

    # As before, where the config has got a new key since: it acted as its default does. And on a
    # machine of another kind.
    settings = os.path.join(run.folder, "study_config.yaml")
    with open(settings) as f:
        older = [line for line in f if "VOTING_SIGMA" not in line]
        older = [line.replace("DEVICE: cpu", "DEVICE: cuda") for line in older]
    with open(settings, "w") as f:
        f.writelines(older)

    # A third time there is nothing to do; with other settings the folder is not touched.
    size = os.path.getsize(os.path.join(run.folder, "console.txt"))
    assert run_tool(path)[0] == 0
    assert os.path.getsize(os.path.join(run.folder, "console.txt")) == size
    changed = write_study(
        seeds=[1], overrides=["SOLVER.MAX_ITER", 12], runs={"a": run.config}, baseline=None
    )
    status, said = run_tool(changed)
    assert status == 1
    assert (
        "trained with other settings, which now are SOLVER.CHECKPOINT_PERIOD 5, SOLVER.MAX_ITER 12:"
        in said
    )


def test_a_run_that_fails_is_named(write_study, run_tool, repository):
    """The other runs are trained all the same, and the exit status tells."""
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    path = write_study(
        seeds=[1],
        overrides=[],
        runs={"bad": {"config": config, "overrides": ["MODEL.WEIGHTS", "nowhere.pth"]}},
        baseline=None,
    )
    status, said = run_tool(path)
    assert status == 1
    assert "bad, seed 1: FAILED: error: nowhere.pth: no such weights file" in said
    assert "1 of 1 runs failed" in said


@pytest.mark.slow
def test_further_evaluations_and_a_test_set(write_study, run_tool, repository):
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    options = {
        "seeds": [1],
        "overrides": ["SOLVER.MAX_ITER", 4],
        "runs": {"a": config},
        "baseline": None,
        "metrics": ["bbox/AP", "voting/bbox/AP"],
        "evaluations": {"voting": ["MODEL.CBBL.VOTING_SIGMA", 0.05]},
        "test_set": "small_shapes_mini_test",
    }
    path = write_study(**options)
    status, said = run_tool(path)
    assert status == 0, said
    (run,) = load_study(path).runs
    with open(os.path.join(study_folder(path), "results", "runs.csv")) as f:
        (row,) = csv.DictReader(f)
    for key in ("bbox/AP", "bbox/APvs", "voting/bbox/AP50"):
        assert 0 <= float(row[key]) <= 100, key
    assert sum(key.startswith("bbox/AP-") for key in row) == 5  # classes
    assert len(row["annotations"]) == len(row["settings"]) == 12
    # What was measured on the test set is kept, and can be read nowhere.
    folders = [name for _, names, _ in os.walk(run.folder) for name in names]
    assert any(name.startswith("voting-") for name in folders) and "sealed" not in folders
    assert "test" not in " ".join(os.listdir(study_folder(path)))
    status, said = run_tool(path, "--open-test")
    assert status == 0 and "| a |" in said
    with open(os.path.join(study_folder(path), "results", "opened_test.csv")) as f:
        (opened,) = csv.DictReader(f)
    assert opened["test_set"] == "small_shapes_mini_test"
    assert 0 <= float(opened["voting/bbox/AP"]) <= 100
    # The same name for something else: evaluated again, nothing else is.
    write_study(**{**options, "evaluations": {"voting": ["MODEL.CBBL.VOTING_SIGMA", 5.0]}})
    weights = os.path.getmtime(run.weights)
    status, said = run_tool(path)
    assert status == 0 and os.path.getmtime(run.weights) == weights, said
    with open(os.path.join(study_folder(path), "results", "runs.csv")) as f:
        (again,) = csv.DictReader(f)
    assert again["bbox/AP"] == row["bbox/AP"] and again["evaluations"] != row["evaluations"]
    # What cannot be used is not read out either.
    checkpoint = torch.load(run.weights)
    torch.save({**checkpoint, "iteration": 0}, run.weights)
    os.remove(os.path.join(study_folder(path), "results", "test.csv"))
    status, said = run_tool(path)
    assert status == 1 and f"a, seed 1: FAILED: see {run.folder}/sealed/console.txt" in said
    torch.save(checkpoint, run.weights)
    assert run_tool(path)[0] == 0
    # A second time there is nothing to do, also without the folder of the run.
    shutil.rmtree(run.folder)
    status, said = run_tool(path)
    assert status == 0 and not os.path.exists(run.folder), said


def study_folder(path):
    with open(path) as f:
        return yaml.safe_load(f)["output"]


@pytest.mark.slow
def test_finished_runs_are_evaluated_on_another_data_set(write_study, run_tool, repository):
    """The trainings and their table stay what they are."""
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    path = write_study(
        seeds=[1], overrides=["SOLVER.MAX_ITER", 2], runs={"a": config}, baseline=None
    )
    other = "small_shapes_mini_test"
    status, said = run_tool(path, "--evaluate-on", other)
    assert status == 1 and "a, seed 1 is not: run the study without --evaluate-on first" in said
    assert run_tool(path)[0] == 0
    study = load_study(path)
    table = os.path.join(study.output, "table.md")
    before = open(table).read(), study.runs[0].results()

    status, said = run_tool(path, "--evaluate-on", other)
    assert status == 0, said
    (evaluated,) = study.evaluated_on(other).runs
    folder = os.path.join(study.runs[0].folder, other)
    assert evaluated.folder == folder and evaluated.results()["bbox/AP"] >= 0
    assert os.path.isfile(os.path.join(study.output, other, "plot.png"))
    with open(os.path.join(folder, "inference", "coco_instances_results.json")) as f:
        assert isinstance(json.load(f), list)
    assert (open(table).read(), load_study(path).runs[0].results()) == before
    # A second time there is nothing to do.
    size = os.path.getsize(os.path.join(folder, "console.txt"))
    assert run_tool(path, "--evaluate-on", other)[0] == 0
    assert os.path.getsize(os.path.join(folder, "console.txt")) == size
